"""Small tokenizers, trained on the built-in text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quantcli.calibration.builtin_text import builtin_documents

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def train_bpe(pre_tokenizer: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of 500 tokens that puts <s> first and </s> last."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    core.train_from_iterator(builtin_documents()[:20], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)], pair=None
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture
def wikitext() -> Path:
    """The directory of wikitext-2, where this checkout has it beside it."""
    directory = SHARED / "wikitext-2"
    if not directory.is_dir():
        pytest.skip("no wikitext-2 beside the checkout")
    return directory
