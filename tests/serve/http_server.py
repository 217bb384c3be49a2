"""A server of this process, in a thread, and clients for it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from openai import OpenAI

from hal.serve.app import Limits, Server
from hal.serve.async_llm import AsyncLLM


class Serving:
    """Attributes: server, engine: what runs. address: of it. client: of the openai package."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.engine, self.address = server, server.engine, ("127.0.0.1", port)
        self.client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=server.api_key or "none", max_retries=0,
                             timeout=60)

    def open(self, path: str, body: str) -> socket.socket:
        """A connection to which a POST was written. It takes little that is not read."""
        connection = socket.socket()
        connection.settimeout(60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(self.address)
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
                           f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return connection


@contextmanager
def serving(model: str | None = None, *, api_key: str | None = None, limits: Limits | None = None,
            adapter_loading: bool = False, **options: Any) -> Iterator[Serving]:
    engine = AsyncLLM(**options) if model is None else AsyncLLM(model, **options)
    server = Server(engine, "the-model", api_key=api_key, limits=limits, adapter_loading=adapter_loading)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections too
        # The client keeps a connection for 5 seconds. As uvicorn does by default, so it may close one that is in use.
        http = uvicorn.Server(uvicorn.Config(server.app, log_level="warning", lifespan="off", ws="none",
                                             timeout_keep_alive=600))
        thread = threading.Thread(target=asyncio.run, args=(http.serve(sockets=[listener]),))
        thread.start()
        made = Serving(server, listener.getsockname()[1])
        try:
            yield made
        finally:
            made.client.close()
            http.should_exit = http.force_exit = True
            thread.join(30)
            engine.close()
