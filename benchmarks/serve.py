"""The HTTP server under load: tokens/s beside LLM.generate, a soak with clients that go away or do not read, and the
time until streams go on when a rank is killed.

    python benchmarks/serve.py throughput [--model-config qwen2-0.5b] [--streams 64] [--tokens 256] [--repeat 3]
    python benchmarks/serve.py soak [--seconds 300] [--streams 200] [--device null]
    python benchmarks/serve.py restart [--model DIR] [--streams 8] [--tokens 256] [--repeat 3]

The server and LLM.generate share one engine in a process of its own, and take turns. The client is another process. The
soak compares the time between chunks of the clients that read, with and without clients that do not read, and counts
what the server holds when all are gone. It exits with 1 if anything is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GONE = (ConnectionError, asyncio.IncompleteReadError)


def serve(options: dict[str, Any], port: int) -> None:
    """The server's process. /here runs LLM.generate, and /inside counts what the server holds."""
    import uvicorn

    from hal.sampling.params import SamplingParams
    from hal.serve.app import Server
    from hal.serve.async_llm import AsyncLLM

    engine = AsyncLLM(**options)
    server = Server(engine, "model")

    def generate(query: dict[str, Any]) -> float:
        started = time.monotonic()
        outputs = engine.llm.generate(query["prompts"], SamplingParams(max_tokens=query["tokens"], ignore_eos=True))
        return sum(len(output.token_ids) for output in outputs) / (time.monotonic() - started)

    def inside() -> dict[str, Any]:
        scheduler = engine.llm.scheduler
        return {"tasks": len(asyncio.all_tasks()), "streams": len(engine._open) + len(engine._streams),
                "rows": scheduler.max_rows - len(scheduler._free_rows), "blocks": sum(scheduler.blocks.refs),
                "ranks": [each.process.pid for each in engine.llm.executor._ranks.processes] if "tp" in options else [],
                "active": server.active, "files": len(os.listdir("/proc/self/fd")),
                "megabytes": int(Path("/proc/self/statm").read_text().split()[1]) >> 8}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") not in ("/here", "/inside"):
            await server.app(scope, receive, send)
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                break
        found = inside() if scope["path"] == "/inside" else await asyncio.to_thread(generate, json.loads(body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(found).encode()})

    uvicorn.run(app, port=port, log_level="warning", lifespan="off", ws="none")


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    async def post(self, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection, of which the response's head has been read."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)
        text = json.dumps(body)
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
                     f"Content-Length: {len(text)}\r\n\r\n{text}".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head[:20]:
            raise SystemExit(f"the server refuses: {(head + await reader.read()).decode()}")
        return reader, writer

    async def ask(self, path: str, body: Any = None) -> Any:
        reader, writer = await self.post(path, body)
        answer = (await reader.read()).decode()
        writer.close()
        return json.loads(answer[answer.index("\r\n") + 2:answer.rindex("\r\n0")] if "\r\n" in answer else answer)

    async def healthy(self) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return b" 200 " in head[:20]

    async def stream(self, prompt: list[int], tokens: int) -> int:
        """Read a stream to its end. Returns the number of its chunks."""
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        reader, writer = await self.post("/v1/completions", body)
        text = await reader.read()
        writer.close()
        assert b"[DONE]" in text
        return text.count(b"data: {")


async def throughput(client: Client, args: argparse.Namespace) -> int:
    draw, rates = random.Random(0), {"generate": list[float](), "http": list[float]()}
    chunks = 0
    for round_ in range(args.repeat + 1):
        for kind in rates if round_ % 2 else reversed(rates):
            prompts = [[draw.randrange(3, args.vocab) for _ in range(args.prompt)] for _ in range(args.streams)]
            if kind == "generate":
                rate = await client.ask("/here", {"prompts": prompts, "tokens": args.tokens})
            else:
                started = time.monotonic()
                chunks = sum(await asyncio.gather(*[client.stream(prompt, args.tokens) for prompt in prompts]))
                rate = args.streams * args.tokens / (time.monotonic() - started)
            if round_:  # the first one warms up
                rates[kind].append(rate)
            print(f"{kind:9} {rate:9.1f} tokens/s", flush=True)
    ratio = statistics.median(rates["http"]) / statistics.median(rates["generate"])
    print(f"HTTP has {ratio:.3f} of LLM.generate, with {args.streams * args.tokens / chunks:.1f} tokens a chunk")
    return 0


async def soak(client: Client, args: argparse.Namespace) -> int:
    draw, gaps, seen = random.Random(args.seed), {False: list[float](), True: list[float]()}, {"read": 0, "left": 0}
    end, slow_now = time.monotonic() + args.seconds, False
    before = await client.ask("/inside")

    async def reader() -> None:
        while time.monotonic() < end:
            prompt = [draw.randrange(3, args.vocab) for _ in range(draw.randrange(4, 40))]
            body = {"prompt": [prompt] * draw.choice((1, 1, 1, 2)), "max_tokens": draw.randrange(10, 120),
                    "ignore_eos": True, "stream": draw.random() < 0.8}
            leaves = time.monotonic() + draw.random() * 2 if draw.random() < 0.4 else None
            stream, writer = None, None
            try:
                opening = client.post("/v1/completions", body)
                stream, writer = await asyncio.wait_for(opening, None if leaves is None else 2)
                last = 0.0
                while line := await asyncio.wait_for(stream.readline(), None if leaves is None else 2):
                    now = time.monotonic()
                    if line.startswith(b"data: {") and body["stream"]:
                        if last:
                            gaps[slow_now].append(now - last)
                        last = now
                    if leaves is not None and now > leaves:
                        break
                seen["read" if leaves is None else "left"] += 1
            except asyncio.TimeoutError:
                seen["left"] += 1
            except GONE:
                seen["left"] += 1
            finally:
                if writer is not None:
                    writer.transport.abort()

    async def never_reads() -> None:
        """Clients that ask for much, and read nothing for some seconds."""
        nonlocal slow_now
        while time.monotonic() + 2 < end:
            await asyncio.sleep(args.window)
            slow_now, held = True, []
            for _ in range(8):
                connection = socket.create_connection(("127.0.0.1", client.port))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                text = json.dumps({"prompt": [3, 4], "max_tokens": 400, "stream": True, "ignore_eos": True,
                                   "logprobs": 16})
                connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                                   f"Content-Length: {len(text)}\r\n\r\n{text}".encode())
                held.append(connection)
            await asyncio.sleep(args.window)
            slow_now = False
            for connection in held:
                connection.close()

    await asyncio.gather(never_reads(), *[reader() for _ in range(args.streams)])
    for _ in range(200):
        after = await client.ask("/inside")
        left = {name: after[name] - (before[name] if name in ("tasks", "files") else 0) for name in after
                if name not in ("megabytes", "ranks")}
        if not any(left.values()):
            break
        await asyncio.sleep(0.05)
    print(f"{seen['read']} requests read to their end, {seen['left']} left before")
    for slow, times in gaps.items():
        cuts = statistics.quantiles(times, n=100)
        print(f"between chunks {'beside 8 clients that do not read' if slow else 'without such clients':33}: "
              f"p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms, {len(times)} gaps")
    print(f"before: {before}\nafter:  {after}\nleft: {left}")
    return int(any(left.values()))


async def restart(client: Client, args: argparse.Namespace) -> int:
    """Kill a rank while all streams run. The parts of the time until they go on, as a client sees them."""
    rows = []
    for _ in range(args.repeat):
        chunks: list[list[float]] = [[] for _ in range(args.streams)]
        ends = [""] * args.streams

        async def read(place: int, chunks: list[list[float]] = chunks, ends: list[str] = ends) -> None:
            body = {"prompt": [3, 4, place % 8 + 4], "max_tokens": args.tokens, "ignore_eos": True, "stream": True}
            reader, writer = await client.post("/v1/completions", body)
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    chunks[place].append(time.monotonic())
                    ends[place] = line.decode().strip()
            writer.close()

        tasks = [asyncio.create_task(read(place)) for place in range(args.streams)]
        while not all(len(times) > 3 for times in chunks):
            await asyncio.sleep(0.005)
        os.kill((await client.ask("/inside"))["ranks"][-1], signal.SIGKILL)
        killed = time.monotonic()
        while await client.healthy():
            await asyncio.sleep(0.002)
        noticed = time.monotonic()
        while not await client.healthy():
            await asyncio.sleep(0.002)
        back = time.monotonic()
        await asyncio.gather(*tasks)
        later = [min((t for t in times if t > noticed + 0.05), default=float("inf")) for times in chunks]
        assert ends == ["data: [DONE]"] * args.streams, ends
        rows.append((noticed - killed, back - noticed, min(later) - back, max(later) - killed))
        print("/health fails {:.3f} s after the kill, is well {:.3f} s later, and the first stream goes on {:.3f} s "
              "after that; all go on {:.3f} s after the kill".format(*rows[-1]), flush=True)
    print("medians: " + ", ".join(f"{statistics.median(part):.3f}" for part in zip(*rows, strict=True)))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "soak", "restart"))
    parser.add_argument("--model-config", help="a shape of `hal bench` with random weights; default: the bundled model")
    parser.add_argument("--model", help="a checkpoint for `restart`")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--window", type=float, default=5, help="seconds with, and without, clients that do not read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(*json.loads(args.child))
        return 0
    args.streams = args.streams or {"throughput": 64, "soak": 200, "restart": 8}[args.what]
    with socket.create_server(("127.0.0.1", 0)) as free, tempfile.TemporaryDirectory() as scratch:
        port = free.getsockname()[1]
        free.close()
        options: dict[str, Any] = {"device": args.device, "max_num_seqs": 64}
        args.vocab = 16
        if args.model_config:
            from hal.cli.shapes import SHAPES

            (Path(scratch) / "config.json").write_text(json.dumps(SHAPES[args.model_config]))
            options |= {"model": scratch, "random_weights": True, "max_model_len": 512}
            args.vocab = SHAPES[args.model_config]["vocab_size"]
        if args.what == "restart":
            options |= {"tp": 2, **({"model": args.model, "max_model_len": 512} if args.model else {})}
        child = subprocess.Popen([sys.executable, __file__, args.what, "--child", json.dumps([options, port])])
        try:
            client = Client(port)
            while child.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.1)
            return asyncio.run({"throughput": throughput, "soak": soak, "restart": restart}[args.what](client, args))
        finally:
            child.terminate()
            child.wait(20)


if __name__ == "__main__":
    sys.exit(main())
