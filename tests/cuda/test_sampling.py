"""Sampling in Triton against the default sampler, token for token."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampler import batch, column, spread

from hal.contracts.inputs import PagedModelInput
from hal.features import ADJUSTING
from hal.features.penalties import NO_PENALTIES
from hal.sampling.noise import exponential, row_keys
from hal.sampling.sampler import Sampler, reference, threshold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # else the interpreter
ROWS = 12 if DEVICE.type == "cuda" else 6  # the interpreter takes a time proportional to the rows
EXAMPLES = int(os.environ.get("HAL_EXAMPLES", 60 if DEVICE.type == "cuda" else 12))
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
VOCABS = (5, 300, 4096, 9001)  # the last ones: all lanes, and more than three times as many
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def ours() -> Sampler:
    from runners.cuda.sampler import CudaSampler

    return CudaSampler()


def moved(m: PagedModelInput) -> PagedModelInput:
    return PagedModelInput.from_buffer(m.to_buffer(), DEVICE)


def sample(logits: torch.Tensor, m: PagedModelInput) -> list[int]:
    found: list[int] = ours()(logits.to(DEVICE), moved(m)).token_ids.tolist()
    return found


def drawn(seed: int, n: int) -> dict[str, torch.Tensor]:
    """Parameters of n rows, in which every filter is on and off."""
    rng = np.random.default_rng(seed)
    return {"temperature": torch.tensor(rng.choice([0.0, 1e-4, 0.7, 1.0, 1.5], n), dtype=torch.float32),
            "top_k": torch.tensor(rng.choice([0, 0, 1, 7, 50, 3000, 5000], n), dtype=torch.int32),
            "top_p": torch.tensor(rng.choice([0.0, 0.3, 0.95, 0.999, 1.0, 1.0], n), dtype=torch.float32),
            "min_p": torch.tensor(rng.choice([0.0, 0.0, 0.02, 1.0], n), dtype=torch.float32),
            "seed": torch.tensor(rng.integers(-2**63, 2**63 - 1, n))}


def scaled(logits: torch.Tensor, m: PagedModelInput) -> torch.Tensor:
    assert m.temperature is not None
    scores, temperature = logits.float(), torch.where(m.temperature == 0, 1.0, m.temperature)[:, None]
    return (scores - reference(scores.max(-1, keepdim=True).values, temperature)) / temperature


def kept(logits: torch.Tensor, m: PagedModelInput) -> list[torch.Tensor]:
    """bool [n, vocab]: what passes filters that are a little too narrow, and a little too wide."""
    scores, found = scaled(logits, m), []
    top_k, top_p, min_p = (None if x is None else x[:, None] for x in (m.top_k, m.top_p, m.min_p))
    # To divide by a small temperature rounds: then the default sampler's shares are off too.
    slack = 1e-5 + 2e-7 * float(scores.masked_fill(~scores.isfinite(), 0.0).abs().max())
    for off in (-slack, slack):
        p = None if top_p is None else torch.where(top_p < 1, top_p + off, top_p).clamp(0, 1)
        floor = None if min_p is None else min_p * (1 - off)
        lowest = threshold(scores.sort(-1, descending=True).values, top_k, p, floor, scores.logsumexp(-1, keepdim=True))
        found.append(scores >= lowest)
    return found


def acceptable(logits: torch.Tensor, m: PagedModelInput) -> torch.Tensor:
    """bool [n, vocab]: the default sampler's token, and those that rounding makes it: near a threshold, or as good as
    the winner of the race."""
    assert m.temperature is not None and m.seed is not None
    ids = torch.arange(logits.shape[1], dtype=torch.int32)[None]
    race = scaled(logits, m) - exponential(row_keys(m.seed, m.positions + 1), ids).log()
    narrow, wide = (race.masked_fill(~some, -torch.inf) for some in kept(logits, m))
    found = (wide >= narrow.max(-1, keepdim=True).values - 1e-4) & (wide > -torch.inf) & (m.temperature > 0)[:, None]
    found[torch.arange(len(logits)), Sampler()(logits, m).token_ids.long()] = True
    return found


def made(seed: int, n: int, vocab: int, scale: float, shift: float, levels: bool, cut: bool) -> torch.Tensor:
    """[n, vocab]; `levels`: few values, `cut`: of constrained output."""
    logits = spread(n, vocab, seed) * scale + shift
    logits = logits.round() if levels else logits
    if cut:
        logits[:, 1::3] = -torch.inf
    return logits


LOGITS = {"seed": st.integers(0, 2**31), "vocab": st.sampled_from(VOCABS), "scale": st.sampled_from((0.01, 1.0, 6.0)),
          "shift": st.sampled_from((0.0, -40.0)), "levels": st.booleans(), "cut": st.booleans()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(n=st.integers(1, 5), vocab=st.sampled_from((1, 7, 512, 1500)), gap=st.integers(0, 3), levels=st.integers(1, 40),
       seed=st.integers(0, 2**31))
@settings(max_examples=EXAMPLES, deadline=None)
def test_greedy(dtype: torch.dtype, n: int, vocab: int, gap: int, levels: int, seed: int) -> None:
    """The first of equals, of rows with gaps; kept for the next step, where padding goes to the last place."""
    from runners.cuda.kernels.sampling import greedy

    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-levels, 1, (n, vocab + gap), generator=generator).float()
    wide = torch.where(torch.rand(wide.shape, generator=generator) < 0.5, wide, wide - 0.0 * wide.abs().add(1))
    wide[:, vocab:] = 9
    wide[seed % n] = -torch.inf
    logits = wide.to(DEVICE, dtype)[:, :vocab]
    expected = wide[:, :vocab].argmax(-1).int()
    expected[seed % n] = -1
    places = torch.randperm(n + 2, generator=generator)[:n].int()
    places[torch.rand(n, generator=generator) < 0.4] = -1
    last = torch.full((n + 3,), -7, dtype=torch.int32, device=DEVICE)
    kept = last.tolist()
    assert greedy(logits).tolist() == greedy(logits, places.to(DEVICE), last).tolist() == expected.tolist()
    padding = {max(int(t), 0) for t, place in zip(expected, places, strict=True) if place < 0}
    for token, place in zip(expected.tolist(), places.tolist(), strict=True):
        if place >= 0:
            kept[place] = max(token, 0)  # the next step looks it up
    assert last.tolist()[:-1] == kept[:-1] and (not padding or int(last[-1]) in padding)


@pytest.mark.parametrize("n", [3, 260])
def test_greedy_of_a_real_vocabulary(n: int) -> None:
    from runners.cuda.kernels.sampling import greedy

    n = n if DEVICE.type == "cuda" else 2
    logits = torch.randn(n, 151_936, generator=torch.Generator().manual_seed(n)).half()
    assert greedy(logits.to(DEVICE)).tolist() == logits.float().argmax(-1).tolist()


def test_noise() -> None:
    """Programs of one element: what they race with is the noise itself."""
    from runners.cuda.kernels.launch import launch_options
    from runners.cuda.kernels.sampling import _race

    n, vocab = (64, 4096) if DEVICE.type == "cuda" else (4, 64)
    seeds, at = torch.arange(n) * 2**57 - 2**62, torch.arange(n, dtype=torch.int32)
    scores, winners = torch.zeros(1, vocab, device=DEVICE), torch.empty(n, vocab, dtype=torch.int64, device=DEVICE)
    places = at.to(DEVICE)
    bases = torch.empty(n, vocab, device=DEVICE)
    _race[(n, vocab)](scores, torch.ones(n, device=DEVICE), None, None, seeds.to(DEVICE), places, places, winners,
                      bases, 0, vocab, 1, vocab, DRAW=True, BLOCK=1, num_warps=1, **launch_options(scores))
    bits = (winners.cpu() >> 32).int()
    race = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    expected = exponential(row_keys(seeds, at + 1), torch.arange(vocab, dtype=torch.int32)[None])
    torch.testing.assert_close(race.neg().exp(), expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(only=st.sets(st.sampled_from(tuple(OFF)), min_size=1), **LOGITS)
@settings(max_examples=EXAMPLES, deadline=None)
def test_thresholds(dtype: torch.dtype, only: set[str], **how: Any) -> None:
    from runners.cuda.kernels.sampling import thresholds

    n, params = ROWS, drawn(how["seed"], ROWS)
    params["temperature"].clamp_(min=1e-3)
    logits, m = made(n=n, **how).to(dtype), batch(n, **{k: v for k, v in params.items() if k in only or k not in OFF})
    there = moved(m)
    lowest = thresholds(logits.to(DEVICE), there.temperature, there.top_k, there.top_p, there.min_p)[0].cpu()
    ours, (narrow, wide) = scaled(logits, m) >= lowest[:, None], kept(logits, m)
    assert (ours | ~narrow | logits.isneginf()).all() and (wide | ~ours).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999, 0.99999])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_top_p_where_the_whole_tail_decides(top_p: float, temperature: float) -> None:
    """One token, and thousands that together weigh just less, and just more, than it takes to be kept."""
    from runners.cuda.kernels.sampling import thresholds

    n, vocab = 2, 6001
    p, t = column(n, top_p), column(n, temperature)
    logits = torch.zeros(n, vocab)
    logits[:, 7] = temperature * (np.log((vocab - 1) * p / (1 - p)) + torch.tensor([0.4, -0.4]))
    scores = logits / t[:, None]
    lowest = thresholds(logits.to(DEVICE), t.to(DEVICE), None, p.to(DEVICE), None)[0].cpu()
    assert (scores >= lowest[:, None]).sum(-1).tolist() == [1, vocab]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(only=st.sets(st.sampled_from(tuple(OFF))), **LOGITS)
@settings(max_examples=EXAMPLES, deadline=None)
def test_tokens_are_those_of_the_default_sampler(dtype: torch.dtype, only: set[str], **how: Any) -> None:
    n, params = ROWS, drawn(how["seed"], ROWS)
    at = torch.tensor(np.random.default_rng(how["seed"]).integers(0, 5000, n), dtype=torch.int32)
    logits = made(n=n, **how).to(dtype)
    m = batch(n, at, **{k: v for k, v in params.items() if k in only or k not in OFF})
    allowed = acceptable(logits, m)
    for row, token in enumerate(sample(logits, m)):
        assert allowed[row, token], (row, token, allowed[row].nonzero()[:, 0].tolist(), m)


def test_most_tokens_are_exactly_those_of_the_default_sampler() -> None:
    """So that what is acceptable does not hide anything."""
    n, vocab = (4000, 3001) if DEVICE.type == "cuda" else (20, 3001)
    logits, m = spread(n, vocab), batch(n, torch.arange(n, dtype=torch.int32), **drawn(1, n))
    equal = torch.tensor(sample(logits, m)) == Sampler()(logits, m).token_ids
    assert (~equal).sum() <= n // 1000


@given(seed=st.integers(0, 2**31), vocab=st.sampled_from(VOCABS[1:]), scale=st.sampled_from((0.01, 3.0)))
@settings(max_examples=EXAMPLES // 3, deadline=None)
def test_a_token_depends_on_nothing_but_its_request(seed: int, vocab: int, scale: float) -> None:
    n, params = 4, drawn(seed, 4)
    logits, at = spread(n, vocab, seed) * scale, torch.arange(n, dtype=torch.int32) * 7
    together = sample(logits, batch(n, at, **params))
    wide = batch(n, at, **params).padded(num_tokens=n + 3, num_logits=n + 2, num_sampled=n + 4)
    assert sample(torch.cat([logits, logits[:2]]), wide) == together
    for i in range(n):
        own = {k: v[i:i + 1] for k, v in params.items() if k not in OFF or v[i] != OFF[k]}
        assert sample(logits[i:i + 1], batch(1, at[i:i + 1], **own)) == together[i:i + 1]


@pytest.mark.parametrize("filters", [(), ("top_k",), ("top_p",), ("min_p",), tuple(OFF)], ids=str)
@given(seed=st.integers(0, 2**31), vocab=st.sampled_from(VOCABS), values=st.lists(st.sampled_from(
    (math.nan, math.inf, -math.inf, 3e38, -3e38)), min_size=1, max_size=4), whole=st.booleans())
@settings(max_examples=EXAMPLES // 3, deadline=None)
def test_a_row_without_a_finite_maximum_has_no_token(filters: tuple[str, ...], seed: int, vocab: int,
                                                     values: list[float], whole: bool) -> None:
    """And the other rows have the tokens that they have without it."""
    n, rng = 6, np.random.default_rng(seed)
    logits, params = spread(n, vocab, seed), drawn(seed, n)
    m = batch(n, **{k: v for k, v in params.items() if k in filters or k not in OFF})
    sound, sound_greedy = sample(logits, m), sample(logits, batch(n))
    for row in (1, 4):
        where = slice(None) if whole else torch.tensor(rng.integers(0, vocab, len(values)))
        logits[row, where] = float(values[0]) if whole else torch.tensor(values)
    finite = (logits.max(-1).values.abs() < math.inf).tolist()
    got, got_greedy = sample(logits, m), sample(logits, batch(n))
    assert [t >= 0 for t in got] == [t >= 0 for t in got_greedy] == finite
    for row in (0, 2, 3, 5):
        assert (got[row], got_greedy[row]) == (sound[row], sound_greedy[row])


@given(only=st.sets(st.sampled_from(tuple(OFF))), seed=st.integers(0, 2**31), vocab=st.sampled_from(VOCABS),
       scale=st.sampled_from((1e-30, 1.0, 1e30)), shift=st.sampled_from((0.0, -1e3, 1e37)))
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_extreme_temperatures(only: set[str], seed: int, vocab: int, scale: float, shift: float) -> None:
    """From the smallest number of fp32 to the largest; logits have ties, in several pieces."""
    n, params = 8, drawn(seed, 8)
    params["temperature"] = torch.tensor([0.0, 1e-45, 1e-40, 1e-37, 1e-20, 1e-5, 1e20, 3.4e38])
    logits = spread(n, vocab, seed).round() * scale + shift
    m = batch(n, **{k: v for k, v in params.items() if k in only or k not in OFF})
    allowed = acceptable(logits, m)
    for row, token in enumerate(sample(logits, m)):
        assert allowed[row, token], (row, token, allowed[row].nonzero()[:, 0].tolist(), m)


def everything(n: int, vocab: int) -> PagedModelInput:
    rng, fields = np.random.default_rng(n), drawn(n, n)
    history = torch.tensor(rng.integers(0, vocab, (n, 9)), dtype=torch.int32)
    penalties = {name: column(n, value) for name, value in zip(NO_PENALTIES, (1.2, 0.5, 0.25), strict=True)}
    mask = torch.tensor(rng.integers(-2**31, 2**31, (n, -(-vocab // 32))), dtype=torch.int32)
    return batch(n, **fields, **penalties, history=history, prompt_lens=column(n, 4, torch.int32), num_logprobs=3,
                 token_mask=mask, bias_ids=history[:, :3].contiguous(), bias_values=torch.ones(n, 3))


def test_whole_outputs() -> None:
    """With penalties and logprobs, of more rows than are sampled."""
    n, vocab = 5, 700
    logits, m = spread(n + 2, vocab).half(), everything(n, vocab)
    got, expected = ours()(logits.to(DEVICE), moved(m)), Sampler()(logits, m)
    got.validate(got.token_ids.device)
    for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(expected, name))
    m.num_samples = 0
    assert ours()(logits[:0].to(DEVICE), moved(m)).token_ids.tolist() == []


@pytest.mark.skipif(DEVICE.type != "cuda", reason="requires an NVIDIA GPU: nothing else counts waits")
def test_the_host_never_waits() -> None:
    n, vocab = 8, 50_257
    adjusted = (name for feature in ADJUSTING for name in feature.fields)
    kinds: list[dict[str, Any]] = [{}, {**dict.fromkeys(adjusted), "num_logprobs": -1}]
    for changes in kinds:
        m = everything(n, vocab)
        for name, value in changes.items():
            setattr(m, name, value)
        m, logits, sampler = moved(m), spread(n, vocab).to(DEVICE, torch.bfloat16), ours()
        expected = sampler(logits, m).token_ids.tolist()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = sampler(logits, m)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert got.token_ids.tolist() == expected
