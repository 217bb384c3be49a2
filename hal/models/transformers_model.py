"""Any decoder of transformers: its own modelling code, with our attention, linear layers, weights and communication.

The model's tp plan says how linear layers are sharded, and its pp plan where the pipeline may be cut. Linear layers
that get the same input are merged, which one traced forward pass shows (hal.models.skeleton).
"""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from hal.contracts.attention import AttentionSpec, ForwardContext, LayerAttention
from hal.contracts.inputs import IntermediateTensors
from hal.model_config import ModelConfig
from hal.models import skeleton, swaps
from hal.models.causal_lm import CausalLM
from hal.models.layers import Build, Linear
from hal.models.skeleton import AttentionCall, Trace, refuse
from hal.weights import LinearSpec, Projection, Scheme
from hal.weights.base import canonical
from hal.weights.dense import BIAS, DENSE
from hal.weights.formats import mergeable
from hal.weights.sharding import ParameterSpec, StoredSlice

# Of transformers' tp plan: the dimension that is sharded.
_SHARDED = {"colwise": "out", "packed_colwise": "out", "colwise_gather_output": "out", "rowwise": "in",
            "rowwise_split_input": "in"}
_REPLICATED = {"replicated_with_grad_allreduce", "embedding_rowwise"}


class TransformersModel(CausalLM):
    """A hal.models.causal_lm.CausalLM around a model of transformers.

    Raises:
        ConfigError: the architecture needs what hal does not have, or has no plan for this topology.
    """

    intermediates = ("hidden_states",)

    def __init__(self, config: ModelConfig, build: Build) -> None:
        nn.Module.__init__(self)
        self.trace = skeleton.trace(config)
        hf = skeleton.make(config, build.dtype, "cpu" if build.device.type != "meta" else "meta")
        self.sinks: dict[str, nn.Parameter] = {}
        parts = _Parts(config, build, self.trace, hf)
        parts.cut()
        parts.replace()
        self.begin(config, build)
        self.hf, self.base = hf, getattr(hf, self.trace.base)
        self.given = _Given()
        setattr(hf, self.trace.base, self.given)
        self.received = parts.received
        self.step = parts.step
        here = iter(range(len(self.stage)))
        modules = dict(self.base.named_modules(prefix=self.trace.base))
        for layer in self.stage:
            call = self.trace.calls[layer]
            module = modules[call.module]
            module.hal_attend = _Attend(self.step, next(here))
            if call.sinks is not None:
                object.__setattr__(self.caches[layer], "sinks", getattr(module, call.sinks))

    def declare_caches(self, build: Build) -> list[Any]:
        tp = build.topology.tp
        return [_spec(self.config, call, tp if self.shards(call) else 1) for call in self.trace.calls]

    def shards(self, call: AttentionCall) -> bool:
        """Whether the plan gives each rank some of the heads; otherwise it gathers the projections on every rank."""
        return any(style == "colwise" and fnmatch.fnmatchcase(f"{call.module}.x", f"{pattern.rpartition('.')[0]}.x")
                   for pattern, style in self.trace.tp_plan.items())

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext,
                intermediate: IntermediateTensors | None = None) -> torch.Tensor | IntermediateTensors:
        self.step.attention = context.attention
        inputs: dict[str, Any]
        if intermediate is None:
            inputs = {"input_ids": input_ids.long()[None]}
        else:
            self.received.hidden = intermediate["hidden_states"][None]
            inputs = {"inputs_embeds": self.received.hidden}
        hidden = self.base(position_ids=positions.long()[None], use_cache=False, **inputs)[0][0]
        # A compiler that traces lazily computes what is still held after the trace, and that would use up the caches.
        self.step.attention = self.received.hidden = None
        self.step.rotaries.clear()
        return hidden if self.topology.is_last_stage else self.make_intermediate(hidden)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.given.hidden = hidden[None]
        logits: torch.Tensor = self.hf(inputs_embeds=self.given.hidden, use_cache=False).logits[0]
        self.given.hidden = None
        return logits


class _Step:
    """What the layers share in the running step: its attention, and the values of rotary embeddings."""

    attention: LayerAttention | None = None

    def __init__(self) -> None:
        self.rotaries: swaps.Rotaries = {}


class _Attend:
    """Answers the attention call of one layer."""

    def __init__(self, step: _Step, layer: int) -> None:
        self.step, self.layer = step, layer

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: Any, options: Any,
                 ) -> torch.Tensor:
        """[1, heads, num_tokens, head_dim] -> [1, num_tokens, heads, value_dim]."""
        heads, tokens = q.shape[1], q.shape[2]
        q, k, v = (swaps.by_token(x) for x in (q, k, v))
        assert self.step.attention is not None, "a layer runs within forward"
        return self.step.attention(self.layer, q, k, v).view(1, tokens, heads, -1)


class _Hidden(BaseModelOutputWithPast):
    """Hidden states alone: every other output is absent, whatever it is called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands for the base model where transformers computes logits: it returns hidden states that are known."""

    hidden: torch.Tensor | None = None

    @property
    def decoder(self) -> _Given:
        """Some models call this part of the base model."""
        return self

    def forward(self, *args: Any, **options: Any) -> _Hidden:
        return _Hidden(last_hidden_state=self.hidden)


class _Received:
    """Gives the first layer of a later pipeline stage the hidden states of the stage before."""

    hidden: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if args:
            return (self.hidden, *args[1:]), options
        return args, {**options, "hidden_states": self.hidden}


class _Absent(nn.Module):
    """A layer of another pipeline stage."""

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return x


class HfLinear(Linear):
    """A Linear whose input and output have transformers' shapes.

    Attributes:
        in_features, out_features: of the whole layer, as modelling code reads them.
    """

    def __init__(self, build: Build, spec: LinearSpec, *, bias: bool, style: str | None,
                 weight: nn.Parameter | None = None, scheme: Scheme | None = None) -> None:
        super().__init__(build, spec, bias=bias and (spec.sharded != "in" or build.topology.tp_rank == 0),
                         weight=weight, scheme=scheme)
        self.in_features, self.out_features = spec.in_size, sum(p.size for p in spec.projections)
        self.gathered = style == "colwise_gather_output" and build.topology.tp > 1
        self.split = build.topology.tp_rank if style == "rowwise_split_input" and build.topology.tp > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if self.split is not None:
            size = self.weight.shape[1] if self.is_dense else self.in_features
            x = x.narrow(-1, self.split * size, size)
        y = super().forward(x.reshape(-1, x.shape[-1]))
        if self.gathered:
            y = self.communicator.all_gather(y)[:, :self.out_features]
        return y.view(*x.shape[:-1], y.shape[-1])


class _Merged(HfLinear):
    """The first of several layers that get the same input. It computes them all, and keeps what the others return."""

    kept: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def all(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of all layers, side by side."""
        return super().forward(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = torch.split(self.all(x), list(self.outputs), -1)
        self.kept = x, rest
        return first


class _Following(nn.Module):
    """Returns what the first layer of its group computed."""

    def __init__(self, first: _Merged, place: int, projection: Projection, in_size: int) -> None:
        super().__init__()
        self.first = (first,)  # in a tuple, so that it is not a child of this module too
        self.place, self.in_features, self.out_features = place, in_size, projection.size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first[0]
        assert first.kept is not None and first.kept[0] is x, "the layer was traced with its group's input"
        found = first.kept[1][self.place]
        if self.place == len(first.kept[1]) - 1:
            first.kept = None
        return found


class _Parts:
    """Replaces the layers and parameters of a model of transformers by ours."""

    def __init__(self, config: ModelConfig, build: Build, trace: Trace, hf: Any) -> None:
        self.config, self.build, self.trace, self.hf = config, build, trace, hf
        self.step, self.received = _Step(), _Received()
        self.made: dict[int, nn.Parameter] = {}
        if build.topology.tp > 1 and not trace.tp_plan:
            raise refuse(config, "transformers declares no tensor-parallel plan for it", f"tp={build.topology.tp}")

    def cut(self) -> None:
        """Take out what other pipeline stages compute."""
        topology, config = self.build.topology, self.config
        if topology.pp == 1:
            return
        if len(self.trace.pp_plan) < 2:  # some have the head alone
            raise refuse(config, "transformers declares no pipeline plan for it", f"pp={topology.pp}")
        base, table = getattr(self.hf, self.trace.base), self.hf.get_input_embeddings()
        if others := [n for n, m in base.named_modules() if isinstance(m, nn.Embedding) and m is not table]:
            raise refuse(config, "its layers need embeddings that a later pipeline stage has no tokens for", others[0])
        for name in self.trace.pp_plan:
            owner = base if hasattr(base, name.rpartition(".")[2]) else self.hf
            name = name.rpartition(".")[2]
            child = getattr(owner, name)
            if isinstance(child, nn.ModuleList):
                if len(child) != config.num_layers:
                    raise refuse(config, "a layer of its pipeline plan has several attentions",
                                 f"{config.num_layers} attentions in {len(child)} layers")
                stage = topology.layers(config.num_layers)
                for i in range(len(child)):
                    if i not in stage:
                        child[i] = _Absent()
                if not topology.is_first_stage:
                    child[stage.start].register_forward_pre_hook(self.received, with_kwargs=True)
            elif not (topology.is_first_stage if child is table else topology.is_last_stage):
                setattr(owner, name, _Absent())

    def replace(self) -> None:
        hf, followers = self.hf, set[str]()
        groups = {group[0]: group for group in self.trace.merged}
        modules = dict(hf.named_modules())
        for name, module in modules.items():
            if type(module) not in (nn.Linear, Conv1D) or name in followers:
                continue
            group = groups.get(name, [name])
            apart = self.style(name) in ("packed_colwise", "colwise_gather_output")
            if len({self.style(n) for n in group}) > 1 or apart or any(
                    (modules[n].bias is None) != (module.bias is None) for n in group) or not self.mergeable(group):
                group = [name]
            followers.update(group[1:])
            made = self.linears([(n, modules[n]) for n in group])
            for n, m in zip(group, made, strict=True):
                parent, _, child = n.rpartition(".")
                setattr(hf.get_submodule(parent), child, m)
        for name, module in list(hf.named_modules()):
            if not isinstance(module, Linear):
                self.own(name, module)
                if self.style(name) == "moe_tp_experts":
                    module.register_forward_hook(self.sum)
                swaps.swap(module, self.build.ops, self.step.rotaries)

    def mergeable(self, group: list[str]) -> bool:
        names = group if len(group) > 1 else []
        parts = tuple(Projection(self.stored(f"{n}.weight").removesuffix(".weight"),
                                 self.hf.get_submodule(n).out_features) for n in names)
        return not parts or mergeable(LinearSpec(1, parts, "out"), self.build.schemes)

    def sum(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Each rank has a part of every expert's inner layer."""
        return self.build.communicator.all_reduce(output)

    def style(self, name: str) -> str | None:
        """The entry of the tp plan for a module or parameter; None without tensor parallelism or an entry."""
        if self.build.topology.tp == 1:
            return None
        exact = [s for pattern, s in self.trace.tp_plan.items() if fnmatch.fnmatchcase(name, pattern)]
        if not exact:
            return None
        if exact[0] not in _SHARDED and exact[0] not in _REPLICATED and exact[0] != "moe_tp_experts":
            raise refuse(self.config, f"its tensor-parallel plan has the entry {exact[0]!r}", name)
        return exact[0]

    def linears(self, group: list[tuple[str, Any]]) -> list[nn.Module]:
        (name, module), tp = group[0], self.build.topology.tp
        style, transposed = self.style(name), type(module) is Conv1D
        sharded = _SHARDED.get(style or "")
        weights = [m.weight.t() if transposed else m.weight for _, m in group]
        in_size = weights[0].shape[1]
        stored = [self.stored(f"{n}.weight").removesuffix(".weight") for n, _ in group]
        head = module is self.hf.get_output_embeddings()
        tied = head and self.config.tie_embeddings
        scheme = self.build.head_scheme(tied) if head else None
        if tied:
            stored = [self.trace.embedding]
        whole = None if sharded else 1  # all ranks compute one head
        projections = tuple(Projection(n, w.shape[0], whole) for n, w in zip(stored, weights, strict=True))
        if style == "packed_colwise":
            half = weights[0].shape[0] // 2
            projections = tuple(Projection(stored[0], half, None, at, 2 * half) for at in (0, half))
        sizes = [in_size] if sharded == "in" else [p.size for p in projections] if sharded else []
        if any(size % tp for size in sizes) and style != "colwise_gather_output":
            raise refuse(self.config, f"tp={tp} does not divide a layer", f"{name}: {sizes}")
        spec = LinearSpec(in_size, projections, "in" if sharded == "in" else "out", transposed)
        shared = None
        if tied and tp == 1 and not (scheme and scheme.on_load):
            table = self.hf.get_input_embeddings()
            if isinstance(getattr(table, "weight", None), nn.Parameter):
                shared = self.parameter(f"{self.embedding_path()}.weight", table.weight)
        kind = HfLinear if len(group) == 1 else _Merged
        first = kind(self.build, spec, bias=module.bias is not None and not tied, style=style, weight=shared,
                     scheme=scheme)
        if tied and module.bias is not None:  # which is stored beside the head, or elsewhere under another name
            own = self.hf.all_tied_weights_keys.get(f"{name}.bias", f"{name}.bias")
            own = self.stored(own).removesuffix(".bias")
            spec = replace(spec, projections=(Projection(own, weights[0].shape[0], whole),))
            first.bias = self.build.linear_tensor(spec, BIAS, DENSE)
        return [first, *(_Following(first, i, projections[i + 1], in_size) for i in range(len(group) - 1)
                         if isinstance(first, _Merged))]

    def embedding_path(self) -> str:
        table = self.hf.get_input_embeddings()
        path: str = next(n for n, m in self.hf.named_modules() if m is table)
        return path

    def stored(self, name: str) -> str:
        names = self.trace.stored.get(name) or [canonical(name)]
        if len(names) > 1:
            raise refuse(self.config, "its checkpoints store a linear layer in parts", name)
        return names[0]

    def own(self, name: str, module: nn.Module) -> None:
        """Replace the parameters and buffers that a module holds itself."""
        dot = f"{name}." if name else ""
        for key, parameter in list(module.named_parameters(recurse=False)):
            names = self.trace.stored.get(dot + key) or [canonical(dot + key)]
            if len(names) > 1:
                self.parts(dot + key, module, key, parameter, names)
            else:
                setattr(module, key, self.parameter(dot + key, parameter))
        for key, buffer in list(module.named_buffers(recurse=False)):
            if key in module._non_persistent_buffers_set:
                module.register_buffer(key, buffer.to(self.build.device), persistent=False)
            else:
                del module._buffers[key]
                setattr(module, key, self.parameter(dot + key, buffer))

    def parameter(self, name: str, old: torch.Tensor) -> nn.Parameter:
        """A parameter of ours for one of theirs; the same one where theirs is shared."""
        if id(old) in self.made:
            return self.made[id(old)]
        style, build = self.style(name), self.build
        dtype = old.dtype if not old.is_floating_point() else None if old.dtype == build.dtype else old.dtype
        stored, shape = self.stored(name), tuple(old.shape)
        if style in _SHARDED:
            if len(shape) != 1 or style != "colwise" or shape[0] % build.topology.tp:
                raise refuse(self.config, f"its tensor-parallel plan shards a parameter as {style!r}", name)
            source = StoredSlice(stored, shape, 0, shape[0], 0, build.topology.tp)
            made = build.parameter((shape[0] // build.topology.tp,), ParameterSpec(0, 0, (source,)), dtype)
        else:
            source = StoredSlice(stored, shape, 0 if shape else None, shape[0] if shape else 1)
            made = build.parameter(shape, ParameterSpec(None, 0, (source,)), dtype)
        self.made[id(old)] = made
        return made

    def parts(self, name: str, module: nn.Module, key: str, old: torch.Tensor, names: list[str]) -> None:
        """A parameter whose entries along the first dimension are stored one by one, such as the weights of experts.
        Each entry becomes a parameter of its own, in memory that the modelling code sees as one tensor."""
        build, style, tp = self.build, self.style(name), self.build.topology.tp
        experts, size = old.shape[0], tuple(old.shape[1:])
        each = len(names) // experts
        stored = (size[0] // each, *size[1:])
        dim = {"out": 0, "in": 1}.get(_SHARDED.get(style or "", ""))
        if dim is not None and (dim >= len(size) or stored[dim] % tp):
            raise refuse(self.config, f"tp={tp} does not divide the experts' weights", f"{name}: {list(stored)}")
        local = list(size)
        if dim is not None:
            local[dim] //= tp
        whole = torch.empty(experts, *local, dtype=build.dtype, device=build.device)
        delattr(module, key)
        setattr(module, key, whole)
        held = nn.ParameterList()
        for i in range(experts):
            at = names[i * each:(i + 1) * each]
            if dim == 1:
                sources = tuple(StoredSlice(n, stored, 1, stored[1], 0, tp) for n in at)
            else:
                sources = tuple(StoredSlice(n, stored, 0, stored[0], 0, 1 if dim is None else tp) for n in at)
            part = nn.Parameter(whole[i], requires_grad=False)
            part.spec = ParameterSpec(dim, dim or 0, sources)  # type: ignore[attr-defined]
            held.append(part)
        module.register_module(f"hal_{key}", held)


def _spec(config: ModelConfig, call: AttentionCall, tp: int) -> AttentionSpec:
    for what, heads in (("heads", call.num_heads), ("key-value heads", call.num_kv_heads)):
        if heads % tp:
            raise refuse(config, f"tp={tp} does not divide the {what} of a layer", heads)
    return AttentionSpec(call.num_heads // tp, call.num_kv_heads // tp, call.head_dim, call.scale, call.window,
                         call.value_dim, call.softcap)
