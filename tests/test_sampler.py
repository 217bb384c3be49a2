"""The sampler: filters against transformers' processors, noise against its distribution, tokens against the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hal.contracts.inputs import PagedModelInput
from hal.features.penalties import NO_PENALTIES, penalised
from hal.sampling.noise import exponential, row_keys
from hal.sampling.sampler import LARGE, Sampler, threshold
from runners.cpu.sampler import CpuSampler

pytestmark = pytest.mark.torch_release
SEED = 20240614


def batch(n: int, positions: torch.Tensor | None = None, **fields: Any) -> PagedModelInput:
    """n sequences that each sample after their only token."""
    ids = torch.arange(n, dtype=torch.int32)
    positions = torch.zeros_like(ids) if positions is None else positions
    return PagedModelInput(
        input_ids=ids, positions=positions, slot_mapping=(ids + 1) * 16, seq_lens=positions + 1,
        query_start_loc=torch.arange(n + 1, dtype=torch.int32), block_tables=ids[:, None] + 1,
        logits_indices=ids, block_size=16, num_decode_seqs=n, num_samples=n, **fields)


def column(n: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((n,), value, dtype=dtype)


def spread(n: int, vocab: int, seed: int = SEED) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@given(seed=st.integers(0, 2**31), top_k=st.integers(0, 40), top_p=st.sampled_from((0.05, 0.5, 0.9, 1.0)),
       min_p=st.sampled_from((0.0, 0.02, 0.4, 1.0)), temperature=st.sampled_from((0.3, 1.0, 2.5)))
@settings(max_examples=200, deadline=None)
@example(seed=65002, top_k=0, top_p=0.9, min_p=0.0, temperature=1.0)  # a sum that fp32 cannot tell from top_p
@example(seed=54235, top_k=20, top_p=0.9, min_p=0.0, temperature=2.5)
def test_filters_keep_what_transformers_keeps(seed: int, top_k: int, top_p: float, min_p: float,
                                              temperature: float) -> None:
    from transformers.generation import logits_process as hf

    def kept(slack: float) -> torch.Tensor:
        """By transformers, with shares that are larger or smaller by `slack`: a sum in fp32 is not exact, and the last
        token's may be top_p to seven digits."""
        chain: list[Any] = [hf.TemperatureLogitsWarper(temperature)]
        chain += [hf.TopKLogitsWarper(top_k)] if top_k else []
        chain += [hf.TopPLogitsWarper(top_p * (1 + slack))] if top_p < 1 else []
        chain += [hf.MinPLogitsWarper(min(min_p * (1 - slack), 1.0))] if min_p > 0 else []
        found = scores
        for processor in chain:
            found = processor(torch.zeros(3, 1, dtype=torch.long), found)
        return found > -math.inf

    scores = spread(3, 33, seed)
    scaled = scores / temperature
    ordered = scaled.sort(-1, descending=True).values
    lowest = threshold(ordered, column(3, top_k, torch.int32)[:, None], column(3, top_p)[:, None],
                       column(3, min_p)[:, None], scaled.logsumexp(-1, keepdim=True))
    got = scaled >= lowest
    assert (kept(-2e-6) <= got).all() and (got <= kept(2e-6)).all()


@given(seed=st.integers(0, 2**31), repetition=st.sampled_from((0.5, 1.0, 1.3)), presence=st.sampled_from((0.0, 0.7)),
       frequency=st.sampled_from((0.0, -0.3, 0.25)))
@settings(max_examples=100, deadline=None)
def test_penalties(seed: int, repetition: float, presence: float, frequency: float) -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    rng, vocab = np.random.default_rng(seed), 12
    lens = rng.integers(1, 9, 3)
    prompts = [int(rng.integers(1, n + 1)) for n in lens]
    history = np.full((3, 9), -1)
    scores = spread(3, vocab, seed)
    expected = torch.empty_like(scores)
    for row, n in enumerate(lens):
        history[row, :n] = tokens = rng.integers(0, vocab, n)
        expected[row] = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor(tokens)[None], scores[row:row + 1])[0]
        for token in range(vocab):
            count = int((tokens[prompts[row]:] == token).sum())
            expected[row, token] -= presence * (count > 0) + frequency * count
    penalties = (torch.full((3,), value) for value in (repetition, presence, frequency))
    before = scores.clone()
    got = penalised(scores, *penalties, torch.tensor(history, dtype=torch.int32), torch.tensor(prompts).int())
    torch.testing.assert_close(got, expected)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("cls", [Sampler, CpuSampler])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_equals(cls: type[Sampler], dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [-1.0, -3.0, -1.0, -2.0], [5.0, 1.0, 1.0, 9.0]], dtype=dtype)
    assert cls()(logits, batch(3)).token_ids.tolist() == [1, 0, 3]
    mixed = batch(3, temperature=torch.tensor([0.0, 0.0, 1e-6]), seed=torch.zeros(3, dtype=torch.int64),
                  top_p=column(3, 0.9))
    assert cls()(logits, mixed).token_ids.tolist() == [1, 0, 3]


FILTERS: dict[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@st.composite
def temperatures(draw: st.DrawFn) -> float:
    """Every positive number of fp32, subnormal ones too, each power of two as likely as another."""
    mantissa, exponent = draw(st.floats(1.0, 1.99)), draw(st.integers(-149, 127))
    return float(np.float32(np.ldexp(mantissa, exponent)))


def in_fp64(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, at: int,
            ) -> torch.Tensor:
    """bool [vocab]: the tokens that may win the race when fp32's rounding decides whatever it can. Quotients that
    differ by less than it become equal."""
    scores = (logits.double() - logits.double().max()) / temperature
    ordered, allowed = scores.sort(descending=True).values, []
    noise = exponential(row_keys(torch.tensor([seed]), torch.tensor([at + 1])),
                        torch.arange(len(logits), dtype=torch.int32)[None])[0].double().log()
    relative = bool((logits.double().max() / temperature).abs() > LARGE)  # to the largest, as `reference` says
    rounding = 2.0**-22 * (scores if relative else logits.double() / temperature).abs()
    for slack, error in ((-5e-3, torch.zeros(1)), (5e-3, rounding)):
        lowest = ordered[min(top_k, len(ordered)) - 1] if top_k else torch.tensor(-torch.inf, dtype=torch.float64)
        if top_p < 1:
            shares = ordered[ordered >= lowest].softmax(-1)
            kept = int(((shares.cumsum(-1) - shares) < top_p + slack).sum().clamp(min=1))
            lowest = lowest.maximum(ordered[kept - 1])
        if min_p > 0:
            lowest = lowest.maximum(torch.tensor(math.log(min_p) - slack, dtype=torch.float64).clamp(max=0))
        allowed.append((scores - noise).masked_fill(scores + error < lowest, -torch.inf))
    narrow, wide = allowed
    return (wide > -torch.inf) & (wide >= narrow.max() - 5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Sampler, CpuSampler])
@given(rows=st.lists(st.tuples(temperatures(), st.sampled_from((0, 1, 3, 40)), st.sampled_from((0.0, 0.3, 0.95, 1.0)),
                               st.sampled_from((0.0, 0.02, 1.0))), min_size=1, max_size=5),
       seed=st.integers(0, 2**31), vocab=st.sampled_from((1, 40, 700)), scale=st.sampled_from((1e-3, 1.0, 1e30)),
       shift=st.sampled_from((0.0, -50.0, 1e4, -1e37)), mask=st.booleans())
@settings(max_examples=150, deadline=None)
@example(rows=[(1.103641390800476, 0, 0.0, 0.0)] * 2, seed=40493702, vocab=40, scale=1e-3, shift=1e4, mask=False)
def test_any_temperature_gives_what_fp64_gives(
        cls: type[Sampler], rows: list[tuple[float, int, float, float]], seed: int, vocab: int, scale: float,
        shift: float, mask: bool) -> None:
    n = len(rows)
    logits = spread(n, vocab, seed).mul(4).round() * scale + shift  # with ties
    if mask:
        logits[:, 1::3] = -torch.inf
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    at, seeds = torch.arange(n, dtype=torch.int32) * 3, torch.arange(n) + seed
    given: dict[str, torch.Tensor] = {"top_k": torch.tensor(top_k, dtype=torch.int32), "top_p": torch.tensor(top_p),
                                      "min_p": torch.tensor(min_p)}
    used = {k: v for k, v in given.items() if (v != FILTERS[k]).any()}
    tokens = cls()(logits, batch(n, at, temperature=torch.tensor(temperature), seed=seeds, **used)).token_ids.tolist()
    for i, row in enumerate(rows):
        allowed = in_fp64(logits[i], *row, int(seeds[i]), int(at[i]))
        assert allowed[tokens[i]], (row, tokens[i], allowed.nonzero()[:, 0].tolist())


def test_a_temperature_below_fp32_is_greedy() -> None:
    logits = spread(1, 50)
    m = batch(1, temperature=torch.tensor([1e-46]), seed=torch.ones(1, dtype=torch.int64), **fields(1, top_k=9))
    assert Sampler()(logits, m).token_ids.tolist() == [int(logits.argmax())]


@given(repetition=st.sampled_from((1e-50, 1e-40, 0.5, 1.0, 3e38)), presence=st.sampled_from((-3.4e38, 0.0, 3.4e38)),
       frequency=st.sampled_from((-3.4e38, 0.0, 3.4e38)), temperature=st.sampled_from((0.0, 1e-40, 0.5, 3.4e38)),
       broken=st.sampled_from((None, math.nan, math.inf, -math.inf)))
@settings(max_examples=100, deadline=None)
def test_penalties_overflow_to_the_largest_number(repetition: float, presence: float, frequency: float,
                                                  temperature: float, broken: float | None) -> None:
    """Never to NaN or infinity, in whichever order they cancel; what was not finite before stays what it was."""
    logits = torch.tensor([[2.0, -3.0, 0.0, -torch.inf, 1.5]]) if broken is None else torch.tensor(
        [[broken, -torch.inf, -torch.inf, -torch.inf, -torch.inf]])
    history = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 3]], dtype=torch.int32)
    penalties = {name: column(1, value) for name, value in zip(NO_PENALTIES, (repetition, presence, frequency),
                                                               strict=True)}
    scores = penalised(logits, *penalties.values(), history, torch.tensor([2]))
    assert torch.equal(scores.isfinite(), logits.isfinite()) and torch.equal(scores.isnan(), logits.isnan())
    m = batch(1, **penalties, history=history, prompt_lens=column(1, 2, torch.int32),
              temperature=column(1, temperature), seed=torch.ones(1, dtype=torch.int64))
    token = int(Sampler()(logits, m).token_ids)
    assert token == -1 if broken is not None else token not in (-1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Sampler, CpuSampler])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**31), vocab=st.sampled_from((1, 33, 600)),
       filters=st.sets(st.sampled_from(tuple(FILTERS))), values=st.lists(
           st.sampled_from((math.nan, math.inf, -math.inf)), min_size=1, max_size=4),
       whole=st.booleans(), greedy=st.booleans(), top=st.integers(-1, 1))
@settings(max_examples=60, deadline=None)
def test_a_row_without_a_finite_maximum_has_no_token(
        cls: type[Sampler], dtype: torch.dtype, seed: int, vocab: int, filters: set[str], values: list[float],
        whole: bool, greedy: bool, top: int) -> None:
    """And its neighbours have the tokens that they have beside a sound row."""
    n, rng = 5, np.random.default_rng(seed)
    params: dict[str, Any] = {} if greedy else {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 1e-40, 2.0]), "seed": torch.arange(n) + seed}
    if not greedy:
        params |= {k: v for k, v in fields(n, top_k=5, top_p=0.8, min_p=0.01).items() if k in filters}
    logits = spread(n, vocab, seed).to(dtype)
    sound = cls()(logits, batch(n, **params)).token_ids.tolist()
    for row in (1, 3):
        where = slice(None) if whole else torch.tensor(rng.integers(0, vocab, len(values)))
        logits[row, where] = values[0] if whole else torch.tensor(values, dtype=dtype)
    out = cls()(logits, batch(n, num_logprobs=top, **params))
    out.validate("cpu")
    out.check()
    finite = (logits.max(-1).values.abs() < torch.inf).tolist()
    for row, token in enumerate(out.token_ids.tolist()):
        assert (token >= 0) == finite[row] and (row in (1, 3) or token == sound[row])


CASES: dict[str, dict[str, Any]] = {
    "temperature": {}, "top_k": {"top_k": 7}, "top_p": {"top_p": 0.8}, "min_p": {"min_p": 0.05},
    "top_k, top_p": {"top_k": 12, "top_p": 0.7}, "all": {"top_k": 20, "top_p": 0.95, "min_p": 0.02}}


def fields(n: int, **params: float) -> dict[str, torch.Tensor]:
    return {k: column(n, v, torch.int32 if k == "top_k" else torch.float32) for k, v in params.items()}


@pytest.mark.parametrize("case", CASES)
def test_tokens_follow_the_filtered_distribution(case: str) -> None:
    """Chi-square over 20,000 positions of one request, and over 20,000 seeds; with fixed seeds nothing is random."""
    n, vocab, temperature = 20_000, 40, 1.5
    logits = spread(1, vocab)
    scaled = logits / temperature
    one = {k: v[:, None] for k, v in fields(1, **CASES[case]).items()}
    lowest = threshold(scaled.sort(-1, descending=True).values, one.get("top_k"), one.get("top_p"), one.get("min_p"),
                       scaled.logsumexp(-1, keepdim=True))
    p = scaled.masked_fill(scaled < lowest, -math.inf).softmax(-1)[0].double().numpy()
    positions = torch.arange(n, dtype=torch.int32)
    for seeds, at in ((torch.full((n,), SEED), positions), (torch.arange(n) + SEED, torch.full_like(positions, 9))):
        m = batch(n, at, temperature=column(n, temperature), seed=seeds, **fields(n, **CASES[case]))
        counts = np.bincount(Sampler()(logits.expand(n, vocab), m).token_ids.numpy(), minlength=vocab)
        assert counts[p == 0].sum() == 0
        enough = p * n >= 5
        chi2 = (((counts - n * p) ** 2)[enough] / (n * p[enough])).sum()
        degrees = enough.sum() - 1
        assert chi2 < degrees + 4 * math.sqrt(2 * degrees) + 4, (chi2, degrees)


def test_noise_is_exponential_and_independent() -> None:
    n, vocab = 512, 4096
    ids = torch.arange(vocab, dtype=torch.int32)[None]
    positions = torch.arange(n)
    noise = {"positions": exponential(row_keys(torch.full((n,), 1), positions), ids),
             "seeds": exponential(row_keys(torch.arange(n), torch.full((n,), 3)), ids),
             "distant seeds": exponential(row_keys(torch.arange(n) << 40, positions), ids)}
    for name, x in noise.items():
        total = x.numel()
        assert abs(float(x.double().mean()) - 1) < 5 / math.sqrt(total), name
        uniform = (-x.double()).expm1().neg()
        counts = torch.histc(uniform, 256, 0, 1)
        chi2 = float(((counts - total / 256) ** 2).sum() / (total / 256))
        assert chi2 < 255 + 5 * math.sqrt(510), (name, chi2)
        centred = uniform - 0.5
        for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1)), centred.roll(64, 1)):
            assert abs(float((centred * other).mean() * 12)) < 5 / math.sqrt(total), name
        # Neighbouring rows as whole vectors: no pair among them is alike.
        rows = centred[:128] / centred[:128].norm(dim=1, keepdim=True)
        alike = (rows @ rows.T).fill_diagonal_(0).abs().max()
        assert alike < 6 / math.sqrt(vocab), name
    assert float(noise["positions"].min()) > 0 and float(noise["positions"].max()) < 17


def test_noise_is_the_same_everywhere() -> None:
    """Written down once: another torch, device or machine must give these bits."""
    keys = row_keys(torch.tensor([0, -1, 2**62, 7]), torch.tensor([0, 1, 2, 131071]))
    assert keys.tolist() == KEYS
    got = exponential(keys, torch.tensor([[0, 1, 151935]], dtype=torch.int32))
    torch.testing.assert_close(got, torch.tensor(NOISE), rtol=2e-6, atol=0)


KEYS = [5197578548964807871, 6755974106381971767, -6303279100715332996, 6028240396337438001]
NOISE = [[0.3884589, 0.0838927, 1.236341],
         [1.044175, 0.4244461, 1.591924],
         [0.9983072, 0.194504, 1.030008],
         [0.9618741, 0.4647858, 1.017213]]


@pytest.mark.slow
@given(seed=st.integers(0, 2**31), vocab=st.sampled_from((5, 300, 2000)), scale=st.sampled_from((0.01, 1.0, 6.0)),
       ties=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_token_depends_on_nothing_but_its_request(seed: int, vocab: int, scale: float, ties: bool) -> None:
    """Alone or among others, whose parameters widen or narrow the candidates, by either sampler, padded or not."""
    rng, n = np.random.default_rng(seed), 6
    logits = spread(n, vocab, seed) * scale
    logits = logits.bfloat16() if ties else logits
    params = {
        "temperature": torch.tensor(rng.choice([0.0, 0.7, 1.0], n), dtype=torch.float32),
        "top_k": torch.tensor(rng.choice([0, 1, 50, 700], n), dtype=torch.int32),
        "top_p": torch.tensor(rng.choice([0.3, 0.95, 1.0], n), dtype=torch.float32),
        "min_p": torch.tensor(rng.choice([0.0, 0.1], n), dtype=torch.float32),
        "seed": torch.tensor(rng.integers(-2**63, 2**63 - 1, n))}
    at = torch.tensor(rng.integers(0, 5000, n), dtype=torch.int32)
    together = Sampler()(logits, batch(n, at, **params)).token_ids
    assert torch.equal(CpuSampler()(logits, batch(n, at, **params)).token_ids, together)
    wide = batch(n, at, **params).padded(num_tokens=n + 3, num_logits=n + 2, num_sampled=n + 4)
    assert torch.equal(Sampler()(torch.cat([logits, logits[:2]]), wide).token_ids, together)
    none = {"top_k": 0, "top_p": 1, "min_p": 0}
    for i in range(n):
        own = {k: v[i:i + 1] for k, v in params.items() if k not in none or v[i] != none[k]}
        assert Sampler()(logits[i:i + 1], batch(1, at[i:i + 1], **own)).token_ids.tolist() == [int(together[i])], params


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_are_of_the_raw_logits(top: int) -> None:
    n, vocab = 4, 30
    logits = spread(n, vocab).bfloat16()
    m = batch(n, temperature=column(n, 0.5), seed=torch.arange(n), num_logprobs=top)
    m.check()
    out = Sampler()(logits, m)
    out.validate("cpu")
    expected = logits.float().log_softmax(-1)
    assert out.logprobs is not None
    torch.testing.assert_close(out.logprobs, expected.gather(1, out.token_ids.long()[:, None])[:, 0])
    if not top:
        assert out.top_ids is None and out.top_logprobs is None
        return
    assert out.top_ids is not None and out.top_logprobs is not None
    torch.testing.assert_close(out.top_logprobs, expected.topk(top, -1).values)
    torch.testing.assert_close(expected.gather(1, out.top_ids.long()), out.top_logprobs)


def test_nothing_to_sample() -> None:
    m = batch(2)
    m.num_samples, m.logits_indices = 0, torch.zeros(0, dtype=torch.int32)
    assert list(Sampler()(torch.zeros(0, 9), m).token_ids.shape) == [0]
