"""hal under vLLM: vLLM's scheduler, API server and sampling options, hal's workers and model runners.

The plug-in does nothing unless a hal device is asked for: by the variable HAL_DEVICE, or by
`--additional-config '{"hal": {"device": "cpu"}}'` on the command line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

_OPTION = "--additional-config"


def register() -> str | None:
    """vLLM's entry point group vllm.platform_plugins: the name of the platform class, or None to stay out of the way.

    vLLM asks before it has read its options, so this looks for the device on the command line itself. Child processes
    get the device by HAL_DEVICE.
    """
    device = os.environ.get("HAL_DEVICE") or device_in(sys.argv)
    if not device:
        return None
    os.environ["HAL_DEVICE"] = device
    return "hal_vllm.platform.HalPlatform"


def register_models() -> None:
    """vLLM's entry point group vllm.general_plugins: name hal's architectures, those that vLLM lacks included."""
    if not os.environ.get("HAL_DEVICE"):
        return
    from vllm import ModelRegistry

    from hal.models.families import architectures
    from hal_vllm.model import HalForCausalLM

    for name in architectures():
        ModelRegistry.register_model(name, HalForCausalLM)


def device_in(arguments: Sequence[str]) -> str | None:
    """The hal device that --additional-config names, as JSON or as --additional-config.hal.device."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.replace("_", "-", 2 if argument.startswith("--") else 0).partition("=")
        if not equals:
            value = arguments[i + 1] if i + 1 < len(arguments) else ""
        if name == f"{_OPTION}.hal.device":
            return value
        if name == _OPTION:
            try:
                device = json.loads(value)["hal"]["device"]
            except (ValueError, KeyError, TypeError):  # vLLM reports what is wrong with the option
                continue
            return device if isinstance(device, str) else None
    return None
