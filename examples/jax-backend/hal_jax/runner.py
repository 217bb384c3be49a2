"""A runner whose steps are compiled programs: one for each bucket of a ShapePlan. Each takes the cache over (donation),
so the cache is updated in place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from hal.config import Topology, WorkerConfig
from hal.contracts.communicator import Communicator
from hal.contracts.inputs import IntermediateTensors, PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import ModelRunnerBase, Progress, Trace, no_progress
from hal.errors import BackendError
from hal.paged.batch import BatchState
from hal.paged.pending import PendingTokens
from hal.paged.shape_plan import ShapePlan, ladder
from hal.sampling.sampler import Sampler, TokenLogprobs, logprobs
from hal.schema import Array
from hal_jax import model
from hal_jax.model import TOKENS, Parts
from hal_jax.weights import GPT2, load_shares, place_weights, to_numpy

FIELDS = ("input_ids", "positions", "slot_mapping", "query_start_loc", "block_tables", "logits_indices")
BLOCKS = 8  # that one call reads or writes


def to_torch(array: jax.Array) -> torch.Tensor:
    """The array on the host, without a copy where it is there already."""
    return torch.from_dlpack(jax.device_put(array, jax.devices("cpu")[0]))


def some(blocks: torch.Tensor) -> np.ndarray:
    """At most BLOCKS numbers of blocks, filled up with the null block."""
    return np.pad(blocks.numpy().astype(np.int32), (0, BLOCKS - len(blocks)))


class JaxRunner(ModelRunnerBase[PagedModelInput]):
    input_type, output_type = PagedModelInput, SamplerOutput

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator) -> None:
        super().__init__(config, device, communicator)
        engine, topology = config.engine, config.topology
        name = config.model.dtype if engine.dtype == "auto" else engine.dtype
        self.dtype, self.jax_dtype = getattr(torch, name), jnp.dtype(name)
        self.state = BatchState(engine.max_num_seqs, config.max_model_len, engine.block_size, config.model.vocab_size,
                                asynchronous=bool(engine.async_scheduling))
        self.pending, self.sampler = PendingTokens(engine.max_num_seqs, device, communicator), Sampler()
        tokens, blocks = engine.max_num_batched_tokens, -(-config.max_model_len // engine.block_size)
        self.plan = ShapePlan({"step": {"num_tokens": ladder(tokens, 4),
                                        "max_blocks": ladder(blocks, 4, min(8, blocks))}})
        self.rows = min(engine.max_num_seqs, tokens)  # whose logits one program computes
        self.programs: dict[Any, Callable[..., Any]] = {}
        self.intermediate_type = IntermediateTensors.declare(
            "JaxIntermediate", hidden_states=Array(name, "num_tokens", config.model.hidden_size))
        self.shards = engine.tp if topology.tp == 1 else 1  # SPMD: this process has the devices of all tp ranks
        devices = jax.devices()
        self.default, self.on_gpu = jax.config.jax_default_device or devices[0], devices[0].platform != "cpu"
        if self.shards > 1:
            first = topology.pp_rank * engine.tp if self.on_gpu else 0
            if len(devices) < first + engine.tp:
                raise BackendError("there are fewer JAX devices than tensor-parallel ranks", got=len(devices),
                                   expected=f"{first + engine.tp}", hint="choose a smaller tp; on the CPU, set "
                                   f"JAX_NUM_CPU_DEVICES={engine.tp}")
            self.mesh = jax.sharding.Mesh(np.array(devices[first:first + engine.tp]), ("tp",))

    def sharding(self, shared: int | None) -> Any:
        """Of an array whose dimension `shared` the devices share; None: each has all of it."""
        if self.shards == 1:
            return SingleDeviceSharding(self.default)
        return NamedSharding(self.mesh, PartitionSpec(*() if shared is None else [None] * shared + ["tp"]))

    def load_model(self, progress: Progress = no_progress) -> None:
        engine, topology = self.config.engine, self.config.topology
        ranks = [topology] if self.shards == 1 else [
            t for t in Topology(engine.tp, engine.pp).every_rank() if t.pp_rank == topology.pp_rank]
        shares = load_shares(self.config, ranks, self.dtype, progress)
        self.specs = shares[0].attention_specs
        self.weights = place_weights(shares, lambda array, shared: jax.device_put(array, self.sharding(shared)))
        first_row = -(-self.config.model.vocab_size // topology.tp) * topology.tp_rank
        self.parts = Parts(self.config.model, self.specs[0].scale, topology.is_last_stage,
                           None if topology.tp == 1 else first_row)
        self.names = {ours: theirs for theirs, ours in GPT2.items()} if self.config.model.family == "gpt2" else {}

    # Memory.

    def _cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        spec = self.specs[0]
        return (len(self.specs), num_blocks, 2, self.config.engine.block_size, spec.num_kv_heads * self.shards,
                spec.head_dim)

    def kv_bytes_per_block(self) -> int:
        return math.prod(self._cache_shape(1)) * self.dtype.itemsize // (self.shards if self.on_gpu else 1)

    def reserve_bytes(self) -> int:
        c, spec, engine = self.config.model, self.specs[0], self.config.engine
        context = self.config.max_model_len * (4 * spec.num_kv_heads * spec.head_dim + 3 * spec.num_heads)
        per_token = 8 * c.hidden_size + 4 * c.intermediate_size
        return 4 * (2 * TOKENS * context + engine.max_num_batched_tokens * per_token + 4 * self.rows * c.vocab_size)

    def make_kv_caches(self, num_blocks: int) -> list[jax.Array]:
        shape, ids = self._cache_shape(num_blocks), self._like(BLOCKS)
        cache = self._like(*shape, dtype=self.jax_dtype, shared=4)
        values = self._like(shape[0], BLOCKS, *shape[2:], dtype=self.jax_dtype)
        self._compile(("read", num_blocks), lambda cache, ids: cache[:, ids], cache, ids)
        self._compile(("write", num_blocks), lambda cache, ids, new: cache.at[:, ids].set(new), cache, ids, values,
                      out=self.sharding(4), donate=(0,))
        return [jnp.zeros(shape, self.jax_dtype, device=self.sharding(4))]  # each step puts a new array into the list

    def read_blocks(self, kv_caches: list[jax.Array], blocks: torch.Tensor) -> list[torch.Tensor]:
        array = kv_caches[0]
        parts = [to_torch(self.programs["read", array.shape[1]](array, some(blocks[at:at + BLOCKS])))
                 for at in range(0, len(blocks), BLOCKS)]
        return [torch.cat(parts, 1)[:, :len(blocks)]]

    def write_blocks(self, kv_caches: list[jax.Array], blocks: torch.Tensor, values: Sequence[torch.Tensor]) -> None:
        for at in range(0, len(blocks), BLOCKS):
            part, program = values[0][:, at:at + BLOCKS], self.programs["write", kv_caches[0].shape[1]]
            whole = torch.nn.functional.pad(part, [0, 0] * 4 + [0, BLOCKS - part.shape[1]])
            kv_caches[0] = program(kv_caches[0], some(blocks[at:at + BLOCKS]), to_numpy(whole))

    # Programs.

    def _like(self, *shape: int, dtype: Any = np.int32, shared: int | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(shared))

    def _compile(self, key: Any, function: Callable[..., Any], *like: Any, out: Any = None,
                 donate: tuple[int, ...] = ()) -> None:
        """Compile a program for arguments like these. Its results lie whole on each device, unless `out` says else."""
        if key not in self.programs:
            jitted = jax.jit(function, donate_argnums=donate, out_shardings=out or self.sharding(None))
            self.programs[key] = jitted.lower(*like).compile()
            self.compiled += 1

    def warmup(self, kv_caches: list[jax.Array], progress: Progress = no_progress) -> None:
        buckets = self.plan.buckets()
        for done, bucket in enumerate(buckets):
            progress("compiling", done, len(buckets))
            self._compile_bucket(kv_caches, **bucket.dims)
        if self.parts.last:
            self._compile("head", partial(model.logits_of, self.parts), self.weights, self._hidden(self.rows))
        progress("compiling", len(buckets), len(buckets))

    def _hidden(self, tokens: int) -> jax.ShapeDtypeStruct:
        return self._like(tokens, self.config.model.hidden_size, dtype=self.jax_dtype)

    def _compile_bucket(self, kv_caches: list[jax.Array], num_tokens: int, max_blocks: int, note: bool = False) -> None:
        """The whole step is one program. Where the generic worker's ranks share tensors, it is cut at their sums."""
        rows, size = min(num_tokens, self.rows), num_tokens
        tokens, layer, x = self._like(size), self._like(), self._hidden(size)
        likes = [tokens] * 3 + [self._like(rows + 1), self._like(rows, max_blocks), self._like(rows)]
        m, p, w = dict(zip(FIELDS, likes, strict=True)), self.parts._replace(note=note), self.weights
        cache = self._like(*kv_caches[0].shape, dtype=self.jax_dtype, shared=4)
        first, out = self.config.topology.is_first_stage, (self.sharding(4), *[self.sharding(None)] * (2 + p.last))
        if p.first_row is None:
            return self._compile(("step", size, max_blocks, note), partial(model.step, p), w, cache, m,
                                 None if first else x, out=out, donate=(1,))
        if first:
            self._compile(("embed", size), partial(model.embed, p), w, tokens, tokens)
        self._compile(("attention", size, max_blocks), lambda w, cache, m, layer, x: model.attention(
            p, w, cache, model.prepare(w, m), layer, x)[:2], w, cache, m, layer, x, donate=(1,))
        self._compile(("mlp", size), lambda *given: model.mlp(p, *given)[:2], w, layer, x, x)
        self._compile(("end", size), partial(model.end, p), w, layer, x, x)
        if p.last:
            self._compile(("finish", size), partial(model.finish, p), w, self._like(rows), x)

    # Steps.

    def choose_shape(self, dims: Any, values: Any) -> tuple[dict[str, int], tuple[str, ...]]:
        """The bucket of a step: its tokens and the blocks of a context. Sequences and logits follow from the tokens."""
        sizes = self.plan.bucket_for("step", dims).dims
        rows = min(sizes["num_tokens"], self.rows)
        return {**sizes, "num_seqs": rows, "num_logits": max(rows, dims["num_logits"])}, ()

    def prepare_model_input(self, request: ExecuteModelRequest) -> PagedModelInput:
        self.state.apply(request)
        return self.state.prepare(request, self.choose_shape).to(self.device)

    def execute_model(self, model_input: PagedModelInput, kv_caches: list[jax.Array],
                      intermediate: IntermediateTensors | None = None) -> SamplerOutput | IntermediateTensors | None:
        m, x = model_input, None if intermediate is None else to_numpy(intermediate["hidden_states"])
        arrays = self._arrays(m)
        run = self._run_whole if self.parts.first_row is None else self._run_parts
        x, *logits = run(arrays, kv_caches, x)
        if not self.parts.last:
            return self.intermediate_type(hidden_states=to_torch(x))
        return self._sample(m, self._logits(logits[0]), x)

    def execute_traced(self, model_input: PagedModelInput, kv_caches: list[jax.Array], trace: Trace) -> Any:
        arrays = self._arrays(model_input)
        self._compile_bucket(kv_caches, len(arrays["input_ids"]), arrays["block_tables"].shape[1], note=True)
        x, logits, noted = self._run_whole(arrays, kv_caches, None, note=True)
        for layer, name in itertools.product(range(len(self.specs)), model.NOTED):
            trace(self.names.get(name, name), layer, np.asarray(noted[name])[layer])
        return self._sample(model_input, self._logits(logits), x)

    def _run_whole(self, arrays: dict[str, np.ndarray], kv_caches: list[jax.Array], x: Any, note: bool = False) -> Any:
        program = self.programs["step", len(arrays["input_ids"]), arrays["block_tables"].shape[1], note]
        kv_caches[0], *found = jax.block_until_ready(program(self.weights, kv_caches[0], arrays, x))
        return found

    def _arrays(self, m: PagedModelInput) -> dict[str, np.ndarray]:
        """What the programs take of a step. They compute the logits of the sampled tokens alone."""
        arrays = {name: m[name].numpy() for name in FIELDS}
        return {**arrays, "input_ids": self.pending.input_ids(m).numpy(),
                "logits_indices": arrays["logits_indices"][:len(arrays["block_tables"])]}

    def _run_parts(self, arrays: dict[str, np.ndarray], kv_caches: list[jax.Array], x: Any) -> Any:
        """`model.step`, with the sums over the ranks between its parts."""
        tokens, w, p = len(arrays["input_ids"]), self.weights, self.programs
        if x is None:
            x = self._sum(p["embed", tokens](w, arrays["input_ids"], arrays["positions"]))
        for layer in map(np.int32, range(len(self.specs))):
            attention = p["attention", tokens, arrays["block_tables"].shape[1]]
            kv_caches[0], out = attention(w, kv_caches[0], arrays, layer, x)
            x, down = p["mlp", tokens](w, layer, x, self._sum(out))
            x = p["end", tokens](w, layer, x, self._sum(down))
        return p["finish", tokens](w, arrays["logits_indices"], x) if self.parts.last else [x]

    def _sum(self, x: jax.Array) -> np.ndarray:
        return to_numpy(self.communicator.all_reduce(to_torch(x).clone()))  # a JAX array never changes

    def _logits(self, of_rank: jax.Array) -> torch.Tensor:
        logits = to_torch(of_rank)
        whole = self.communicator.all_gather(logits) if self.config.topology.tp > 1 else logits
        return whole[:, :self.config.model.vocab_size]

    def _sample(self, m: PagedModelInput, logits: torch.Tensor, hidden: jax.Array) -> SamplerOutput | None:
        output = self.sampler(logits, m) if self.config.topology.samples else None
        self.pending.keep(m, None if output is None else output.token_ids)
        if m.prompt_targets is None:
            return output
        rows, parts = to_torch(hidden)[m.logits_indices[m.num_samples:][:len(m.prompt_targets)].long()], []
        for at in range(0, len(rows), self.rows):
            targets, states = m.prompt_targets[at:at + self.rows], rows[at:at + self.rows]
            padded = torch.nn.functional.pad(states, (0, 0, 0, self.rows - len(states)))
            logits = self._logits(self.programs["head"](self.weights, to_numpy(padded)))
            parts.append(logprobs(logits[:len(targets)], targets, m.num_prompt_logprobs))
        found = TokenLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))
        for name, value in found.fields("prompt_").items() if output is not None else ():
            setattr(output, name, value)
        return output
