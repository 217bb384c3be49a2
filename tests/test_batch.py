"""The batch state against a slow one made of plain lists, over random schedules of random sequences."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from by_hand import GREEDY, Seq, request
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.contracts.inputs import PagedModelInput
from hal.contracts.request import ExecuteModelRequest
from hal.errors import StateError
from hal.features import FEATURES
from hal.features.penalties import NO_PENALTIES
from hal.paged.batch import BatchState

VOCAB, MAX_LEN, ROWS = 50, 40, 6


def expected(run: list[tuple[Seq, int]], size: int) -> dict[str, Any]:
    """The step's input by the obvious way: token by token, sequence by sequence."""
    e: dict[str, Any] = {n: [] for n in ("input_ids", "positions", "slot_mapping", "seq_lens", "logits_indices")}
    e["query_start_loc"], samples, targets, target_rows = [0], [], [], []
    for s, queries in run:
        for position in range(s.computed, s.computed + queries):
            if s.params["prompt_logprobs"] >= 0 and position + 1 < s.prompt:
                targets.append(s.tokens[position + 1])
                target_rows.append((len(e["input_ids"]), s))
            e["input_ids"].append(s.tokens[position])
            e["positions"].append(position)
            e["slot_mapping"].append(s.blocks[position // size] * size + position % size)
        e["query_start_loc"].append(len(e["input_ids"]))
        e["seq_lens"].append(s.computed + queries)
        if s.computed + queries == len(s.tokens):
            samples.append(s)
            e["logits_indices"].append(len(e["input_ids"]) - 1)
    e["logits_indices"] += [token for token, _ in target_rows]
    width = max((-(-n // size) for n in e["seq_lens"]), default=0)
    e["block_tables"] = [(s.blocks + [0] * width)[:width] for s, _ in run]
    e["num_samples"] = len(samples)
    e["num_decode_seqs"] = sum(q == 1 for _, q in run)
    e["num_logprobs"] = max((int(s.params["logprobs"]) for s in samples), default=-1)
    e["num_prompt_logprobs"] = max((int(s.params["prompt_logprobs"]) for _, s in target_rows), default=-1)
    e["prompt_targets"] = targets or None
    random_ones = [s for s in samples if s.params["temperature"] > 0]
    for name in ("temperature", "seed", "top_k", "top_p", "min_p"):
        needed = random_ones if name in ("temperature", "seed") else [s for s in random_ones
                                                                      if s.params[name] != GREEDY[name]]
        e[name] = [s.params[name] for s in samples] if needed else None
    if any(s.params[name] != none for s in samples for name, none in NO_PENALTIES.items()):
        longest = max(len(s.tokens) for s in samples)
        e |= {name: [s.params[name] for s in samples] for name in NO_PENALTIES}
        e["prompt_lens"] = [s.prompt for s in samples]
        e["history"] = [s.tokens + [-1] * (longest - len(s.tokens)) for s in samples]
    else:
        e |= dict.fromkeys((*NO_PENALTIES, "prompt_lens", "history"))
    return e


def compare(got: PagedModelInput, want: dict[str, Any]) -> None:
    for name, value in want.items():
        if value is None or isinstance(value, int):
            assert got[name] == value, name
        else:
            tensor = torch.tensor(value, dtype=got[name].dtype).reshape(got[name].shape)
            assert torch.equal(got[name], tensor), (name, got[name], value)


def draw_params(rng: random.Random) -> dict[str, float]:
    if rng.random() < 0.5:
        return GREEDY
    choices: dict[str, list[float]] = {
        "temperature": [0.0, 0.75], "top_p": [1.0, 0.5], "min_p": [0.0, 0.125], "repetition_penalty": [1.0, 1.5],
        "presence_penalty": [0.0, 0.5], "frequency_penalty": [0.0, -0.25], "top_k": [0, 3], "seed": [-5, 2**40],
        "logprobs": [-1, 0, 2], "prompt_logprobs": [-1, 0, 3]}
    return {name: rng.choice(values) for name, values in choices.items()}


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from((1, 3, 16)), lively=st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_step_is_what_plain_lists_give(seed: int, size: int, lively: bool) -> None:
    rng = random.Random(seed)
    state = BatchState(ROWS, MAX_LEN, size, VOCAB)
    live: list[Seq] = []
    appended: list[tuple[int, int]] = []
    pool = list(range(1, 1 + ROWS * -(-MAX_LEN // size)))
    digest = 0
    for step in range(12):
        finished = [s.row for s in live if rng.random() < 0.15 or len(s.tokens) == MAX_LEN]
        for s in [s for s in live if s.row in finished]:
            pool += s.blocks
            live.remove(s)
        appended = [(row, token) for row, token in appended if row not in finished]
        for s in live:
            s.tokens += [token for row, token in appended if row == s.row]
        new = []
        for row in sorted(set(range(ROWS)) - {s.row for s in live}):
            if rng.random() < 0.4:
                tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(1, MAX_LEN - 1))]
                new.append(Seq(row, tokens, rng.randint(1, len(tokens)), draw_params(rng) if lively else GREEDY))
        live += new
        run, blocks = [], []
        for s in rng.sample(live, len(live)):
            if rng.random() < 0.8 and s.computed < len(s.tokens):
                run.append((s, rng.randint(1, len(s.tokens) - s.computed)))
                if rng.random() < 0.1 and s.blocks:  # a prefix found late: the table is rewritten, maybe shorter
                    keep = rng.randint(0, len(s.blocks))
                    pool += s.blocks[keep:]
                    s.blocks, s.computed = s.blocks[:keep], min(s.computed, keep * size)
                    run[-1] = s, rng.randint(1, len(s.tokens) - s.computed)
                more = -(-(s.computed + run[-1][1]) // size) - len(s.blocks)
                rng.shuffle(pool)
                fresh = [pool.pop() for _ in range(more)]
                if fresh or rng.random() < 0.2 or run[-1][1] > 1:
                    blocks.append((s.row, len(s.blocks), fresh))
                s.blocks += fresh
        run.sort(key=lambda pair: pair[1] != 1)
        r = request(step, digest, finished=finished, new=new, appended=appended, blocks=blocks, run=run)
        r = ExecuteModelRequest.from_buffer(r.to_buffer())
        state.apply(r)
        got = state.prepare(r).to()
        got.validate("cpu")
        got.check()
        compare(got, expected(run, size))
        assert all(got[n] is None or len(got[n]) == got.num_samples for f in FEATURES for n, a in f.fields.items()
                   if a.dims[0].symbol == "num_sampled")
        digest = r.chain()
        appended = [(s.row, rng.randrange(VOCAB)) for s, q in run if s.computed + q == len(s.tokens)]
        for s, queries in run:
            s.computed += queries


def entered() -> tuple[BatchState, ExecuteModelRequest]:
    state = BatchState(2, 8, 4, VOCAB)
    first = request(0, 0, new=[(s := Seq(0, [1, 2, 3], 3, GREEDY))], blocks=[(0, 0, [1])], run=[(s, 3)])
    state.apply(first)
    return state, first


@pytest.mark.parametrize("step, digest_off, epoch, named", [
    (2, 0, 0, "step 2"), (0, 0, 0, "step 0"), (1, 1, 0, "digest"), (1, 0, 1, "epoch 1"), (0, 5, 1, "epoch 1")])
def test_a_request_out_of_order_is_refused_and_changes_nothing(step: int, digest_off: int, epoch: int,
                                                               named: str) -> None:
    state, first = entered()
    digest = (0 if epoch and not step else first.chain()) + digest_off
    with pytest.raises(StateError, match=named) as caught:
        state.apply(request(step, digest, epoch, finished=[0]))
    assert f"step {step}" in str(caught.value.got) and caught.value.expected is not None
    assert state.num_tokens[0] == 3
    state.apply(request(1, first.chain()))


def test_a_changed_step_is_noticed_by_the_next() -> None:
    state, _ = entered()
    other = request(0, 0, new=[Seq(0, [1, 2, 4], 3, GREEDY)], blocks=[(0, 0, [1])])
    with pytest.raises(StateError, match="digest"):
        state.apply(request(1, other.chain()))


def test_a_new_epoch_starts_over() -> None:
    state, _ = entered()
    again = request(0, 0, epoch=4, new=[(s := Seq(0, [7], 1, GREEDY))], blocks=[(0, 0, [2])], run=[(s, 1)])
    state.apply(again)
    compare(state.prepare(again).to(), {"input_ids": [7], "slot_mapping": [8], "num_samples": 1})
    state.apply(request(1, again.chain(), epoch=4))


@pytest.mark.parametrize("tokens", [[VOCAB], [1] * 9])
def test_tokens_that_the_model_cannot_hold_are_refused(tokens: list[int]) -> None:
    with pytest.raises(StateError):
        BatchState(2, 8, 4, VOCAB).apply(request(0, 0, new=[Seq(0, tokens, 1, GREEDY)]))


def test_an_empty_step() -> None:
    state = BatchState(2, 8, 4, VOCAB)
    nothing = request(0, 0)
    state.apply(nothing)
    got = state.prepare(nothing).to()
    got.check()
    assert got.num_samples == 0 and list(got.block_tables.shape) == [0, 0]
