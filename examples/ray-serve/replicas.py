"""hal's HTTP server as replicas behind Ray Serve, which spreads requests over them and replaces one that fails.

    pip install "hal-runtime[serve]" "ray[serve]"
    python replicas.py --replicas 2                       # the bundled model, at http://127.0.0.1:8000
    python replicas.py --model DIR --replicas 4 --gpus 1 --device cuda

Each replica is a process with an engine of its own. On a cluster, run it on the head node: Ray places the replicas. An
engine that has failed for good makes its replica unhealthy, and Ray starts another one. With tp > 1 give each replica
as many GPUs (--gpus), since its ranks run where it runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray import serve

from hal.config import BUNDLED_MODEL
from hal.serve.app import Server
from hal.serve.async_llm import AsyncLLM


def deployment(model: str, options: dict[str, Any], replicas: int, gpus: float) -> Any:
    """The deployment of a model with these options of LLM, `gpus` for each replica."""
    engines: list[AsyncLLM] = []  # of the replica's process: this function's copy there has one

    def build() -> Any:  # Ray calls it in each replica
        engines.append(AsyncLLM(model, **options))
        return Server(engines[0], Path(model).name).app

    class Replica:
        def check_health(self) -> None:
            if (error := engines[0].health()) is not None:
                raise error

    return serve.deployment(name="hal", num_replicas=replicas, max_ongoing_requests=512,
                            ray_actor_options={"num_gpus": gpus}, graceful_shutdown_timeout_s=60,
                            )(serve.ingress(build)(Replica)).bind()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(BUNDLED_MODEL))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(deployment(args.model, {"device": args.device, "tp": args.tp}, args.replicas, args.gpus), blocking=True)


if __name__ == "__main__":
    main()
