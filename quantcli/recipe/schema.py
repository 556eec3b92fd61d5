"""What a recipe may say: every key with its type, its default and its meaning, and which keys exclude each other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from quantcli.recipe.data import CalibrationSection
from quantcli.recipe.evaluation import EvaluateSection
from quantcli.recipe.fields import Section, Size, Text, refusal, whole
from quantcli.recipe.quantization import QuantizeSection, named_scheme
from quantcli.recipe.smoothing import SmoothSection, check_smoothing


class ModelSection(Section):
    """The model to quantize."""

    path: Text = Field(description="Model directory, .gguf file or hub name (org/name). --model sets it.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="Data type of the float model; auto takes the checkpoint's own."
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|npu)(:[0-9]+)?)$")] = Field(
        default="auto", description="Where to compute: auto, cpu, cuda, cuda:N, npu or npu:N. --device sets it."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the checkpoint.")
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of a hub model; null takes the newest."
    )
    sanity_check: Literal["stop", "warn", "off"] = Field(
        default="stop",
        description="What to do when the float model predicts no better than chance: stop, warn, or off.",
    )
    cache_memory: Size = Field(
        default=1 << 30,
        description="Hidden states between two blocks that are kept in memory, as 1GiB or 500MB; more go to disk.",
        json_schema_extra={"default": "1GiB"},
    )

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if self.revision is not None and (self.path.startswith("/") or self.path.endswith(".gguf")):
            raise refusal("revision", f"there are no revisions of the local model {self.path}", "Remove the key.")
        return self


class ExportSection(Section):
    """The checkpoints to write."""

    formats: Annotated[
        tuple[
            Literal["compressed-tensors", "ascend", "mindie", "numpy", "gptq", "awq", "modelopt", "gguf", "dense"], ...
        ],
        Field(strict=False, min_length=1),
    ] = Field(
        default=("compressed-tensors",),
        description="Checkpoint formats: compressed-tensors, which vLLM and transformers load; ascend, for vLLM-Ascend "
        "and MindIE; mindie and numpy, its older layouts; gptq and awq, for what reads those; modelopt, "
        "FP8 for vLLM, SGLang and TensorRT-LLM; gguf, for llama.cpp and "
        "Ollama; dense, the dequantized weights as a float model. The first is measured.",
    )
    restrict_permissions: bool = Field(
        default=True,
        description="Whether exports in ascend, mindie and numpy are for their owner alone: folder 750, weights 400, "
        "other files 600. Otherwise, and in other formats, the umask decides.",
    )
    shard_size: Annotated[Size, Field(gt=0)] | None = Field(
        default=None,
        description="Largest size of a file of weights, as 5GB or 500MB; null takes 2GiB. A tensor that is larger has "
        "a file for itself. gguf is one file, and numpy one a kind of tensor.",
    )

    engines: Annotated[
        tuple[Literal["vllm-cpu", "vllm-gpu", "vllm-ascend", "mindie", "transformers", "llama.cpp", "sglang"], ...],
        Field(strict=False),
    ] = Field(
        default=(),
        description="Engines that have to load the result. One that loads none of the formats as planned is refused "
        "before work; of engines that are not named, plan only says whether they do.",
    )

    @model_validator(mode="after")
    def _check(self) -> ExportSection:
        if len(set(self.formats)) < len(self.formats):
            raise refusal("formats", "names a format twice", "Name each once.")
        return self


class Recipe(Section):
    """One quantization of one model, from the float checkpoint to the measured result."""

    version: Annotated[Literal[1], BeforeValidator(whole, json_schema_input_type=Literal[1])] = Field(
        default=1, description="Version of the recipe's language."
    )
    model: ModelSection = Field(description="The model to quantize, and how it is read.")
    calibration: CalibrationSection | None = Field(
        default=None, description="Calibration text; null or absent for schemes that need none."
    )
    smooth: SmoothSection | None = Field(
        default=None, description="Outlier suppression before quantization; {} for the defaults, null for none."
    )
    quantize: QuantizeSection = Field(description="The quantization scheme; {} is 8-bit weights, one scale a channel.")
    export: ExportSection | None = Field(default=ExportSection(), description="Checkpoints to write; null writes none.")
    evaluate: EvaluateSection | None = Field(default=None, description="What to measure; null or absent for nothing.")
    output: Text = Field(description="Run directory. --output sets it.")

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        section, remedy = self.quantize, "Add a section calibration: {}"
        treatments = [("", section.treatment(None))]
        treatments += [(f"overrides.{i}.", section.treatment(each)) for i, each in enumerate(section.overrides)]
        for place, treatment in treatments if self.calibration is None else ():
            if treatment is not None and treatment[1].observed:
                key = f"quantize.{place}activations.scope"
                raise refusal(key, "static scales need calibration", f"{remedy} or set scope: token.")
            if treatment is not None and treatment[0].importance == "second_moment":
                raise refusal(
                    f"quantize.{place}weights.importance",
                    "second_moment needs calibration",
                    f"{remedy} or set importance: none.",
                )
            if treatment is not None and treatment[0].solves:
                wrong = f"{treatment[0].method} needs calibration"
                raise refusal(f"quantize.{place}weights.method", wrong, f"{remedy} or set method: mse.")
        if section.distill is not None and self.calibration is None:
            raise refusal("quantize.distill", "learns from calibration text", f"{remedy}.")
        if section.distill is not None and not any(treatment for _, treatment in treatments):
            raise refusal("quantize.distill", "tunes scales of weights, and none is quantized", "Remove it.")
        to = named_scheme(section.rollback.to)
        if self.calibration is None and to is not None and to[1].observed:
            wrong = f"is {section.rollback.to}, and static scales need calibration"
            raise refusal("quantize.rollback.to", wrong, f"{remedy} or set to: W8A8-dynamic.")
        for key in ("kv_cache", "attention"):
            if self.calibration is None and getattr(section, key) is not None:
                raise refusal(f"quantize.{key}", "scales need calibration", f"{remedy}.")
        if self.calibration is None and section.rollback.ranks:
            key = "level" if section.rollback.level else "target"
            raise refusal(f"quantize.rollback.{key}", "ranks linears by what they are fed", f"{remedy}.")
        if self.calibration is None and section.target is not None:
            raise refusal("quantize.target", "is shared out by what linears do to calibration text", f"{remedy}.")
        if self.calibration is not None and self.calibration.drop_outliers and not any(t for _, t in treatments):
            raise refusal(
                "calibration.drop_outliers",
                "measures what quantized linears change, and none is",
                "Remove it.",
            )
        if self.smooth is not None:
            check_smoothing(self.smooth, section, self.calibration is not None)
        target = section.rollback.target
        if target is not None and target.size is None and (self.evaluate is None or self.evaluate.perplexity is None):
            raise refusal(
                "quantize.rollback.target", "is measured on evaluate.perplexity, which is absent", "Add that section."
            )
        if self.evaluate is not None and self.export is None:
            raise refusal(
                "evaluate",
                "measures the exported checkpoint, and export is null",
                "Set evaluate: null too, or keep export.",
            )
        return self


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, for editors.

    It does not demand `model.path` and `output`, which a file may leave to --model and --output.
    """
    schema = Recipe.model_json_schema()
    schema["required"] = ["quantize"]
    del schema["$defs"]["ModelSection"]["required"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "quantcli recipe"}
