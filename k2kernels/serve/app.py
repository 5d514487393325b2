"""The endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from k2kernels import engine as engines
from k2kernels.engine import Engine
from k2kernels.serve.answer import UNANSWERED, Answer, Part, Scored
from k2kernels.serve.fields import Order, Refused, chat_order, parse_json, text_order
from k2kernels.serve.score import score
from k2kernels.text.chat import Chat
from k2kernels.text.tokenizer import Tokenizer

MAX_BODY, MAX_BODY_SECONDS = 1 << 20, 30.0  # bytes; until all of them are here
CLOSING = "the server is shutting down"
GRACE = 5  # seconds beyond a request's own for a client to take what was sent
Scores = dict[int, list[Scored] | Refused]  # of prompts, by their number
GAUGES = {"waiting", "running", "pages", "pages_held", "pages_idle"}  # of Engine.stats; the others are counters


class Server:
    """The application of a model, `app`, for an ASGI server. Results cross from the engine's thread to the event loop
    by `call_soon_threadsafe`; a client that goes away, waits or not, ends its request.

    Args:
        engine: started.
        chat: None for a model without turns.
        name: of the model, in requests and answers.
        api_key: that /v1 asks for; None: none.
        max_waiting: samples in the queue; further requests are answered with 429.
        max_seconds: of a request, from its first byte to its last.

    Attributes:
        closing: set to refuse new requests with 503, and those whose body is not here.
        open: requests in flight.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat: Chat | None,
        name: str,
        *,
        api_key: str | None = None,
        max_waiting: int = 256,
        max_seconds: float = 600.0,
    ):
        self.engine, self.tokenizer, self.chat, self.name = engine, tokenizer, chat, name
        self.api_key, self.max_waiting, self.max_seconds = api_key, max_waiting, max_seconds
        self.closing, self.open, self.started = False, 0, int(time.time())
        self.registry = registry = CollectorRegistry()
        registry.register(_Stats(engine))
        self.outcomes = Counter("k2kernels_requests", "by outcome", ["outcome"], registry=registry)
        self.first = Histogram("k2kernels_time_to_first_token_seconds", "of a request", registry=registry)
        self.between = Histogram("k2kernels_inter_token_seconds", "between parts of a request", registry=registry)
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._models, methods=["GET"]),
                Route("/v1/chat/completions", _Endpoint(partial(self._answer, chat_order)), methods=["POST"]),
                Route("/v1/completions", _Endpoint(partial(self._answer, text_order)), methods=["POST"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
            ],
            exception_handlers={Refused: self._refused, HTTPException: self._no_route, Exception: self._failed},
        )

    # ---- short answers ------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        self._authorize(request)
        model = dict(id=self.name, object="model", created=self.started, owned_by="k2kernels")
        if "name" not in request.path_params:
            return _json(dict(object="list", data=[model]))
        self._check_model(request.path_params["name"])
        return _json(model)

    async def _health(self, request: Request) -> Response:
        status = "closing" if self.closing else "ok" if self.engine.error is None else f"down: {self.engine.error!r}"
        return _json(dict(status=status), 200 if status == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def _refused(self, request: Request, error: Refused) -> Response:
        self.outcomes.labels("refused" if error.status < 500 else "failed").inc()
        return _json(error.body, error.status, error.headers)

    def _no_route(self, request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _json(Refused(message).body, error.status_code, error.headers)

    def _failed(self, request: Request, error: Exception) -> Response:  # which starlette raises again, for the log
        return self._refused(request, Refused("internal error; see the log", status=500, kind="server_error"))

    # ---- completions --------------------------------------------------------------------------------------------

    async def _answer(self, order_of: Callable[..., Order], request: Request, send: Any) -> None:
        if self.closing or self.engine.error is not None:
            raise _unavailable(CLOSING if self.closing else "the engine has failed")
        self._authorize(request)
        loop, until = asyncio.get_running_loop(), time.monotonic() + self.max_seconds
        requests: list[engines.Request] = []
        self.open += 1
        try:
            body = parse_json(await self._body(request))
            self._check_model(body.get("model"))
            order = await asyncio.to_thread(order_of, body, self.engine, self.tokenizer, self.chat)
            event = asyncio.Event()
            scores: Scores = {}
            self._submit(order, requests, event, scores)
            answer = Answer(order, requests, self.tokenizer, self.name)
            parts = self._parts(answer, event, scores, until)
            timer = loop.call_later(max(until - time.monotonic(), 0), event.set)
            work = asyncio.ensure_future(_send(answer, parts, request, send))
            gone = asyncio.ensure_future(_disconnected(request))
            try:
                await asyncio.wait({work, gone}, timeout=self.max_seconds + GRACE, return_when="FIRST_COMPLETED")
                if work.done():
                    work.result()
                outcome = "gone" if not work.done() else "failed" if answer.failed else "ok"
                self.outcomes.labels(outcome).inc()
            finally:
                for one in (*requests, timer, work, gone):
                    one.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)
        except (ClientDisconnect, OSError):
            self.outcomes.labels("gone").inc()
        finally:
            self.open -= 1
            for one in requests:
                one.cancel()

    def _submit(self, order: Order, requests: list[engines.Request], event: asyncio.Event, scores: Scores) -> None:
        """Queues the requests of an order; `event` is set when there is news, `scores` get those of prompts."""
        count, loop = order.n * len(order.prompts), asyncio.get_running_loop()
        most = min(self.max_waiting, self.engine.scheduler.max_running)
        if count > most:
            raise Refused(f"n: n times prompts must be at most {most}, got {count}", "n")
        if self.engine.stats()["waiting"] + count > self.max_waiting:
            message = f"{self.max_waiting} samples wait already"
            raise Refused(message, status=429, kind="rate_limit_error", headers={"retry-after": "1"})

        def update(index: int, one: engines.Request) -> None:  # in the engine's thread
            if order.echo and order.logprobs and index not in scores and not one.samples[0].cancelled:
                try:
                    prompt = order.prompts[index]
                    of = score(self.engine, prompt, order.sampling.logprobs or 0)
                    scores[index] = list(zip(prompt, [None, *of]))
                except Exception as error:
                    scores[index] = Refused(f"{type(error).__name__}: {error}", status=500, kind="server_error")
            loop.call_soon_threadsafe(event.set)

        for index, prompt in enumerate(order.prompts):
            options = dict(sampling=order.sampling, n=order.n, salt=order.salt, on_update=partial(update, index))
            begin = prompt[:-1] if order.empty and len(prompt) > 1 else prompt  # the context has room for no token more
            try:
                requests.append(self.engine.submit(begin, **options))
            except (TypeError, ValueError) as error:
                raise Refused(str(error), "messages" if order.chat else "prompt") from None
            except RuntimeError as error:
                raise _unavailable(str(error)) from None

    async def _parts(self, answer: Answer, event: asyncio.Event, scores: Scores, until: float) -> AsyncIterator[Part]:
        """The parts of all choices, as the engine makes them; a prompt that is to be repeated comes first."""
        left, order, before = list(answer.readers), answer.order, time.monotonic()
        histogram, started = self.first, set()
        while left:
            await event.wait()  # not wait_for, which may lose a cancellation before Python 3.12
            event.clear()
            now = time.monotonic()
            if now >= until - 0.01:  # the timer
                raise _too_long()
            histogram.observe(now - before)
            histogram, before = self.between, now
            for reader in list(left):
                prompt = reader.choice // order.n
                if order.echo and reader.choice not in started:
                    if order.logprobs and prompt not in scores and reader.sample.finish_reason not in UNANSWERED:
                        continue  # its tokens are there before its prompt's score
                    started.add(reader.choice)
                    tokens = scores.get(prompt, [])
                    if isinstance(tokens, Refused):
                        raise tokens
                    yield Part(reader.choice, order.echo[prompt], tokens)
                part = reader.read()
                if part is not None:
                    yield part
                    if part.reason is not None:
                        left.remove(reader)

    async def _body(self, request: Request) -> bytes:
        """A body that never comes holds neither its place nor a server that is closing."""
        reading = asyncio.ensure_future(self._read(request))
        until = time.monotonic() + min(self.max_seconds, MAX_BODY_SECONDS)
        try:
            while not (await asyncio.wait({reading}, timeout=0.1))[0]:
                if self.closing:
                    raise _unavailable(CLOSING, connection="close")
                if time.monotonic() > until:
                    raise Refused("the body took too long", status=408, headers={"connection": "close"})
            return reading.result()
        finally:
            reading.cancel()

    async def _read(self, request: Request) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("the header content-type must be application/json", status=415)
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BODY:
                raise Refused(f"the body must be at most {MAX_BODY} bytes", status=413)
        return bytes(data)

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self.api_key is not None and not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
            message = "the header authorization must be Bearer and the API key"
            raise Refused(message, status=401, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _check_model(self, name: Any) -> None:
        if name not in (None, self.name):
            message = f"model: must be {self.name!r}, which is served, got {repr(name)[:60]}"
            raise Refused(message, "model", status=404, code="model_not_found")


class _Endpoint:
    """A route that sends its answer itself, since it also has to see the client go away."""

    def __init__(self, answer: Callable[[Request, Any], Any]):
        self.answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.answer(Request(scope, receive), send)


class _Stats:
    """The engine's numbers, read when they are asked for."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Any:
        for name, value in self.engine.stats().items():
            family = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            yield family(f"k2kernels_{name}", "of Engine.stats", value=value)


async def _send(answer: Answer, parts: AsyncIterator[Part], request: Request, send: Any) -> None:
    async with contextlib.aclosing(parts):
        if not answer.order.stream:
            response = _json(await answer.whole(parts))
            return await response(request.scope, request.receive, send)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send(dict(type="http.response.start", status=200, headers=headers))
        async for chunk in answer.chunks(parts):
            await send(dict(type="http.response.body", body=chunk.encode(), more_body=True))
        await send(dict(type="http.response.body", body=b""))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_long() -> Refused:
    headers = {"x-should-retry": "false"}  # of OpenAI's clients
    return Refused("the request took too long", status=504, kind="timeout", headers=headers)


def _unavailable(message: str, **headers: str) -> Refused:
    return Refused(message, status=503, kind="server_error", headers={"retry-after": "1", **headers})


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(json.dumps(value), status, headers, "application/json")  # in ASCII: some strings have no UTF-8
