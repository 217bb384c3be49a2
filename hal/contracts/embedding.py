"""The input and the output of a step whose model makes embeddings."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch

from hal.contracts.inputs import ModelInput
from hal.errors import InputError
from hal.schema import Array, Declared


class EmbeddingInput(ModelInput):
    """Whole texts, which a model turns into embeddings without a KV cache. Tokens of a text are adjacent. Behind them
    there may be padding, up to the first token of the next text, so a device may give all texts one length."""

    input_ids: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0, doc="token ids")]
    positions: Annotated[torch.Tensor, Array("int32", "num_tokens", low=0, doc="place of each token in its text")]
    query_start_loc: Annotated[torch.Tensor, Array("int32", "num_seqs + 1", pad="edge", low=0,
                                                   doc="first token of each text, then the number of tokens")]
    seq_lens: Annotated[torch.Tensor, Array("int32", "num_seqs", low=0, doc="tokens of each text; 0 in padding")]

    def check(self) -> None:
        """Semantic check (HAL_STRICT=1). Raises InputError: texts overlap, or positions do not count their tokens."""
        super().check()
        starts, lens = (x.cpu().numpy().astype(np.int64) for x in (self.query_start_loc, self.seq_lens))
        if starts[0] != 0 or starts[-1] > len(self.input_ids) or (lens > np.diff(starts)).any():
            raise InputError("EmbeddingInput.query_start_loc is inconsistent", got=starts, fields=("query_start_loc",),
                             expected=f"0, then room for texts of {lens} tokens")
        expected = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens, lens)
        found = self.positions.cpu().numpy()[expected + np.repeat(starts[:-1], lens)]
        if (found != expected).any():
            raise InputError("EmbeddingInput.positions is inconsistent", got=found, expected=expected,
                             fields=("positions",))


class EmbeddingOutput(Declared):
    """The embeddings of a step's texts, in their order."""

    embeddings: Annotated[torch.Tensor, Array("float32", "num_seqs", "dim")]
