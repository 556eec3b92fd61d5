"""A transformers causal language model without its weights, and the means to fill one part of it at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantcli.errors import ModelError
from quantcli.model.checkpoint import Checkpoint, TensorEntry, read_json, stored_dtype
from quantcli.model.heap import large_blocks_apart
from quantcli.model.names import map_parameters
from quantcli.model.rotation import untied as untied_structure
from quantcli.model.structure import Structure
from quantcli.model.untrusted import check_texts

MAXIMUM_BLOCKS, MAXIMUM_EXPERTS = 4096, 1 << 18
"""Decoder blocks, and experts of all blocks, that a configuration may ask for."""
_COUNTS = re.compile(r".*(layers|blocks|labels|experts|codebooks|dense_replace)|n_layer|depth|attention_types")
"""Keys by which configurations of transformers make lists of so many items as they are read."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class TensorSource(Protocol):
    """What a skeleton is filled from: tensors by the names of a float checkpoint."""

    entries: dict[str, TensorEntry]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...


class Skeleton:
    """A causal LM whose parameters are on the meta device until `resident` fills them from the checkpoint.

    `checkpoint` takes the place of the weights in `directory`, for instance a quantized checkpoint that is read as a
    float one; `untied` says that its output head is a tensor of its own, whatever config.json says. Biases of the
    structure that the architecture lacks are added: a linear adds its own, and what a norm puts out gets the norm's.
    Buffers (rotary tables and the like) are real, because the model computes them from its configuration.
    """

    def __init__(
        self,
        directory: Path,
        structure: Structure,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
        checkpoint: TensorSource | None = None,
        untied: bool = False,
    ) -> None:
        self.directory = directory
        self.structure = untied_structure(structure) if untied else structure
        self.device = torch.device(device)
        self.config = load_config(directory, trust_remote_code=trust_remote_code)
        if untied:
            self.config.tie_word_embeddings = False
        self.dtype = resolve_dtype(self.config, dtype)
        self.checkpoint: TensorSource = Checkpoint(directory) if checkpoint is None else checkpoint
        with large_blocks_apart(), _parameters_on_meta():
            self.model = build_model(self.config, self.dtype, trust_remote_code)
            _add_biases(self.model, self.structure)
        self.model.eval().requires_grad_(False)
        _keep_float32(self.model, self.dtype)
        self.sources, self.unused_tensors = map_parameters(self.model, self.checkpoint.entries)
        self.blocks = [block.name for block in structure.blocks]
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(self.device), name not in module._non_persistent_buffers_set)

    def module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def parameter_names(self, path: str) -> list[str]:
        """Names, from the root, of the parameters and stored buffers below `path`."""
        return [f"{path}.{name}" for name in self.module(path).state_dict()]

    def outer_names(self) -> list[str]:
        """Names of everything that belongs to no decoder block."""
        inside = tuple(f"{block}." for block in self.blocks)
        return [name for name in self.model.state_dict() if not name.startswith(inside)]

    def read(self, names: Iterable[str], rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameter values on the CPU in the dtype that the model computes in (norms kept in float32 stay so).

        rows: of a parameter the only rows that are wanted, int64. Where its dtype has to be changed, the others are 0,
        in memory that is never touched and so takes no room.
        """
        state = self.model.state_dict()
        values: dict[str, Tensor] = {}
        readers: dict[int, list[str]] = defaultdict(list)
        for name in names:
            readers[id(self.sources[name])].append(name)
        for own in readers.values():
            self._check_shape(own[0], state)
            # in its final dtype before the next is read: folded weights are float32 until then
            parts = self.sources[own[0]].assemble(self.model, self.checkpoint.read)
            for name in own:
                key = name if name in parts else next(iter(parts))
                _require_shape(name, tuple(parts[key].shape), tuple(state[name].shape))
                if rows is not None and name in rows and parts[key].dtype != state[name].dtype:
                    values[name] = torch.zeros_like(parts[key], dtype=state[name].dtype)
                    values[name][rows[name]] = parts[key][rows[name]].to(state[name].dtype)
                    continue
                # tied parameters share what they become
                values[name] = parts[key] = parts[key].to(state[name].dtype)
        return values

    def check_shapes(self) -> None:
        """Raise ModelError for a tensor that has another shape than its parameter; nothing is read. Of parameters that
        are joined of several tensors nothing is said."""
        state = self.model.state_dict()
        for name in state:
            self._check_shape(name, state)

    def _check_shape(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Before it is read: what is not of the model may have any size."""
        source = self.sources[name]
        if source.converter is None:
            _require_shape(name, self.checkpoint.entries[source.tensors[0]].shape, tuple(state[name].shape))

    @contextmanager
    def resident(self, names: Iterable[str], rows: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Fill the named parameters for the duration of the body, then let them go; of some only `rows`, as `read`."""
        values = self.read(names, rows)
        held: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for name in list(values):
                value = values.pop(name)
                path, _, leaf = name.rpartition(".")
                owner = self.module(path)
                table = _table(owner, leaf)
                held.append((table, leaf, table[leaf]))
                value = value.to(self.device)
                table[leaf] = nn.Parameter(value, requires_grad=False) if table is owner._parameters else value
            yield
        finally:
            for table, leaf, empty in held:
                table[leaf] = empty


def _require_shape(name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if stored != expected:
        raise ModelError(f"{name} has shape {stored} in the checkpoint and {expected} in the model.",
                         "Check that config.json belongs to these weights.")  # fmt: skip


def load_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model directory. Raises ModelError for a broken file, an unknown architecture, or one that
    needs code which is not trusted."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        raise _no_model(directory)
    check_texts(directory)
    content = read_json(path)
    check_counts(path, content)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a configuration class raises, the file is at fault
        kind = content.get("model_type", "missing")
        if "auto_map" in content and not trust_remote_code:
            raise ModelError(f"{path}: model_type {kind!r} needs code from the checkpoint.",
                             "Read that code, then set model.trust_remote_code: true, or for verify and convert say "
                             "--trust-remote-code.") from error  # fmt: skip
        if isinstance(kind, str) and kind in CONFIG_MAPPING:
            raise ModelError(f"{path}: {_one_line(error)}.", "Check that value, or download the file again.") from error
        raise ModelError(f"{path}: model_type {kind!r} is not an architecture that this transformers knows.",
                         "Upgrade transformers, or check the file.") from error  # fmt: skip
    if "quantization_config" in content:
        # what the weights are stored as is the readers' business; the architecture is the float model's
        del config.quantization_config
    try:
        if not _is_causal(config):
            declared, config = getattr(config, "dtype", None), config.get_text_config(decoder=True)
            if getattr(config, "dtype", None) is None:
                config.dtype = declared
    except Exception as error:  # likewise
        raise ModelError(f"{path}: {_one_line(error)}.", "Check that value, or download the file again.") from error
    check_size(path, config)
    if _declared(config) is None and (stored := stored_dtype(directory)) is not None:
        config.dtype = DTYPES[stored]
    return config


def _no_model(directory: Path) -> ModelError:
    """What a directory without config.json is in the place of a model."""
    if (directory / "adapter_config.json").is_file():
        remedy = "Merge it into its model (peft's merge_and_unload), save that by save_pretrained, and use it."
        return ModelError(f"{directory} is an adapter, not a model.", remedy)
    inside = sorted(file.parent for file in directory.glob("snapshots/*/config.json"))  # a folder of the hub's cache
    remedy = f"The model is {inside[-1]}." if inside else "model.path must be a Hugging Face model directory."
    return ModelError(f"{directory} holds no config.json.", remedy)


def check_counts(path: Path, content: dict[str, Any]) -> None:
    """Refuse, before a configuration is made of its JSON, lists of more items than any model has."""
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(inner if _COUNTS.fullmatch(inner) else "", below) for inner, below in value.items()]
        elif isinstance(value, list):
            waiting += [(key, below) for below in value]
        elif key and type(value) is int and value > MAXIMUM_EXPERTS:
            raise ModelError(f"{path}: {key[:100]} is {repr(value)[:100]}, more than any model has.",
                             "Check that value, or download the file again.")  # fmt: skip


def check_size(path: Path, config: Any) -> None:
    """Refuse more modules than memory has room for, and what is no number of modules."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    depth = getattr(config, "num_hidden_layers", None)
    experts = [getattr(layer, key, None) for layer in layers_of(config) for key in keys]
    count = max([number for number in experts if type(number) is int], default=1)
    if depth is None:
        return
    if type(depth) is not int or not 0 < depth <= MAXIMUM_BLOCKS or depth * count > MAXIMUM_EXPERTS:
        raise ModelError(f"{path}: {repr(depth)[:100]} decoder blocks of {count} experts are more than any model has.",
                         "Check num_hidden_layers, or download the file again.")  # fmt: skip


def layers_of(config: Any) -> list[Any]:
    """The configuration of every block: those of a model whose blocks differ in what a configuration has one value for,
    such as the size of heads (Gemma 4), else the one of all."""
    if not getattr(config, "is_heterogeneous", False):
        return [config]
    return [config.per_layer_config[index] for index in range(config.num_hidden_layers)]


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    own_code = getattr(config, "auto_map", None) or {}
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own_code


def resolve_dtype(config: Any, dtype: str) -> torch.dtype:
    """The dtype to compute in: what the recipe says, else what config.json declares or, where it does not, its weights
    have (`load_config`), else float32."""
    if dtype != "auto":
        return DTYPES[dtype]
    return _declared(config) or torch.float32


def _declared(config: Any) -> torch.dtype | None:
    inner = getattr(config, "text_config", None)  # of a model of several parts
    declared = getattr(config, "dtype", None) or getattr(inner, "dtype", None)
    declared = DTYPES.get(declared) if isinstance(declared, str) else declared
    return declared if isinstance(declared, torch.dtype) else None


def build_model(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """A causal LM with undefined parameters. Raises ModelError when no causal LM class exists for the configuration."""
    from transformers.initialization import no_init_weights
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with no_init_weights():
        try:
            if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
                # The class itself rather than the Auto factory, which imports every task's machinery.
                return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config, dtype=dtype)
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except MemoryError:
            raise
        except Exception as error:
            if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or trust_remote_code:
                raise ModelError(f"config.json describes no {config.model_type} that can be built: {_one_line(error)}.",
                                 "Check that file, or download it again.") from error  # fmt: skip
            raise ModelError(f"model_type {config.model_type!r} has no causal language model in transformers.",
                             "quantcli handles decoder-only language models.") from error  # fmt: skip


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")


def find_blocks(model: nn.Module, config: Any) -> list[str]:
    """Paths of the decoder blocks: the outermost ModuleList of `num_hidden_layers` modules, else the heaviest list."""
    depth = getattr(config, "num_hidden_layers", None)
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks.", "Its architecture is not supported.")
    matching = [entry for entry in lists if len(entry[1]) == depth]
    path, found = max(matching or lists, key=lambda e: (-e[0].count("."), sum(p.numel() for p in e[1].parameters())))
    return [f"{path}.{i}" for i in range(len(found))]


def as_returned(hidden: Tensor, length: int) -> Any:
    """Hidden states as blocks return them: first of a tuple of `length` items, whose others a model takes apart from
    them and may not need; alone if it is 0."""
    return (hidden, *[None] * (length - 1)) if length else hidden


def _add_biases(model: nn.Module, structure: Structure) -> None:
    state, linears = model.state_dict(), {linear.name for linear in structure.linears()}
    for name, shape in structure.parameters.items():
        owner = name.removesuffix(".bias")
        if name in state or owner == name:
            continue
        module, dtype = model.get_submodule(owner), state[f"{owner}.weight"].dtype
        module.register_parameter("bias", nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), False))
        if owner not in linears:
            module.register_forward_hook(_plus_bias)


def _plus_bias(norm: nn.Module, _args: Any, output: Tensor) -> Tensor:
    bias: Tensor = norm.bias  # type: ignore[assignment]
    return (output + bias).to(output.dtype)


def _keep_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """What a family keeps in float32 whatever the dtype, such as DeepSeek's routing bias: `from_pretrained` heeds it,
    building a model from its configuration does not."""
    patterns = [re.compile(glob.replace("*", ".*")) for glob in model._get_dtype_plan(dtype)]  # type: ignore[operator]
    for name, value in model.state_dict().items():
        if value.is_floating_point() and any(pattern.search(name) for pattern in patterns):
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            table, value = _table(owner, leaf), value.float()
            table[leaf] = nn.Parameter(value, requires_grad=False) if table is owner._parameters else value


def _table(module: nn.Module, name: str) -> dict[str, Any]:
    """The dictionary of the module that holds a parameter or buffer."""
    return module._parameters if name in module._parameters else module._buffers


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters created inside go to the meta device; buffers, which `torch.device("meta")` would lose, do not."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
