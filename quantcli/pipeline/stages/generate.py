"""generate: a little text by the float and by the exported model, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.plan import BYTES
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.source import known_positions
from quantcli.recipe.comparison import GenerateSection
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantcli.evaluation.simulate import Forward, Int8Weights
    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.model.skeleton import Skeleton

RESULT = "generated.json"


def _section(recipe: Recipe) -> GenerateSection:
    assert recipe.evaluate is not None
    assert recipe.evaluate.generate is not None
    return recipe.evaluate.generate


def _identity(context: Context) -> dict[str, Any]:
    section = _section(context.recipe).model_dump(mode="json")
    return {"generate": section, "dtype": context.recipe.model.dtype, "device": context.device}


def run(context: Context, folder: StageFolder) -> None:
    """Writes generated.json: the prompts, and the tokens and text that each model puts behind them, greedily; or why
    there are none: the models have to be whole in memory, one after the other, and `memory` bounds that."""
    section = _section(context.recipe)
    content: dict[str, Any] = {"max_new_tokens": section.max_new_tokens, "skipped": _obstacle(context, section)}
    if content["skipped"]:
        context.emit("note", text=content["skipped"])
    else:
        content |= _generated(context, section)
    write_json(folder.path / RESULT, content)
    folder.add(folder.path / RESULT)


def _obstacle(context: Context, section: GenerateSection) -> str:
    """Why no text can be generated; empty if it can."""
    structure, dtype = context.plan.structure, context.recipe.model.dtype
    needed = sum(map(prod, structure.parameters.values())) * BYTES[structure.dtype if dtype == "auto" else dtype]
    if needed > section.memory:
        return (f"No text was generated: the model's weights take {needed / 2**30:.1f} GiB, more than "
                f"evaluate.generate.memory ({section.memory / 2**30:.3g} GiB).")  # fmt: skip
    return ""


def _generated(context: Context, section: GenerateSection) -> dict[str, Any]:
    from quantcli.formats.reader import QuantizedCheckpoint
    from quantcli.model.skeleton import Skeleton
    from quantcli.pipeline.stages.export import float_source

    assert context.recipe.export is not None
    tokenizer = context.tokenizer()
    prompts = [prompt_tokens(tokenizer, prompt) for prompt in section.prompts]
    form = context.recipe.export.formats[0]
    exported = QuantizedCheckpoint(context.folder("export") / form, context.linears, float_source(context).weights)
    quantized = Skeleton(
        context.model,
        context.plan.structure,
        dtype=exported.dtype,
        device=context.device,
        trust_remote_code=context.recipe.model.trust_remote_code,
        checkpoint=exported,
        untied=context.untied,
    )
    entries: list[dict[str, Any]] = [{"prompt": prompt} for prompt in section.prompts]
    for name, skeleton in (("float", context.skeleton(original=True)), ("quantized", quantized)):
        with ExitStack() as stack:
            left_out: set[str] = set()
            if name == "quantized":
                left_out = stack.enter_context(_as_served(skeleton, exported))
            names = [n for n in skeleton.model.state_dict() if n not in left_out]
            stack.enter_context(skeleton.resident(names))
            for entry, tokens in zip(entries, prompts, strict=True):
                written = _continued(context, skeleton, tokens, section.max_new_tokens)
                entry[name] = {"text": tokenizer.decode(written, skip_special_tokens=True), "tokens": written}
                context.emit("generated", model=name, prompt=entry["prompt"], tokens=len(written))
    return {"chat_template": getattr(tokenizer, "chat_template", None) is not None, "prompts": entries}


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt: as a user's message that is to be answered where the tokenizer has a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        found: list[int] = tokenizer(prompt).input_ids
        return found
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    chat: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return chat


def _continued(context: Context, skeleton: Skeleton, prompt: list[int], count: int) -> list[int]:
    """At most `count` tokens, each the likeliest behind those before it, up to one that ends a text."""
    import torch
    from transformers import GenerationConfig

    longest = known_positions(context.model)
    count = count if longest is None else min(count, longest - len(prompt))
    if count < 1:
        return []
    ends = _ends(context, skeleton)
    # nothing of generation_config.json but what ends a text: penalties and sampling would hide what weights do
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=ends, pad_token_id=ends[0] if ends else 0
    )
    skeleton.model.generation_config = settings
    tokens = torch.tensor([prompt], device=skeleton.device)
    with torch.inference_mode():
        output = skeleton.model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
        )
    written: list[int] = output[0, len(prompt) :].tolist()
    return written


def _ends(context: Context, skeleton: Skeleton) -> list[int]:
    """Tokens that end a text, as generation_config.json or config.json names them."""
    from quantcli.model.checkpoint import read_json

    file = context.model / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.is_file() else None
    if named is None:
        named = getattr(skeleton.config, "eos_token_id", None)
    return [named] if isinstance(named, int) else list(named or ())


@contextmanager
def _as_served(skeleton: Skeleton, exported: QuantizedCheckpoint) -> Iterator[set[str]]:
    """While the body runs, linears and attention of the whole model compute as an engine does. Yields the parameters
    that nothing reads then."""
    from quantcli.evaluation.simulate import not_read, simulated
    from quantcli.pipeline.attention import attention_as_stored

    left_out: set[str] = set()
    with ExitStack() as stack:
        for block in skeleton.structure.blocks:
            path, module = block.name, skeleton.module(block.name)
            linears = _integer_linears(skeleton, exported, f"{path}.")
            left_out |= {f"{path}.{name}" for name in not_read(linears, block.local_experts)}
            stack.enter_context(simulated(module, linears, block.local_experts))
            modules = [name for name in exported.attention_modules if name.startswith(f"{path}.")]
            attention = {name: exported.read_attention(name) for name in modules}
            stack.enter_context(attention_as_stored(module, path, exported.attention, attention))
        if (head := skeleton.structure.head) is not None and head in exported.schemes:
            found = _integer_linears(skeleton, exported, head)
            left_out |= {f"{head}.weight" for _ in found}
            stack.enter_context(simulated(skeleton.model, {head: found[""]} if found else {}))
        yield left_out


def _integer_linears(
    skeleton: Skeleton, exported: QuantizedCheckpoint, prefix: str
) -> dict[str, Int8Weights | Tensor | Forward]:
    """What takes the place of linears with quantized inputs whose names begin so, by the rest of their names."""
    from quantcli.evaluation.simulate import forward_of
    from quantcli.pipeline.treatment import replacement

    found: dict[str, Int8Weights | Tensor | Forward] = {}
    for name, scheme in exported.schemes.items():
        if scheme.activations == "none" or not name.startswith(prefix):
            continue
        stored = exported.read_linear(name).to(skeleton.device)
        prompt, decoded = (
            replacement(stored, scheme, skeleton.dtype, skeleton.device, phase) for phase in ("prefill", "decode")
        )

        def either(module: nn.Module, x: Tensor, _prompt: Any = prompt, _decoded: Any = decoded) -> Tensor:
            return forward_of(module, _decoded if x.shape[-2] == 1 else _prompt)(x)

        found[name.removeprefix(prefix)] = either if scheme.activations == "mix" else prompt
    return found


STAGE = Stage(
    "generate",
    ("export",),
    lambda recipe: recipe.evaluate is not None and recipe.evaluate.generate is not None and recipe.export is not None,
    _identity,
    run,
    lambda _: (RESULT,),
    guards=("check", "verify"),
)
