"""A server whose rank fails answers its requests with an error, ends with status 1, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from failing import SIGNALS
from openai import APIError
from servers import Server, Servers

TWO_RANKS = ("--tensor-parallel-size", "2")
CAUSES = {"raises": "this rank was told to raise", "dies": "rank 1 died.*killed by signal 9",
          "stops": "rank 1 .*no sign of life"}


def options(how: str) -> dict[str, float]:
    """A rank that stops is to be found soon. Elsewhere, one that is only slow must not be taken for it."""
    return {"heartbeat": 5} if how == "stops" else {}


def ended_by_failure(server: Server, how: str) -> None:
    assert server.exit_status() == 1
    assert server.left_behind() == []
    assert re.search(CAUSES[how], server.log(), re.DOTALL), server.log()[-5000:]


@pytest.mark.parametrize("how", ["dies", pytest.param("raises", marks=pytest.mark.slow),
                                 pytest.param("stops", marks=pytest.mark.slow)])
def test_a_rank_fails_in_a_step(servers: Servers, how: str) -> None:
    with servers.server("failing:backend", *TWO_RANKS, hal=options(how)) as server:
        server.wait_until_ready()
        client = server.client(timeout=300)
        stream = client.completions.create(model="add", prompt=[1, 2, 3], max_tokens=90, stream=True,
                                           extra_body={"ignore_eos": True})
        next(stream)
        begin = time.monotonic()
        with pytest.raises(APIError):
            client.completions.create(model="add", prompt=SIGNALS[how], max_tokens=2)
        with pytest.raises(APIError):
            list(stream)
        assert time.monotonic() - begin < 120
        ended_by_failure(server, how)
        assert re.search(r"exit status 1, since the engine has failed: \w+Error: .*rank 1", server.log())


@pytest.mark.slow
@pytest.mark.parametrize(("how", "number"), [("dies", signal.SIGKILL), ("stops", signal.SIGSTOP)])
def test_a_rank_fails_while_idle(servers: Servers, how: str, number: signal.Signals) -> None:
    """vLLM's failure callback ends the engine without a request."""
    with servers.server("null", *TWO_RANKS, hal=options(how)) as server:
        server.wait_until_ready()
        rank, = server.ranks()
        os.kill(rank, number)
        ended_by_failure(server, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", SIGNALS)
def test_a_rank_fails_at_the_start(servers: Servers, how: str) -> None:
    with servers.server("failing:backend", *TWO_RANKS, hal=options(how), environment={"FAILING": how}) as server:
        ended_by_failure(server, how)


@pytest.mark.parametrize(("number", "whole_group"), [
    (signal.SIGTERM, False), pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)])
def test_a_server_that_is_told_to_stop_ends_with_status_0(servers: Servers, number: signal.Signals,
                                                          whole_group: bool) -> None:
    """Supervisors send the signal to the server alone or to all its processes; a terminal sends it to all."""
    with servers.server("null", *TWO_RANKS) as server:
        server.wait_until_ready()
        server.client().completions.create(model="add", prompt=[1, 2, 3], max_tokens=9)
        (os.killpg if whole_group else os.kill)(server.pid, number)
        assert server.exit_status() == 0, server.log()[-5000:]
        assert server.left_behind() == []


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_completes_requests_within_the_timeout(servers: Servers) -> None:
    with servers.server("failing:backend", *TWO_RANKS, "--shutdown-timeout", "60") as server:
        server.wait_until_ready()
        stream = server.client().completions.create(model="add", prompt=[1, 2, 3], max_tokens=60, stream=True,
                                                    extra_body={"ignore_eos": True, "return_token_ids": True})
        next(stream)
        os.kill(server.pid, signal.SIGTERM)
        assert sum(len(part.choices[0].token_ids or ()) for part in stream) == 59
        assert server.exit_status() == 0, server.log()[-5000:]
        assert server.left_behind() == []
