"""Verification of drafts: the tokens are those of plain decoding, whatever is proposed, however the engine runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from proposing import Oracle

from hal import LLM, SamplingParams
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts.backend import select
from hal.contracts.inputs import PagedModelInput
from hal.contracts.outputs import SamplerOutput
from hal.engine.scheduler import Scheduler
from hal.engine.sequence import Sequence
from hal.errors import ConfigError, InputError, StateError
from hal.features.masks import allowed
from hal.paged.batch import BatchState
from hal.recording.format import Recording
from hal.recording.record import RecordingExecutor, rebuild
from hal.recording.replay import replay
from hal.sampling.sampler import Sampler
from hal.sampling.verification import verify

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2], [3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [0, 1, 2, 3]]
LONG = {"max_tokens": 40, "ignore_eos": True}
PARAMS = [SamplingParams(max_tokens=60), SamplingParams(**LONG), SamplingParams(**LONG, temperature=0.8, logprobs=2),
          SamplingParams(**LONG, temperature=1.0, top_p=0.9, seed=5, repetition_penalty=1.3, frequency_penalty=0.2),
          SamplingParams(**LONG, stop_token_ids=(4,), logprobs=0, logit_bias=((3, 1.5), (7, -4.0))),
          SamplingParams(**LONG, stop=("31", "9"), logprobs=1), SamplingParams(max_tokens=20, prompt_logprobs=1)]
SMALL = {"block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 40, "max_model_len": 80}
TIGHT = {**SMALL, "num_blocks": 24}
ORACLE = {"speculate": "proposing:Oracle", "speculative_tokens": 3}


def generated(params: list[SamplingParams] = PARAMS, **options: Any) -> tuple[list[Any], Any]:
    with LLM(**{"device": "null", **options}) as llm:
        outputs = llm.generate(PROMPTS, params)
        found = [(o.token_ids, o.text, o.finish_reason, o.logprobs, o.prompt_logprobs) for o in outputs]
        stats = llm.stats()
        if "speculate" in options:
            assert sum(o.drafted_tokens for o in outputs) <= stats.drafted_tokens
            assert 0 < sum(o.accepted_tokens for o in outputs) <= stats.accepted_tokens < stats.drafted_tokens
        return found, stats


@pytest.fixture(scope="module")
def plain() -> tuple[list[Any], Any]:
    found, stats = generated(**SMALL)
    Oracle.known.update({tuple(prompt): tokens for prompt, (tokens, *_) in zip(PROMPTS, found, strict=True)})
    return found, stats


@pytest.mark.parametrize("options", [
    SMALL, {**SMALL, "max_num_batched_tokens": 9}, TIGHT, {**TIGHT, "num_cpu_blocks": 20},
    {**TIGHT, "prefix_caching": False, "max_num_seqs": 3}], ids=[
    "alone", "chunked prompts", "few blocks", "swapping", "few rows"])
def test_each_output_is_that_of_plain_decoding(plain: tuple[list[Any], Any], options: dict[str, Any]) -> None:
    found, stats = generated(**options, **ORACLE)
    assert found == plain[0]
    assert stats.steps < plain[1].steps or options is not SMALL
    assert stats.preemptions or "num_blocks" not in options or options["max_num_seqs"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tp": 2, "wire": "request"}, {"pp": 2}, {"tp": 2, "control_plane": "gloo"}],
                         ids=["tp=2, requests travel", "pp=2", "tp=2, gloo"])
def test_several_ranks_give_the_same(plain: tuple[list[Any], Any], options: dict[str, Any]) -> None:
    """With one control-plane message a round, whatever the number of drafts is."""
    with LLM(device="null", **{**SMALL, **ORACLE, "speculative_tokens": 8}, **options) as llm:
        plane, sent, drafted = llm.executor._worker.plane, list[int](), set[int]()
        broadcast, submit, speculation = plane.broadcast, llm.executor.execute_model, llm.core.speculation
        plane.broadcast = lambda parts: (sent.append(1), broadcast(parts))[1]

        def execute(request: Any, **how: Any) -> Any:
            drafted.add(0 if request.draft_counts is None else int(request.draft_counts.max()))
            return submit(request, **how)

        llm.executor.execute_model = execute
        speculation._choose = lambda rows: setattr(speculation, "count", speculation.count % 8 + 1)
        outputs = llm.generate(PROMPTS, PARAMS)
        assert [o.token_ids for o in outputs] == [tokens for tokens, *_ in plain[0]]
        assert len(sent) == llm.stats().steps and drafted >= set(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"tp": 2}, {"pp": 2}], ids=["alone", "tp=2", "pp=2"])
def test_a_model_in_float32_gives_the_tokens_of_plain_decoding(options: dict[str, Any]) -> None:
    """Greedy and drawn. No top-two margin here is within float32's rounding."""
    base = {**SMALL, "device": "cpu", "dtype": "float32", **options}
    params = [SamplingParams(**LONG), SamplingParams(**LONG, temperature=0.8, seed=3)] * 3 + [SamplingParams(**LONG)]
    expected = [tokens for tokens, *_ in generated(params, **base)[0]]
    Oracle.known = {tuple(prompt): tokens for prompt, tokens in zip(PROMPTS, expected, strict=True)}
    for options in (ORACLE, {"speculate": "ngram"}):
        assert [tokens for tokens, *_ in generated(params, **base, **options)[0]] == expected


COUNT, VOCAB = 20_000, 6


def sampled(logits: torch.Tensor, params: SamplingParams, first_seed: int, places: int) -> torch.Tensor:
    """[COUNT, places] tokens of plain decoding, whose logits [places, VOCAB] do not depend on the tokens before."""
    n = COUNT * places
    at, whole = torch.arange(n, dtype=torch.int32), torch.ones(n)
    m = PagedModelInput(
        input_ids=at * 0, positions=at % places + 5, slot_mapping=at * 0, query_start_loc=at[:1], seq_lens=at[:0],
        block_tables=at[:0, None], logits_indices=at, block_size=4, num_samples=n)
    m.temperature, m.seed = whole * params.temperature, torch.arange(COUNT).repeat_interleave(places) + first_seed
    m.top_k, m.top_p, m.min_p = (whole * params.top_k).int(), whole * params.top_p, whole * 0
    return Sampler()(logits.repeat(COUNT, 1), m).token_ids.view(COUNT, places)


def p_value(counts: torch.Tensor, shares: torch.Tensor) -> float:
    """Of Pearson's chi-squared test that counts were drawn with these shares."""
    expected = shares[shares > 0].double() * counts.sum()
    assert not counts[shares == 0].any()
    value = ((counts[shares > 0] - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), value / 2))


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=1.0), SamplingParams(temperature=0.7), SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=1.0, top_p=0.8)], ids=["1", "0.7", "top-k", "top-p"])
def test_verified_tokens_have_the_distribution_of_plain_sampling(params: SamplingParams) -> None:
    """Drafts that favour some tokens leave the joint distribution of two tokens as it is. An acceptance test that takes
    2% of the wrong drafts is found."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    shares = (logits / params.temperature).softmax(-1)
    if params.top_k:
        shares = torch.where(shares >= shares.topk(params.top_k).values[:, -1:], shares, 0)
    order = shares.sort(-1, descending=True)
    before = order.values.cumsum(-1) - order.values
    shares = shares.scatter(1, order.indices, torch.where(before < params.top_p, order.values, 0))
    shares /= shares.sum(-1, keepdim=True)
    expected = (shares[0, :, None] * shares[1]).flatten()
    chance = torch.Generator().manual_seed(5)
    favoured = shares.argmax(-1).int()
    drafts = favoured.repeat(COUNT, 1).flatten()
    counts = torch.full((COUNT,), 3, dtype=torch.int32)
    own = sampled(logits, params, 1, 3)

    def pairs(tokens: torch.Tensor, seed: int) -> torch.Tensor:
        """How often each pair of first tokens came: what a row lacks comes from a later step, by plain decoding."""
        out = verify(SamplerOutput(token_ids=tokens.flatten()), drafts, counts, 3)
        assert out.counts is not None
        rows, later = out.token_ids.view(COUNT, 3), sampled(logits, params, seed, 3)
        second = torch.where(out.counts > 1, rows[:, 1], later[:, 1])
        return torch.bincount(rows[:, 0] * VOCAB + second, minlength=VOCAB * VOCAB)

    first = pairs(own, 1)
    assert (first == torch.bincount(own[:, 0] * VOCAB + own[:, 1], minlength=VOCAB * VOCAB)).all()  # with these seeds
    assert p_value(first, expected) > 0.01 and p_value(pairs(own, 1 << 40), expected) > 0.01
    biased = torch.where(torch.rand(COUNT, 3, generator=chance) < 0.02, drafts.view(COUNT, 3), own)
    assert p_value(pairs(biased, 1).view(VOCAB, VOCAB).sum(1), shares[0]) < 0.01


@pytest.mark.parametrize(("options", "match"), [
    ({"speculate": "nonesuch"}, "unknown proposer"), ({"speculate": "no_module:Proposer"}, "cannot be imported"),
    ({"speculate": "hal.engine.llm:LLM"}, "not a proposer"),
    ({"speculate": "ngram", "async_scheduling": True}, "async_scheduling"),
    ({"speculate": "ngram", "speculative_tokens": 64, "max_num_batched_tokens": 64}, "cannot verify so many"),
    ({"speculate": "ngram", "speculative_tokens": 12, "num_blocks": 3, "block_size": 4}, "cannot hold the drafts"),
    ({"speculate": "ngram", "speculative_tokens": 0}, "speculative_tokens is not usable"),
    ({"speculate": "draft"}, "needs a draft model"), ({"draft_model": "somewhere"}, "without speculation"),
    ({"speculate": "ngram", "tp": 2, "draft_tp": 3}, "draft_tp that divides")])
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError) as error:
        LLM(device="null", **options)
    assert match in str(error.value)


def test_masks_hold_for_each_place_of_a_sequence_with_drafts() -> None:
    config = EngineConfig(speculate="ngram", max_num_seqs=2, block_size=4, num_blocks=40, device="null")
    scheduler, vocab = Scheduler(config, 40), 20
    seq = Sequence(request_id=7, prompt_ids=[1, 2], params=SamplingParams(ignore_eos=True), seed=0, limit=20)
    scheduler.add(seq)
    first = scheduler.schedule()
    assert first is not None
    scheduler.update(first, np.array([5]))
    seq.drafts = [6, 7]
    step = scheduler.schedule()
    assert step is not None and step.drafts == {seq.row: 2}
    assert step.request.draft_tokens is not None and step.request.draft_tokens.tolist() == [6, 7]
    with pytest.raises(StateError, match="a mask for each of its places"):
        step.restrict({7: np.ones(vocab, np.bool_)}, vocab)
    masks = np.arange(vocab) % 3 == np.arange(3)[:, None]
    step.restrict({7: masks}, vocab)
    state = BatchState(2, 40, 4, vocab)
    for each in (first, step):
        state.apply(each.request)
        made = state.prepare(each.request).to()
        made.check()
    assert (allowed(made.token_mask, vocab).numpy() == masks).all()
    assert made.positions.tolist() == [2, 3, 4] and made.logits_indices.tolist() == [0, 1, 2]
    step.request.mask_rows, step.request.token_masks = step.request.mask_rows[:2], step.request.token_masks[:2]
    with pytest.raises(InputError, match="mask_rows"):
        state.prepare(step.request)


def test_no_block_with_a_rejected_token_is_published() -> None:
    config = EngineConfig(speculate="ngram", max_num_seqs=2, block_size=4, num_blocks=40, device="null")
    scheduler = Scheduler(config, 40)
    seq = Sequence(request_id=0, prompt_ids=[1, 2], params=SamplingParams(ignore_eos=True), seed=0, limit=30)
    scheduler.add(seq)
    step = scheduler.schedule()
    assert step is not None
    scheduler.update(step, np.array([5]))
    seq.drafts = [6, 7, 8]  # these fill the first block; the second of them is wrong
    step = scheduler.schedule()
    assert step is not None and not any(scheduler.blocks._hash_of)
    scheduler.update(step, np.array([6, 9, 0, 0]), np.array([2]), np.array([1]))
    assert seq.output_ids == [5, 6, 9] and scheduler.computed[seq.row] == 4 and (seq.drafted, seq.accepted) == (3, 1)
    step = scheduler.schedule()
    assert step is not None and step.request.num_computed.tolist() == [4] and step.request.draft_counts is None
    assert scheduler.blocks.match(seq.hashes) == seq.blocks[:1] and seq.tokens(0, 4) == [1, 2, 5, 6]


def test_a_recording_with_drafts_replays_without_the_proposer(tmp_path: Path, plain: tuple[list[Any], Any]) -> None:
    path, device = tmp_path / "drafts.safetensors", select("null")
    Oracle.known = {tuple(prompt): tokens for prompt, (tokens, *_) in zip(PROMPTS, plain[0], strict=True)}
    with LLM(device="null", **SMALL, **ORACLE) as llm:
        recorder = RecordingExecutor(llm.executor, WorkerConfig(llm.config, llm.model_config, Topology()), device)
        llm.executor = recorder
        llm.generate(PROMPTS, PARAMS)
        recorder.save(path)
    assert replay(path, device, "null").exact
    recording = Recording.load(path)
    step = next(s for s in recording.steps if s.request.draft_counts is not None)
    # A step that fails is recorded as requests of its own, which mean the same input.
    size = recording.engine.block_size
    slots = np.full((int(step.input.block_tables.max()) + 1, size), 1)
    slots.reshape(-1)[step.input.slot_mapping.numpy()] = step.input.input_ids.numpy()
    state = BatchState(recording.engine.max_num_seqs, 80, size, recording.model.vocab_size)
    for request in rebuild(step.input, slots, 40, {}):
        request.check()
        state.apply(request)
        made = state.prepare(request).to()
    for name in ("input_ids", "positions", "slot_mapping", "logits_indices", "sample_counts"):
        assert torch.equal(made[name], step.input[name][:len(made[name])]), name  # without targets for prompt logprobs
