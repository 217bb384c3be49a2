"""The paged batch: consistent ones pass, each kind of inconsistency is refused by name, padding stays harmless."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hal.contracts.inputs import PagedModelInput, WorkerInput
from hal.errors import InputError
from hal.schema import Array
from hal.testing.strategies import instances


@given(batch=instances(PagedModelInput))
@settings(max_examples=200, deadline=None)
def test_consistent_batches_pass(batch: PagedModelInput) -> None:
    batch.validate("cpu")
    batch.check()
    arrived = PagedModelInput.from_buffer(batch.to_buffer())
    arrived.validate("cpu")
    arrived.check()


@pytest.mark.slow
@given(batch=instances(PagedModelInput), seqs=st.integers(0, 4), tokens=st.integers(0, 9), blocks=st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_padding_to_a_bucket_stays_consistent(batch: PagedModelInput, seqs: int, tokens: int, blocks: int) -> None:
    dims = PagedModelInput.schema.pack(batch).dims
    wide = batch.padded(num_seqs=dims["num_seqs"] + seqs, num_tokens=dims["num_tokens"] + tokens,
                        max_blocks=dims["max_blocks"] + blocks, num_logits=dims["num_logits"] + seqs)
    wide.validate("cpu")
    wide.check()
    real = int(batch.query_start_loc[-1])
    assert torch.equal(wide.slot_mapping[:real], batch.slot_mapping)
    assert int(wide.query_start_loc[-1]) == real
    assert (wide.slot_mapping[real:] < batch.block_size).all()


def bump(name: str, at: int, by: int) -> Callable[[PagedModelInput], None]:
    def change(b: PagedModelInput) -> None:
        b[name][at] += by

    return change


def share_a_block(b: PagedModelInput) -> None:
    """The last sequence writes where the first one does."""
    assume(len(b.seq_lens) > 1)
    first, last = ((int(b.seq_lens[s]) - 1) // b.block_size for s in (0, -1))
    assume(int(b.seq_lens[0] - 1) % b.block_size == int(b.seq_lens[-1] - 1) % b.block_size)
    b.block_tables[-1, last] = b.block_tables[0, first]
    for token in range(int(b.query_start_loc[-2]), int(b.query_start_loc[-1])):
        position = int(b.positions[token])
        b.slot_mapping[token] = b.block_tables[-1, position // b.block_size] * b.block_size + position % b.block_size


def padding_writes_a_live_slot(b: PagedModelInput) -> None:
    b.__dict__.update(b.padded(num_tokens=len(b.input_ids) + 1).__dict__)
    b.slot_mapping[-1] = b.slot_mapping[0]


def logits_of_no_token(b: PagedModelInput) -> None:
    assume(len(b.logits_indices))
    b.logits_indices[-1] = 10**6


def drop(name: str) -> Callable[[PagedModelInput], None]:
    """Remove one of fields that belong together."""
    def change(b: PagedModelInput) -> None:
        assume(b[name] is not None)
        setattr(b, name, None)

    return change


def shorten(name: str) -> Callable[[PagedModelInput], None]:
    """Too few rows in a sampling field for the sequences that are sampled."""
    def change(b: PagedModelInput) -> None:
        assume(b.num_samples and b[name] is not None)
        setattr(b, name, b[name][:-1])

    return change


def a_target_too_many(b: PagedModelInput) -> None:
    assume(b.prompt_targets is not None)
    assert b.prompt_targets is not None
    b.prompt_targets = torch.cat([b.prompt_targets, b.prompt_targets[:1]])


BREAKS: dict[str, tuple[str, Callable[[PagedModelInput], None]]] = {
    "query_start_loc does not start at 0": ("query_start_loc", bump("query_start_loc", 0, 1)),
    "query_start_loc runs past the tokens": ("query_start_loc", bump("query_start_loc", -1, 99)),
    "a context shorter than its query": ("seq_lens", lambda b: b.seq_lens.zero_()),
    "a position off by one": ("positions", bump("positions", -1, 1)),
    "a negative token id": ("input_ids", lambda b: b.input_ids.fill_(-1)),
    "a slot off by one": ("slot_mapping", bump("slot_mapping", 0, 1)),
    "a null block in a context": ("block_tables", lambda b: b.block_tables.zero_()),
    "a context longer than its blocks": ("positions", lambda b: b.seq_lens.add_(1000)),
    "two sequences write one slot": ("block_tables", share_a_block),
    "padding writes a live slot": ("slot_mapping", padding_writes_a_live_slot),
    "logits of a token that is not there": ("logits_indices", logits_of_no_token),
    "more decodes than sequences": ("num_decode_seqs", lambda b: setattr(b, "num_decode_seqs", 99)),
    "more samples than logits": ("num_samples", lambda b: setattr(b, "num_samples", len(b.logits_indices) + 1)),
    "fewer than no samples": ("num_samples", lambda b: setattr(b, "num_samples", -1)),
    "targets that take sampled rows": ("num_samples", a_target_too_many),
    "too few temperatures": ("temperature", shorten("temperature")),
    "too few seeds": ("seed", shorten("seed")),
    "too few values of top_p": ("top_p", shorten("top_p")),
    "too few penalties": ("presence_penalty", shorten("presence_penalty")),
    "too little history": ("history", shorten("history")),
    "a temperature without seeds": ("temperature", drop("seed")),
    "seeds without a temperature": ("seed", drop("temperature")),
    "penalties without history": ("repetition_penalty", drop("history")),
    "history without a penalty": ("presence_penalty", drop("repetition_penalty")),
    "history without prompt lengths": ("repetition_penalty", drop("prompt_lens")),
    "token ids of a bias without its values": ("bias_ids", drop("bias_values")),
    "too few masks": ("token_mask", shorten("token_mask")),
}


@pytest.mark.slow
@pytest.mark.parametrize("why", BREAKS)
@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_inconsistent_batches_are_refused_by_name(why: str, data: st.DataObject) -> None:
    batch = data.draw(instances(PagedModelInput, min_size=2))
    field, change = BREAKS[why]
    change(batch)
    with pytest.raises(InputError) as caught:
        batch.check()
    assert caught.value.field == field, str(caught.value)


def test_a_subclass_is_drawn_with_what_it_adds() -> None:
    class Bucketed(PagedModelInput):
        weights: Annotated[torch.Tensor, Array("float32", "num_tokens", low=0.0, high=1.0)]
        bucket: int = 0

    @given(batch=instances(Bucketed, min_size=1))
    @settings(max_examples=20, deadline=None)
    def consistent(batch: Bucketed) -> None:
        assert type(batch) is Bucketed and len(batch.weights) == len(batch.input_ids)
        batch.validate("cpu")
        batch.check()

    consistent()


def test_worker_input_travels() -> None:
    sent = WorkerInput(blocks_to_copy=np.array([[1, 2]], np.int32))
    got = WorkerInput.from_buffer(sent.to_buffer())
    assert got.blocks_to_swap_in is None
    assert got.blocks_to_copy is not None and got.blocks_to_copy.tolist() == [[1, 2]]
