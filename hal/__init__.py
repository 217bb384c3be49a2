"""The layer between an LLM inference engine and the hardware. Importing it loads no torch: names resolve on use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hal.config import EngineConfig
    from hal.contracts.backend import Backend, Capabilities
    from hal.contracts.communicator import Communicator
    from hal.contracts.inputs import IntermediateTensors, ModelInput, PagedModelInput, WorkerInput
    from hal.contracts.outputs import SamplerOutput
    from hal.contracts.request import ExecuteModelRequest
    from hal.contracts.runner import ModelRunnerBase
    from hal.engine.llm import LLM
    from hal.engine.request_output import RequestOutput
    from hal.errors import HalError
    from hal.sampling.params import SamplingParams
    from hal.schema import Array, Declared
    from hal.serve.async_llm import AsyncLLM

_HOME = {
    "LLM": "hal.engine.llm", "AsyncLLM": "hal.serve.async_llm", "RequestOutput": "hal.engine.request_output",
    "EngineConfig": "hal.config", "SamplingParams": "hal.sampling.params", "HalError": "hal.errors",
    "Array": "hal.schema", "Declared": "hal.schema",
    **{name: f"hal.contracts.{module}" for module, names in {
        "backend": ["Backend", "Capabilities"], "communicator": ["Communicator"], "runner": ["ModelRunnerBase"],
        "request": ["ExecuteModelRequest"], "outputs": ["SamplerOutput"],
        "inputs": ["ModelInput", "PagedModelInput", "WorkerInput", "IntermediateTensors"],
    }.items() for name in names},
}

__all__ = [
    "LLM", "Array", "AsyncLLM", "Backend", "Capabilities", "Communicator", "Declared", "EngineConfig",
    "ExecuteModelRequest", "HalError", "IntermediateTensors", "ModelInput", "ModelRunnerBase", "PagedModelInput",
    "RequestOutput", "SamplerOutput", "SamplingParams", "WorkerInput",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hal' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
