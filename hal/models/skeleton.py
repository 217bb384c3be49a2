"""Transformers' own modelling code as a model without weights, and what one traced forward pass says about it.

Only the Transformers backend imports this module, since it loads transformers' modelling code.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from hal.errors import ConfigError, HalError, ModelLoadError
from hal.model_config import ModelConfig
from hal.weights.base import canonical

_NAME = "hal_paged"
_OWN_ATTENTION = "its modelling code has an attention of its own, and calls no function that can be replaced"
_TOKENS = 4  # of the traced forward pass
# Arguments of transformers' attention that change nothing here: there is no dropout, and positions are applied.
_HARMLESS = {"dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "training",
             "position_embeddings", "output_hidden_states", "output_router_logits", "past_key_values", "layer_idx",
             "deterministic", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "target_dtype",
             "implementation", "mask_type", "current_length"}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asks of its attention, without tensor parallelism.

    Attributes:
        module: the name of the module that calls it. sinks: the name of that module's parameter, or None.
    """

    module: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: str | None


@dataclass(slots=True)
class Trace:
    """Attributes:
        calls: in the order of the layers.
        merged: groups of linear layers of one module that get the same tensor, each in the order of their calls.
        stored: for each parameter and each buffer that checkpoints store, the names of the stored tensors. More than
            one: the entries of the parameter's first dimension, each cut into equal parts along the next one.
        base: the name of the model without its head.
        embedding: the stored name of the embedding table, without ".weight".
        tp_plan, pp_plan: as transformers declares them; empty where it declares none.
        num_params: of the whole model.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    merged: list[list[str]] = field(default_factory=list)
    stored: dict[str, list[str]] = field(default_factory=dict)
    embedding: str = ""
    base: str = ""
    tp_plan: dict[str, str] = field(default_factory=dict)
    pp_plan: dict[str, Any] = field(default_factory=dict)
    num_params: int = 0


def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
           scaling: float | None = None, **options: Any) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls. Each layer's module has the one that answers."""
    answer: Callable[..., torch.Tensor] = module.hal_attend  # type: ignore[assignment]
    return answer(query, key, value, attention_mask, scaling, options), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, attend)


def refuse(config: ModelConfig, why: str, got: object = None) -> ConfigError:
    return ConfigError(f"the Transformers backend cannot run {config.architecture}: {why}", got=got,
                       hint="hal certify says what holds for an architecture")


def make(config: ModelConfig, dtype: torch.dtype, device: str, experts: str = "grouped_mm") -> Any:
    """Transformers' model with memory that nothing has touched, in inference mode.

    Raises:
        ConfigError: transformers cannot make it. ModelLoadError: config.json names something that it does not know.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": _NAME}
    if config.code:
        options["trust_remote_code"] = True
    build: Any = transformers.AutoModelForCausalLM.from_config
    try:
        with no_init_weights(), torch.device(device):
            try:
                model = build(load_config(config), experts_implementation=experts, **options)
            except ValueError as error:
                if "experts implementation" not in str(error):
                    raise
                model = build(load_config(config), **options)
    except Exception as error:  # the modelling code of any architecture
        if isinstance(error, KeyError) and error.args == (_NAME,):
            raise refuse(config, _OWN_ATTENTION) from error
        if isinstance(error, KeyError):  # the name of a rope type or an activation
            raise ModelLoadError(f"transformers does not know a value of config.json for {config.architecture}",
                                 got=str(error), hint="config.json is damaged, or needs another release of "
                                 "transformers") from error
        raise refuse(config, "transformers cannot build it with another attention function", _said(error)) from error
    with contextlib.suppress(Exception):  # some configurations take no None
        model.config.pad_token_id = None  # otherwise some models look for padding in the tokens of every step
    return model.eval().requires_grad_(False)


def load_config(config: ModelConfig) -> Any:
    """Transformers' configuration object, from the content of config.json."""
    assert config.source is not None
    if config.code:
        return transformers.AutoConfig.from_pretrained(config.code, trust_remote_code=True)
    return config_object(config.source)


def config_object(source: Mapping[str, Any]) -> Any:
    """Transformers' configuration object from the content of config.json, in which infinity is an object."""
    def decoded(value: dict[str, Any]) -> Any:
        return float(value["__float__"]) if value.keys() == {"__float__"} else value

    return transformers.CONFIG_MAPPING[source["model_type"]].from_dict(
        json.loads(json.dumps(source), object_hook=decoded))


def trace(config: ModelConfig) -> Trace:
    """Run the model once without data, and note what its layers ask for.

    Raises:
        ConfigError: the architecture needs an attention or a state that no part of hal offers.
    """
    return _trace(json.dumps(config.source, sort_keys=True), config.code, config.tie_embeddings, _Keep(config))


class _Keep:
    """An argument that a cache's key leaves out."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keep)


@lru_cache(maxsize=4)
def _trace(source: str, code: str | None, tied: bool, keep: _Keep) -> Trace:
    config = keep.config
    _refuse_layers(config)
    found = Trace()
    model = make(config, torch.float32, "meta", experts="batched_mm")
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise refuse(config, "its forward pass takes no positions", type(model.base_model).__name__)
    inputs: list[tuple[str, Any, int]] = []
    for name, module in model.named_modules():
        module.hal_attend = _Recorder(config, found, name, module)
        if type(module) in (nn.Linear, Conv1D) and name:
            module.register_forward_pre_hook(_note(inputs, name))
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), _without_data(model):
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except HalError:
        raise
    except Exception as error:
        raise refuse(config, "a trial of its forward pass without data and cache fails", _said(error)) from error
    if not found.calls:
        raise refuse(config, _OWN_ATTENTION, type(model).__name__)
    at = [call.module for call in found.calls]
    if len(set(at)) < len(at):
        raise refuse(config, "a layer calls its attention twice", max(at, key=at.count))
    if len(found.calls) != config.num_layers:
        raise refuse(config, "not every layer has exactly one attention", f"{len(found.calls)} calls in "
                     f"{config.num_layers} layers")
    found.merged = _groups(inputs)
    found.stored = _stored(config, model)
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    found.base = embedding.partition(".")[0]
    found.embedding = found.stored[f"{embedding}.weight"][0].removesuffix(".weight")
    found.tp_plan, found.pp_plan = dict(model.tp_plan or {}), dict(getattr(model, "_pp_plan", None) or {})
    found.num_params = sum(p.numel() for p in model.parameters())
    return found


def _refuse_layers(config: ModelConfig) -> None:
    text = load_config(config).get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention", "attention",
                                                             "global", "local"}
    if "chunked_attention" in kinds:
        raise refuse(config, "some of its layers attend within chunks of the text")
    if kinds:
        raise refuse(config, "some of its layers keep another state than keys and values, or need a mask of their own",
                     ", ".join(sorted(map(str, kinds))))


class _Recorder:
    def __init__(self, config: ModelConfig, found: Trace, name: str, module: nn.Module) -> None:
        self.config, self.found, self.name, self.module = config, found, name, (module,)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float | None,
                 options: Mapping[str, Any]) -> torch.Tensor:
        if options.get("is_causal", getattr(self.module[0], "is_causal", True)) is False:
            raise refuse(self.config, "its attention is in both directions", self.name)
        if mask is not None:
            raise refuse(self.config, "its attention needs a mask or bias of its own", self.name)
        if q.shape[2] != k.shape[2] or q.shape[2] != _TOKENS:
            raise refuse(self.config, "its attention looks at other keys than those of the tokens", self.name)
        options = {n: o for n, o in options.items() if o is not None}
        sinks, window, softcap = (options.pop(n, None) for n in ("s_aux", "sliding_window", "softcap"))
        if other := sorted(options.keys() - _HARMLESS):
            raise refuse(self.config, "its attention has arguments that the paged attention does not know",
                         ", ".join(other))
        names = [n for n, p in self.module[0].named_parameters(recurse=False) if p is sinks]
        if sinks is not None and not names:
            raise refuse(self.config, "its attention sinks are not a parameter of the layer", self.name)
        self.found.calls.append(AttentionCall(
            self.name, q.shape[1], k.shape[1], q.shape[3], v.shape[3], q.shape[3] ** -0.5 if scale is None else scale,
            window or None, softcap or None, names[0] if names else None))
        return q.new_empty(1, _TOKENS, q.shape[1], v.shape[3])


def _note(inputs: list[tuple[str, Any, int]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            inputs.append((name, args[0], args[0]._version))  # the list keeps the tensor, so that ids stay unique
    return hook


def _groups(inputs: list[tuple[str, Any, int]]) -> list[list[str]]:
    """Linear layers that follow one another with the same input, in the same module."""
    groups: list[list[str]] = []
    last: tuple[Any, int] | None = None
    for name, x, version in inputs:
        together = last is not None and x is last[0] and version == last[1] and (
            groups[-1][0].rpartition(".")[0] == name.rpartition(".")[0])
        if together:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x, version
    return [group for group in groups if len(group) > 1]


@contextlib.contextmanager
def _without_data(model: nn.Module) -> Iterator[None]:
    """Layers of experts choose by values, which a model without data does not have. Then only the shape counts."""
    for module in model.modules():
        if any(word in type(module).__name__.lower() for word in ("moe", "expert", "sparse", "router")):
            module.forward = _shape_only(module.forward)
    yield


def _shape_only(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        try:
            return forward(*args, **options)
        except (NotImplementedError, RuntimeError):
            return torch.empty_like(args[0] if args else options["hidden_states"])
    return run


def _stored(config: ModelConfig, model: Any) -> dict[str, list[str]]:
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    # `canonical` drops a prefix where a checkpoint has one.
    model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange)]
    names: dict[str, list[str]] = {}
    for name, tensor in model.state_dict().items():
        if not model._weight_conversions:
            names[name] = [canonical(name)]
            continue
        try:
            reverted = revert_weight_conversion(model, {name: tensor})
            if len(reverted) > 1:
                _check_parts(tensor.shape, [x.shape for x in reverted.values()])
                parts = len(reverted) // len(tensor)
                # Each stored part of a small copy has the number of its place.
                numbers = torch.arange(len(reverted)).view(len(tensor), parts, *[1] * (tensor.ndim - 2))
                coded = revert_weight_conversion(model, {name: numbers})
                reverted = dict(sorted(coded.items(), key=lambda item: int(item[1].flatten()[0])))
            elif next(iter(reverted.values())).shape != tensor.shape:
                raise ValueError("the stored tensor has another shape")
        except Exception as error:
            raise refuse(config, "its checkpoints store a weight in a way that hal's reader does not know",
                         f"{name}: {_said(error)}") from error
        names[name] = [canonical(stored) for stored in reverted]
    return names


def _check_parts(whole: torch.Size, parts: list[torch.Size]) -> None:
    each, rest = divmod(len(parts), whole[0])
    if rest or any(part != (whole[1] // each, *whole[2:]) for part in parts):
        raise ValueError(f"{len(parts)} parts of the shape {list(parts[0])} of {list(whole)}")


def _said(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text:.160}"
