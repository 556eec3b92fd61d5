"""What a stage is given, and what a stage is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.model.structure import Linear, Structure, biased
from quantcli.pipeline.plan import Plan
from quantcli.pipeline.rundir import RunDirectory, StageFolder
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from quantcli.evaluation.protocols import EvaluationText
    from quantcli.model.checkpoint import Checkpoint
    from quantcli.model.hidden import HiddenCache
    from quantcli.model.stream import BlockStream

Listener = Callable[[dict[str, Any]], None]


@dataclass
class Context:
    """Everything that a stage reads: the recipe, the plan, and the folders of the stages before it."""

    recipe: Recipe
    model: Path
    plan: Plan
    run: RunDirectory
    device: str
    listener: Listener | None = None
    stage: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    ranking: bool = False  # the ranking of linears itself was asked for
    overwrite: bool = False  # files of an export that somebody changed may be replaced
    exports: bool = False  # stage `export` follows

    def emit(self, kind: str, **facts: Any) -> None:
        """Record an event in events.jsonl and show it to whoever listens."""
        event = {"event": kind, "stage": self.stage, **facts}
        self.run.append_event(event)
        if self.listener is not None:
            self.listener(event)

    def folder(self, stage: str) -> Path:
        return self.run.path / stage

    @cached_property
    def linears(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.plan.structure.matrices()}

    @cached_property
    def linear_blocks(self) -> dict[str, int]:
        """The block of each linear; the head's is one behind the last."""
        blocks = self.plan.structure.blocks
        found = {linear.name: index for index, block in enumerate(blocks) for linear in block.linears}
        head = self.plan.structure.head_linear
        return found if head is None else {**found, head.name: len(blocks)}

    @cached_property
    def experts(self) -> list[tuple[str, ...]]:
        """The linears of each expert of the model: those that read its input, and the one that makes its output."""
        layers = (experts for block in self.plan.structure.blocks for experts in block.experts)
        return [names for experts in layers for names in experts.linears]

    @cached_property
    def expert_inputs(self) -> dict[str, str]:
        """Of each linear of an expert, the linear under whose name its input is observed: the first that reads it."""
        return {name: names[-1] if name == names[-1] else names[0] for names in self.experts for name in names}

    @property
    def ranks(self) -> bool:
        """Whether linears are ranked by their sensitivity."""
        return self.ranking or self.recipe.quantize.rollback.ranks

    @property
    def blocks(self) -> int:
        return len(self.plan.structure.blocks)

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises ModelError when there is none."""
        from quantcli.pipeline.source import load_tokenizer

        return load_tokenizer(self.model, trust_remote_code=self.recipe.model.trust_remote_code)

    @cached_property
    def evaluation_text(self) -> EvaluationText:
        """The windows that the recipe's section evaluate.perplexity asks for."""
        from quantcli.pipeline.samples import windows_of

        assert self.recipe.evaluate is not None
        assert self.recipe.evaluate.perplexity is not None
        return windows_of(self.recipe.evaluate.perplexity, self.tokenizer())

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The float checkpoint as stages behind `smooth` read it: with what that stage found folded in."""
        from quantcli.pipeline.smoothed import smoothed_checkpoint

        return smoothed_checkpoint(self.recipe, self.model, self.plan.structure, self.folder("smooth"))

    @property
    def untied(self) -> bool:
        """Whether smoothing gave an output head that was tied a weight of its own."""
        from quantcli.model.folding import unties

        return unties(self.checkpoint)

    @property
    def structure(self) -> Structure:
        """The plan's, with the biases that smoothing added."""
        from quantcli.model.folding import added_biases

        return biased(self.plan.structure, added_biases(self.checkpoint))

    def skeleton(
        self, *, original: bool = False, checkpoint: Checkpoint | None = None, dtype: str | None = None
    ) -> Any:
        """The float model without its weights, which are read as smoothed, as stored if `original`, or from another
        `checkpoint`; in the recipe's dtype or another."""
        from quantcli.model.folding import added_biases, unties
        from quantcli.model.skeleton import Skeleton

        section = self.recipe.model
        if not original and checkpoint is None:
            checkpoint = self.checkpoint
        return Skeleton(
            self.model,
            self.plan.structure if checkpoint is None else biased(self.plan.structure, added_biases(checkpoint)),
            dtype=dtype or section.dtype,
            device=self.device,
            trust_remote_code=section.trust_remote_code,
            checkpoint=checkpoint,
            untied=checkpoint is not None and unties(checkpoint),
        )

    def hidden_cache(self, path: Path, stream: BlockStream) -> HiddenCache:
        """The hidden states of a stream between its blocks, in memory as far as the recipe allows."""
        from quantcli.model.hidden import HiddenCache

        return HiddenCache(path, stream.hidden_shapes(), stream.skeleton.dtype, self.recipe.model.cache_memory)


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    `reads` names the stages whose files it reads, `guards` those that must have passed before it; `wanted` says whether
    a recipe calls for it; `identity` is what of the recipe and the data its files depend on beside those it reads;
    `writes` are glob patterns of all its files, finished or not; `run` does the work and records each finished file.
    `title` is what it does, in words, `asked_by` what of a recipe asks for it.
    `settle`, where given, brings what the stage found into the plan, whether it ran or was up to date. `part`, where
    given, says what the files in one of its folders depend on in the place of `identity`: such folders stay when the
    recipe no longer names them, unless what they come from has changed. `plain`, where given, is the recipe that says
    by itself what the stage found; it is written in every run, since sections that the stage does not read may change.
    `unfinished`, where given, says whether a stage that is up to date left something out that it can do by now.
    """

    name: str
    reads: tuple[str, ...]
    wanted: Callable[[Recipe], bool]
    identity: Callable[[Context], dict[str, Any]]
    run: Callable[[Context, StageFolder], None]
    writes: Callable[[Context], tuple[str, ...]]
    title: str
    asked_by: str
    guards: tuple[str, ...] = ()
    settle: Callable[[Context], None] | None = None
    part: Callable[[Context, str], dict[str, Any]] | None = None
    plain: Callable[[Context], Recipe] | None = None
    unfinished: Callable[[Context], bool] | None = None
