"""Conversations as calibration text: rows of messages, rendered by the tokenizer's chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tiny_models import BOS, EOS, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from quantcli.calibration.datasets import load_documents, load_texts
from quantcli.errors import DataError
from quantcli.pipeline.batches import calibration_tokens, texts_of
from quantcli.recipe.data import CalibrationSection

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
ASKED = [{"role": "user", "content": "Where is the bridge?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Below the mill."}]
TEXTS = [
    "<s>user: Where is the bridge?</s><s>assistant: Below the mill.</s>",
    "<s>user: Where is the bridge?</s><s>assistant:",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def write(file: Path, *rows: Any) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_messages_become_the_text_that_the_template_makes(tokenizer: Any, tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": "Where is the bridge?"}, {"from": "gpt", "value": "Below the mill."}]
    file = write(tmp_path / "chat.jsonl", {"messages": ANSWERED}, {"messages": ASKED}, {"conversations": sharegpt})
    assert load_texts("jsonl", path=file, tokenizer=tokenizer) == [*TEXTS, TEXTS[0]]
    assert all(document.prompt for document in load_documents("jsonl", path=file))
    parquet.write_table(pyarrow.table({"messages": [ANSWERED, ASKED]}), tmp_path / "chat.parquet")
    assert load_texts("parquet", path=tmp_path / "chat.parquet", tokenizer=tokenizer) == TEXTS
    # text that stands beside messages comes first, as it did before; field says otherwise
    both = write(tmp_path / "both.jsonl", {"prompt": "p", "messages": ANSWERED})
    assert load_texts("jsonl", path=both, tokenizer=tokenizer) == ["p"]
    assert load_texts("jsonl", path=both, field="messages", tokenizer=tokenizer) == TEXTS[:1]


def test_a_conversation_is_a_sample_and_gets_no_special_token_twice(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", *[{"messages": ANSWERED}] * 9)
    keys: dict[str, Any] = {"dataset": "jsonl", "path": str(file), "samples": 8, "sequence_length": 200}
    section = CalibrationSection.model_validate(keys)
    found = calibration_tokens(section, tokenizer)
    whole = tokenizer(TEXTS[0], add_special_tokens=False).input_ids
    assert found.samples == [whole] * 8
    assert (whole.count(BOS), whole.count(EOS)) == (2, 2)
    assert texts_of(section, tokenizer) == TEXTS[:1] * 9
    packed = calibration_tokens(CalibrationSection.model_validate({**keys, "packing": "packed"}), tokenizer)
    joined = tokenizer("\n\n".join(TEXTS[:1] * 9), add_special_tokens=False).input_ids
    assert packed.samples[0] == joined[:200]
    # plain text still gets what the tokenizer adds
    plain = write(tmp_path / "plain.jsonl", *[{"prompt": "The bridge"}] * 8)
    first, *_ = calibration_tokens(CalibrationSection.model_validate({**keys, "path": str(plain)}), tokenizer).samples
    assert first == tokenizer("The bridge").input_ids
    assert first[0] == BOS


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": []}], "chat.jsonl:1: the conversation is empty"),
        ([{"messages": ASKED}, {"messages": ["hello"]}], "chat.jsonl:2: message 1 has no role and content"),
        ([{"messages": [{"role": "user"}]}], "message 1 has no role"),
        ([{"conversations": [{"from": "bing", "value": "a"}]}], "message 1 has no role"),
        ([{"messages": [*ASKED, {"role": "system", "content": "x"}]}], "does not take this conversation.*comes first"),
        ([{"messages": [{"role": "user", "content": "\ud83d"}]}], "half a character"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(
    tokenizer: Any, tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_texts("jsonl", path=write(tmp_path / "chat.jsonl", *rows), tokenizer=tokenizer)
    assert caught.value.remedy


def test_a_tokenizer_without_a_template_and_rows_of_both_kinds_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "chat.jsonl", {"messages": ASKED}, {"text": "plain"})
    with pytest.raises(DataError, match=r"chat\.jsonl:1: the row is a conversation.*no chat template"):
        load_texts("jsonl", path=file, tokenizer=tiny_tokenizer())
    section = CalibrationSection.model_validate({"dataset": "jsonl", "path": str(file)})
    with pytest.raises(DataError, match=r"chat\.jsonl:1 is a conversation, and .*chat\.jsonl:2 is text"):
        calibration_tokens(section, tokenizer)
