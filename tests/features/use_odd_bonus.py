"""Run by test_addition.py in a process of its own, where HAL_FEATURES names the feature. Prints where it arrives."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from hal import LLM, SamplingParams
from hal.cli import main
from hal.contracts.inputs import PagedModelInput
from hal.contracts.request import ExecuteModelRequest
from hal.recording.format import Recording
from hal.sampling.document import page


def printed(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(list(arguments)) == 0
    return out.getvalue()


def run() -> dict[str, Any]:
    found: dict[str, Any] = {}
    params = SamplingParams(max_tokens=6, ignore_eos=True, odd_bonus=1000)  # type: ignore[call-arg]
    with LLM(device="null", tp=2, max_model_len=64, num_blocks=32) as llm:
        plain = SamplingParams(max_tokens=40, ignore_eos=True)
        outputs = llm.generate([[5, 6, 7], [5, 6, 7]], [params, plain])
    found["asked"], found["plain"] = (output.token_ids for output in outputs)
    common = ["--device", "null", "--max-model-len", "64", "--num-blocks", "32", "--max-tokens", "6", "--ignore-eos"]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "in.jsonl")
        lines.write_text(json.dumps({"prompt_token_ids": [5, 6, 7], "odd_bonus": 1000}) + "\n")
        found["jsonl"] = json.loads(printed("generate", *common, "--json", "--input", str(lines)))["token_ids"]
        file = Path(folder, "run.safetensors")
        printed("record", *common, "--odd-bonus", "1000", "--output", str(file), "1+1=")
        step = Recording.load(file).steps[0]
        found["recorded"] = [step.request.new_floats.tolist(), step.input["odd_bonus"].tolist()]
        found["replay"] = printed("replay", str(file), "--device", "null")
    found["option"] = printed("generate", *common, "--odd-bonus", "1000", "--json", "37+85=")
    found["column"] = ExecuteModelRequest.schema.by_name["new_floats"].describe
    found["field"] = PagedModelInput.schema.by_name["odd_bonus"].describe
    found["row"] = [line for line in page().splitlines() if "odd_bonus" in line]
    return found


if __name__ == "__main__":
    json.dump(run(), sys.stdout)
