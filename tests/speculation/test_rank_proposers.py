"""Drafts and EAGLE-3 heads behind a runner, driven step by step: what they propose, and what the target makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import by_hand
import checkpoints
import heads
import numpy as np
import pytest
import torch
from by_hand import GREEDY, Seq

from hal.checkpoints.hf_config import read_config
from hal.config import EngineConfig, Topology, WorkerConfig
from hal.contracts import backend as backends
from hal.contracts.communicator import LocalCommunicator
from hal.contracts.runner import ModelRunnerBase
from hal.speculation.runner import compose

Checkpoint = Callable[[str], Path]
TARGET, K, SIZE = "llama3-gqa", 3, 4
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}


def runner(target: Path, **options: Any) -> tuple[ModelRunnerBase[Any], Sequence[torch.Tensor]]:
    engine = EngineConfig(model=str(target), device="cpu", dtype="float32", block_size=SIZE, max_num_seqs=4,
                          max_model_len=128, speculative_tokens=K, **options)
    config, backend = WorkerConfig(engine, read_config(target), Topology()), backends.select("cpu")
    made = compose(backend.make_runner(config, backend.device(0), LocalCommunicator()), config, backend.device(0),
                   LocalCommunicator())
    made.load_model()
    return made, made.make_kv_caches(200)


def rounds(made: ModelRunnerBase[Any], caches: Sequence[torch.Tensor], prompts: list[list[int]], count: int,
           budget: int, params: dict[str, float]) -> tuple[list[Seq], int, int]:
    """`count` tokens after each prompt, and how many drafts were verified and accepted. A step has at most `budget`
    tokens of prompts. A sequence has no block before it has tokens for it."""
    seqs = [Seq(row, list(p), len(p), GREEDY | params) for row, p in enumerate(prompts)]
    pool = np.random.default_rng(7).permutation(np.arange(1, 200)).tolist()
    drafts: dict[int, list[int]] = {}
    appended: list[tuple[int, list[int]]] = []
    step = digest = verified = accepted = 0
    while True:
        run, left = [], budget
        for s in seqs:
            queries = len(s.tokens) - s.computed
            if len(s.tokens) >= s.prompt + count or not min(queries, left):
                continue
            if queries > 1:
                queries = min(queries, left)
                left -= queries
            run.append((s, queries, drafts.get(s.row, []) if s.computed + queries == len(s.tokens) else []))
        if not run:
            return seqs, verified, accepted
        run.sort(key=lambda x: x[1] + len(x[2]) != 1)
        blocks = []
        for s, queries, some in run:
            fresh = [pool.pop() for _ in range(-(-(s.computed + queries + len(some)) // SIZE) - len(s.blocks))]
            blocks += [(s.row, len(s.blocks), fresh)] if fresh else []
            s.blocks += fresh
        r = by_hand.request(step, digest, new=seqs if step == 0 else (), blocks=blocks,
                            run=[(s, queries + len(some)) for s, queries, some in run])
        r.append_rows = np.array([row for row, _ in appended], np.int32)
        r.append_tokens = np.array([t for _, tokens in appended for t in tokens], np.int32)
        r.append_counts = np.array([len(tokens) for _, tokens in appended], np.int32)
        r.num_proposals = K
        if any(some for _, _, some in run):
            r.draft_counts = np.array([len(some) for _, _, some in run], np.int32)
            r.draft_tokens = np.array([t for _, _, some in run for t in some], np.int32)
        m = made.prepare_model_input(r)
        m.check()
        output = made.execute_model(m, caches)
        output.check()
        gained, appended, row = output.rows(), [], 0
        for s, queries, some in run:
            s.computed += queries
            if s.computed < len(s.tokens):
                continue
            new = gained[row]
            proposed = output.draft_tokens[row].tolist()
            verified, accepted, row = verified + len(some), accepted + len(new) - 1, row + 1
            assert new[:-1] == some[:len(new) - 1]
            s.computed += len(new) - 1
            s.tokens += new
            appended.append((s.row, new))
            drafts[s.row] = proposed
        assert row == len(gained)
        step, digest = step + 1, r.chain()


def texts(seqs: list[Seq], count: int) -> list[list[int]]:
    return [s.tokens[s.prompt:s.prompt + count] for s in seqs]


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("budget", [7, 1000])
def test_a_draft_that_is_the_target_is_always_accepted(checkpoint: Checkpoint, budget: int, params: dict[str, float],
                                                       ) -> None:
    target, prompts = checkpoint(TARGET), checkpoints.prompts(3, longest=18)
    plain = by_hand.generate(*runner(target), prompts, 24, budget=100, params=params)
    seqs, verified, accepted = rounds(*runner(target, speculate="draft", draft_model=str(target)), prompts, 24, budget,
                                      params)
    assert texts(seqs, 24) == texts(plain, 24)
    assert verified == accepted >= 3 * 17


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["draft", "eagle"])
def test_any_draft_gives_the_tokens_of_plain_decoding(checkpoint: Checkpoint, tmp_path: Path, kind: str,
                                                      params: dict[str, float]) -> None:
    target, prompts = checkpoint(TARGET), checkpoints.prompts(3, longest=18)
    draft = checkpoint("qwen3")
    if kind == "eagle":
        draft = heads.save(tmp_path / "head", vocab=checkpoints.VOCAB, hidden=64, drafts=60)
    made, caches = runner(target)
    plain = by_hand.generate(made, caches, prompts, 20, budget=100, params=params)
    seqs, verified, accepted = rounds(*runner(target, speculate=kind, draft_model=str(draft)), prompts, 20, 7, params)
    assert texts(seqs, 20) == texts(plain, 20)
    assert verified > accepted


def test_an_eagle_head_proposes_what_the_oracle_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Greedy proposals behind a prompt of one chunk, and behind drafts of which some are rejected."""
    target, prompt = checkpoint(TARGET), checkpoints.prompts(1, longest=13)[0]
    head = heads.save(tmp_path / "head", vocab=checkpoints.VOCAB, hidden=64, drafts=60)
    made, caches = runner(target, speculate="eagle", draft_model=str(head))
    model: Any = made.target  # type: ignore[attr-defined]
    theirs, embedding = checkpoints.load(target), model.model.embed.weight
    fc = heads.load_file(head / "model.safetensors")["fc.weight"]
    taps = model.taps

    def expected(tokens: list[int]) -> list[int]:
        """Proposals behind `tokens`, whose last one the target has not computed."""
        with torch.no_grad():
            states = theirs(input_ids=torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        hidden = torch.cat([states[i][0] for i in taps], -1) @ fc.T
        found = list(tokens)
        for _ in range(K):
            out, logits = heads.forward(head, embedding, torch.tensor(found[1:]), hidden)
            found.append(int(logits[-1].argmax()))
            hidden = torch.cat((hidden, out[-1:]))
        return found[len(tokens):]

    checked: list[list[int]] = []
    propose = made.proposer.propose  # type: ignore[attr-defined]

    def spy(*args: Any) -> Any:
        result = propose(*args)
        checked.append(result[0].tolist())
        return result

    made.proposer.propose = spy  # type: ignore[attr-defined]
    seqs, _, _ = rounds(made, caches, [prompt], 12, 100, {})
    tokens, at = seqs[0].tokens, len(prompt) + 1
    assert checked[0] == expected(tokens[:at])
    for proposed in checked[1:]:
        # A round gives a token and those of the former proposals that agreed.
        former = checked[checked.index(proposed) - 1] if proposed in checked else []
        gained = 1 + next((i for i, t in enumerate(former) if tokens[at + i] != t), K)
        at += gained
        assert proposed == expected(tokens[:at])
