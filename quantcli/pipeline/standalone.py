"""A checkpoint that stands alone, whoever made it: opened by what lies in it, and scored as an engine computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError, RecipeError
from quantcli.model.float_weights import (
    below_linears,
    first_codes,
    linear_weights,
    of_no_parameter,
    require_floats,
    stored_parameters,
)
from quantcli.model.structure import Structure, biased, rms_norms
from quantcli.model.structure_cache import find_structure
from quantcli.pipeline.batches import evaluation_batches
from quantcli.pipeline.held import refuse_arithmetic
from quantcli.pipeline.samples import protocol_facts, windows_of
from quantcli.pipeline.source import (
    float_structure,
    load_tokenizer,
    locate_model,
    require_known_tokens,
    require_positions,
)
from quantcli.recipe.data import PerplexitySection
from quantcli.recipe.evaluation import GatesSection
from quantcli.recipe.schema import ModelSection, Recipe

if TYPE_CHECKING:
    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.pipeline.context import Listener


def open_checkpoint(
    directory: Path, *, trust_remote_code: bool = False
) -> tuple[Structure, QuantizedCheckpoint, dict[str, str]]:
    """The structure of the model, its checkpoint, and the name of each linear's weight in it; a tied head has none.
    Biases that the architecture lacks, after a shift of channels, are in the structure, too.

    Raises ModelError for a format that is not known, for biases that the model has no place for, for a tensor below a
    linear that its scheme does not have, and for codes that nothing describes.
    """
    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.formats.table import open_weights

    structure = find_structure(directory, trust_remote_code=trust_remote_code)
    linears = {linear.name: linear for linear in structure.matrices()}
    weights = linear_weights(linears, open_weights(directory).entries)
    checkpoint = QuantizedCheckpoint(directory, linears, weights)
    if hasattr(checkpoint.form, "takes_added_bias"):
        structure = _with_added_biases(structure, checkpoint)
    if checkpoint.form is None:
        require_floats(directory, structure, checkpoint.raw, trust_remote_code=trust_remote_code)
    else:
        _refuse_left_over(structure, checkpoint, weights, trust_remote_code)
    return structure, checkpoint, weights


def _with_added_biases(structure: Structure, checkpoint: QuantizedCheckpoint) -> Structure:
    """The structure with the biases of the checkpoint that the architecture lacks, as after a shift of channels; those
    that are zeros, as msModelSlim writes for norms after m1 to m5, are left out of the checkpoint.

    Raises ModelError for one that engines do not add, and for a norm's that a linear behind it does not take back: the
    model would compute something else.
    """
    assert checkpoint.form is not None
    known = {name: whole for whole in structure.parameters for name in (whole, whole.partition(".")[2])}
    present, found = set(structure.parameters), {}
    for name in list(checkpoint.entries):
        module = name.removesuffix(".bias")
        if module == name or name in known or f"{module}.weight" not in known:
            continue
        bias = known[f"{module}.weight"].removesuffix("weight") + "bias"
        present.add(bias)
        if bool(checkpoint.read([name])[name].float().any()):
            found[bias] = name
        else:
            del checkpoint.entries[name]
    norms = {norm.name for norm in rms_norms(structure)}
    for bias, name in found.items():
        owner = bias.removesuffix(".bias")
        scheme = checkpoint.schemes.get(owner)
        if owner not in norms and (scheme is None or not checkpoint.form.takes_added_bias(scheme)):
            kind = "" if owner not in checkpoint.linears else f" of {scheme.name if scheme else 'a linear in float'}"
            raise ModelError(f"{checkpoint.directory}: {name} is not zero, and the model has no such bias. Engines add "
                             f"none{kind} that the architecture lacks.",
                             "Quantize again without a shift of channels.")  # fmt: skip
    for shared in (shared for block in structure.blocks for shared in block.groups):
        moved = found.get(f"{shared.producer.name}.bias") if shared.producer and shared.producer.name in norms else None
        lost = [linear for linear in shared.linears if moved is not None and f"{linear}.bias" not in present]
        if lost:
            raise ModelError(f"{checkpoint.directory}: {moved} is not zero, and {lost[0]} has no bias that takes the "
                             "shift back.", "Quantize it again.")  # fmt: skip
    checkpoint.added_biases = tuple(found)
    return biased(structure, found)


def _refuse_left_over(
    structure: Structure, checkpoint: QuantizedCheckpoint, weights: Mapping[str, str], trust_remote_code: bool
) -> None:
    """Raise ModelError for a tensor below a linear that neither its scheme nor the model has, as a further scale, a
    shift or a part of its own there changes what the linear computes; and for codes of a linear without a scheme, or of
    an embedding or a norm."""
    left = below_linears(structure, weights, checkpoint.entries)
    unknown = [name for name, module in left.items() if module not in weights]
    if left and not unknown:
        directory = checkpoint.directory
        unknown = of_no_parameter(left, directory, structure, checkpoint, trust_remote_code=trust_remote_code)
    if unknown:
        name, module = unknown[0], left[unknown[0]]
        kind = checkpoint.schemes[module].name if module in checkpoint.schemes else "a linear in float"
        raise ModelError(f"{checkpoint.directory}: {name} is no tensor of {kind}, as which {module} is read.",
                         "What it stands for is not read; quantize again without.")  # fmt: skip
    in_float = [name for module, name in weights.items() if module not in checkpoint.schemes]
    in_float += stored_parameters(structure, checkpoint.entries)
    if (entry := first_codes(in_float, checkpoint.entries)) is not None:
        raise ModelError(f"{checkpoint.directory}: {entry.name} holds codes ({entry.dtype}), and what is said of the "
                         "quantization leaves it in float.",
                         "Take the configuration that belongs to these weights, or quantize again.")  # fmt: skip


def score_recipe(recipe: Recipe, original: str | None = None, listener: Listener | None = None) -> dict[str, Any]:
    """`score_checkpoint` of the checkpoint at the recipe's model.path, on the text of its evaluate.perplexity. Both it
    and `original` may be directories, .gguf files or names on the hub. Beside `original` the gates of predictions are
    judged (`gates`, and `missed_gate`, what is to be said if one is missed); a warning names those that are not."""
    from quantcli.pipeline.engine import choose_device
    from quantcli.pipeline.gates import of_scores, set_gates

    section = (recipe.evaluate.perplexity if recipe.evaluate else None) or PerplexitySection()
    model = recipe.model.model_copy(update={"path": str(locate_model(recipe.model, listener=listener))})
    if original is not None and Path(original).exists():
        original = str(Path(original).absolute())
    beside = locate_model(ModelSection(path=original), listener=listener) if original is not None else None
    gates = (recipe.evaluate.gates if recipe.evaluate else None) or GatesSection()
    compared = ("perplexity_increase", "kl_divergence", "agreement") if original is not None else ()
    if (left := [name for name in set_gates(gates) if name not in compared]) and listener is not None:
        how = "a run judges them" if compared else "a run judges them, and --model those of predictions"
        text = f"Of evaluate.gates these are not judged of a checkpoint alone: {', '.join(left)}; {how}."
        listener({"event": "warning", "stage": "eval-ppl", "text": text})
    found = score_checkpoint(model, section, choose_device(recipe.model.device), beside, listener)
    judged = list(of_scores(gates, found)) if compared else []
    missed = " ".join(gate.sentence() for gate in judged if not gate.passed)
    return found | {"gates": [gate.to_json() for gate in judged], "missed_gate": missed or None}


def score_checkpoint(
    model: ModelSection,
    section: PerplexitySection,
    device: str,
    original: Path | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Perplexity of the checkpoint in the directory `model.path`, float or quantized in any format that is known.

    Linears compute as an engine does that serves it, in the dtype of its config.json. With `original`, the directory of
    the float model, also its perplexity, and what quantization changed. Nothing is written but hidden states, in a
    temporary directory. Raises RecipeError for `model.dtype` and an arithmetic without effect, ModelError for what
    cannot be read.
    """
    from quantcli.evaluation.scores import summarize, text_scores, with_distributions
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.skeleton import Skeleton
    from quantcli.model.stream import BlockStream
    from quantcli.pipeline.served import advance, head_as_served
    from quantcli.pipeline.stages import eval_ppl

    if model.dtype != "auto":
        raise RecipeError("model.dtype: a checkpoint is scored in its own data type.", "Leave it at auto.")

    def emit(kind: str, **facts: Any) -> None:
        if listener is not None:
            listener({"event": kind, "stage": eval_ppl.STAGE.name, **facts})

    directory, trust = Path(model.path), model.trust_remote_code
    emit("started")
    structure, checkpoint, _ = open_checkpoint(directory, trust_remote_code=trust)
    refuse_arithmetic(section, checkpoint.attention)
    require_positions(directory, "evaluate.perplexity", section)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust)
    text = windows_of(section, tokenizer)
    require_known_tokens(text.windows, structure.vocabulary)
    emit("tokens", samples=len(text.windows), tokens=text.tokens, protocol=section.protocol)
    batches = evaluation_batches(text.windows)
    own = Skeleton(
        directory, structure, dtype=checkpoint.dtype, device=device, trust_remote_code=trust, checkpoint=checkpoint
    )
    skeletons = {"float": own}  # the one that is scored; beside a float model it is the other
    if original is not None:
        other = float_structure(original, trust_remote_code=trust)
        if other.vocabulary != structure.vocabulary:
            sizes = f"{other.vocabulary} tokens, and {directory} {structure.vocabulary}"
            raise ModelError(f"{original} knows {sizes}.", "Name the model that the checkpoint was made from.")
        skeletons = {"float": Skeleton(original, other, device=device, trust_remote_code=trust), "quantized": own}
    with TemporaryDirectory(prefix="quantcli-") as place:
        streams = {name: BlockStream(skeleton, batches) for name, skeleton in skeletons.items()}
        caches = {
            name: HiddenCache(Path(place) / name, stream.hidden_shapes(), stream.skeleton.dtype, model.cache_memory)
            for name, stream in streams.items()
        }
        for name, stream in streams.items():
            read = checkpoint if stream.skeleton is own else None
            said = "quantized" if stream.skeleton is own and checkpoint.schemes else name
            advance(said, stream, caches[name], read, section.phase, emit, section.arithmetic)
        with head_as_served(own, checkpoint, section.phase, section.arithmetic):
            windows = eval_ppl.windows_scored(streams, caches, text, batches)
    scores = summarize(windows, original is not None, text.batch)
    per_text = text_scores(windows, text, original is not None)
    if original is None:
        scores = replace(scores, quantized=scores.float_model)
        per_text = {name: {"quantized": found["float_model"]} for name, found in (per_text or {}).items()} or None
    else:
        scores = with_distributions(scores, windows)
    counts = Counter(scheme.name for scheme in checkpoint.schemes.values())
    found = {key: eval_ppl.finite(value) for key, value in asdict(scores).items() if key != "per_window"}
    return {
        "checkpoint": str(directory),
        "format": checkpoint.form.NAME if checkpoint.form is not None else "float",
        "schemes": dict(counts),
        "zero_points": checkpoint.disputed,
        "dtype": checkpoint.dtype,
        "arithmetic": section.arithmetic,
        **protocol_facts(section, text, scores.tokens),
        **found,
        "per_text": eval_ppl.finite(per_text),
        "float_model": found["float_model"] if original is not None else None,
    }
