"""The endpoints that load and unload adapters, with vLLM's names of their fields."""

from __future__ import annotations

from typing import Any

from hal.errors import CapacityError, HalError, ModelLoadError, RequestError
from hal.serve.async_llm import AsyncLLM
from hal.serve.errors import ApiError
from hal.serve.protocol import Reader, as_api_error


async def load(engine: AsyncLLM, base: str, body: Any) -> str:
    """Load an adapter from a directory of the server.

    Args:
        base: the name of the base model, which no adapter may have.

    Returns:
        What was done.

    Raises:
        ApiError.
    """
    reader = Reader(body, frozenset(("lora_name", "lora_path")))
    name, path = _text(reader, "lora_name"), _text(reader, "lora_path")
    if name == base:
        raise ApiError(400, f"{name!r} is the name of the base model", "lora_name")
    try:
        await engine.load_adapter(name, path)
    except HalError as error:
        raise _refusal(error) from error
    return f"loaded the adapter {name!r} from {path!r}"


async def unload(engine: AsyncLLM, body: Any) -> str:
    """Unload an adapter. Returns what was done. Raises ApiError."""
    reader = Reader(body, frozenset(("lora_name", "wait")))
    name, wait = _text(reader, "lora_name"), reader.take("wait", bool, False)
    if name not in engine.adapters:
        raise ApiError(404, f"no adapter {name!r} is loaded", "lora_name", "model_not_found")
    try:
        await engine.unload_adapter(name, wait=wait)
    except HalError as error:
        raise _refusal(error) from error
    return f"unloaded the adapter {name!r}"


def _text(reader: Reader, field: str) -> str:
    value: str = reader.take(field, str, "")
    if not value.isprintable() or not value:
        raise ApiError(400, f"{field} is missing, or has characters that cannot be printed", field)
    return value


def _refusal(error: HalError) -> ApiError:
    if isinstance(error, (RequestError, CapacityError, ModelLoadError)):
        return ApiError(400, str(error), "lora_path" if isinstance(error, ModelLoadError) else "lora_name")
    return as_api_error(error)
