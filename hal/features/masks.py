"""Token masks: the tokens that a sequence may get next, one bit each. The driver of the executor gives them in every
step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hal.errors import StateError
from hal.features.declare import Batch, Feature, FeatureState, Fields, Ints, StepRows, need
from hal.schema import Array

if TYPE_CHECKING:
    import torch
    from hypothesis import strategies as st

WORD = 32  # bits of a word


def _needs_host(mask: torch.Tensor, m: Any, taken: Any) -> torch.Tensor:
    raise StateError("a token mask holds for one step, so the next decode step needs the host", got="a step of several "
                     "tokens with masks", expected="masks in steps of one token",
                     hint="set Sequence.needs_tokens for a sequence that gets masks")


class TokenMasks(Feature):
    """A row's mask holds for the step whose request carries it. A row with drafts has a mask for each of its places:
    the token before its drafts, and each draft. Bit i % 32 of word i // 32 says whether token i is
    allowed. A row that the request does not name, and bits behind the vocabulary, are not restricted."""

    per_step = for_sampling = True
    fields = {"token_mask": Array("int32", "num_sampled", "mask_words", pad=-1,
                                  advance=_needs_host,
                                  doc="bit i % 32 of word i // 32: whether token i is allowed")}
    request = {"mask_rows": Array("int32", "num_masked", low=0, doc="scheduled rows whose next token is restricted"),
               "token_masks": Array("int32", "num_masked", "mask_words", doc="the bits of each, see TokenMasks")}

    def check_request(self, request: Any, vocab_size: int) -> None:
        rows, masks = request.mask_rows, request.token_masks
        if rows is None or masks is None:
            need("mask_rows", rows is masks is None, "one of mask_rows and token_masks", "both or none")
            return
        words = -(-vocab_size // WORD)
        need("token_masks", masks.shape[1] == words, f"{masks.shape[1]} words", f"{words}")
        need("mask_rows", set(rows.tolist()) <= set(request.rows.tolist()), rows, "scheduled rows")

    def renamed(self, request: Any, ids: Ints) -> dict[str, np.ndarray[Any, Any]]:
        if request.token_masks is None:
            return {}
        bits = np.unpackbits(np.ascontiguousarray(request.token_masks, "<i4").view(np.uint8), 1, bitorder="little")
        moved = bits.copy()
        moved[:, ids] = bits[:, :len(ids)]
        return {"token_masks": np.packbits(moved, 1, bitorder="little").view("<i4")}

    def prepare(self, step: StepRows, state: FeatureState | None) -> Fields:
        rows, masks = step.request.mask_rows, step.request.token_masks
        if rows is None or masks is None or not len(step.sampled):
            return {}
        found = np.full((len(step.sampled), -(-step.state.vocab_size // WORD)), -1, np.int32)
        at: dict[int, list[int]] = {}
        for i, row in enumerate(step.sampled.tolist()):
            at.setdefault(row, []).append(i)
        for row, mask in zip(rows.tolist(), masks, strict=True):
            if at.get(row):  # False if this step does not reach the row's last token
                found[at[row].pop(0)] = mask
        for row in {*rows.tolist()} & at.keys():
            need("mask_rows", not at[row], f"{len(at[row])} places of row {row} without a mask", "a mask for the token "
                 "behind each draft of a row, too")
        return {"token_mask": found}

    def adjust(self, scores: torch.Tensor, model_input: Any) -> torch.Tensor:
        if scores.is_cpu:
            return _filled_on_host(scores, model_input["token_mask"][:len(scores)])
        return scores.masked_fill(~allowed(model_input["token_mask"][:len(scores)], scores.shape[1]), -float("inf"))

    def restore_request(self, model_input: Any, rows: Ints) -> dict[str, np.ndarray[Any, Any]]:
        if not self.present(model_input):
            return {}
        return {"mask_rows": rows.astype(np.int32), "token_masks": model_input["token_mask"][:len(rows)].numpy()}

    def example(self, draw: st.DrawFn, rng: np.random.Generator, batch: Batch) -> Fields:
        words = -(-batch.vocab_size // WORD)
        return {"token_mask": rng.integers(-2**31, 2**31, (len(batch.lens), words))}


def allowed(mask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[n, words] int32 -> [n, vocab_size] bool."""
    import torch

    bits = torch.arange(WORD, dtype=torch.int32, device=mask.device)
    return (torch.bitwise_right_shift(mask[:, :, None], bits) & 1).flatten(1)[:, :vocab_size] != 0


def _filled_on_host(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`scores` themselves, -inf where the mask forbids a token. Row by row, and by the places of the fewer tokens, this
    is several times faster than masked_fill, which costs a tenth of a step of a small model."""
    bits = np.unpackbits(mask.contiguous().numpy().view(np.uint8), 1, bitorder="little", count=scores.shape[1])
    for row, allowed_here in zip(scores.numpy(), bits.view(np.bool_), strict=True):
        if np.count_nonzero(allowed_here) * 2 > len(row):
            row[np.flatnonzero(~allowed_here)] = -np.inf
        else:
            at = np.flatnonzero(allowed_here)
            kept = row[at]
            row.fill(-np.inf)
            row[at] = kept
    return scores


def mask_fields(masks: Mapping[int, np.ndarray[Any, Any]], vocab_size: int) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a request that carry the masks of these rows.

    Args:
        masks: by row, a bool array [vocab_size]: which tokens are allowed. Of a row with drafts [1 + drafts,
            vocab_size]: which tokens are allowed behind its last token, and behind each draft. Or, of all rows, int32
            [words] or [1 + drafts, words]: the bits themselves.
    """
    words = -(-vocab_size // WORD)
    if masks and all(mask.dtype == np.int32 for mask in masks.values()):
        packed = [np.atleast_2d(mask) for mask in masks.values()]
        return {"mask_rows": np.repeat(np.array(list(masks), np.int32), [len(some) for some in packed]),
                "token_masks": np.concatenate(packed)}
    allowed = [np.atleast_2d(mask) for mask in masks.values()]
    rows = np.repeat(np.array(list(masks), np.int32), [len(some) for some in allowed])
    bits = np.ones((len(rows), words * WORD), np.bool_)
    if allowed:
        bits[:, :vocab_size] = np.concatenate(allowed)
    return {"mask_rows": rows, "token_masks": np.packbits(bits, axis=1, bitorder="little").view("<i4")}
