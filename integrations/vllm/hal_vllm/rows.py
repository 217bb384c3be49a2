"""What the translator knows of each request, and of each row that the ranks keep for a running one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hal.constrained.rules import TokenRules
from hal.contracts.request import ExecuteModelRequest


@dataclass(slots=True, eq=False)
class Request:
    """A request from the step that brings it in to the step that says it is finished, preemptions included.

    Attributes:
        row: its row, or -1 while it is preempted.
        seed: its own or a derived one, the same after a preemption.
        tokens: prompt and output as far as the host knows them. num_prompt: how many are the prompt.
        prompt_parts: prompt logprobs of the chunks computed so far, kept until a token is sampled, since vLLM takes
            them whole and with that token.
    """

    req_id: str
    params: Any
    seed: int
    tokens: list[int]
    num_prompt: int
    constraints: TokenRules | None
    needs_tokens: bool
    grammar: bool
    prompt_logprobs: int
    row: int = -1
    prompt_parts: list[Any] = field(default_factory=list)


class Scheduled:
    """The requests of a step, in the order of its rows. Steps of the same decodes share one.

    Attributes:
        ids: of the requests. owners: the requests. index: the place of each id.
        rows, rows32: their rows, as int64 and int32. ones: int32, a one for each.
    """

    __slots__ = ("ids", "index", "ones", "owners", "rows", "rows32")

    def __init__(self, ids: list[str], owners: list[Request], rows: np.ndarray) -> None:
        self.ids, self.owners, self.rows = ids, owners, rows
        self.index = {req_id: i for i, req_id in enumerate(ids)}
        self.rows32, self.ones = rows.astype(np.int32), np.ones(len(ids), np.int32)


class BlockTables:
    """The block tables that grow in a step: row, first column that changes, number of blocks, and all their blocks."""

    __slots__ = ("blocks", "counts", "rows", "starts")

    def __init__(self) -> None:
        self.rows, self.starts, self.counts, self.blocks = [], [], [], []

    def add(self, row: int, start: int, blocks: list[int]) -> None:
        self.rows.append(row)
        self.starts.append(start)
        self.counts.append(len(blocks))
        self.blocks += blocks


@dataclass(slots=True, eq=False)
class Step:
    """A translated step.

    Attributes:
        req_ids: of all scheduled requests, in the order of `request.rows`. index: the place of each.
        sampled: the places of requests that get a token, or None if all of them do. owners: the requests at `rows`.
        rows: of all scheduled requests. occupants: number of the entry into each row, to tell whether a sequence still
            has its row when the output arrives.
        targets: (request, first, end) of prompt tokens whose logprobs come with this step.
        grammar: a scheduled request's tokens follow a grammar, so the sampling waits for vLLM's masks.
    """

    request: ExecuteModelRequest
    req_ids: list[str]
    index: dict[str, int]
    rows: np.ndarray
    occupants: np.ndarray
    sampled: np.ndarray | None
    owners: list[Request]
    targets: list[tuple[Request, int, int]]
    grammar: bool
