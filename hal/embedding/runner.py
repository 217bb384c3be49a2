"""The default runner of a model that turns texts into embeddings, for any device that PyTorch runs on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hal.checkpoints.loader import load_model
from hal.config import WorkerConfig
from hal.contracts.attention import ForwardContext
from hal.contracts.communicator import Communicator
from hal.contracts.embedding import EmbeddingInput, EmbeddingOutput
from hal.contracts.inputs import IntermediateTensors
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import ModelRunnerBase, Progress, no_progress
from hal.embedding.attention import TextAttention, groups_of
from hal.embedding.pooling import Finish, pool
from hal.errors import StateError
from hal.model_config import EmbeddingConfig
from hal.models.causal_lm import CausalLM
from hal.models.ops import Ops
from hal.schema.packed import Packed

_WARMUP_TOKENS = 64


class EmbeddingRunner(ModelRunnerBase[EmbeddingInput]):
    """Every sequence that a request brings in is a text, which the same step computes whole; no row outlives a step.

    Args:
        ops: the models' operations on this device.
    """

    input_type, output_type = EmbeddingInput, EmbeddingOutput
    model: CausalLM
    finish: Finish

    def __init__(self, config: WorkerConfig, device: torch.device, communicator: Communicator,
                 ops: Ops | None = None) -> None:
        super().__init__(config, device, communicator)
        engine = config.engine
        self.ops = ops or Ops()
        self.dtype: torch.dtype = getattr(torch, config.model.dtype if engine.dtype == "auto" else engine.dtype)
        assert config.model.embedding is not None
        self.embedding: EmbeddingConfig = config.model.embedding
        self._next = 0, 0, 0  # epoch, step and digest of the next request

    def load_model(self, progress: Progress = no_progress) -> None:
        self.model = self.make_model(progress)
        self.intermediate_type = self.model.intermediate_type
        engine = self.config.engine
        if self.config.topology.samples:
            self.finish = Finish(self.embedding, None if engine.random_weights else engine.model, self.device)
        TextAttention(self.model.attention_specs, (), self.config.model.causal)

    def make_model(self, progress: Progress = no_progress) -> CausalLM:
        """This rank's part of the model, with its weights. Raises as load_model."""
        return load_model(self.config, self.communicator, self.ops, self.dtype, self.device, progress)

    def kv_bytes_per_block(self) -> int:
        return 0

    def reserve_bytes(self) -> int:
        """Activations of a layer over the most tokens. An estimate from above."""
        engine, c = self.config.engine, self.config.model
        heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        values = 8 * c.hidden_size + (4 * heads + 3 * c.intermediate_size) // self.config.topology.tp
        return engine.max_num_batched_tokens * values * self.dtype.itemsize

    def make_kv_caches(self, num_blocks: int) -> Any:
        return []

    def warmup(self, kv_caches: Any, progress: Progress = no_progress) -> None:
        """Nothing is compiled here; a step lets libraries choose kernels and allocate."""
        tokens = min(_WARMUP_TOKENS, self.config.max_model_len, self.config.engine.max_num_batched_tokens)
        m = self.pack(np.array([tokens]), np.zeros(tokens, np.int32)).to(self.device)
        intermediate = None
        if not self.config.topology.is_first_stage:
            zeros = torch.zeros(tokens, self.config.model.hidden_size, dtype=self.dtype, device=self.device)
            intermediate = self.model.make_intermediate(*(zeros.clone() for _ in self.model.intermediates))
        self.execute_model(m, kv_caches, intermediate)

    def prepare_model_input(self, request: ExecuteModelRequest) -> EmbeddingInput:
        self.follow(request)
        result: EmbeddingInput = self.pack(request.new_lens, request.new_tokens).to(self.device)
        return result

    def follow(self, request: ExecuteModelRequest) -> None:
        """Raises StateError: the request is not the next one, or computes something else than the texts it brings."""
        got = request.epoch, request.step, request.digest
        if got != self._next:
            form = "epoch {}, step {}, digest {}".format
            raise StateError("a request does not follow the one before it", got=form(*got), expected=form(*self._next),
                             hint="a step was lost, repeated or changed on its way to this rank")
        self._next = request.epoch, request.step + 1, request.chain()
        if not np.array_equal(request.rows, request.new_rows) or (request.num_scheduled != request.new_lens).any():
            raise StateError("a step of embeddings computes the texts that enter with it, each as a whole",
                             got=f"{len(request.rows)} rows, of which {len(request.new_rows)} enter",
                             expected="rows that enter, with all of their tokens")

    @staticmethod
    def pack(lens: np.ndarray, tokens: np.ndarray) -> Packed[EmbeddingInput]:
        """The input of texts of these lengths, on the host."""
        ends = np.cumsum(lens)
        packed: Packed[EmbeddingInput] = EmbeddingInput.schema.allocate({"num_tokens": len(tokens),
                                                                         "num_seqs": len(lens)})
        for name, value in (("input_ids", tokens), ("seq_lens", lens),
                            ("positions", np.arange(len(tokens)) - np.repeat(ends - lens, lens))):
            packed.arrays[name][...] = value
        packed.arrays["query_start_loc"][0] = 0
        packed.arrays["query_start_loc"][1:] = ends
        return packed

    @torch.inference_mode()
    def execute_model(self, model_input: EmbeddingInput, kv_caches: Any,
                      intermediate: IntermediateTensors | None = None) -> EmbeddingOutput | IntermediateTensors | None:
        m, groups = model_input, groups_of(model_input)
        attention = TextAttention(self.model.attention_specs, groups, self.config.model.causal)
        hidden = self.model(m.input_ids, m.positions, ForwardContext(attention, m), intermediate)
        if not isinstance(hidden, torch.Tensor):
            stage: IntermediateTensors = hidden
            return stage
        if not self.config.topology.samples:
            return None
        pooled = torch.cat([pool(group.of(hidden), self.embedding.pooling) for group in groups])
        return EmbeddingOutput(embeddings=self.finish(pooled).contiguous())
