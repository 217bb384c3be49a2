"""The HTTP server: OpenAI's endpoints on an AsyncLLM, as an ASGI application."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from time import monotonic, time
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hal.engine.prompts import Prompt
from hal.engine.request_output import RequestOutput
from hal.errors import ConfigError, HalError
from hal.sampling.params import SamplingParams
from hal.serve import adapters
from hal.serve.answers import Answer, usage
from hal.serve.async_llm import AsyncLLM
from hal.serve.errors import ApiError
from hal.serve.metrics import Metrics
from hal.serve.protocol import Call, as_api_error, read_chat, read_completion, read_embedding

_log = logging.getLogger("hal.serve")
_ID = re.compile(r"[!-~]{1,128}")  # a request's id that is safe in a log and in a header
_GONE = 499  # the status in the log of a request whose client went away
T = TypeVar("T")
Outputs = AsyncGenerator[tuple[int, RequestOutput], None]
Write = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Attributes:
        requests: HTTP requests to /v1 at a time; more of them get the status 429. choices: of one request, over all
            its prompts. body: bytes.
    """

    requests: int = 1024
    choices: int = 1024
    body: int = 8 << 20


class Gone(Exception):
    """The client has closed its connection."""


class Server:
    """OpenAI's completions, chat completions, embeddings and models, with /health, /metrics, and a page at /.

    Args:
        name: of the base model, for clients. api_key: what clients must send to /v1; None: nothing.
        adapter_loading: clients may load adapters from directories of the server, and unload them.
        tool_parser: the form of the model's tool calls, a key of hal.serve.tools.FORMATS; "auto": the one of which its
            chat template speaks; "none": calls stay text.

    Raises:
        ConfigError: an adapter has the name of the base model, or adapters are to be loaded where there is no slot.
    """

    def __init__(self, engine: AsyncLLM, name: str, *, api_key: str | None = None,
                 limits: Limits | None = None, adapter_loading: bool = False,
                 tool_parser: str = "auto") -> None:
        if name in engine.adapters:
            raise ConfigError("an adapter has the name of the base model", got=repr(name), expected="two names",
                              hint="--served-model-name names the base model")
        if adapter_loading and not engine.llm.config.max_adapters:
            raise ConfigError("adapters are to be loaded, and the engine has no slots for them", got="max_adapters=0",
                              expected="--max-adapters N beside --allow-adapter-loading")
        self.engine, self.name, self.api_key, self.adapter_loading = engine, name, api_key, adapter_loading
        self.tool_parser = tool_parser
        self.limits, self.metrics, self.active = limits or Limits(), Metrics(), 0
        routes = [Route("/v1/completions", partial(self.generate, chat=False), methods=["POST"]),
                  Route("/v1/chat/completions", partial(self.generate, chat=True), methods=["POST"]),
                  Route("/v1/embeddings", self.embed, methods=["POST"]), Route("/v1/models", self.models),
                  Route("/v1/load_lora_adapter", partial(self.change_adapters, load=True), methods=["POST"]),
                  Route("/v1/unload_lora_adapter", partial(self.change_adapters, load=False), methods=["POST"]),
                  Route("/health", self.health), Route("/metrics", self.show_metrics), Route("/", self.page)]
        self.app: ASGIApp = _Front(self, Starlette(routes=routes, exception_handlers={
            kind: _refused for kind in (ApiError, HalError, HTTPException, ClientDisconnect, Gone, Exception)}))

    # The endpoints

    async def generate(self, request: Request, chat: bool) -> Response:
        body, llm = await self._body(request), self.engine.llm
        call, template = read_chat(body, llm, self.tool_parser) if chat else (read_completion(body, llm), None)
        call = call.with_adapter(self._adapter(call.model))
        if template is not None:
            try:
                call = replace(call, prompts=[await self.engine.chat_ids(**template)])
            except HalError as error:
                raise as_api_error(error, "messages") from error
        jobs, field = call.jobs, "messages" if chat else "prompt"
        if not 0 < len(jobs) <= self.limits.choices:
            raise ApiError(400, f"a request has too many prompts and choices, or none\n  got: {len(jobs)}\n  "
                           f"expected: 1 to {self.limits.choices}", field)
        number = ("chatcmpl-" if chat else "cmpl-") + request.state.id
        kind = "text_completion" if not chat else "chat.completion.chunk" if call.stream else "chat.completion"
        head = {"id": number, "object": kind, "created": int(time()), "model": call.model or self.name}
        outputs, answers = self._outputs(jobs, field), [Answer(llm, call, i, chat) for i in range(len(jobs))]
        if not call.stream:
            found = await _unless_gone(request, _last_of(outputs, len(jobs)))
            request.state.usage = usage(found, len(call.prompts))
            choices = [answer.choice(output) for answer, output in zip(answers, found, strict=True)]
            return JSONResponse({**head, "choices": choices, "usage": request.state.usage})
        first = await _unless_gone(request, anext(outputs))  # an error before it has a status of its own
        return _Events(request, partial(self._write, call, head, answers, first, outputs, request))

    async def embed(self, request: Request) -> Response:
        reader = read_embedding(await self._body(request))
        self._adapter(reader.take("model", str, ""))  # a model of embeddings has none
        texts = reader.take("input", (str, list))
        form = reader.take("encoding_format", str, "float")
        name, truncate = reader.take("prompt_name", str), reader.take("truncate", bool, True)
        if form not in ("float", "base64"):
            raise ApiError(400, f"encoding_format={form!r} is not supported: float, base64", "encoding_format")
        try:
            ids = await self.engine.text_ids(texts, prompt_name=name, truncate=truncate)
            if not 0 < len(ids) <= self.limits.choices:
                raise ApiError(400, f"{len(ids)} texts are too many, or none: 1 to {self.limits.choices}", "input")
            vectors = await _unless_gone(request, self.engine.embed(ids))
        except HalError as error:
            raise as_api_error(error, "input") from error
        reader.refuse("dimensions", "vectors are not cut", vectors.shape[1])
        data = [{"object": "embedding", "index": i, "embedding": vector.tolist() if form == "float" else
                 base64.b64encode(vector.astype("<f4").tobytes()).decode()} for i, vector in enumerate(vectors)]
        tokens = sum(map(len, ids))
        self.metrics.prompt_tokens += tokens
        return JSONResponse({"object": "list", "model": self.name, "data": data,
                             "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    async def models(self, request: Request) -> Response:
        shared = {"object": "model", "created": 0, "owned_by": "hal", "max_model_len": self.engine.llm.max_model_len}
        base = {"id": self.name, **shared, "parent": None}
        return JSONResponse({"object": "list", "data": [
            base, *({"id": name, **shared, "parent": self.name} for name in self.engine.adapters)]})

    async def change_adapters(self, request: Request, load: bool) -> Response:
        if not self.adapter_loading:
            raise ApiError(403, "clients may not load or unload adapters here (hal serve --allow-adapter-loading)")
        body = await self._body(request)
        done = await (adapters.load(self.engine, self.name, body) if load else adapters.unload(self.engine, body))
        _log.info("%s %s", request.state.id, done)
        return PlainTextResponse(done)

    async def health(self, request: Request) -> Response:
        error = self.engine.health()
        state = "draining" if self.engine.draining else "ok" if error is None else "failed"
        return JSONResponse({"status": state, "error": None if error is None else str(error)},
                            200 if state == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        engine = self.engine
        return PlainTextResponse(self.metrics.text(engine.stats(), engine.failures, engine.health() is None))

    async def page(self, request: Request) -> Response:
        return HTMLResponse(files("hal").joinpath("assets/serve.html").read_text(encoding="utf-8"))

    # What they are made of

    async def _body(self, request: Request) -> Any:
        """The JSON of a body. Raises ApiError."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A page of another site may send other types without asking.
            raise ApiError(415, "the body is not declared as JSON: send Content-Type: application/json")
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > self.limits.body:
                raise ApiError(413, f"the body has more than {self.limits.body} bytes")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error}") from error

    def _adapter(self, model: str) -> str | None:
        """The adapter that a request's `model` names; None: the base model. Raises ApiError: there is no such model."""
        if model in ("", self.name):
            return None
        if model not in (names := self.engine.adapters):
            known = ", ".join(map(repr, (self.name, *names)))
            raise ApiError(404, f"this server has no model {model!r}; it has {known}", "model", "model_not_found")
        return model

    def _outputs(self, jobs: list[tuple[Prompt, SamplingParams]], field: str) -> Outputs:
        """The outputs of all choices as they grow, each with its place. A slow client slows no other: while it does not
        read, nothing is taken from the engine, which merges what it has."""
        return self._output(0, *jobs[0], field) if len(jobs) == 1 else self._merged(jobs, field)

    async def _merged(self, jobs: list[tuple[Prompt, SamplingParams]], field: str) -> Outputs:
        queue: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue(1)

        async def pump(place: int) -> None:
            try:
                async with aclosing(self._output(place, *jobs[place], field)) as outputs:
                    async for each in outputs:
                        await queue.put(each)
            except (HalError, ApiError) as error:
                await queue.put((place, error))

        tasks = [asyncio.create_task(pump(place)) for place in range(len(jobs))]
        try:
            left = len(jobs)
            while left:
                place, result = await queue.get()
                if isinstance(result, Exception):
                    raise result
                left -= result.finish_reason is not None
                yield place, result
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _output(self, place: int, prompt: Prompt, params: SamplingParams, field: str) -> Outputs:
        """One choice, measured. Raises ApiError."""
        started = before = monotonic()
        seen, metrics, reason = 0, self.metrics, "abort"
        try:
            async with aclosing(self.engine.generate(prompt, params)) as outputs:
                async for output in outputs:
                    now, count = monotonic(), len(output.token_ids) - seen
                    if not seen:
                        metrics.first_token.observe(now - started)
                        metrics.prompt_tokens += len(output.prompt_token_ids)
                    elif count:
                        metrics.between_tokens.observe((now - before) / count, count)
                    before, seen = now, seen + count
                    metrics.generation_tokens += count
                    if output.error is not None:
                        raise output.error
                    reason = output.finish_reason or reason
                    yield place, output
        except HalError as error:
            reason = "error"
            raise as_api_error(error, field) from error
        finally:
            if seen or reason != "error":  # otherwise it was refused
                metrics.finished[reason] += 1
                metrics.whole.observe(monotonic() - started)

    async def _write(self, call: Call, head: dict[str, Any], answers: list[Answer], first: tuple[int, RequestOutput],
                     outputs: Outputs, request: Request, write: Write) -> None:
        """Write the events of a stream. At many streams most of the server's time is spent here."""
        start = "data: " + json.dumps({**head, "usage": None} if call.usage else head)[:-1] + ', "choices": ['
        async with aclosing(outputs):
            try:
                place, output = first
                while True:
                    choice = answers[place].json(output)
                    if choice is not None:
                        await write(f"{start}{choice}]}}\n\n".encode())
                    place, output = await anext(outputs)
            except StopAsyncIteration:
                found = [answer.output for answer in answers if answer.output is not None]
                request.state.usage = usage(found, len(call.prompts))
                if call.usage:
                    last = {**head, "choices": [], "usage": request.state.usage}
                    await write(f"data: {json.dumps(last)}\n\n".encode())
                await write(b"data: [DONE]\n\n")
            except ApiError as error:
                await write(f"data: {json.dumps(error.body)}\n\n".encode())


class _Events(Response):
    """A stream of server-sent events, which ends when its client goes away.

    The layers of the application see the start and the end of the response. The events go to the HTTP server directly,
    since passing each of them through all layers costs more than making it.

    Args:
        events: writes the events through the function that it is given.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, events: Callable[[Write], Coroutine[Any, Any, None]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._request, self._events = request, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        direct: Send = self._request.state.send

        async def everything() -> None:
            await self._events(lambda data: direct({"type": "http.response.body", "body": data, "more_body": True}))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with suppress(Gone):
            await _unless_gone(self._request, everything())


async def _last_of(outputs: Outputs, count: int) -> list[RequestOutput]:
    found = dict[int, RequestOutput]()
    async with aclosing(outputs):
        async for place, output in outputs:
            found[place] = output
    return [found[place] for place in range(count)]


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of some work. It is cancelled when the client goes away, and then Gone is raised."""
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, (ClientDisconnect, Gone)):
        return Response(status_code=_GONE)
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
    elif isinstance(error, HalError):
        error = as_api_error(error)
    elif not isinstance(error, ApiError):
        error = ApiError(500, f"the server failed: its log has the cause, with the id {request.state.id}")
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status in (429, 503) else None)


class _Front:
    """What every request passes first: it gets an id, /v1 is guarded, and its end is a line of the log."""

    def __init__(self, server: Server, routes: ASGIApp) -> None:
        self.server, self.routes = server, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started, status, headers = monotonic(), _GONE, Headers(scope=scope)
        given, api, server = headers.get("x-request-id", ""), scope["path"].startswith("/v1/"), self.server
        number = given if _ID.fullmatch(given) else uuid.uuid4().hex
        state: dict[str, Any] = {"id": number, "usage": None, "send": send}
        scope["state"], counted = state, api

        async def noted(message: Message) -> None:
            nonlocal status, counted
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            elif counted and not message.get("more_body"):
                server.active, counted = server.active - 1, False  # before the client can send its next request
            await send(message)

        server.active += api
        try:
            problem = self._problem(headers) if api else None
            if problem is None:
                await self.routes(scope, receive, noted)
            else:
                await (await _refused(Request(scope), problem))(scope, receive, noted)
        finally:
            server.active -= counted
            if status >= 400:
                server.metrics.refused[status] += 1
            tokens = "" if state["usage"] is None else (
                f" {state['usage']['prompt_tokens']} + {state['usage']['completion_tokens']} tokens")
            _log.log(logging.INFO if api else logging.DEBUG, "%s %s %s %d %.3f s%s", number, scope["method"],
                     scope["path"], status, monotonic() - started, tokens)

    def _problem(self, headers: Headers) -> ApiError | None:
        """Why a request to /v1 is refused."""
        server, key = self.server, self.server.api_key
        if key is not None and not hmac.compare_digest(headers.get("authorization", "").encode(),
                                                       f"Bearer {key}".encode()):
            return ApiError(401, "the API key is wrong or missing: Authorization: Bearer KEY", code="invalid_api_key")
        if server.engine.draining:
            return ApiError(503, "the server is about to end, and takes no new request")
        if server.active > server.limits.requests:
            return ApiError(429, f"more than {server.limits.requests} requests at a time", code="rate_limit_exceeded")
        return None
