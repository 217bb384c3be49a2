"""Failures of a rank under vLLM."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from served import serving


def test_a_rank_that_dies_while_idle_fires_the_callback() -> None:
    with serving("null", tensor_parallel_size=2) as llm:
        executor, told = llm.llm_engine.engine_core.engine_core.model_executor, threading.Event()
        executor.register_failure_callback(told.set)
        executor.check_health()
        os.kill(executor._hal._ranks.processes[0].process.pid, signal.SIGKILL)
        assert told.wait(5)
        with pytest.raises(Exception, match="rank 1 died between steps: killed by signal 9"):
            executor.check_health()
