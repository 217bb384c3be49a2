"""The configuration of an engine: plain values without torch, which are checked at construction."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hal.errors import ConfigError
from hal.files import local_checkpoint
from hal.model_config import ModelConfig, ModelImpl
from hal.values import described, plain

BUNDLED_MODEL = Path(__file__).parent / "assets" / "add-tiny"
DType = Literal["auto", "float32", "bfloat16", "float16"]
WirePolicy = Literal["model-input", "request", "none"]
KVDType = Literal["auto", "fp8"]
Quantize = Literal["fp8", "int8", "int4"]
ExecutorName = Literal["multiprocess", "ray"]
GenerationConfig = Literal["auto", "none"]
Pooling = Literal["auto", "none", "cls", "mean", "mean_sqrt", "max", "last"]
MOST_STEPS = 64  # decode steps of one message
AUTO_STEPS = 8  # steps_per_message="auto"
_LARGEST = 2**31 - 1
_INTEGERS = {"tp": 1, "pp": 1, "ep": 1, "max_num_seqs": 1, "max_num_batched_tokens": 1, "block_size": 1,
             "max_model_len": 1, "num_blocks": 1, "num_cpu_blocks": 0, "speculative_tokens": 1,
             "draft_tp": 1, "max_adapters": 0, "max_adapter_rank": 1}  # and the smallest value of each
_OPTIONAL = ("max_model_len", "num_blocks", "kv_cache_bytes", "async_scheduling", "speculate",
             "draft_model", "chat_template", "itl_target_ms")  # may be None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Attributes:
        model: checkpoint directory in Hugging Face format, or a GGUF file; a leading "~" is expanded. An id of the
            Hugging Face hub stands for its files in the local cache; nothing is downloaded.
        device: a backend's name, "auto", or "module:attribute" of a Backend that is not installed as an entry point.
        dtype: of weights and KV cache; "auto" takes the checkpoint's where the backend has it, else float32.
        kv_dtype: of the KV cache: "auto" is that of the weights, "fp8" (e4m3) holds twice the tokens of 16 bits at
            some loss of accuracy, with the scales of the checkpoint where it has any, and otherwise unscaled.
        quantize: the form that the linear layers' weights of a dense checkpoint get as they are read: "fp8" and "int8"
            have a scale for each output, "int4" a scale and a zero point for 64 inputs. None keeps them as they are.
        tp, pp: tensor and pipeline parallel sizes; the engine has tp * pp ranks.
        ep: expert parallel size, a divisor of tp: the tp ranks of a stage are grouped anew for the layers that hold
            whole experts, so ep adds no rank.
        max_model_len: longest prompt + output in tokens; None takes the model's context length, or what the KV cache
            holds where that is less and num_blocks is None.
        max_num_seqs: sequences in one step. max_num_batched_tokens: tokens in one step (longer prompts are chunked).
        itl_target_ms: milliseconds between two tokens of a sequence that chunks of prompts shall not exceed: while
            sequences decode, a step takes as many prompt tokens as its expected time allows, and at least block_size.
            None bounds nothing. Only with pp=1, and not with wire="none".
        block_size: tokens per KV block. num_blocks: KV blocks; None sizes them from kv_cache_bytes, the bytes
            that each rank gives its KV cache, or else from free memory * memory_fraction.
        num_cpu_blocks: host blocks that preempted sequences are swapped to; 0 recomputes them instead.
        prefix_caching: reuse the KV blocks of equal prefixes.
        async_scheduling: prepare a step before the tokens of the one before it are known on the host; None: where the
            backend runs steps while the host goes on. Not with pp > 1.
        speculate: what proposes tokens for the model to verify (docs/speculation.md): "ngram", "draft" (a smaller
            model), "eagle" (heads trained for the model), "module:attribute" of a Proposer; None proposes nothing.
        speculative_tokens: the most tokens that are proposed at a time for a sequence.
        draft_model: checkpoint directory of "draft" or "eagle". draft_tp: tensor parallel size of it, a divisor of tp.
        steps_per_message: the most decode steps that ranks take for one message, up to 64, so that the host works once
            for so many tokens. "auto": 8 while no request waits, and 1 where something needs one step at a time. Above
            1 it needs pp=1.
        max_adapters: adapters (LoRA, docs/adapters.md) that may be loaded at a time; their memory is allocated at the
            start. max_adapter_rank: the largest rank of one.
        executor: what starts the other ranks: this process on this host, or Ray on the nodes of a cluster.
        wire: what a step's message holds (see docs/distributed.md). With "none" there is no message: torchrun starts
            every rank, each runs this same program, and their schedulers decide alike.
        control_plane: the mechanism: "local", "shm", "gloo", "collectives" (the backend's) or "ray"; "auto" picks of
            the first three. With "gloo" and "collectives" ranks share no memory: the CPU's data plane is gloo too.
        heartbeat: seconds without a sign of life after which a rank in another process counts as failed.
        batch_invariant: a request gives the same tokens and logprobs, to the last bit, whatever else is in its batch
            and however its prompt is cut into chunks. It fixes the kernels that otherwise depend on the number of
            rows, so it costs speed. Only where the backend offers it; with tp up to 2, and without speculation.
        expert_loads: count how many tokens each expert computes (Stats.expert_loads). It costs one small operation in
            each layer with experts. Only with pp=1, for native models, and where the device can.
        graphs: capture or compile the shapes of steps where the backend can; False runs every step eagerly.
        model_impl: what runs the model: "native" is a definition of hal.models, "transformers" is transformers' own
            modelling code on this engine's attention, linear layers and communication, and "auto" takes a native
            definition where there is one.
        generation_config: "auto" takes the sampling parameters of a request that gives none from the checkpoint's
            generation_config.json: temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens. "none" does
            not. End-of-sequence ids are read from it in both cases.
        pooling: how the hidden states of a text become its embedding. "auto" takes the checkpoint's modules.json, and a
            checkpoint without that file generates; "none" lets a model generate that has it; the other values are those
            of hal.model_config.EmbeddingConfig.
        chat_template: a Jinja file that takes the place of the checkpoint's chat template.
        random_weights: initialise instead of loading (benchmarks of a shape without a checkpoint).
        trust_remote_code: run the checkpoint's own Python code where its tokenizer or its model is made of that. No
            certificate covers a model of such code.
        seed: of requests that give none.
    """

    model: str = str(BUNDLED_MODEL)
    device: str = "auto"
    dtype: DType = "auto"
    kv_dtype: KVDType = "auto"
    quantize: Quantize | None = None
    tp: int = 1
    pp: int = 1
    ep: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    itl_target_ms: float | None = None
    block_size: int = 16
    num_blocks: int | None = None
    num_cpu_blocks: int = 0
    kv_cache_bytes: int | None = None
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    async_scheduling: bool | None = None
    speculate: str | None = None
    speculative_tokens: int = 4
    draft_model: str | None = None
    draft_tp: int = 1
    steps_per_message: int | Literal["auto"] = 1
    max_adapters: int = 0
    max_adapter_rank: int = 16
    executor: ExecutorName = "multiprocess"
    wire: WirePolicy = "model-input"
    control_plane: str = "auto"
    heartbeat: float = 30.0
    batch_invariant: bool = False
    expert_loads: bool = False
    graphs: bool = True
    model_impl: ModelImpl = "auto"
    generation_config: GenerationConfig = "auto"
    pooling: Pooling = "auto"
    chat_template: str | None = None
    random_weights: bool = False
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError, naming the option. Numbers of numpy and torch become Python's own."""
        for name, low in _INTEGERS.items():
            self._take(name, (int,), f"an integer from {low} to {_LARGEST}", low, _LARGEST)
        self._take("kv_cache_bytes", (int,), "a number of bytes", 1, 2**63 - 1)
        self._take("seed", (int,), "a 64-bit integer", -(2**63), 2**63 - 1)
        if not (isinstance(self.steps_per_message, str) and self.steps_per_message == "auto"):
            self._take("steps_per_message", (int,), f'an integer from 1 to {MOST_STEPS}, or "auto"', 1, MOST_STEPS)
        for name, high in (("memory_fraction", 1.0), ("heartbeat", 86400.0), ("itl_target_ms", 86400e3)):
            self._take(name, (int, float), f"a number above 0, up to {high:g}", math.ulp(0.0), high)
        for name in ("prefix_caching", "batch_invariant", "expert_loads", "graphs", "random_weights",
                     "trust_remote_code", "async_scheduling"):
            self._take(name, (bool,), "true or false")
        for name in ("device", "control_plane", "speculate"):
            self._take(name, (str,), "a text")
        for name in ("model", "draft_model", "chat_template"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
            self._take(name, (str,), "the path of a file" if name == "chat_template" else "the path of a directory")
            if getattr(self, name) is not None:
                object.__setattr__(self, name, local_checkpoint(os.path.expanduser(getattr(self, name))))
        for name, kind in (("dtype", DType), ("kv_dtype", KVDType), ("wire", WirePolicy), ("executor", ExecutorName),
                           ("model_impl", ModelImpl), ("quantize", Quantize), ("pooling", Pooling),
                           ("generation_config", GenerationConfig)):
            value = plain(getattr(self, name))
            if value is None and name == "quantize":
                continue
            if not isinstance(value, str) or value not in get_args(kind):
                raise ConfigError(f"unknown {name}", got=described(value), expected=", ".join(get_args(kind)))
            object.__setattr__(self, name, value)
        if self.tp % self.ep:
            raise ConfigError("ep groups the tensor-parallel ranks of a stage", got=f"ep={self.ep}, tp={self.tp}",
                              expected="an ep that divides tp", hint="ep=1 cuts experts over tp instead")
        if self.async_scheduling and self.pp > 1:
            raise ConfigError("async_scheduling keeps pending tokens within one pipeline stage", got=f"pp={self.pp}",
                              expected="pp=1, or async_scheduling=False: stages overlap as it is")
        if self.pp > 1 and self.steps_per_message not in (1, "auto"):
            raise ConfigError("steps_per_message keeps the sampled tokens within one pipeline stage",
                              got=f"steps_per_message={self.steps_per_message}, pp={self.pp}",
                              expected='steps_per_message=1 or "auto", or pp=1',
                              hint="tp divides a model without stages")
        if self.itl_target_ms is not None and (self.pp > 1 or self.wire == "none"):
            raise ConfigError("itl_target_ms bounds steps by the times that one scheduler measures for whole steps",
                              got=f"pp={self.pp}, wire={self.wire!r}", expected="pp=1, and a wire policy with messages",
                              hint="max_num_batched_tokens bounds a step in any layout")
        if self.expert_loads and self.pp > 1:
            raise ConfigError("expert_loads counts on the driver's stage, which has some of the layers",
                              got=f"expert_loads=True, pp={self.pp}", expected="pp=1")
        if self.batch_invariant and self.max_adapters:
            raise ConfigError("batch_invariant has no kernels for the products of adapters",
                              got=f"max_adapters={self.max_adapters}", expected="max_adapters=0, or no batch_invariant")
        if self.batch_invariant and (self.tp > 2 or self.speculate is not None):
            raise ConfigError("batch_invariant has one order of every sum, which collectives of more than two ranks "
                              "and the verification of drafts do not have", expected="tp up to 2, and no speculation",
                              got=f"tp={self.tp}, speculate={self.speculate!r}")
        if self.speculate is not None:
            self._check_speculation()
        elif self.draft_model is not None:
            raise ConfigError("a draft model without speculation does nothing", got=f"draft_model={self.draft_model!r}",
                              expected='speculate="draft" or "eagle"')

    def _check_speculation(self) -> None:
        if self.async_scheduling:
            raise ConfigError("async_scheduling prepares a step before the drafts of the one before it are verified",
                              got=f"speculate={self.speculate!r}", expected="async_scheduling=None or False")
        if self.steps_per_message not in (1, "auto"):
            raise ConfigError("speculation gives sequences several tokens a message by itself",
                              got=f"speculate={self.speculate!r}, steps_per_message={self.steps_per_message}",
                              expected='steps_per_message=1 or "auto"')
        if self.max_samples > self.max_num_batched_tokens:
            raise ConfigError("a step cannot verify so many drafts",
                              got=f"speculative_tokens={self.speculative_tokens}",
                              expected=f"less than max_num_batched_tokens={self.max_num_batched_tokens}")
        if (self.num_blocks or _LARGEST) - 1 < -(-self.max_samples // self.block_size):
            raise ConfigError("the KV cache cannot hold the drafts of one sequence",
                              got=f"speculative_tokens={self.speculative_tokens}, num_blocks={self.num_blocks} of "
                              f"{self.block_size} tokens", expected="fewer drafts, or more blocks")
        if (self.speculate in ("draft", "eagle")) and self.draft_model is None:
            raise ConfigError(f"speculate={self.speculate!r} needs a draft model", got="draft_model=None",
                              expected="the path of its checkpoint directory")
        if self.tp % self.draft_tp:
            raise ConfigError("the draft model runs on ranks of the target", got=f"draft_tp={self.draft_tp}, "
                              f"tp={self.tp}", expected="a draft_tp that divides tp")

    @property
    def max_samples(self) -> int:
        """The most tokens of a sequence that a step samples."""
        return 1 if self.speculate is None else 1 + self.speculative_tokens

    def longest_sequence(self, model: ModelConfig) -> int:
        """The most tokens of a sequence, prompt and output: max_model_len, or else the model's context.

        Raises:
            ConfigError: max_model_len is longer than the model's context.
        """
        if (self.max_model_len or 0) > model.max_position:
            raise ConfigError("max_model_len is longer than the model's context", got=self.max_model_len,
                              expected=f"at most {model.max_position}")
        return self.max_model_len or model.max_position

    def _take(self, name: str, kinds: tuple[type, ...], expected: str, low: float = 0, high: float = 1) -> None:
        """Keep an option as a plain Python value, or refuse it. `low` and `high` are the bounds of a number."""
        given = getattr(self, name)
        value: Any = plain(given)
        if value is None and name in _OPTIONAL:
            return
        if type(value) not in kinds or value == "" or (not isinstance(value, str) and not low <= value <= high):
            raise ConfigError(f"{name} is not usable", got=described(given), expected=expected)
        object.__setattr__(self, name, value)  # the dataclass is frozen


AXES = "tp", "pp", "ep"


@dataclass(frozen=True, slots=True)
class Axis:
    """A rank's group along one axis of the mesh: the ranks whose other coordinates are the same.

    Attributes:
        name: of AXES. size: how many ranks the group has. rank: this rank's coordinate, from 0.
        ranks: the group's ranks, by their coordinate.
    """

    name: str
    size: int
    rank: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """A rank's place in the mesh of ranks, whose axes have names. This class alone relates ranks to coordinates.

    rank = pp_rank * tp + tp_rank, as in the field; rank 0 is the driver. The axis "ep" groups the tp ranks of a stage
    anew: tp_rank = ep_rank * (tp // ep) + a place among the tp // ep ranks that hold the same experts. So ep divides
    tp, and adds no rank; with ep = tp each rank of a stage has experts of its own, and with ep = 1 nothing is expert
    parallel.
    """

    tp: int = 1
    pp: int = 1
    rank: int = 0
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def ep_rank(self) -> int:
        return self.tp_rank // (self.tp // self.ep)

    def axis(self, name: str) -> Axis:
        """Raises ConfigError: the mesh has no such axis."""
        if name not in AXES:
            raise ConfigError("the mesh has no such axis", got=repr(name), expected=", ".join(AXES))
        size, at, stride = {"tp": (self.tp, self.tp_rank, 1), "pp": (self.pp, self.pp_rank, self.tp),
                            "ep": (self.ep, self.ep_rank, self.tp // self.ep)}[name]
        first = self.rank - at * stride
        return Axis(name, size, at, tuple(range(first, first + size * stride, stride)))

    def every_rank(self) -> list[Topology]:
        """The places of all ranks of this mesh, in order."""
        return [dataclasses.replace(self, rank=rank) for rank in range(self.world_size)]

    @property
    def is_driver(self) -> bool:
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def samples(self) -> bool:
        """Whether this rank samples. Its output goes to the driver."""
        return self.rank == self.sampling_rank

    @property
    def sampling_rank(self) -> int:
        """The rank that samples: tp_rank 0 of the last stage."""
        return (self.pp - 1) * self.tp

    def layers(self, num_layers: int) -> range:
        """This stage's decoder layers: contiguous, sizes differing by at most one, earlier stages the larger."""
        base, extra = divmod(num_layers, self.pp)
        start = self.pp_rank * base + min(self.pp_rank, extra)
        return range(start, start + base + (self.pp_rank < extra))


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Everything that a rank needs to build its worker. It is sent to other processes as JSON."""

    engine: EngineConfig
    model: ModelConfig
    topology: Topology

    def __post_init__(self) -> None:
        """Raises ConfigError: the engine needs something that the model does not have."""
        self.engine.longest_sequence(self.model)
        if self.engine.batch_invariant and (self.model.experts is not None or self.model.family == "transformers"):
            raise ConfigError("batch_invariant has no kernels for this model", got="a mixture of experts, or a model "
                              "that transformers' code runs", expected="a dense model of hal.models")

    @property
    def max_model_len(self) -> int:
        return self.engine.longest_sequence(self.model)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerConfig:
        data = json.loads(text)
        return cls(EngineConfig(**data["engine"]), ModelConfig.from_dict(data["model"]), Topology(**data["topology"]))
