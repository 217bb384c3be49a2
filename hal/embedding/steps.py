"""The steps of a batch of texts: cut by tokens, submitted to the executor, and their vectors put in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from hal.config import EngineConfig
from hal.contracts.executor import Executor, StepHandle
from hal.contracts.request import ExecuteModelRequest
from hal.errors import NumericsError
from hal.features import COLUMNS

_NONE = np.zeros(0, np.int32)


class EmbeddingSteps:
    """Attributes:
        steps, tokens: how many so far.
    """

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        self.executor, self.config = executor, config
        self.steps = self.tokens = self._digest = self._held = 0

    def run(self, texts: Sequence[Sequence[int]], dim: int) -> np.ndarray:
        """The embeddings of token ids, fp32 [num_texts, dim]. Texts of similar lengths share a step, the longest first.

        Raises:
            WorkerError.
        """
        result = np.empty((len(texts), dim), np.float32)
        in_flight: deque[tuple[list[int], StepHandle]] = deque()
        for batch in [*self._batches(texts), None]:
            while in_flight and (batch is None or len(in_flight) >= max(self.config.pp, 2)):
                places, handle = in_flight.popleft()
                result[places] = handle.result().embeddings.numpy()
            if batch is not None:
                in_flight.append((batch, self._submit([texts[i] for i in batch])))
        return result

    def _batches(self, texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Places of texts, so that a step has at most max_num_seqs texts, and at most max_num_batched_tokens tokens
        even where a device pads all of them to the longest one."""
        order, at = sorted(range(len(texts)), key=lambda i: -len(texts[i])), 0
        while at < len(order):
            most = min(self.config.max_num_batched_tokens // len(texts[order[at]]), self.config.max_num_seqs)
            yield order[at:at + most]
            at += most

    def _submit(self, texts: Sequence[Sequence[int]]) -> StepHandle:
        """A step of these texts, which enter rows now and leave them with the next step."""
        rows, lens = np.arange(len(texts), dtype=np.int32), np.array([len(ids) for ids in texts], np.int32)
        request = ExecuteModelRequest(
            step=self.steps, digest=self._digest, finished_rows=np.arange(self._held, dtype=np.int32), new_rows=rows,
            new_lens=lens, new_prompt_lens=lens, new_tokens=np.concatenate(texts).astype(np.int32),
            new_floats=np.zeros((len(texts), len(COLUMNS["float"])), np.float32),
            new_ints=np.zeros((len(texts), len(COLUMNS["int"])), np.int64), append_rows=_NONE, append_tokens=_NONE,
            block_rows=_NONE, block_starts=_NONE, block_counts=_NONE, new_blocks=_NONE, rows=rows, num_scheduled=lens,
            num_computed=np.zeros_like(lens))
        handle = self.executor.execute_model(request)
        self._digest, self._held = request.chain(), len(texts)
        self.steps, self.tokens = self.steps + 1, self.tokens + int(lens.sum())
        return handle


def require_finite(vectors: np.ndarray) -> np.ndarray:
    """The same vectors, [num_texts, dim]. Raises NumericsError: one of them is not finite."""
    wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(wrong):
        raise NumericsError(f"the embedding of text {wrong[0]} is not finite", request_id=int(wrong[0]), position=0,
                            got=f"{len(wrong)} of {len(vectors)} texts", expected="finite numbers",
                            hint="try dtype=float32 or bfloat16; if that does not help, the weights are damaged")
    return vectors
