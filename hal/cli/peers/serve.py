"""Runs a peer in its own Python, which need not have hal: `serve.py NAME MODEL OPTIONS`. Each line of the standard
input is a batch, [prompts, new_tokens]; the answer is a line with its events, [seconds, request, tokens gained]."""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    name, model, options = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the peer prints
    try:
        peer = importlib.import_module(f"{name}_peer").Peer(model, **json.loads(options))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers)
        return
    print(json.dumps({"about": peer.about}), file=answers)
    for line in sys.stdin:
        print(json.dumps(peer.run(*json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
