"""reference: the float model over the evaluation text, once for all that is compared with it.

What is kept is the hidden states behind the last block. They are exact, so the logits that the head makes of them are
those of the float model to the bit; `width` values a token, where logits are as many as the vocabulary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.model.checkpoint import file_digest, read_json, replacing
from quantcli.pipeline.batches import data_identity, evaluation_batches
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.rundir import StageFolder, is_run, write_json
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream

RESULT = "reference.json"
STATES = "states"


def _wanted(recipe: Recipe) -> bool:
    return recipe.evaluate is not None and recipe.evaluate.perplexity is not None


def _identity(context: Context) -> dict[str, Any]:
    evaluate = context.recipe.evaluate
    assert evaluate is not None
    assert evaluate.perplexity is not None
    quantized_alone = ("phase", "arithmetic")
    text = {key: value for key, value in data_identity(evaluate.perplexity).items() if key not in quantized_alone}
    return {
        "perplexity": text,
        "dtype": context.recipe.model.dtype,
        "device": context.device,
        "limit": evaluate.reference_size,
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes reference.json and, unless they take more than `evaluate.reference_size`, the hidden states.

    They are taken over from the run that `evaluate.reference` names, or from one beside this run, if it has those of
    the same model, text and versions.
    """
    import torch

    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.served import advance

    evaluate = context.recipe.evaluate
    assert evaluate is not None
    done = RESULT in folder.files and not read_json(folder.path / RESULT)["kept"]  # kept states may have gone since
    if done or taken_over(context, folder, STATES):
        return
    text = context.evaluation_text
    stream = BlockStream(context.skeleton(original=True), evaluation_batches(text.windows))
    size = sum(prod(shape) for shape in stream.hidden_shapes()) * stream.skeleton.dtype.itemsize
    kept = size <= evaluate.reference_size
    if kept:
        context.emit("tokens", samples=len(text.windows), tokens=text.tokens, protocol=text.protocol)
        cache = context.hidden_cache(folder.path / STATES, stream)
        advance("float", stream, cache, None, "prefill", context.emit)
        for file in sorted((folder.path / STATES).glob("hidden*")):
            folder.add(file)
    else:
        HiddenCache(folder.path / STATES, [], torch.float32).clear()
        context.emit("note", text=f"The float model's hidden states take {size / 2**30:.2g} GiB, more than "
                     "evaluate.reference_size: each evaluation runs the float model anew.")  # fmt: skip
    write_json(folder.path / RESULT, {"kept": kept, "bytes": size, "tokens": text.tokens})
    folder.add(folder.path / RESULT)


def float_states(context: Context, stream: BlockStream) -> HiddenCache | None:
    """The hidden states that stage `reference` kept, or None if they were too large to be."""
    folder = context.folder("reference")
    if not read_json(folder / RESULT)["kept"]:
        return None
    cache = context.hidden_cache(folder / STATES, stream)
    assert cache.resume() == context.blocks
    return cache


def taken_over(context: Context, folder: StageFolder, needed: str) -> bool:
    """Whether another run has what this stage would write, in files of names that begin with `needed`: the run that
    `evaluate.reference` names, or one beside this one. Files are linked, or copied where that is impossible."""
    evaluate = context.recipe.evaluate
    assert evaluate is not None
    for path in _candidates(context.run.path, evaluate.reference):
        other = StageFolder(path / folder.path.name)
        if not other.complete(folder.fingerprint) or not any(name.startswith(needed) for name in other.files):
            continue
        if any(file_digest(other.path / name) != digest for name, digest in other.files.items()):
            continue
        for name, digest in sorted(other.files.items()):
            target = folder.path / name
            target.parent.mkdir(exist_ok=True)
            with replacing(target) as temporary:
                _link(other.path / name, temporary)
            folder.add(target, digest)
        context.emit("note", text=f"The float model has been measured in {path}; its results are taken over.")
        return True
    if evaluate.reference is not None:
        context.emit("warning", text=f"evaluate.reference: {evaluate.reference} has no results of this model on the "
                     "same text by the same versions; they are computed.")  # fmt: skip
    return False


def _candidates(run: Path, named: str | None) -> Iterator[Path]:
    """The run that is named, else those beside this one."""
    beside = [Path(named)] if named is not None else sorted(run.absolute().parent.iterdir())
    return (path for path in beside if path.is_dir() and path.resolve() != run.resolve() and is_run(path))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


STAGE = Stage(
    "reference",
    (),
    _wanted,
    _identity,
    run,
    lambda _: (RESULT, f"{STATES}/*"),
    guards=("check",),
    title="Running the float model over the evaluation text",
    asked_by="evaluate.perplexity",
)
