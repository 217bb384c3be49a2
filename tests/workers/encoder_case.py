"""An encoder as a runner of its own: no KV cache, its own input, embeddings as output. Run as a script by torchrun,
each rank writes its embeddings to a folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from hal.checkpoints.hf_config import read_config
from hal.config import BUNDLED_MODEL, EngineConfig
from hal.contracts import backend as backends
from hal.contracts.executor import Executor, make_executor
from hal.contracts.inputs import IntermediateTensors, ModelInput
from hal.contracts.request import ExecuteModelRequest
from hal.contracts.runner import ModelRunnerBase, Progress, no_progress
from hal.engine.scheduled_step import Changes
from hal.engine.sequence import Sequence as Seq
from hal.model_config import ModelConfig
from hal.sampling.params import SamplingParams
from hal.schema import Array, Declared
from hal.testing.null import NullBackend

MODEL = read_config(str(BUNDLED_MODEL))
TEXTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [1, 2]]


class EncoderInput(ModelInput):
    input_ids: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0)]
    query_start_loc: Annotated[torch.Tensor, Array("int32", "num_seqs + 1", pad="edge", low=0)]


class Embeddings(Declared):
    embeddings: Annotated[torch.Tensor, Array("float32", "num_seqs", "hidden")]


class Weights:
    """Of a layer: q, k, v, o [hidden, hidden], up [4 * hidden, hidden], down [hidden, 4 * hidden]."""

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        def make(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) / columns ** 0.5

        self.q, self.k, self.v, self.o = (make(hidden, hidden) for _ in range(4))
        self.up, self.down = make(4 * hidden, hidden), make(hidden, 4 * hidden)


def weights(config: ModelConfig, seed: int) -> tuple[torch.Tensor, list[Weights]]:
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    return embed, [Weights(config.hidden_size, generator) for _ in range(config.num_layers)]


def plain(texts: list[list[int]], config: ModelConfig = MODEL, seed: int = 0) -> torch.Tensor:
    """[texts, hidden]: the whole encoder, one text at a time, in one process."""
    (embed, layers), found = weights(config, seed), []
    for text in texts:
        x = embed[text]
        for w in layers:
            q, k, v = ((layer_norm(x, x.shape[1:]) @ m.T).view(len(text), config.num_heads, -1).transpose(0, 1)
                       for m in (w.q, w.k, w.v))
            x = x + scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(len(text), -1) @ w.o.T
            x = x + gelu(layer_norm(x, x.shape[1:]) @ w.up.T) @ w.down.T
        found.append(x.mean(0))
    return torch.stack(found)


class EncoderRunner(ModelRunnerBase[EncoderInput]):
    """Each tensor-parallel rank has a part of the heads and of the inner size; stages have a part of the layers."""

    input_type, output_type = EncoderInput, Embeddings

    def load_model(self, progress: Progress = no_progress) -> None:
        config, topology = self.config.model, self.config.topology
        self.embed, layers = weights(config, self.config.engine.seed)
        self.layers = [layers[i] for i in topology.layers(config.num_layers)]
        for w in self.layers:
            for name, dim in {"q": 0, "k": 0, "v": 0, "o": 1, "up": 0, "down": 1}.items():
                setattr(w, name, getattr(w, name).chunk(topology.tp, dim)[topology.tp_rank])
        self.intermediate_type = IntermediateTensors.declare(
            "EncoderIntermediate", hidden=Array("float32", "num_tokens", config.hidden_size))
        self.texts: dict[int, list[int]] = {}  # by row

    def kv_bytes_per_block(self) -> int:
        return 0

    def reserve_bytes(self) -> int:
        return 1 << 20

    def make_kv_caches(self, num_blocks: int) -> Sequence[torch.Tensor]:
        assert num_blocks == 0
        return []

    def warmup(self, kv_caches: Sequence[torch.Tensor], progress: Progress = no_progress) -> None:
        pass

    def prepare_model_input(self, request: ExecuteModelRequest) -> EncoderInput:
        for row in request.finished_rows.tolist():
            del self.texts[row]
        ends = np.cumsum(request.new_lens)
        for row, start, end in zip(request.new_rows.tolist(), ends - request.new_lens, ends, strict=True):
            self.texts[row] = request.new_tokens[start:end].tolist()
        texts = [self.texts[row] for row in request.rows.tolist()]
        starts = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return EncoderInput(input_ids=torch.tensor([t for text in texts for t in text], dtype=torch.int32),
                            query_start_loc=torch.from_numpy(starts))

    def execute_model(self, model_input: EncoderInput, kv_caches: Sequence[torch.Tensor],
                      intermediate: Any = None) -> Declared | None:
        topology, bounds = self.config.topology, model_input.query_start_loc.tolist()
        heads, reduce = self.config.model.num_heads // topology.tp, self.communicator.all_reduce
        x = self.embed[model_input.input_ids] if intermediate is None else intermediate.hidden
        own = torch.block_diag(*(torch.ones(b - a, b - a) for a, b in pairwise(bounds))).bool()
        for w in self.layers:
            q, k, v = ((layer_norm(x, x.shape[1:]) @ m.T).view(len(x), heads, -1).transpose(0, 1)
                       for m in (w.q, w.k, w.v))
            attended = scaled_dot_product_attention(q, k, v, attn_mask=own)
            x = x + reduce(attended.transpose(0, 1).reshape(len(x), -1) @ w.o.T)
            x = x + reduce(gelu(layer_norm(x, x.shape[1:]) @ w.up.T) @ w.down.T)
        if not topology.is_last_stage:
            assert self.intermediate_type is not None
            return self.intermediate_type(hidden=x)  # type: ignore[call-arg]  # declared at run time
        if not topology.samples:
            return None
        return Embeddings(embeddings=torch.stack([x[a:b].mean(0) for a, b in pairwise(bounds)]))


class EncoderBackend(NullBackend):
    name, runner = "encoder", EncoderRunner

    def make_runner(self, *args: Any) -> Any:
        return self.runner(*args)


class WiderEmbeddings(Embeddings):
    norms: Annotated[torch.Tensor | None, Array("float32", "num_seqs")] = None


class DiffersOnRankOne(EncoderRunner):
    def load_model(self, progress: Progress = no_progress) -> None:
        super().load_model(progress)
        if self.config.topology.rank:
            self.output_type = WiderEmbeddings  # type: ignore[misc]


class YieldsADict(EncoderRunner):
    output_type = dict  # type: ignore[assignment]


class KeepsALocalField(EncoderRunner):
    class output_type(Declared):
        embeddings: Annotated[torch.Tensor, Array("float32", "num_seqs", "hidden")]
        private: Annotated[torch.Tensor | None, Array("float32", "num_seqs", scope="rank")] = None


def of(kind: type[EncoderRunner]) -> EncoderBackend:
    made = EncoderBackend()
    made.runner = kind
    return made


encoder, differs, a_dict, local_field = map(of, (EncoderRunner, DiffersOnRankOne, YieldsADict, KeepsALocalField))


def start(name: str = "encoder", **options: Any) -> Executor:
    config = EngineConfig(device=f"encoder_case:{name}", dtype="float32", max_num_seqs=4, **options)
    return make_executor(config, MODEL, backends.select(config.device))


def embed(executor: Any, texts: list[list[int]] = TEXTS) -> torch.Tensor:
    """Three texts in one step, then the last one while one of them leaves: [texts, hidden]."""
    seqs = [Seq(request_id=i, prompt_ids=text, params=SamplingParams(), seed=0, limit=len(text) + 1, row=i)
            for i, text in enumerate(texts)]
    none, found, digest = np.zeros(0, np.int32), [], 0
    for step, (entered, finished) in enumerate(((seqs[:3], []), (seqs[3:], [1]))):
        rows, lens = np.array([s.row for s in entered]), np.array([len(s) for s in entered])
        request = Changes(entered=entered, finished=finished).request(rows, lens, 0 * lens, none, none, step=step,
                                                                      digest=digest)
        digest = request.chain()
        found.append(executor.execute_model(request).result().embeddings)
    return torch.cat(found)


if __name__ == "__main__":
    executor = start(**json.loads(sys.argv[1]))
    (Path(sys.argv[2]) / os.environ["RANK"]).write_text(json.dumps(embed(executor).tolist()))
    executor.shutdown()
