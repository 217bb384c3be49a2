"""How many messages an engine's control plane carries. torchrun runs this file as a script: each rank counts in one
case after the other, and writes the numbers to a folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hal.contracts.proposer import HostProposer, Propose
from hal.engine.llm import LLM
from hal.sampling.params import SamplingParams

MOST, ROUNDS = 8, 3
SIZES = {"device": "null", "block_size": 4, "max_num_seqs": 3, "max_num_batched_tokens": 64, "max_model_len": 80}


class Zeros(HostProposer):
    """Proposes as many tokens as it may. The null backend's tokens are others, so rounds gain one or a few."""

    def begin(self, prompt_ids: Sequence[int]) -> Propose:
        return lambda output_ids, count: [0] * count


def counted(mode: str, **options: Any) -> list[list[int]]:
    """For each k from 1 to MOST: messages of k decode steps ("steps") or rounds of k drafts ("drafts") beside the step
    of the prompts, and messages of the control plane for both."""
    how: dict[str, Any] = {"steps_per_message": MOST} if mode == "steps" else {
        "speculate": "messages_case:Zeros", "speculative_tokens": MOST}
    found = []
    with LLM(**SIZES, **how, **options) as llm:
        plane, submit = llm.executor._worker.plane, llm.executor.execute_model  # type: ignore[attr-defined]
        sent, kinds, broadcast = [0], list[int](), plane.broadcast

        def sending(parts: Any) -> None:
            sent[0] += 1
            broadcast(parts)

        def submitting(request: Any, **how: Any) -> Any:
            drafts = 0 if request.draft_counts is None else int(request.draft_counts.max())
            kinds.append(request.num_steps if mode == "steps" else drafts)
            return submit(request, **how)

        plane.broadcast, llm.executor.execute_model = sending, submitting  # type: ignore[method-assign]
        for k in range(1, MOST + 1):
            if mode == "steps":
                llm.scheduler.steps = k
            else:
                speculation: Any = llm.core.speculation
                speculation.count, speculation._choose = k, lambda rows: None
            sent[0] = 0
            kinds.clear()
            params = SamplingParams(max_tokens=1 + ROUNDS * k if mode == "steps" else 4 + k, ignore_eos=True)
            llm.generate([[1, 2, 3], [4, 5]], params)
            # The last rounds of drafts have fewer: no sequence can gain k + 1 tokens any more.
            found.append([sum(kind == k for kind in kinds[1:]), len(kinds), sent[0]])
    return found


if __name__ == "__main__":
    sys.modules["messages_case"] = sys.modules["__main__"]
    torch.set_num_threads(1)
    numbers = [(mode, counted(mode, wire="none", control_plane=plane, tp=2))
               for mode, plane in (case.split() for case in sys.argv[2:])]
    (Path(sys.argv[1]) / os.environ["RANK"]).write_text(json.dumps(numbers))
