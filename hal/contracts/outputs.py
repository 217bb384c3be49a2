"""The output of a step whose model samples tokens. A runner of another kind declares its own `output_type`."""

from __future__ import annotations

from typing import Annotated

import torch

from hal.errors import InputError
from hal.schema import Array, Declared


class SamplerOutput(Declared):
    """The new tokens of a step's sampled sequences, in the order of the step's sequences, and their logprobs if a
    sequence asked for them. Logprobs are those of the raw logits, before temperature and penalties.

    A sequence gains one token, or several, up to `width`. With several, it has `width` places in `token_ids` and in
    each array beside it. `counts` says how many of its places hold a token; the others hold arbitrary values. So the
    shapes of a device's arrays do not depend on the counts. One token for each sequence is the case without `counts`,
    with width 1.
    """

    token_ids: Annotated[torch.Tensor, Array("int32", "num_places", low=-1, doc="the new tokens, place after place; -1 "
                                                    "where the logits have no finite maximum: then the sequence ends "
                                                    "there with an error, and the logprobs mean nothing")]
    counts: Annotated[torch.Tensor | None, Array("int32", "num_rows", low=1, doc="new tokens of each sequence, at most "
                                                 "the width, num_places / num_rows; absent: one of each")] = None
    num_computed: Annotated[torch.Tensor | None, Array("int32", "num_rows", low=0, doc="how many of these the step has "
                                                       "also put in the KV cache, the first ones, never the last; "
                                                       "absent: none")] = None
    draft_tokens: Annotated[torch.Tensor | None, Array("int32", "num_rows", "num_proposals", low=-1, doc="tokens that "
                                                     "a proposer expects behind the new ones; -1 behind the last")
                            ] = None
    logprobs: Annotated[torch.Tensor | None, Array("float32", "num_places", doc="of the new tokens")] = None
    ranks: Annotated[torch.Tensor | None, Array("int32", "num_places", low=1, doc="of the new tokens by raw logit; 1 "
                                                "is the most likely")] = None
    top_ids: Annotated[torch.Tensor | None, Array("int32", "num_places", "num_top", low=0, doc="most likely tokens, "
                                                  "best first")] = None
    top_logprobs: Annotated[torch.Tensor | None, Array("float32", "num_places", "num_top")] = None
    prompt_logprobs: Annotated[torch.Tensor | None, Array("float32", "num_targets", doc="of each prompt target")] = None
    prompt_ranks: Annotated[torch.Tensor | None, Array("int32", "num_targets", low=1)] = None
    prompt_top_ids: Annotated[torch.Tensor | None, Array("int32", "num_targets", "num_prompt_top", low=0)] = None
    prompt_top_logprobs: Annotated[torch.Tensor | None, Array("float32", "num_targets", "num_prompt_top")] = None

    @property
    def num_rows(self) -> int:
        """Sequences that gained tokens."""
        return len(self.token_ids) if self.counts is None else len(self.counts)

    def rows(self) -> list[list[int]]:
        """The new tokens of each sequence."""
        rows = self.num_rows
        tokens: list[list[int]] = self.token_ids.view(rows, len(self.token_ids) // max(rows, 1)).tolist()
        return tokens if self.counts is None else [t[:n] for t, n in zip(tokens, self.counts.tolist(), strict=True)]

    def check(self) -> None:
        """Semantic check (HAL_STRICT=1, recordings): the counts fit the places. Raises InputError."""
        super().check()
        if self.counts is None:
            if self.num_computed is not None:
                self._refuse("num_computed", "an array", "none, since counts is absent")
            return
        rows, places = len(self.counts), len(self.token_ids)
        width = places // max(rows, 1)
        if places != rows * width:
            self._refuse("token_ids", f"{places} places", f"a multiple of the {rows} rows")
        if rows and int(self.counts.max()) > width:
            self._refuse("counts", self.counts.tolist(), f"at most {width}, the places of a row")
        if self.num_computed is not None and bool((self.num_computed >= self.counts).any()):
            self._refuse("num_computed", self.num_computed.tolist(), f"less than the counts {self.counts.tolist()}")

    def _refuse(self, field: str, got: object, expected: object) -> None:
        raise InputError(f"{type(self).__name__}.{field} is inconsistent", got=got, expected=expected, fields=(field,))
