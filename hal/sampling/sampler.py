"""The default sampler. Every filter is a threshold on the scaled logits, so equal logits are kept or dropped together,
and the result does not depend on the order in which an algorithm sorts them.

The filters and their order are those of transformers' logits processors: penalties, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from hal.contracts.inputs import PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.features import adjusting
from hal.sampling.noise import exponential, row_keys
from hal.schema.packed import on_host

_CANDIDATES = 256  # the most likely tokens, examined before a whole row is sorted
_PIECE = 1 << 18  # elements computed at a time on a CPU, so that they stay in its cache
LARGE = 2.0**14  # best score / temperature up to which float32 tells the other scores apart


class Sampler:
    """Plain PyTorch for any device. It reads a few booleans back to the host unless all rows are greedy."""

    def __call__(self, logits: torch.Tensor, model_input: PagedModelInput) -> SamplerOutput:
        """Args:
            logits: [num_samples or more, vocab_size] of the first tokens in `model_input.logits_indices`, any float
                type.

        Returns:
            Tensors on the logits' device. top_ids and top_logprobs are absent if no row asked for any. `logprobs` makes
            the prompt's logprobs, since a step may have too many of them for one tensor of logits. The token id of a
            row whose logits have no finite maximum is -1.
        """
        m, n = model_input, model_input.num_samples
        raw = logits[:n]
        scores = raw
        for feature in adjusting(m) if n else ():
            scores = feature.adjust(raw.to(torch.float32, copy=True) if scores is raw else scores, m)
        token_ids = self._draw(scores, m) if m.temperature is not None and n else self.greedy(scores)
        result = {"token_ids": token_ids.int()}
        if m.num_logprobs >= 0:
            result |= logprobs(raw, token_ids, m.num_logprobs).fields()
        return SamplerOutput(**result)

    def argmax(self, scores: torch.Tensor) -> torch.Tensor:
        """[n, vocab] -> [n]: the first of the largest values; in a row with NaN, the place of a NaN."""
        return scores.argmax(-1)

    def greedy(self, scores: torch.Tensor) -> torch.Tensor:
        """[n, vocab] -> [n]: `argmax`, or -1 for a row without a finite maximum."""
        best = self.argmax(scores)
        return checked(best, scores.gather(1, best[:, None])[:, 0])

    def descending(self, scores: torch.Tensor) -> torch.Tensor:
        """fp32 [n, vocab] with each row sorted."""
        return scores.sort(-1, descending=True).values

    def _draw(self, scores: torch.Tensor, m: PagedModelInput) -> torch.Tensor:
        """A token a row from `scores` [n, vocab] of any float type, greedy where the temperature is 0; -1 where no
        score is a finite maximum."""
        n, vocab = scores.shape
        temperature = m.temperature[:n, None]
        keys = row_keys(m.seed[:n], m.positions[m.logits_indices[:n]] + 1)
        greedy, scores = temperature == 0, scores.float()
        best = self.argmax(scores)
        top = scores.gather(1, best[:, None])
        temperature = torch.where(greedy, 1.0, temperature)
        base = reference(top, temperature)
        if not scores.is_cpu or base.count_nonzero():  # this would wait for a device that runs behind the host
            scores = scores - base
        scores = scores / temperature
        top_k, top_p, min_p = (None if x is None else x[:n, None] for x in (m.top_k, m.top_p, m.min_p))
        if top_k is None and top_p is None and min_p is None:
            return checked(torch.where(greedy[:, 0], best, self._race(scores, keys)), top[:, 0])
        normaliser = None
        if top_p is not None:  # in a way that does not depend on the number of rows, see `logprobs`
            normaliser = scores.gather(1, best[:, None]) - scores.log_softmax(-1).gather(1, best[:, None])
        width = min(vocab, max(_CANDIDATES, 0 if top_k is None else int(on_host(m, "top_k")[:n].max()) + 1))
        values, ids = scores.topk(width, -1)
        lowest = threshold(values, top_k, top_p, min_p, normaliser)
        tokens = ids.gather(1, self._race_among(values, ids, lowest, keys)[:, None])[:, 0]
        # When the threshold is above the last candidate, all tokens that pass the filters are candidates.
        unsure = ((lowest <= values[:, -1:]) & ~greedy)[:, 0].nonzero()[:, 0] if width < vocab else keys[:0]
        rows = rows_at_once(scores)
        for i in range(0, len(unsure), rows):
            some = unsure[i:i + rows]
            values, least = scores[some], lowest[some]
            if top_p is not None:  # without top-p, the candidates give the right threshold
                least = threshold(self.descending(values), *(None if x is None else x[some]
                                                             for x in (top_k, top_p, min_p, normaliser)))
            tokens[some] = self._race(values.masked_fill_(values < least, -torch.inf), keys[some])
        return checked(torch.where(greedy[:, 0], best, tokens), top[:, 0])

    def _race_among(self, values: torch.Tensor, ids: torch.Tensor, lowest: torch.Tensor,
                    keys: torch.Tensor) -> torch.Tensor:
        race = values - exponential(keys, ids.int()).log_()
        return race.masked_fill_(values < lowest, -torch.inf).argmax(-1)

    def _race(self, scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """A token a row with probability softmax(scores): the largest of scores - log Exp(1) (the Gumbel-max trick)."""
        ids = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)[None]
        rows = rows_at_once(scores)
        return torch.cat([self.argmax(scores[i:i + rows] - exponential(keys[i:i + rows], ids).log_())
                          for i in range(0, len(scores), rows)])


def rows_at_once(scores: torch.Tensor) -> int:
    """The number of whole rows to work on at a time: a few on a CPU, all on another device."""
    return max(_PIECE // scores.shape[1], 1) if scores.is_cpu else len(scores)


def checked(token_ids: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """token_ids [n], with -1 where `top` [n], the largest score of the row, is infinite or NaN."""
    return torch.where(top.abs() < torch.inf, token_ids, -1)


def reference(top: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """The number to subtract from a row's scores before they are divided by its temperature. It is 0, or the largest
    score if the quotient of that score would be so large that it overflows, or that float32 rounds the other quotients
    to it. The remaining differences may overflow too, but to -inf, which is a probability of 0.

    Args:
        top: each row's largest score. temperature: above 0, of the same shape.
    """
    return torch.where((top / temperature).abs() > LARGE, top, 0.0)


def threshold(values: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_p: torch.Tensor | None,
              normaliser: torch.Tensor | None) -> torch.Tensor:
    """The smallest value that passes all filters.

    Args:
        values: [n, k] fp32, each row's largest in descending order. top_k, top_p, min_p: [n, 1] or None.
        normaliser: [n, 1], log of the sum of exp over the whole row; needed with top_p.

    Returns:
        [n, 1]. The threshold is exact in three cases: there is no top-p (and there are more than top_k values), or the
        threshold is above the last of `values`, or `values` is the whole row.
    """
    best = values[:, :1]
    lowest = torch.full_like(best, -torch.inf)
    if top_k is not None:
        kth = values.gather(1, (top_k.long() - 1).clamp(0, values.shape[1] - 1))
        lowest = torch.where(top_k > 0, kth, lowest)
    if top_p is not None:
        assert normaliser is not None
        # Top-p is a share of the tokens that top-k leaves. They are within `values`, so the sum runs over them.
        left = values.masked_fill(values < lowest, -torch.inf)
        total = normaliser if top_k is None else torch.where(top_k > 0, left.logsumexp(-1, keepdim=True), normaliser)
        shares = (left - total).exp_()
        before = shares.cumsum(-1, dtype=torch.float64) - shares
        kept = (before < top_p).sum(-1, keepdim=True).clamp_(min=1)
        nucleus = values.gather(1, kept - 1)
        lowest = torch.where(top_p < 1, nucleus, lowest).maximum(lowest)
    if min_p is not None:
        lowest = torch.where(min_p > 0, lowest.maximum(best + min_p.log()), lowest)
    return torch.minimum(lowest, best)


class TokenLogprobs(NamedTuple):
    """Logprobs of given tokens, and of the most likely ones.

    Attributes:
        chosen: fp32 [n], of the given tokens. ranks: int32 [n], 1 for the most likely token; equal logits share a rank.
        top_ids, top: int32 and fp32 [n, top], best first.
    """

    chosen: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor

    def fields(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """As fields of SamplerOutput; those of most likely tokens only where some were asked for."""
        found = {f"{prefix}logprobs": self.chosen, f"{prefix}ranks": self.ranks}
        if self.top.shape[1]:
            found |= {f"{prefix}top_ids": self.top_ids, f"{prefix}top_logprobs": self.top}
        return found


def logprobs(raw: torch.Tensor, token_ids: torch.Tensor, top: int) -> TokenLogprobs:
    """Logprobs from raw logits [n, vocab] of any float type: of the tokens [n], and of the `top` most likely ones. The
    values for a token id of -1 mean nothing."""
    raw = raw.float()
    chosen = token_ids.long().clamp(min=0)[:, None]
    ranks = (raw > raw.gather(1, chosen)).sum(-1, dtype=torch.int32) + 1
    ids = raw.topk(min(max(top, 0), raw.shape[1]), -1).indices
    # Not logsumexp: PyTorch adds up a row in an order that depends on the number of rows. log_softmax does not, if all
    # rows begin at a multiple of 16 bytes.
    found = (F.pad(raw, (0, -raw.shape[1] % 4), value=-torch.inf) if raw.shape[1] % 4 else raw).log_softmax(-1)
    return TokenLogprobs(found.gather(1, chosen)[:, 0], ranks, ids.int(), found.gather(1, ids))
