"""generate: a little text by the float and by the exported model, for a person to look at."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.plan import BYTES
from quantcli.pipeline.rundir import StageFolder, write_json
from quantcli.pipeline.source import known_positions
from quantcli.recipe.comparison import GenerateSection
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
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
    there are none, also where transformers fails at it: that is no reason to lose a run. A model that takes more than
    `memory`, with its keys and values, is run block by block, unless more than `streamed` bytes would be read for that.
    `needs` is what the models take where only the memory that was free was less."""
    from quantcli.pipeline.generation import NoTextError

    section, tokenizer = _section(context.recipe), context.tokenizer()
    prompts = [prompt_tokens(tokenizer, prompt) for prompt in section.prompts]
    skipped, needs = _obstacle(context, section, prompts)
    content: dict[str, Any] = {"max_new_tokens": section.max_new_tokens, "skipped": skipped, "needs": needs}
    if not skipped:
        try:
            content |= _generated(context, section, tokenizer, prompts)
        except NoTextError as error:
            content["skipped"] = f"No text was generated: {error.message}"
    if content["skipped"]:
        context.emit("note", text=content["skipped"])
    write_json(folder.path / RESULT, content)
    folder.add(folder.path / RESULT)


def _obstacle(context: Context, section: GenerateSection, prompts: list[list[int]]) -> tuple[str, int | None]:
    """Why no text can be generated, empty if it can; and the memory that it needs where that is all that is missing."""
    from quantcli.model.skeleton import load_config
    from quantcli.pipeline.generation import cached_values, free_memory

    structure, dtype, tokens = context.plan.structure, context.recipe.model.dtype, _cached(section, prompts)
    config = load_config(context.model, trust_remote_code=context.recipe.model.trust_remote_code)
    size = BYTES[structure.dtype if dtype == "auto" else dtype]
    weights, cache = sum(map(prod, structure.parameters.values())) * size, tokens * cached_values(config) * size
    room, what, needs = section.memory, "evaluate.generate.memory", None
    free = free_memory(context.device)
    if free is not None and free < min(room, weights + cache):
        room, what = free, "the memory that is free"
        needs = weights + cache if weights + cache <= section.memory else None
    reads = 2 * section.max_new_tokens * weights
    if weights + cache <= room or (cache <= room and reads <= section.streamed):
        return "", None
    text = (
        f"No text was generated: the model's weights ({weights / 2**30:.3g} GiB) and the keys and values of {tokens} "
        f"tokens ({cache / 2**30:.3g} GiB) are more than {what} ({room / 2**30:.3g} GiB)"
    )
    if cache <= room:
        text += (
            f", and to read them anew for every token, {reads / 2**30:.3g} GiB in all, is more than "
            f"evaluate.generate.streamed ({section.streamed / 2**30:.3g} GiB)"
        )
    return f"{text}." + " Run again when there is more." * (needs is not None), needs


def _cached(section: GenerateSection, prompts: list[list[int]]) -> int:
    from quantcli.pipeline.generation import cached_tokens

    return cached_tokens([len(prompt) for prompt in prompts], section.max_new_tokens)


def _unfinished(context: Context) -> bool:
    """Whether the memory is there by now that was missing."""
    from quantcli.model.checkpoint import read_json
    from quantcli.pipeline.generation import free_memory

    needs = read_json(context.folder(STAGE.name) / RESULT).get("needs")
    free = free_memory(context.device)
    return isinstance(needs, int) and (free is None or needs <= free)


def _generated(context: Context, section: GenerateSection, tokenizer: Any, prompts: list[list[int]]) -> dict[str, Any]:
    from quantcli.pipeline.generation import serving
    from quantcli.pipeline.sequences import Model
    from quantcli.pipeline.served import exported_model

    entries: list[dict[str, Any]] = [{"prompt": prompt} for prompt in section.prompts]
    tokens = _cached(section, prompts)
    for model in (
        Model("float", context.skeleton(original=True), None, "prefill"),
        Model("quantized", *exported_model(context), "prefill"),
    ):
        with serving(model, "evaluate.generate", tokens, context.emit, section.memory):
            texts = _continued(context, model.skeleton, prompts, section.max_new_tokens)
        for entry, written in zip(entries, texts, strict=True):
            entry[model.name] = {"text": tokenizer.decode(written, skip_special_tokens=True), "tokens": written}
            context.emit("generated", model=model.name, prompt=entry["prompt"], tokens=len(written))
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


def _continued(context: Context, skeleton: Skeleton, prompts: list[list[int]], count: int) -> list[list[int]]:
    """At most `count` tokens behind each prompt, each the likeliest behind those before it, up to one that ends a text
    or fills the model's positions."""
    from quantcli.pipeline.generation import generate, text_ends

    longest, ends = known_positions(context.model), text_ends(context.model, skeleton.config)
    written: list[list[int]] = [[] for _ in prompts]
    by_room: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_room.setdefault(count if longest is None else min(count, longest - len(prompt)), []).append(index)
    for room, members in by_room.items():
        if room > 0:
            for place, tokens in generate(skeleton.model, [prompts[index] for index in members], room, ends):
                written[members[place]] = tokens
    return written


STAGE = Stage(
    "generate",
    ("export",),
    lambda recipe: recipe.evaluate is not None and recipe.evaluate.generate is not None and recipe.export is not None,
    _identity,
    run,
    lambda _: (RESULT,),
    guards=("check", "verify"),
    unfinished=_unfinished,
    title="Generating text",
    asked_by="evaluate.generate",
)
