"""Shape plans of CUDA graphs and XLA programs: every legal step has exactly one bucket, the smallest that holds it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.errors import CapacityError
from hal.paged.shape_plan import ShapePlan
from runners.cuda.graphs import graph_plan, prompt_sizes
from runners.tpu.plan import budget, make_plan, seconds_each

MODEL = read_config(EngineConfig().model)


@st.composite
def plans(draw: st.DrawFn) -> tuple[EngineConfig, ShapePlan]:
    engine = EngineConfig(max_num_seqs=draw(st.integers(1, 300)), block_size=draw(st.sampled_from((1, 16))),
                          max_num_batched_tokens=draw(st.integers(1, 5000)), max_model_len=draw(st.integers(1, 512)))
    if draw(st.booleans(), label="CUDA graphs"):
        return engine, graph_plan(engine.max_num_seqs, (), prompt_sizes(1e6, engine.max_num_batched_tokens))
    plan = make_plan(WorkerConfig(engine, MODEL, Topology()))
    assert plan.seconds(seconds_each(MODEL.num_layers)) <= budget() or len(plan) == 2
    return engine, plan


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(plans(), st.data())
def test_every_legal_step_has_one_bucket_the_smallest_that_holds_it(made: tuple[EngineConfig, ShapePlan],
                                                                    data: st.DataObject) -> None:
    engine, plan = made
    buckets = plan.buckets()
    assert len(set(buckets)) == len(buckets) == len(plan)
    kind = data.draw(st.sampled_from(sorted(plan.kinds)))
    seqs = data.draw(st.integers(1, min(engine.max_num_seqs, engine.max_num_batched_tokens)))
    tokens = seqs if kind == "decode" else data.draw(st.integers(seqs, engine.max_num_batched_tokens))
    assert engine.max_model_len is not None
    blocks = data.draw(st.integers(1, -(-engine.max_model_len // engine.block_size)))
    dims = {"num_tokens": tokens, "num_seqs": seqs, "max_blocks": blocks, "num_logits": seqs}
    bucket = plan.bucket_for(kind, dims)
    holding = [b for b in buckets if b.kind == kind and all(size >= dims[s] for s, size in b.sizes)]
    assert bucket in holding
    assert all(size <= other.dims[symbol] for other in holding for symbol, size in bucket.sizes)


def test_a_step_beyond_the_limits_is_refused() -> None:
    plan = ShapePlan({"decode": {"num_seqs": (1, 4)}})
    assert [str(b) for b in plan.buckets()] == ["decode(num_seqs=4)", "decode(num_seqs=1)"]
    with pytest.raises(CapacityError, match="max_num_seqs"):
        plan.bucket_for("decode", {"num_seqs": 5})
