"""Adapters in PEFT's files: adapter_config.json and adapter_model.safetensors. Only LoRA is read (arXiv 2106.09685),
with the scale of arXiv 2312.03732 where use_rslora asks for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hal.checkpoints.reader import Reader
from hal.checkpoints.stored import Stored, open_file, open_tensor, read_json, shown
from hal.errors import ModelLoadError
from hal.weights.base import canonical
from hal.weights.dense import DENSE
from hal.weights.sharding import shard

if TYPE_CHECKING:
    import torch

    from hal.adapters.layers import ModelAdapters
    from hal.config import Topology
    from hal.model_config import ModelConfig
    from hal.models.causal_lm import CausalLM

_CONFIG, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_MAX_RANK = 1 << 14
_FLOATS = "F32", "F16", "BF16", "F64"
# Fields that say how an adapter was trained or begun, or that the stored tensors say better.
_HARMLESS = frozenset((
    "base_model_name_or_path", "revision", "task_type", "peft_type", "peft_version", "inference_mode", "auto_mapping",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "bias", "init_lora_weights",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
    "megatron_core"))
# Ways to begin a training that also change the weights of the base model.
_CHANGE_BASE = "pissa", "olora", "corda", "loftq", "lora_ga"


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's configuration, and where its tensors are stored; values are not read.

    Attributes:
        base: the model that it says it was trained for.
        ranks, scales: of each linear map that it changes, by the map's name in the checkpoint.
        a, b: its tensors, [rank, in] and [out, rank].
    """

    path: Path
    base: str
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    a: Mapping[str, Stored]
    b: Mapping[str, Stored]

    @property
    def max_rank(self) -> int:
        return max(self.ranks.values())

    def check(self, sizes: Mapping[str, tuple[int, int]], max_rank: int) -> None:
        """Check that the adapter fits a model: its names, shapes and values, all of which are read.

        Args:
            sizes: see hal.adapters.layers.target_sizes.

        Raises:
            ModelLoadError: it does not.
        """
        short = sorted({name.rpartition(".")[2] for name in sizes})
        for name in self.ranks:
            if name not in sizes:
                raise ModelLoadError("the adapter changes a module that this model does not have, or that takes no "
                                     "adapter", got=f"{shown(name)} in {self.path}", expected=", ".join(short))
        if self.max_rank > max_rank:
            raise ModelLoadError("the adapter's rank is above the engine's maximum", got=f"{self.max_rank} in "
                                 f"{self.path}", expected=f"at most max_adapter_rank={max_rank}",
                                 hint=f"make the engine with max_adapter_rank={self.max_rank}")
        with open_file(self.path / _WEIGHTS, "pt") as file:
            for name, rank in self.ranks.items():
                size_in, size_out = sizes[name]
                for stored, shape in ((self.a[name], [rank, size_in]), (self.b[name], [size_out, rank])):
                    tensor, what = open_tensor(file, stored), f"{shown(stored.name)} of the adapter"
                    if tensor.get_shape() != shape:
                        hint = (f"it was trained for {shown(self.base)}, and this model has other widths" if rank in
                                tensor.get_shape() else f"{_CONFIG} does not belong to these tensors")
                        raise ModelLoadError(f"{what} has the wrong shape", got=tensor.get_shape(), expected=shape,
                                             hint=hint)
                    if not bool(tensor[:].isfinite().all()):  # or its slot would spoil tokens of other adapters
                        raise ModelLoadError(f"{what} has values that are not finite", got=self.path,
                                             hint="the file is damaged")


def read_adapter(directory: str | Path) -> AdapterFiles:
    """Read an adapter's configuration and the names of its tensors.

    Raises:
        ModelLoadError: a file is missing or damaged, or asks for something that is not supported, which it names.
    """
    path = Path(directory)
    if isfile(path / "adapter_model.bin") and not isfile(path / _WEIGHTS):
        raise ModelLoadError("the adapter is pickled", got=path / "adapter_model.bin", expected=_WEIGHTS,
                             hint="save it with save_pretrained(..., safe_serialization=True)")
    config = Reader(read_json(path / _CONFIG), _CONFIG)
    _refuse(config)
    with open_file(path / _WEIGHTS, "np") as file:
        dtypes = {name: open_tensor(file, Stored(name, path / _WEIGHTS)).get_dtype() for name in file.keys()}  # noqa: SIM118
    found: dict[str, dict[str, Stored]] = {"A": {}, "B": {}}
    modules: dict[str, str] = {}  # PEFT matches patterns with the names of its own
    for name, dtype in dtypes.items():
        parts = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if parts is None or dtype not in _FLOATS:
            raise ModelLoadError("the adapter has a tensor that is not supported", got=f"{shown(name)} ({dtype}) in "
                                 f"{path}", expected=f"{_PREFIX}MODULE.lora_A.weight and lora_B.weight, of "
                                 f"{', '.join(_FLOATS)}")
        module = canonical(parts[1])
        modules[module], found[parts[2]][module] = parts[1], Stored(name, path / _WEIGHTS)
    alone = sorted(found["A"].keys() ^ found["B"].keys())
    if alone or not modules:
        raise ModelLoadError("the adapter is not complete", got=f"{path}: " + (f"one of lora_A and lora_B of {alone[0]}"
                             if alone else "no tensor"), expected="lora_A and lora_B of each module")
    r, alpha = config.size(8, _MAX_RANK, "r"), config.get((int, float), 8, "lora_alpha")
    ranks = {m: int(_of_pattern(config, "rank_pattern", name, r)) for m, name in modules.items()}
    alphas = {m: float(_of_pattern(config, "alpha_pattern", name, alpha)) for m, name in modules.items()}
    root = config.get(bool, False, "use_rslora", null=False)
    scales = {m: alphas[m] / (ranks[m] ** 0.5 if root else ranks[m]) for m in modules}
    return AdapterFiles(path, str(config.data.get("base_model_name_or_path")), ranks, scales, found["A"], found["B"])


def _of_pattern(config: Reader, field: str, module: str, default: float) -> float:
    """The value that the first matching key of rank_pattern or alpha_pattern gives, as PEFT finds it."""
    for key, value in config.get(dict, {}, field, null={}).items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", module)
        except re.error:
            raise config.unusable(field, key, "regular expressions") from None
        if matches:
            if type(value) not in (int, float) or not 0 < value <= _MAX_RANK * 64 or (
                    field == "rank_pattern" and type(value) is not int):
                raise config.unusable(field, value, "a positive number of each module")
            return float(value)
    return default


def _refuse(config: Reader) -> None:
    """Refuse, by name, what would make the adapter compute something else."""
    data = config.data
    kind, bias, begun = (data.get(name, default) for name, default in (("peft_type", "LORA"), ("bias", "none"),
                                                                    ("init_lora_weights", True)))
    wrong: dict[str, Any] = {name: data[name] for name in sorted(data) if name not in _HARMLESS and data[name]}
    if kind != "LORA":
        wrong = {"peft_type": kind}
    elif bias != "none":
        wrong["bias"] = bias
    elif isinstance(begun, str) and begun.startswith(_CHANGE_BASE):
        wrong["init_lora_weights"] = begun
    for name, value in wrong.items():
        hint = "peft's merge_and_unload makes a checkpoint of model and adapter, which needs no support"
        if name == "init_lora_weights":
            hint = "convert it with peft's path_initial_model_for_weight_conversion"
        raise ModelLoadError(f"the adapter's {_CONFIG} has {name}, which is not supported", got=shown(value),
                             expected="plain LoRA", hint=hint)


def slot_values(model: CausalLM, adapters: ModelAdapters, directory: str | Path, topology: Topology | None = None,
                ) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor]]:
    """Of each layer that takes adapters: the layer, and on the host this rank's part of the adapter, A [projections *
    rank, in] and B [out, rank] times the scale, in the layer's dtype. Zeros where the adapter does not change it.

    Args:
        topology: of the rank, if it is not the model's.

    Raises:
        ModelLoadError: see read_adapter.
    """
    import torch

    from hal.models.attention import SelfAttention

    files, topology = read_adapter(directory), topology or model.topology
    orders = {m.qkv: m for m in model.modules() if isinstance(m, SelfAttention) and m.arranged and m.order is not None}
    with open_file(files.path / _WEIGHTS, "pt") as file:
        for layer in adapters.layers:
            rank, spec, at = adapters.rank, layer.spec, 0
            a = torch.zeros(len(layer.outputs) * rank, layer.in_size)
            b = torch.zeros(sum(layer.outputs), rank)
            sources = shard(spec, DENSE.tensors(spec)[0], DENSE.name, topology)[1].sources
            for i, (p, source, size) in enumerate(zip(spec.projections, sources, layer.outputs, strict=True)):
                if p.name in files.ranks:
                    first, last = source.local(topology.axis(spec.mesh_axis))
                    columns = slice(first, last) if spec.sharded == "in" else slice(None)
                    rows = slice(p.start, p.start + p.size) if spec.sharded == "in" else slice(first, last)
                    own_a, own_b = (open_tensor(file, stored[p.name]) for stored in (files.a, files.b))
                    r = files.ranks[p.name]
                    a[i * rank:i * rank + r] = own_a[:, columns]
                    b[at:at + size, :r] = own_b[rows].float() * files.scales[p.name]
                at += size
            if layer in orders:  # its outputs lie in another order than the checkpoint's, as SelfAttention.arrange says
                attention = orders[layer]
                heads = b[:(attention.heads + attention.kv_heads) * attention.head_dim].view(
                    -1, attention.head_dim, rank)
                heads.copy_(heads[:, cast("torch.Tensor", attention.order).cpu()])
            yield layer, a.to(layer.dtype), b.to(layer.dtype)


def targets_of(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """hal.adapters.layers.target_sizes of a whole model, of which no memory is allocated."""
    import torch

    from hal.adapters.layers import target_sizes
    from hal.config import Topology
    from hal.contracts.communicator import LocalCommunicator
    from hal.models import build_model
    from hal.models.ops import Ops

    whole = build_model(config, Topology(), LocalCommunicator(), Ops(), torch.float32, torch.device("meta"))
    return target_sizes(whole)
