"""How many drafts a step is worth, and the measured times of rounds that decide it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hal import LLM
from hal.config import BUNDLED_MODEL, EngineConfig
from hal.contracts import backend as backends
from hal.engine.speculation import Speculation
from hal.paged.runner import PagedModelRunner
from hal.sampling.verification import verified_tokens


def speculation(times: Any, right: float) -> Speculation:
    found = Speculation(EngineConfig(speculate="ngram", speculative_tokens=8), backends.load("null"))
    found.take_times(times)
    found._right, found._trials = right, 1.0
    return found


def counts(found: Speculation, rows: int) -> Iterator[int]:
    while True:
        found._choose(rows)
        yield found.count


CHEAP = [(n, k, 1.0 + 0.05 * k) for n in (1, 4) for k in (0, 4, 8)]
DEAR = [(n, k, 1.0 + (3.0 + 0.5 * k) * (k > 0)) for n in (1, 4) for k in (0, 4, 8)]  # as where a round has no graph


def test_measured_times_decide_the_number_of_drafts() -> None:
    assert next(counts(speculation(CHEAP, 0.9), 3)) == 8
    assert next(counts(speculation(CHEAP, 0.4), 3)) == 4
    assert next(counts(speculation(CHEAP, 0.1), 3)) == 0
    assert next(counts(speculation(DEAR, 0.9), 3)) == 0
    assert next(counts(speculation((), 0.9), 3)) > 0  # by the costs that the backend declares


def test_speculation_that_rests_looks_now_and_then_but_not_where_no_round_is_prepared() -> None:
    found, beyond = (counts(speculation(DEAR, 0.9), rows) for rows in (4, 5))
    assert [next(found) for _ in range(64)].count(1) == 2
    assert not any(next(beyond) for _ in range(64))


def test_fewer_drafts_than_were_measured_take_the_time_of_the_next_number() -> None:
    found = speculation([(1, 0, 1.0), (1, 2, 2.0), (1, 8, 5.0)], 0.5)
    assert found._round_times(1) == [1, 2, 2, 5, 5, 5, 5, 5, 5]


def test_programs_are_prepared_for_half_of_the_drafts_and_half_of_those() -> None:
    assert [verified_tokens(most) for most in (1, 2, 3, 4, 8, 9)] == [
        (2,), (3,), (3, 4), (3, 5), (3, 5, 9), (3, 4, 6, 10)]


@pytest.mark.parametrize("how", [{"speculate": "ngram"}, {"speculate": "draft", "draft_model": str(BUNDLED_MODEL)}],
                         ids=["ngram", "draft"])
def test_ranks_measure_the_rounds_that_their_runner_names(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    """Rounds of the real parts, which leave nothing behind: later tokens are right."""
    sizes = [(n, k) for n in (1, 2) for k in (0, 2)]
    monkeypatch.setattr(PagedModelRunner, "rounds", sizes)
    with LLM(device="cpu", max_num_seqs=2, speculative_tokens=2, **how) as llm:
        assert [(n, k) for n, k, _ in llm.executor.round_times] == sizes
        assert llm.core.speculation is not None and sorted(llm.core.speculation._times) == [1, 2]
        assert all(seconds > 0 for *_, seconds in llm.executor.round_times)
        assert [o.text for o in llm.generate(["37+85=", "999+1="])] == ["122", "1000"]
