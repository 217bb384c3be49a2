"""The gated delta rule for tokens one by one, and for chunks of them. Source: arXiv 2412.06464.

For each head a row keeps a matrix S. A token with key k, value v, decay g <= 0 and strength b makes of it
S <- exp(g) S, then S <- S + b k (v - S^T k)^T, and a query q reads S^T q. Queries and keys are normalised, and before
that a convolution over the last tokens mixes q, k and v.

The tokens of a prompt are computed in chunks. Within a chunk all tokens are computed at once, with the inverse of a
triangular matrix (arXiv 2406.06484); the state passes from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK = 64  # tokens; a power of two


class Spans(NamedTuple):
    """How the tokens of a step lie in its sequences; all layers share it. Below, T is tokens, S sequences, N chunks of
    C tokens. Each sequence has chunks of its own, of which the last may have padding.

    Attributes:
        decodes: leading sequences of one token each, which are in no chunk.
        taps: [T, taps], the rows that the convolution of each token sees: first taps - 1 rows of each sequence's state,
            and behind the rows of all sequences the tokens. kept: [S, taps - 1], those that become the state.
        token_of: [N * C], the token at each place of a chunk; padding has any. real: [N, C], whether it is no padding.
        place_of: [T - decodes], the place of each token in the chunks.
        rounds: chunks that can be computed at once, as their numbers and their sequences.
    """

    decodes: int
    taps: torch.Tensor
    kept: torch.Tensor
    token_of: torch.Tensor
    real: torch.Tensor
    place_of: torch.Tensor
    rounds: Sequence[tuple[torch.Tensor, torch.Tensor]]

    def to(self, device: torch.device) -> Spans:
        taps, kept, token_of, real, place_of = (x.to(device) for x in self[1:6])
        return Spans(self.decodes, taps, kept, token_of, real, place_of,
                     [(chunks.to(device), sequences.to(device)) for chunks, sequences in self.rounds])


def find_spans(starts: torch.Tensor, tokens: int, taps: int, decodes: int, chunk: int = CHUNK, count: int = 0) -> Spans:
    """Args:
        starts: the first token of each sequence, then the number of real tokens.
        count: N, for static shapes: with it each chunk is a round of its own.
    """
    first, last = starts[:-1].long(), starts[1:].long()
    seqs, arange = len(first), torch.arange(max(tokens, count, len(first) + 1), device=starts.device)
    owner = (arange[:tokens, None] >= last).sum(1).clamp(max=seqs - 1)
    back = torch.arange(1 - taps, 1, device=starts.device)

    def rows_of(sequence: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Of these places [n, taps] in sequences [n]; a negative place is in the state."""
        state, token = sequence[:, None] * (taps - 1) + place + taps - 1, seqs * (taps - 1) + first[sequence, None]
        return torch.where(place < 0, state, token + place)

    seen = rows_of(owner, (arange[:tokens] - first[owner])[:, None] + back)
    kept = rows_of(arange[:seqs], (last - first)[:, None] + back[:-1])
    chunks = (last - first + chunk - 1) // chunk * (arange[:seqs] >= decodes)
    ends = chunks.cumsum(0)
    begins, total = ends - chunks, count or int(ends[-1])
    sequence = (arange[:total, None] >= ends).sum(1).clamp(max=seqs - 1)
    number = arange[:total] - begins[sequence]
    token_of = (first[sequence] + number * chunk)[:, None] + torch.arange(chunk, device=starts.device)
    place_of = (begins[owner] * chunk + arange[:tokens] - first[owner])[decodes:]
    if count:
        rounds = [(arange[i:i + 1], sequence[i:i + 1]) for i in range(count)]
    else:
        each = [(number == i).nonzero()[:, 0] for i in range(int(chunks.max()))]
        rounds = [(some, sequence[some]) for some in each]
    return Spans(decodes, seen, kept, token_of.clamp(max=tokens - 1).flatten(), token_of < last[sequence, None],
                 place_of.clamp(max=max(total * chunk - 1, 0)), rounds)


def step_rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, strength: torch.Tensor,
              state: torch.Tensor) -> torch.Tensor:
    """The rule for one token of each row, in fp32.

    Args:
        q, k: [n, heads, key_dim]. v: [n, heads, value_dim]. decay, strength: [n, heads]. Decays are logarithms.
        state: [n, heads, key_dim, value_dim]; it becomes the next one.

    Returns:
        [n, heads, value_dim].
    """
    held = state.mul_(decay.exp()[..., None, None]).flatten(0, 1)
    q, k, v = (x.flatten(0, 1).unsqueeze(1) for x in (q, k, v))
    held.baddbmm_(k.mT, (v - k @ held) * strength.view(-1, 1, 1))
    return (q @ held).view(*state.shape[:2], -1)


def chunk_rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, strength: torch.Tensor,
               state: torch.Tensor, rounds: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The rule for chunks of tokens, in fp32. A strength and a decay of 0 leave a token out.

    Args:
        q, k: [N, heads, C, key_dim]. v: [N, heads, C, value_dim]. decay, strength: [N, heads, C].
        state: [sequences, heads, key_dim, value_dim]; it becomes that behind each sequence's last chunk.
        rounds: as in Spans.

    Returns:
        [N, heads, C, value_dim].
    """
    since, size = decay.cumsum(-1), decay.shape[-1]
    after = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (since.unsqueeze(-1) - since.unsqueeze(-2)).masked_fill(after, -torch.inf).exp()
    strong = k * strength.unsqueeze(-1)
    inverse = inverse_of_unit(strong @ k.mT * between)
    own, read = inverse @ (v * strength.unsqueeze(-1)), inverse @ (strong * since.exp().unsqueeze(-1))
    within = q @ k.mT * between
    q, k = q * since.exp().unsqueeze(-1), k * (since[..., -1:] - since).exp().unsqueeze(-1)
    whole, out = since[..., -1].exp()[..., None, None], torch.zeros_like(own)
    for chunks, sequences in rounds:
        held = state.index_select(0, sequences)
        new = own.index_select(0, chunks) - read.index_select(0, chunks) @ held
        out.index_copy_(0, chunks, q.index_select(0, chunks) @ held + within.index_select(0, chunks) @ new)
        held = held * whole.index_select(0, chunks) + k.index_select(0, chunks).mT @ new
        state.index_copy_(0, sequences, held)
    return out


def inverse_of_unit(below: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix [..., n, n] with ones on its diagonal; of `below` only the values under
    the diagonal are read. It is put together from the inverses of blocks on the diagonal, whose size doubles: that of
    [[A, 0], [B, C]] is [[A', 0], [-C' B A', C']]."""
    *lead, size, _ = below.shape
    inverse, half = below.new_ones(*lead, size, 1, 1), 1
    while half < size:
        count = size // (2 * half)
        blocks = below.view(*lead, count, 2 * half, count, 2 * half).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        first, second = inverse.view(*lead, count, 2, half, half).unbind(-3)
        corner = second @ blocks[..., half:, :half] @ first
        inverse = torch.cat((F.pad(first, (0, half)), torch.cat((-corner, second), -1)), -2)
        half *= 2
    return inverse.squeeze(-3)
