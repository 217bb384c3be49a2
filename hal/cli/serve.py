"""hal serve: serve a model over HTTP, with OpenAI's endpoints"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from hal.cli import options, streams
from hal.config import BUNDLED_MODEL
from hal.errors import ConfigError
from hal.serve.tools import FORMATS

if TYPE_CHECKING:
    from hal.serve.app import Server

EPILOG = """examples:
  hal serve                                     # the bundled model, at http://127.0.0.1:8000
  hal serve DIR --tp 2 --port 8080
  HAL_API_KEY=secret hal serve DIR --host 0.0.0.0

Endpoints: /v1/completions, /v1/chat/completions, /v1/embeddings, /v1/models, /health, /metrics, and a page at /. After
SIGTERM or Ctrl-C the server takes no new request, ends those that it has, and exits with 0; a second signal aborts
them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=str(BUNDLED_MODEL), metavar="MODEL",
                        help=options.ENGINE_HELP["model"] + " (default: the bundled model, which adds numbers)")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this host alone)")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    group.add_argument("--served-model-name", metavar="NAME", 
                       help="the model's name for clients (default: its folder's, or its hub id)")
    group.add_argument("--api-key", metavar="KEY", default=os.environ.get("HAL_API_KEY", ""),
                       help="what clients must send to /v1 (default: HAL_API_KEY; without it, nothing). Other users of "
                            "the host can read a command line")
    group.add_argument("--allow-adapter-loading", action="store_true",
                       help="clients may load and unload adapters (/v1/load_lora_adapter), for which the server reads "
                            "directories that they name; needs --max-adapters")
    group.add_argument("--tool-parser", choices=("auto", *FORMATS, "none"), default="auto",
                       help="how the model writes tool calls; auto: as its chat template says; none: they stay text")
    group.add_argument("--max-requests", type=options.positive, default=1024, metavar="N",
                       help="requests at a time; others get 429 (default: 1024)")
    group.add_argument("--max-body", type=options.positive, default=8 << 20, metavar="BYTES",
                       help="the longest body of a request (default: 8 MiB)")
    group.add_argument("--max-prompt-tokens", type=options.positive, metavar="N",
                       help="the longest prompt (default: what the model's context takes)")
    group.add_argument("--drain-seconds", type=float, default=30.0, metavar="X",
                       help="time for requests to end after SIGTERM, before they are aborted (default: 30)")
    group.add_argument("--retries", type=options.count, default=1, metavar="N",
                       help="failures of the engine after which a request goes on; 0: it gets the error (default: 1)")
    group.add_argument("--restarts", type=options.count, default=3, metavar="N",
                       help="how often new workers are started before a request has completed (default: 3)")
    options.add_engine_options(parser, skip=("model",))


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn  # noqa: F401

        from hal.serve.app import Limits, Server
    except ImportError as error:
        raise ConfigError("hal serve needs packages that are not installed", got=str(error),
                          hint='pip install "hal-runtime[serve]"') from error
    from hal.serve.async_llm import AsyncLLM

    if args.host not in ("127.0.0.1", "::1", "localhost") and not args.api_key:
        streams.say(f"hal: everybody who reaches {args.host} may use this server: --api-key or HAL_API_KEY guards it")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    path = Path(args.model).expanduser()
    name = args.served_model_name or (path.resolve().name if path.exists() else args.model)  # an id of the hub
    # The address is taken before the model is loaded, so that a wrong one fails early.
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((args.host, args.port))
        except (OSError, OverflowError) as error:
            raise ConfigError("the server cannot have this address", got=f"{args.host}, port {args.port}: {error}",
                              expected="an address of this host and a port that is free",
                              hint="--port 0 takes a free port") from None
        engine = AsyncLLM(retries=args.retries, restarts=args.restarts, max_prompt_tokens=args.max_prompt_tokens,
                          progress=sys.stderr.isatty(), **{**options.engine_options(args), "model": args.model})
        try:
            options.load_adapters(engine.llm, args)  # no request has come yet
            server = Server(engine, name, api_key=args.api_key or None,
                            limits=Limits(requests=args.max_requests, body=args.max_body),
                            adapter_loading=args.allow_adapter_loading, tool_parser=args.tool_parser)
            return asyncio.run(_serve(server, listener, max(args.drain_seconds, 0.0)))
        finally:
            engine.close()


async def _serve(server: Server, listener: socket.socket, drain_seconds: float) -> int:
    """Serve until a signal comes and all requests have ended. Returns the exit status."""
    import uvicorn

    class Uvicorn(uvicorn.Server):
        def capture_signals(self) -> nullcontext[None]:  # type: ignore[override]  # the signals are ours
            return nullcontext()

    # OpenAI's client keeps an idle connection for 5 seconds, as uvicorn does by default: the server might close one at
    # the moment when a request comes on it, which then fails. So the server is not the first to close it.
    http = Uvicorn(uvicorn.Config(server.app, log_level="warning", access_log=False, lifespan="off", ws="none",
                                  server_header=False, timeout_keep_alive=75,
                                  timeout_graceful_shutdown=int(drain_seconds) + 5))
    received, stop, loop = list[signal.Signals](), asyncio.Event(), asyncio.get_running_loop()

    def end(number: signal.Signals) -> None:
        received.append(number)
        http.force_exit = len(received) > 1
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    listener.listen(2048)  # a client that connects now waits until the server runs, and is not refused
    running = asyncio.create_task(http.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    streams.say(f"hal: {server.name} is served at http://{f'[{host}]' if ':' in host else host}:{port}")
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        streams.say(f"hal: {server.active} requests are ended before the server does, within {drain_seconds:g} s")
        http.should_exit = True
        draining = asyncio.create_task(server.engine.drain(drain_seconds))
        while not draining.done():
            await asyncio.wait((draining,), timeout=0.1)
            if len(received) > 1:
                draining.cancel()
                await server.engine.drain(0)
    await running
    return 0 if len(received) < 2 else 128 + received[-1]
