"""The gated delta rule against one that is written out token by token, and the layers that keep its state."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from hal.errors import ConfigError, HalError, ModelLoadError
from hal.models.delta_rule import chunk_rule, find_spans, inverse_of_unit, step_rule

HEADS, KEY, VALUE = 3, 8, 12


def tokens(count: int, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, decay and strength of `count` tokens, as the layer gives them to the rule."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.nn.functional.normalize(torch.randn(2, count, HEADS, KEY, generator=generator), dim=-1)
    decay, strength = torch.rand(2, count, HEADS, generator=generator)
    return [q * KEY ** -0.5, k, torch.randn(count, HEADS, VALUE, generator=generator), -3 * decay, strength]


def expected(values: list[torch.Tensor], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, state = families.delta_rule(*(x[None] for x in values), state[None])
    return out[0].float(), state[0].float()


def in_chunks(values: list[torch.Tensor], state: torch.Tensor, spans: Any) -> torch.Tensor:
    real = spans.real.flatten()
    q, k, v, decay, strength = (
        (x[spans.token_of] * real.view(-1, *[1] * (x.ndim - 1))).unflatten(0, spans.real.shape).transpose(1, 2)
        for x in values)
    out = chunk_rule(q, k, v, decay, strength, state, spans.rounds)
    return out.transpose(1, 2).flatten(0, 1)[spans.place_of]


@pytest.mark.parametrize("static", [False, True], ids=["", "static shapes"])
@pytest.mark.parametrize("lengths", [[5], [37, 1, 20], [1, 1, 9, 0, 16]], ids=str)
def test_chunks_of_several_sequences_equal_the_rule_token_by_token(lengths: list[int], static: bool) -> None:
    """Each goes on from a state of its own. The first of one token decode, unless shapes are static."""
    total = sum(lengths)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    decodes = 0 if static else next((i for i, n in enumerate(lengths) if n != 1), len(lengths))
    padding = 3 if static else 0
    values = tokens(total + padding)
    state = torch.randn(len(lengths), HEADS, KEY, VALUE, generator=torch.Generator().manual_seed(1))
    before = state.clone()
    spans = find_spans(starts, total + padding, 4, decodes, 8, (total + padding) // 8 + len(lengths) if static else 0)
    out = in_chunks(values, state, spans)
    for i, (first, end) in enumerate(pairwise(starts.tolist())):
        if i < decodes or first == end:
            assert torch.equal(state[i], before[i])
            continue
        ours, theirs = out[first - decodes:end - decodes], expected([x[first:end] for x in values], before[i])
        torch.testing.assert_close(ours, theirs[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[i], theirs[1], rtol=1e-5, atol=1e-5)


def test_a_step_of_one_token_equals_the_rule() -> None:
    values, state = tokens(2), torch.randn(2, HEADS, KEY, VALUE, generator=torch.Generator().manual_seed(1))
    theirs = [expected([x[i:i + 1] for x in values], state[i]) for i in range(2)]
    out = step_rule(*values, state)
    torch.testing.assert_close(out, torch.cat([o for o, _ in theirs]))
    torch.testing.assert_close(state, torch.stack([s for _, s in theirs]))


@pytest.mark.slow
def test_the_rule_of_transformers_is_the_one_written_out() -> None:
    """So the oracle of the whole stack, which has the one in fp64, stays that of transformers."""
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    values = [x[None] for x in tokens(100)]
    ours, state = families.delta_rule(*values)
    got, last = theirs.torch_chunk_gated_delta_rule(*values, output_final_state=True, use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(got, ours.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, state.float(), rtol=1e-4, atol=1e-5)


def test_the_inverse_is_exact_where_powers_of_the_matrix_overflow_fp32() -> None:
    """With equal keys the values below the diagonal are all one, and the powers of the matrix reach 1e18."""
    below = torch.ones(64, 64)
    unit = torch.eye(64) + below.tril(-1)
    assert torch.equal(inverse_of_unit(below) @ unit, torch.eye(64))


def test_the_convolution_sees_the_state_where_a_sequence_begins_in_the_step() -> None:
    """Rows of the states come first, then the tokens: two sequences of 1 and 4 tokens, and 3 taps."""
    spans = find_spans(torch.tensor([0, 1, 5]), 5, 3, 0)
    assert spans.taps.tolist() == [[0, 1, 4], [2, 3, 5], [3, 5, 6], [5, 6, 7], [6, 7, 8]]
    assert spans.kept.tolist() == [[1, 4], [7, 8]]


@pytest.mark.slow
def test_memory_per_row_is_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
                                  ) -> None:
    """Of 2 layers: 3 inputs of 80 channels, and 4 heads of 8 x 12 values, all in fp32."""
    with caplog.at_level("INFO", "hal"), families.run(families.save("qwen3.5", tmp_path / "model"), max_num_seqs=7,
                                                      progress=True) as llm:
        assert llm.executor.has_row_states
    row = 2 * 4 * (3 * (2 * 2 * 8 + 4 * 12) + 4 * 8 * 12)
    told = f"states of 2 layers {row / (1 << 20):.2f} MiB a row, {8 * row / (1 << 20):.0f} MiB"
    assert told in capsys.readouterr().err
    assert "prefix caching is off" in caplog.text


@pytest.mark.slow
def test_what_states_do_not_allow_is_refused(tmp_path: Path) -> None:
    path = families.save("qwen3.5", tmp_path / "model")
    with pytest.raises(HalError, match=r"(?s)a state per row cannot be taken back when a draft is rejected.*ngram"):
        families.run(path, speculate="ngram")
    with pytest.raises(ConfigError, match=r"(?s)tp=4 does not divide the key heads.*got: 2.*choose another tp"):
        families.run(path, tp=4)
    config = json.loads((path / "config.json").read_text())
    for wrong, match in (({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
                         ({"linear_num_value_heads": 3}, r"linear_num_value_heads(?s:.*)a multiple")):
        (path / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(ModelLoadError, match=match):
            families.run(path)

