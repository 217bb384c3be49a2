"""ModelInput.advance: the next decode step's input, made from this one's, is what the batch state prepares for it."""

from __future__ import annotations

import random
from typing import Annotated, Any

import pytest
import torch
from by_hand import GREEDY, Seq, request
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.contracts.advance import Taken
from hal.contracts.inputs import PagedModelInput
from hal.errors import SchemaError, StateError
from hal.features import FEATURES
from hal.paged.batch import BatchState
from hal.schema import Array

VOCAB, MAX_LEN, ROWS, STEPS = 50, 40, 6, 4
PER_ROW = [name for name, f in PagedModelInput.schema.by_name.items()
           if f.array and f.array.dims[0].symbol in ("num_tokens", "num_seqs", "num_logits", "num_sampled")
           and not f.array.dims[0].offset]
CHOICES: dict[str, list[float]] = {
    "temperature": [0.0, 0.75], "top_p": [1.0, 0.5], "min_p": [0.0, 0.125], "repetition_penalty": [1.0, 1.5],
    "presence_penalty": [0.0, 0.5], "top_k": [0, 3], "seed": [-5, 2**40], "logprobs": [-1, 2], "prompt_logprobs": [-1]}


def start(rng: random.Random, size: int, *, asynchronous: bool, lively: bool) -> tuple[BatchState, list[Seq], Any, Any]:
    """A state, its sequences, a request of them all, and its input. Blocks are there for STEPS steps."""
    state = BatchState(ROWS, MAX_LEN, size, VOCAB, asynchronous=asynchronous)
    state.has_row_states = rng.random() < 0.3
    decodes = rng.random() < 0.6  # otherwise several query tokens a sequence
    seqs, blocks = [], list(range(1, 1 + ROWS * (MAX_LEN // size + 1)))
    rng.shuffle(blocks)
    for row in rng.sample(range(ROWS), rng.randint(1, ROWS)):
        tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(1, MAX_LEN - STEPS))]
        params = {**GREEDY, **{n: rng.choice(v) for n, v in CHOICES.items()}} if lively else GREEDY
        seq = Seq(row, tokens, rng.randint(1, len(tokens)), params)
        seq.computed = 0 if state.has_row_states else len(tokens) - (1 if decodes else rng.randint(1, len(tokens)))
        if state.has_row_states and decodes:
            seq.tokens = seq.tokens[:1]
            seq.prompt = 1
        seq.blocks = [blocks.pop() for _ in range(-(-(len(seq.tokens) + STEPS) // size))]
        seqs.append(seq)
    seqs.sort(key=lambda s: len(s.tokens) - s.computed != 1)
    first = request(0, 0, new=seqs, blocks=[(s.row, 0, s.blocks) for s in seqs],
                    run=[(s, len(s.tokens) - s.computed) for s in seqs])
    first.num_steps = STEPS  # blocks are there for so many
    state.apply(first)
    return state, seqs, first, state.prepare(first).to()


def same(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    assert got.dtype == want.dtype, name
    if got.ndim == 2 and got.shape[1] != want.shape[1]:  # columns behind the last value
        least = min(got.shape[1], want.shape[1])
        longer = got if got.shape[1] > least else want
        rest, got, want = longer[:, least:], got[:, :least], want[:, :least]
        assert name == "block_tables" or (rest == -1).all(), name
    assert torch.equal(got, want), (name, got, want)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from((1, 3, 16)), lively=st.booleans(),
       asynchronous=st.booleans(), stops=st.booleans())
@settings(max_examples=200, deadline=None)
def test_an_advanced_input_is_what_the_next_step_prepares(seed: int, size: int, lively: bool, asynchronous: bool,
                                                          stops: bool) -> None:
    rng = random.Random(seed)
    state, seqs, before, got = start(rng, size, asynchronous=asynchronous, lively=lively)
    live = list(range(len(seqs)))
    for step in range(1, STEPS):
        tokens = [rng.randrange(VOCAB) for _ in seqs]
        live = [i for i in live if not (stops and rng.random() < 0.2)]
        going = torch.tensor([i in live for i in range(len(seqs))])
        kept = {name: None if got[name] is None else got[name].clone() for name in PER_ROW}
        previous, got = got, got.advance(Taken(torch.tensor(tokens, dtype=torch.int32), going))
        assert all(value is None or torch.equal(previous[name], value) for name, value in kept.items())
        if not live:
            break
        for i in live:
            seqs[i].computed = len(seqs[i].tokens)
            seqs[i].tokens.append(tokens[i])
        after = request(step, before.chain(), appended=[(seqs[i].row, tokens[i]) for i in live],
                        run=[(seqs[i], 1) for i in live])
        state.apply(after)
        before, want = after, state.prepare(after).to()
        for name in PER_ROW:
            if name in ("query_start_loc", "logits_indices"):
                continue
            if name == "pending_rows" or want[name] is None or got[name] is None:
                # A row that stopped may have been the only one that asked for the field.
                assert want[name] is None and (got[name] is None or stops or name == "pending_rows"), name
                assert name != "pending_rows" or got[name] is None or (got[name] == -1).all()
                continue
            same(got[name][live], want[name], name)
        assert got.num_decode_seqs == got.num_samples == len(seqs) and got.max_query_len == 1
        assert got.query_start_loc.tolist() == list(range(len(seqs) + 1))
        assert got.logits_indices.tolist() == list(range(len(seqs)))
        assert got.prompt_targets is None and got.num_prompt_logprobs == -1
        stopped = [i for i in range(len(seqs)) if i not in live]
        assert not got.slot_mapping[stopped].any()  # the null block
        if not stopped:
            assert got.num_logprobs == want.num_logprobs
            got.validate("cpu")
            got.check()


def test_padding_stays_padding() -> None:
    _, seqs, _, exact = start(random.Random(3), 4, asynchronous=True, lively=False)
    exact = exact.advance(Taken(torch.ones(len(seqs), dtype=torch.int32), torch.ones(len(seqs), dtype=torch.bool)))
    wide = {"num_seqs": ROWS + 2, "num_tokens": ROWS + 2, "num_logits": ROWS + 2, "num_sampled": ROWS + 2}
    padded = exact.padded(**wide)
    tokens = torch.arange(ROWS + 2, dtype=torch.int32) + 7
    got = padded.advance(Taken(tokens, padded.seq_lens > 0))
    want = exact.advance(Taken(tokens[:len(seqs)], torch.ones(len(seqs), dtype=torch.bool))).padded(**wide)
    for field in PagedModelInput.schema.fields:
        a, b = got[field.name], want[field.name]
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_a_field_without_a_rule_is_refused_by_name() -> None:
    class Own(PagedModelInput):
        flavour: Annotated[torch.Tensor | None, Array("int32", "num_seqs")] = None

    with pytest.raises(SchemaError, match=r"Own cannot be advanced.*\n?.*flavour"):
        Own.require_advance()
    PagedModelInput.require_advance()
    _, seqs, _, m = start(random.Random(1), 4, asynchronous=False, lively=False)
    taken = Taken(torch.zeros(len(seqs), dtype=torch.int32), torch.ones(len(seqs), dtype=torch.bool))
    own = Own(**{f.name: m[f.name] for f in PagedModelInput.schema.fields})
    assert own.advance(taken).flavour is None  # absent: nothing to advance
    own.flavour = m.seq_lens
    with pytest.raises(SchemaError, match="flavour"):
        own.advance(taken)
    m.token_mask = torch.full((len(seqs), 2), -1, dtype=torch.int32)
    with pytest.raises(StateError, match="a token mask holds for one step"):
        m.advance(taken)


def test_every_field_that_a_feature_declares_has_a_rule() -> None:
    assert not [name for f in FEATURES for name, array in f.fields.items() if array.advance is None]
