"""Stands in for hal/cli/peers/serve.py: a peer whose tokens come at known times, that is missing, that dies, or that
never is ready."""

from __future__ import annotations

import json
import sys
import time

name, model, options = sys.argv[1:]
if name == "openvino":
    print(json.dumps({"missing": "No module named 'openvino'"}))
    sys.exit()
if name == "transformers":
    time.sleep(600)
print(json.dumps({"about": f"a peer with {json.loads(options)['threads']} threads"}), flush=True)
for line in sys.stdin:
    if name == "vllm":
        print("an illegal instruction", file=sys.stderr)
        sys.exit(4)
    prompts, new = json.loads(line)
    print(json.dumps([[1.0 + step, i, 1] for step in range(new) for i in range(len(prompts))]), flush=True)
