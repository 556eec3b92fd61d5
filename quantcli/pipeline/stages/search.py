"""search: the fewest linears to roll back for a target, found by measuring the model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantcli.pipeline.batches import data_identity
from quantcli.pipeline.context import Context, Stage
from quantcli.pipeline.fused import fused_groups
from quantcli.pipeline.plan import make_plan
from quantcli.pipeline.rundir import RECIPE, StageFolder, append_line, read_lines, six_digits_or_none, write_json
from quantcli.pipeline.stages.quantize import trial_store
from quantcli.recipe.rollback import TargetSection
from quantcli.recipe.schema import Recipe

if TYPE_CHECKING:
    from quantcli.evaluation.protocols import EvaluationText
    from quantcli.evaluation.scores import Scores
    from quantcli.formats.store import Store
    from quantcli.pipeline.treatment import Arithmetic, Phase
    from quantcli.pipeline.trial import TrialModel

RESULT = "found.json"
TRIALS = "trials.jsonl"
STORES = ("base", "other")

Group = tuple[str, ...]


def _wanted(recipe: Recipe) -> bool:
    return recipe.quantize.rollback.target is not None


def _identity(context: Context) -> dict[str, Any]:
    recipe = context.recipe
    perplexity = recipe.evaluate.perplexity if recipe.evaluate else None
    return {
        "quantize": recipe.quantize.model_dump(mode="json"),
        "dtype": recipe.model.dtype,
        "device": context.device,
        "text": perplexity and data_identity(perplexity),
        "formats": list(recipe.export.formats) if recipe.export else [],
    }


def run(context: Context, folder: StageFolder) -> None:
    """Writes found.json: what is rolled back, and what was measured. Stages behind it read it, so no time is in it: the
    same search has the same bytes."""
    target = context.recipe.quantize.rollback.target
    assert target is not None
    groups = _ranked_groups(context)
    if target.size is not None:
        chosen, facts = _within_size(context, groups, target.size * 1e9)
    else:
        chosen, facts = _by_trials(context, folder, groups, target)
    for name in STORES:
        shutil.rmtree(folder.path / name, ignore_errors=True)
    names = [name for group in chosen for name in group]
    why = f"rolled back to reach {_shown(target)}"
    content = {
        "target": target.model_dump(mode="json", exclude_none=True),
        "rolled_back": dict.fromkeys(names, why),
        **facts,
    }
    write_json(folder.path / RESULT, content)
    folder.add(folder.path / RESULT)
    context.emit("found", rolled_back=len(names), recipe=str(folder.path / RECIPE), **facts)


def settle(context: Context) -> None:
    """Bring what was found into the plan."""
    context.plan = make_plan(context.recipe, context.model, context.plan.structure, _rolled_back(context))


def _rolled_back(context: Context) -> dict[str, str]:
    """Linears that are rolled back → why."""
    content = json.loads((context.folder(STAGE.name) / RESULT).read_text(encoding="utf-8"))
    found: dict[str, str] = content["rolled_back"]
    return found


def _plain(context: Context) -> Recipe:
    """The recipe with the linears that were found by their names, and no target."""
    section = context.recipe.quantize.rollback
    names = (*section.names, *_rolled_back(context))
    plain = section.model_copy(update={"names": names, "target": None, "metric": None})
    quantize = context.recipe.quantize.model_copy(update={"rollback": plain})
    return context.recipe.model_copy(update={"quantize": quantize})


def _ranked_groups(context: Context) -> list[Group]:
    """What can be rolled back, the most sensitive for its number of linears first; fused linears as one, unless
    siblings may part."""
    content = json.loads((context.folder("sensitivity") / "sensitivity.json").read_text(encoding="utf-8"))
    values = {entry["name"]: entry.get(content["metric"], 0.0) for entry in content["linears"]}
    if context.recipe.quantize.rollback.siblings == "apart":
        return [(name,) for name in values]  # in the order of the ranking

    def share(group: Group) -> float:
        found = [values[name] for name in group]
        return math.inf if None in found else max(found) / len(group)

    return sorted(fused_groups(context.plan.structure, values), key=share, reverse=True)


def _within_size(context: Context, groups: Sequence[Group], room: float) -> tuple[list[Group], dict[str, Any]]:
    """As many groups as the size allows, the most sensitive first; one that does not fit lets smaller ones pass."""
    structure = context.plan.structure

    def size(chosen: Sequence[Group]) -> int:
        ranked = dict.fromkeys((name for group in chosen for name in group), "size")
        return make_plan(context.recipe, context.model, structure, ranked).size_after

    chosen: list[Group] = []
    for group in groups:
        if size([*chosen, group]) <= room:
            chosen.append(group)
    return chosen, {"size": size(chosen)}


def _by_trials(
    context: Context, folder: StageFolder, groups: Sequence[Group], target: TargetSection
) -> tuple[list[Group], dict[str, Any]]:
    """The smallest set of groups that meets the bound on all windows, found on the first `target.windows` of them."""
    trials = _Trials(context, folder, target)
    text = context.evaluation_text
    some = replace(text, windows=text.windows[: target.windows], first=text.first[: target.windows])
    chosen = fewest(groups, lambda members: trials.meets(some, members), lambda: trials.left > 1)
    if len(text.windows) > target.windows:
        rest = [group for group in groups if group not in chosen]
        while not trials.meets(text, chosen) and rest and trials.left:
            chosen = [*chosen, rest.pop(0)]
    scores = trials.measured(text, chosen)
    folder.add(trials.file)  # trials belong to this fingerprint: under another the folder removes what it knows of
    if not trials.within(scores):
        context.emit("warning", fallback="missed_target",
                     text=f"The target {_shown(target)} is not met after {trials.count} trials: "
                     f"{scores}. Allow more evaluations, or another metric.")  # fmt: skip
    return chosen, {"evaluations": trials.count, "measured": scores}


def fewest(groups: Sequence[Group], meets: Callable[[Sequence[Group]], bool], more: Callable[[], bool]) -> list[Group]:
    """A small set of groups, ranked most sensitive first, that `meets`; `more` says whether another trial is allowed.

    Doubling, then bisection find the shortest beginning of the ranking that meets. What of it is not needed is then
    taken out in ever smaller runs, the least sensitive and the largest first, as in delta debugging (Zeller and
    Hildebrandt, IEEE TSE 28, 2002): a member that was ranked high may hurt little once others are out.
    """
    if not groups or meets([]):
        return []
    low, high = 0, 1
    while high < len(groups) and more() and not meets(groups[:high]):
        low, high = high, min(2 * high, len(groups))
    while high - low > 1 and more():
        middle = (low + high) // 2
        low, high = (low, middle) if meets(groups[:middle]) else (middle, high)
    chosen = list(groups[:high])
    run = max(1, len(chosen) // 2)
    while run and len(chosen) > 1:
        end = len(chosen)
        while end > 0 and more():
            begin = max(0, end - run)
            without = chosen[:begin] + chosen[end:]
            if without and meets(without):
                chosen = without
            end = begin
        if not more():
            break
        run //= 2
    return chosen


class _Trials:
    """Measurements of sets of groups, each made once and kept in a file, so that an interrupted search goes on."""

    def __init__(self, context: Context, folder: StageFolder, target: TargetSection) -> None:
        self.context, self.folder, self.target = context, folder, target
        self.file = folder.journal(TRIALS)
        self.known: dict[str, dict[str, Any]] = {}
        self.models: dict[int, TrialModel] = {}
        for entry in read_lines(self.file):
            self.known[self._key(entry["windows"], entry["rolled_back"])] = entry

    @property
    def count(self) -> int:
        return len(self.known)

    @property
    def left(self) -> int:
        return max(0, self.target.evaluations - self.count)

    def meets(self, text: EvaluationText, groups: Sequence[Group]) -> bool:
        return self.within(self.measured(text, groups))

    def within(self, scores: Mapping[str, Any]) -> bool:
        """Whether scores keep the bound; a perplexity that is not finite does not."""
        name = "perplexity_increase" if self.target.perplexity_increase is not None else "kl_divergence"
        found, bound = scores[name], getattr(self.target, name)
        return found is not None and found <= bound

    def measured(self, text: EvaluationText, groups: Sequence[Group]) -> dict[str, Any]:
        names = sorted(name for group in groups for name in group)
        key = self._key(len(text.windows), names)
        if key not in self.known:
            scores = self._model(text).measure(names)
            entry = {"windows": len(text.windows), "rolled_back": names, **_facts(scores)}
            append_line(self.file, entry)
            self.known[key] = entry
            self.context.emit("trial", number=self.count, windows=entry["windows"], rolled_back=len(names),
                              perplexity_increase=entry["perplexity_increase"],
                              kl_divergence=entry["kl_divergence"])  # fmt: skip
        entry = self.known[key]
        return {name: entry[name] for name in ("perplexity_increase", "kl_divergence")}

    def _model(self, text: EvaluationText) -> TrialModel:
        from quantcli.pipeline.trial import TrialModel

        if len(text.windows) not in self.models:
            base, other = _stores(self.context, self.folder)
            self.models = {len(text.windows): TrialModel(self.context, base, other, text, *_served(self.context))}
        return self.models[len(text.windows)]

    @staticmethod
    def _key(windows: int, names: Sequence[str]) -> str:
        return f"{windows} {' '.join(sorted(names))}"


def _facts(scores: Scores) -> dict[str, Any]:
    values = {"perplexity_increase": scores.increase, "kl_divergence": scores.kl_divergence}
    return {name: six_digits_or_none(value) for name, value in values.items()}


def _stores(context: Context, folder: StageFolder) -> tuple[Store, Store | None]:
    """Codes of every linear under its scheme, and under the scheme of rolled-back ones, if that is not float."""
    base = trial_store(context, folder.path / STORES[0])
    if context.recipe.quantize.rollback.to == "float":
        return base, None
    every = dict.fromkeys(context.plan.treatments, "trial")
    plan = make_plan(context.recipe, context.model, context.plan.structure, every)
    return base, trial_store(replace(context, plan=plan), folder.path / STORES[1])


def _served(context: Context) -> tuple[Phase, Arithmetic]:
    assert context.recipe.evaluate is not None
    section = context.recipe.evaluate.perplexity
    assert section is not None
    return section.phase, section.arithmetic


def _shown(target: TargetSection) -> str:
    if target.size is not None:
        return f"{target.size:g} GB"
    if target.perplexity_increase is not None:
        return f"a perplexity increase of {target.perplexity_increase:.3g}"
    return f"a KL divergence of {target.kl_divergence:g}"


def _writes(context: Context) -> tuple[str, ...]:
    return (RESULT, TRIALS, *(f"{name}/*" for name in STORES))


STAGE = Stage(
    "search",
    ("smooth", "calibrate", "sensitivity"),
    _wanted,
    _identity,
    run,
    _writes,
    guards=("check",),
    settle=settle,
    plain=_plain,
    title="Searching the fewest linears to roll back",
    asked_by="quantize.rollback.target",
)
