"""Token masks, logit bias and ranks by every sampler that runs on a CPU, against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampler import batch

from hal.contracts.inputs import PagedModelInput
from hal.contracts.request import ExecuteModelRequest
from hal.errors import InputError, RequestError
from hal.features import ADJUSTING, FEATURES
from hal.features.bias import LogitBias
from hal.features.declare import Feature
from hal.features.masks import TokenMasks, allowed, mask_fields
from hal.sampling.params import SamplingParams
from hal.sampling.sampler import Sampler, logprobs
from runners.cpu.sampler import CpuSampler

pytestmark = pytest.mark.torch_release


def static(logits: torch.Tensor, m: PagedModelInput) -> list[int]:
    """The XLA backend's sampling, whose programs take every field."""
    from runners.tpu.sampler import sample

    n = len(logits)
    values: dict[str, Any] = dict.fromkeys(name for feature in FEATURES for name in feature.fields)
    values |= {"temperature": torch.zeros(n), "seed": torch.zeros(n, dtype=torch.int64)}
    values |= {name: m[name] for name in values if m[name] is not None}
    return sample(logits, m.positions, values).tolist()


def default(logits: torch.Tensor, m: PagedModelInput) -> list[int]:
    return Sampler()(logits, m).token_ids.tolist()


def cpu(logits: torch.Tensor, m: PagedModelInput) -> list[int]:
    return CpuSampler()(logits, m).token_ids.tolist()


@pytest.mark.parametrize("sampler", [default, cpu, static], ids=lambda sampler: sampler.__name__)
@given(seed=st.integers(0, 2**31), vocab=st.sampled_from((1, 31, 32, 33, 199)), n=st.integers(1, 5),
       masked=st.booleans(), biased=st.booleans(), drawn=st.booleans())
@settings(max_examples=60, deadline=None)
def test_masks_and_bias(sampler: Callable[[torch.Tensor, PagedModelInput], list[int]], seed: int, vocab: int, n: int,
                        masked: bool, biased: bool, drawn: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (n, vocab)).astype(np.float32)
    scores, fields = logits.copy(), {}
    if biased:
        width = min(4, vocab)
        ids = np.stack([rng.permutation(vocab)[:width] for _ in range(n)]).astype(np.int32)
        ids[rng.random(ids.shape) < 0.3] = -1
        values = np.where(ids < 0, 0, rng.normal(0, 10, ids.shape)).astype(np.float32)
        for row in range(n):
            for token, value in zip(ids[row], values[row], strict=True):
                if token >= 0:
                    scores[row, token] += value
        fields = {"bias_ids": torch.from_numpy(ids), "bias_values": torch.from_numpy(values)}
    keep = rng.random((n, vocab)) < 0.5
    keep[np.arange(n), rng.integers(0, vocab, n)] = True
    if masked:
        found = mask_fields({row: keep[row] for row in range(n)}, vocab)["token_masks"]
        fields["token_mask"] = torch.from_numpy(found)
        assert (allowed(fields["token_mask"], vocab).numpy() == keep).all()
        scores[~keep] = -np.inf
    if drawn:
        fields |= {"temperature": torch.full((n,), 0.8), "seed": torch.arange(n)}
    m = batch(n, **fields)
    m.validate("cpu")
    m.check()
    before = torch.from_numpy(logits.copy())
    given_logits = torch.from_numpy(logits)
    tokens = sampler(given_logits, m)
    assert torch.equal(given_logits, before), "the caller's logits have changed"
    if drawn:
        assert not masked or keep[np.arange(n), tokens].all()
        assert tokens == default(torch.from_numpy(scores), batch(n, **{k: fields[k] for k in ("temperature", "seed")}))
    else:
        assert tokens == scores.argmax(-1).tolist()


def test_features_that_adjust_do_so_in_the_documented_order() -> None:
    assert [type(f).__name__ for f in ADJUSTING] == ["Penalties", "LogitBias", "TokenMasks"]


@given(seed=st.integers(0, 2**31), vocab=st.sampled_from((1, 5, 300)), top=st.sampled_from((0, 3)))
@settings(max_examples=60, deadline=None)
def test_ranks(seed: int, vocab: int, top: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-9, 9, (4, vocab)).astype(np.float32)  # equals, too
    tokens = rng.integers(0, vocab, 4)
    found = logprobs(torch.from_numpy(logits), torch.from_numpy(tokens), top)
    expected = [1 + int((row > row[token]).sum()) for row, token in zip(logits, tokens, strict=True)]
    assert found.ranks.tolist() == expected and found.ranks.dtype == torch.int32


@pytest.mark.parametrize("value", [5, "5=1", {"x": 1}, {-1: 1}, {1.5: 1}, {3: float("nan")}, {3: 1e10}, {3: "a"},
                                   {3: None}, [[1, 2, 3]], dict.fromkeys(range(1025), 1.0)], ids=lambda v: str(v)[:20])
def test_a_logit_bias_that_makes_no_sense_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias=value)


def test_a_logit_bias_may_come_from_json() -> None:
    assert SamplingParams(logit_bias={"3": 1, "4": -2.5}).logit_bias == ((3, 1.0), (4, -2.5))  # type: ignore[arg-type]


def request(**arrays: Any) -> ExecuteModelRequest:
    none = np.zeros(0, np.int32)
    fields: dict[str, Any] = dict.fromkeys(
        ("finished_rows", "new_prompt_lens", "new_lens", "new_tokens", "append_rows", "append_tokens", "block_rows",
         "block_starts", "block_counts", "new_blocks", "num_scheduled", "num_computed"), none)
    return ExecuteModelRequest(**{**fields, "step": 0, "new_rows": np.arange(2, dtype=np.int32),
                                  "rows": np.arange(2, dtype=np.int32), "new_floats": np.zeros((2, 6), np.float32),
                                  "new_ints": np.zeros((2, 4), np.int64), **arrays})


BIAS = {"bias_rows": [1], "bias_counts": [2], "bias_ids": [5, 98], "bias_values": [1.0, -1.0]}
MASK = {"mask_rows": [1], "token_masks": [[0, -1, 3, 7]]}


@pytest.mark.parametrize(("feature", "change"), [
    (LogitBias(), {"bias_rows": [7]}), (LogitBias(), {"bias_rows": None}), (LogitBias(), {"bias_counts": [3]}),
    (LogitBias(), {"bias_ids": [5, 99]}), (LogitBias(), {"bias_values": [1.0, float("nan")]}),
    (LogitBias(), {"bias_counts": [2**31 - 1]}), (TokenMasks(), {"mask_rows": [7]}),
    (TokenMasks(), {"mask_rows": None}), (TokenMasks(), {"token_masks": [[0, -1, 3]]})],
    ids=lambda value: type(value).__name__ if isinstance(value, Feature) else str(value))
def test_arrays_of_an_untrusted_request_are_checked(feature: Feature, change: dict[str, Any]) -> None:
    def arrays(values: dict[str, Any]) -> dict[str, Any]:
        return {k: None if v is None else np.array(v, np.float32 if k == "bias_values" else np.int32)
                for k, v in values.items()}

    good = BIAS if isinstance(feature, LogitBias) else MASK
    feature.check_request(request(**arrays(good)), 99)
    feature.check_request(request(), 99)
    with pytest.raises(InputError, match=next(iter(good))[:4]):
        feature.check_request(request(**arrays(good | change)), 99)
