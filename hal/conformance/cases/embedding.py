"""L1, L3 and L5: models that turn whole texts into vectors, with input and output types of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from hal.config import WorkerConfig
from hal.conformance.case import case
from hal.conformance.context import Context, Session
from hal.conformance.reference import Reference
from hal.contracts.embedding import EmbeddingInput, EmbeddingOutput
from hal.contracts.request import ExecuteModelRequest
from hal.embedding.steps import EmbeddingSteps

_LENGTHS = (9, 17, 17, 1, 40, 17, 3, 26)  # some are equal, and a step takes several
_MADE = {"mean": "window", "last": "qwen3"}  # a pooling, and a model with a window or with norms of q and k


class _Embedder:
    """Vectors of texts, [num_texts, hidden_size], by an executor or by one rank in this process."""

    def __init__(self, executor: Any, config: WorkerConfig) -> None:
        self.steps, self.size = EmbeddingSteps(executor, config.engine), config.model.hidden_size

    def __call__(self, texts: list[list[int]]) -> torch.Tensor:
        return torch.from_numpy(self.steps.run(texts, self.size))


def _one_rank(session: Session) -> _Embedder:
    def execute(request: ExecuteModelRequest) -> Any:
        output = session.step(request)
        return SimpleNamespace(result=lambda: output)

    return _Embedder(SimpleNamespace(execute_model=execute), session.config)


def _reference(ctx: Context, pooling: str, texts: list[list[int]]) -> torch.Tensor:
    path, config = ctx.model(_MADE[pooling]), ctx.config(_MADE[pooling]).model
    hidden = [Reference(path, config, ctx.dtype).hidden(text) for text in texts]
    pooled = torch.stack([x.mean(0) if pooling == "mean" else x[-1] for x in hidden])
    return torch.nn.functional.normalize(pooled, dim=-1)


def _session(ctx: Context, pooling: str) -> Session:
    return ctx.session(_MADE[pooling], pooling=pooling, max_num_batched_tokens=64)


@case(1, "embedding", "embeddings", once=True)
def input_and_output_have_types_of_their_own(ctx: Context) -> None:
    """A prepared step is of the declared input type, and means the texts of the request. It gives the same vectors
    after a message, as an output of the declared type."""
    session, texts = _session(ctx, "last"), ctx.prompts(*_LENGTHS[:3])
    kinds = session.runner.input_type, session.runner.output_type
    ctx.check(issubclass(kinds[0], EmbeddingInput) and issubclass(kinds[1], EmbeddingOutput),
              f"the types of a step are {kinds[0].__name__} and {kinds[1].__name__}")
    vectors = _one_rank(session)(texts)
    [m] = session.inputs
    ctx.equal("the type of a prepared step", type(m), kinds[0])
    ids, starts, lens = (m[name].tolist() for name in ("input_ids", "query_start_loc", "seq_lens"))
    found = [ids[start:start + size] for start, size in zip(starts, lens, strict=False) if size]
    ctx.equal("the texts of a prepared step", found, sorted(texts, key=len, reverse=True))
    output: Any = session.fetch(session.execute(type(m).from_buffer(m.to_buffer(), session.device)))
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    ctx.check(torch.equal(output.embeddings[:len(texts)], vectors[order]), "a message changes the vectors of a step")


@case(3, "embedding", "embeddings")
def vectors_of_whole_texts(ctx: Context) -> None:
    """Vectors of texts of several lengths in a step, with each pooling, are those of the fp64 reference."""
    texts = ctx.prompts(*_LENGTHS)
    for pooling in _MADE:
        ctx.close("model", _one_rank(_session(ctx, pooling))(texts), _reference(ctx, pooling, texts),
                  f"vectors with the pooling {pooling!r}")


@case(3, "embedding", "embeddings")
def whatever_else_is_in_the_step(ctx: Context) -> None:
    """A text's vector alone is that beside other texts, in another order and after them."""
    embed, texts = _one_rank(_session(ctx, "mean")), ctx.prompts(*_LENGTHS)
    beside = embed(texts).double()
    for i in (0, 3, 4, 7):
        ctx.close("model", embed([texts[i]])[0], beside[i], f"the vector of text {i} alone")
    ctx.close("model", embed(texts[::-1]).flip(0), beside, "vectors of the texts in the other order")


@case(5, "embedding", "embeddings", "tp", once=True)
def tp2_embeds(ctx: Context) -> None:
    """Tensors cut in two give the vectors of the reference."""
    texts, config = ctx.prompts(*_LENGTHS), ctx.config(_MADE["mean"], pooling="mean", tp=2)
    executor = ctx.executor(config)
    try:
        vectors = _Embedder(executor, config)(texts)
    finally:
        executor.shutdown()
    ctx.close("model", vectors, _reference(ctx, "mean", texts), "vectors with tp=2")
