"""`hal serve` as a process: it starts, fails early, outlives a rank, and drains."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import pytest

openai = pytest.importorskip("openai", reason="needs the extra `serve` and the package openai")

SMALL = ("--device", "null", "--max-num-seqs", "8", "--num-blocks", "400", "--max-model-len", "500")


@contextmanager
def served(*arguments: str, **how: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and where it serves."""
    process = forked.Popen([sys.executable, "-m", "hal", "serve", "--port", "0", *arguments], text=True,
                           stderr=subprocess.PIPE, **how)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"served at (http://\S+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()  # so that its pipe never fills
                yield process, found[1]
                return
        raise AssertionError("it does not serve")
    finally:
        process.kill()
        process.wait(20)


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


def health(address: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=20) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def takes_requests(address: str) -> bool:
    try:
        return health(address)[0] == 200
    except OSError:  # nobody is there
        return False


def streams(address: str, count: int, tokens: int) -> tuple[list[threading.Thread], list[Any]]:
    """Threads that read a stream each, and what they got: the text with the finish_reason, or an error."""
    found: list[Any] = [None] * count

    def read(place: int) -> None:
        text, reason = "", None
        try:
            for chunk in client(address).completions.create(
                    model="", prompt=[5, place % 7 + 3], max_tokens=tokens, stream=True, temperature=0,
                    extra_body={"ignore_eos": True}):
                text, reason = text + chunk.choices[0].text, chunk.choices[0].finish_reason
                found[place] = text, reason
        except openai.OpenAIError as error:
            found[place] = error

    threads = [threading.Thread(target=read, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    while any(each is None for each in found):
        time.sleep(0.01)
    return threads, found


@pytest.mark.slow
@pytest.mark.parametrize("deadline", ["60", "0.2"])
def test_sigterm_ends_requests_in_order_and_exits_with_0(deadline: str) -> None:
    with served(*SMALL, "--drain-seconds", deadline) as (process, address):
        threads, found = streams(address, 6, 480)
        process.send_signal(signal.SIGTERM)
        while takes_requests(address):
            time.sleep(0.01)
        with pytest.raises(openai.OpenAIError):  # no connection, or 503
            client(address).completions.create(model="", prompt="1")
        assert process.wait(60) == 0
        for thread in threads:
            thread.join(20)
        reasons = {reason for _, reason in found}
        assert reasons == {"length"} if deadline == "60" else reasons <= {"abort", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("retries", [1, 0])
def test_streams_outlive_a_rank_or_get_its_error_and_the_server_is_healthy_again(retries: int, tmp_path: Path) -> None:
    slow, here = tmp_path / "slow", Path(__file__).parent
    with served(*SMALL, "--device", "slowed:backend", "--tp", "2", "--retries", str(retries), cwd=here,
                env={**os.environ, "SLOWED": str(slow)}) as (process, address):
        undisturbed = [client(address).completions.create(
            model="", prompt=[5, place % 7 + 3], max_tokens=480, temperature=0,
            extra_body={"ignore_eos": True}).choices[0].text for place in range(7)]
        slow.touch()  # so that no stream ends before its rank, however long this test is not scheduled
        threads, found = streams(address, 7, 480)
        rank = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1])
        os.kill(rank, signal.SIGKILL)
        slow.unlink()
        states = {health(address)[0]}
        while any(thread.is_alive() for thread in threads):
            states.add(health(address)[0])
            time.sleep(0.02)
        if retries:
            assert found == [(text, "length") for text in undisturbed] and states == {200, 503}
        else:
            assert all(isinstance(each, openai.APIError) and "rank 1" in str(each) for each in found), found
        state, end = health(address), time.monotonic() + 120
        while state[0] == 503 and time.monotonic() < end:
            assert state[1]["status"] == "failed" and "rank 1" in state[1]["error"]
            time.sleep(0.02)
            state = health(address)
        assert state == (200, {"status": "ok", "error": None})
        again = client(address).completions.create(model="", prompt=[5, 3], max_tokens=480, temperature=0,
                                                   extra_body={"ignore_eos": True})
        assert again.choices[0].text == undisturbed[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_nothing_is_left_of_clients_that_leave_or_do_not_read() -> None:
    """The soak of benchmarks/serve.py: rows, blocks, tasks, streams and file descriptors."""
    soak = Path(__file__).parents[2] / "benchmarks" / "serve.py"
    done = subprocess.run([sys.executable, str(soak), "soak", "--device", "null", "--seconds", "12", "--window", "3"],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    read, left = map(int, re.findall(r"(\d+) requests read.* (\d+) left", done.stdout)[0])
    assert read > 20 and left > 20


def test_what_cannot_be_served_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch,
                                                                 capfd: pytest.CaptureFixture[str]) -> None:
    from hal.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        for host, port in (("192.0.2.1", 0), ("127.0.0.1", taken.getsockname()[1]), ("127.0.0.1", 99999)):
            assert main(["serve", "--host", host, "--port", str(port), *SMALL]) == 1
            said = capfd.readouterr().err
            assert "cannot have this address" in said and f"{host}, port {port}" in said and "--port 0" in said
    monkeypatch.setenv("HAL_API_KEY", "")  # of a variable that was not set: it must not look like a guard
    assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--device", "none-such"]) == 1
    assert "everybody who reaches 0.0.0.0 may use this server" in capfd.readouterr().err
    for option in ("--retries", "--restarts"):
        assert main(["serve", option, "-1", *SMALL]) == 2 and "-1 is below 0" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", *SMALL]) == 1
    assert 'pip install "hal-runtime[serve]"' in capfd.readouterr().err
