"""An engine with a draft model or an EAGLE-3 head: its tokens, its counts, and what it refuses."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import heads
import pytest

from hal import LLM, SamplingParams
from hal.config import BUNDLED_MODEL
from hal.errors import ConfigError, HalError, ModelLoadError, WorkerError

Checkpoint = Callable[[str], Path]
TARGET = "llama3-gqa"
COUNT = 24
PROMPTS = checkpoints.prompts(4, longest=30)
PARAMS = [SamplingParams(max_tokens=COUNT), SamplingParams(max_tokens=COUNT, temperature=0.8, top_k=50, seed=5),
          SamplingParams(max_tokens=COUNT, temperature=1.0, top_p=0.9, seed=6),
          SamplingParams(max_tokens=COUNT, repetition_penalty=1.3, logprobs=2)]


def engine(target: Path | str, **options: Any) -> LLM:
    return LLM(target, **{"device": "cpu", "dtype": "float32", "block_size": 4, "max_num_seqs": 4, "num_blocks": 160,
                          "max_model_len": 128, **options})


def tokens(llm: LLM, prompts: Any = PROMPTS, params: Any = PARAMS) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> list[list[int]]:
    with engine(checkpoint(TARGET)) as llm:
        return tokens(llm)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heads.save(tmp_path_factory.mktemp("eagle"), vocab=checkpoints.VOCAB, hidden=64, drafts=80)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"max_num_batched_tokens": 9}, {"max_model_len": 64, "num_blocks": 24, "max_num_batched_tokens": 24},
    {"max_model_len": 64, "num_blocks": 24, "num_cpu_blocks": 40, "speculative_tokens": 8},
], ids=["plain", "chunks", "preempted", "swapped"])
def test_a_draft_that_is_the_target_changes_nothing_and_is_accepted(checkpoint: Checkpoint, plain: list[list[int]],
                                                                    options: dict[str, Any]) -> None:
    target = checkpoint(TARGET)
    with engine(target, speculate="draft", draft_model=target, **options) as llm:
        params = PARAMS[:3]  # a penalty also counts the drafts, which the target's places do
        outputs = llm.generate(PROMPTS[:3], params)
        assert [o.token_ids for o in outputs] == plain[:3]
        stats = llm.stats()
        assert stats.drafted_tokens == stats.accepted_tokens == sum(o.accepted_tokens for o in outputs)
        assert stats.accepted_tokens > COUNT and (stats.preemptions > 0) == ("num_blocks" in options)
        before = llm.stats()
        assert tokens(llm, PROMPTS[:3], params) == plain[:3]
        if not options:
            assert llm.stats().cached_tokens > before.cached_tokens
        assert llm.stats().drafted_tokens == llm.stats().accepted_tokens


@pytest.mark.slow
def test_counts_of_a_request_follow_from_its_tokens(checkpoint: Checkpoint, head: Path) -> None:
    """Each step of a decoding sequence gives one token, and one for each accepted draft."""
    for kind, draft in (("draft", checkpoint("qwen3")), ("draft", checkpoint(TARGET)), ("eagle", head)):
        with engine(checkpoint(TARGET), speculate=kind, draft_model=draft) as llm:
            output, = llm.generate([PROMPTS[0]], PARAMS[1])
            assert len(output.token_ids) == llm.stats().steps + output.accepted_tokens
            assert output.accepted_tokens <= output.drafted_tokens == llm.stats().drafted_tokens


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), [
    ("draft", {"tp": 2}), ("draft", {"tp": 2, "draft_tp": 2, "wire": "request"}), ("draft", {"pp": 2}),
    ("eagle", {}), ("eagle", {"tp": 2}),
    ("eagle", {"tp": 2, "draft_tp": 2, "control_plane": "gloo"}),
], ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}{v}" for k, v in value.items()) or "tp1")
def test_drafts_in_each_topology(checkpoint: Checkpoint, plain: list[list[int]], head: Path, kind: str,
                                 options: dict[str, Any]) -> None:
    target = checkpoint(TARGET)
    with engine(target, speculate=kind, draft_model=target if kind == "draft" else head, **options) as llm:
        assert tokens(llm) == plain
        stats = llm.stats()
        if kind == "draft":  # sums of other ranks round differently, so a draft on fewer ranks may miss
            assert stats.accepted_tokens > 0.8 * stats.drafted_tokens > COUNT
        else:
            assert 0 <= stats.accepted_tokens < stats.drafted_tokens


def test_the_bundled_model_drafts_for_itself() -> None:
    prompts = [f"{a}+{b}=" for a, b in ((12, 34), (271, 99), (5, 8), (640, 77))]
    with LLM(device="cpu") as llm:
        want = [o.text for o in llm.generate(prompts, SamplingParams(max_tokens=8))]
    with LLM(device="cpu", speculate="draft", draft_model=BUNDLED_MODEL) as llm:
        assert [o.text for o in llm.generate(prompts, SamplingParams(max_tokens=8))] == want
        assert llm.stats().accepted_tokens == llm.stats().drafted_tokens > 0


@pytest.mark.parametrize(("options", "error", "named"), [
    ({"speculate": "draft", "draft_model": str(BUNDLED_MODEL)}, ConfigError, "another vocabulary"),
    ({"speculate": "draft", "draft_model": "HEAD"}, ModelLoadError, "--speculate eagle"),
    ({"speculate": "eagle", "draft_model": "qwen3"}, ModelLoadError, "no EAGLE-3 head"),
    ({"speculate": "eagle", "draft_model": "HEAD", "pp": 2}, ConfigError, "every pipeline stage"),
    ({"speculate": "draft", "draft_model": "llama-mqa-tied", "max_model_len": None}, ConfigError, "context is shorter"),
    ({"speculate": "draft", "draft_model": "qwen3", "tp": 4, "draft_tp": 2}, ConfigError, "1 or 4"),
    ({"speculate": "draft", "draft_model": "nowhere"}, ModelLoadError, "does not exist"),
], ids=["vocabulary", "head", "model", "stages", "context", "degree", "absent"])
def test_what_does_not_fit_is_refused_before_a_rank_starts(checkpoint: Checkpoint, head: Path, tmp_path: Path,
                                                           options: dict[str, Any], error: type[HalError],
                                                           named: str) -> None:
    draft, target = options["draft_model"], checkpoint(TARGET)
    if draft == "HEAD":
        draft = head
    elif draft in checkpoints.NAMES:
        draft = checkpoint(draft)
    if "context" in named:
        import json
        import shutil

        draft = shutil.copytree(draft, tmp_path / "short")
        config = json.loads((draft / "config.json").read_text())
        (draft / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 255}))
    with pytest.raises(error, match=named):
        engine(target, **{**options, "draft_model": draft, "num_blocks": None})


@pytest.mark.slow
def test_a_killed_rank_of_the_draft_ends_the_engine(checkpoint: Checkpoint) -> None:
    target = checkpoint(TARGET)
    with engine(target, speculate="draft", draft_model=target, tp=2, draft_tp=2) as llm:
        stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=90))
        next(stream)
        ranks: Any = llm.executor._ranks  # type: ignore[attr-defined]
        os.kill(ranks.processes[0].process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="rank 1"):
            list(stream)
