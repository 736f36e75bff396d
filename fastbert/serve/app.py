"""The server as an ASGI app: its models, what guards them, and the routes of serve.routes."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from fastbert.serve.batcher import BackendError, ClosedError, OverloadedError
from fastbert.serve.metrics import CONTENT_TYPE, Metrics
from fastbert.serve.models import InputError, Served, TooLongError, load
from fastbert.serve.openapi import document, page
from fastbert.serve.routes import APIS, Api
from fastbert.serve.settings import ServeSettings

OPEN = ("/health", "/infinity/health", "/ready", "/metrics")  # paths that need no token
log = logging.getLogger("fastbert.serve")


class NotServedError(Exception):
    """A model or a task that the server does not have."""


class State:
    """The state that the requests of a server share."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.models: list[Served] = []
        self.in_flight = 0
        self.ready = False
        self.failed: Exception | None = None  # what loading ended with
        self.stop: Callable[[], None] = lambda: None  # ends the server

    def pick(self, name: str | None, *kinds: str, exact: bool = False) -> Any:
        """The model of that name, of one of these kinds; unless `exact` of another where there is but one of them.

        Raises:
            NotServedError: there is none.
        """
        fitting: dict[str, Served] = {}
        for model in self.models:
            if model.kind in kinds:
                fitting.setdefault(model.name, model)
        if name in fitting:
            return fitting[name]
        if not fitting:
            raise NotServedError(f"no model here is for {' or '.join(kinds)}")
        if name is None or (len(fitting) == 1 and not exact):
            return next(iter(fitting.values()))
        raise NotServedError(f"model is {name!r}; those for {' or '.join(kinds)} are {', '.join(fitting)}")

    def count_waiting(self) -> None:
        waiting = dict.fromkeys((model.name for model in self.models), 0)
        for batcher, name in {model.batcher: model.name for model in reversed(self.models)}.items():
            waiting[name] += batcher.waiting  # of heads over one encoder, the first's
        for name, tokens in waiting.items():
            self.metrics.queue.labels(name).set(tokens)

    def check_count(self, count: int) -> None:
        if count > self.settings.max_texts:
            raise InputError(f"the request has {count} texts; it must have at most {self.settings.max_texts}")


def make_app(settings: ServeSettings, *, ready_first: bool = False) -> Starlette:
    """The app of a server.

    Args:
        ready_first: whether the models are loaded, and run once, before it has started, and not after: see /ready.
            Starting then fails where loading does.
    """
    from fastbert import __version__

    state = State(settings)

    async def prepare() -> None:
        try:
            state.models = await asyncio.to_thread(load, settings, state.metrics.told)
            for model in state.models:
                await asyncio.to_thread(model.warm_up)
            state.ready = True
        except Exception as error:
            state.failed = error
            state.stop()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        preparing = asyncio.create_task(prepare())  # meanwhile requests are told that they are too early
        if ready_first:
            await preparing
            if state.failed is not None:
                raise state.failed
        yield
        state.ready = False
        await preparing
        for model in state.models:
            await asyncio.to_thread(model.batcher.close)

    async def metrics(request: Request) -> Response:
        """The server's counters, for Prometheus."""
        state.count_waiting()
        return Response(state.metrics.text(), media_type=CONTENT_TYPE)

    apis = [*APIS, Api("/metrics", None, metrics, "server")]
    described = document(apis, __version__)

    async def openapi(request: Request) -> Response:
        return Response(orjson.dumps(described), media_type="application/json")

    async def docs(request: Request) -> Response:
        return Response(page(described), media_type="text/html")

    apis += [Api("/openapi.json", None, openapi, "server"), Api("/docs", None, docs, "server")]
    # What is not in the table, a start or an unknown path, say, is Starlette's to answer.
    app = Starlette(lifespan=lifespan, middleware=[Middleware(Guard, state=state, apis=apis)])
    app.state.serve = state
    return app


async def _answer(api: Api, request: Request, body: bytes) -> Response:
    """The answer of a route, with its body checked, and its errors as answers."""
    try:
        if api.schema is None:
            return await api.handler(request)
        return await api.handler(request, api.schema.model_validate(orjson.loads(body)))
    except _KNOWN as error:
        return _failed(api.path, error)


# Errors, the status of each, and its kind as text-embeddings-inference calls it.
_FAILURES: dict[type[Exception], tuple[int, str]] = {
    TooLongError: (413, "Validation"),
    InputError: (422, "Validation"),
    ValidationError: (422, "Validation"),
    orjson.JSONDecodeError: (422, "Validation"),
    NotServedError: (404, "NotFound"),
    OverloadedError: (429, "Overloaded"),
    ClosedError: (503, "Unhealthy"),
    BackendError: (424, "Backend"),
}
_KNOWN = tuple(_FAILURES)


def _failed(path: str, error: Exception) -> Response:
    status, kind = next(found for known, found in _FAILURES.items() if isinstance(error, known))
    message, headers = str(error), {}
    if isinstance(error, ValidationError):
        message = _of_validation(error)
    elif isinstance(error, orjson.JSONDecodeError):
        message = f"the body is no JSON: {error.msg}"
    elif isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    elif isinstance(error, BackendError):
        log.error("a batch failed: %s", error)
        message = "the model failed"
    return failure(path, status, kind, message, **headers)


def failure(path: str, status: int, kind: str, message: str, **headers: str) -> Response:
    """An error as OpenAI has it, on its paths, or as text-embeddings-inference and the others do."""
    error: dict[str, Any] = {"error": message, "error_type": kind, "message": message}
    if path.startswith("/v1/"):
        error = {"error": {"message": message, "type": kind, "code": status, "param": None}}
    return Response(orjson.dumps(error), status, headers, media_type="application/json")


def _of_validation(error: ValidationError) -> str:
    """One line on the first thing that is wrong, without the values of the request."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


class Guard:
    """Middleware: the routes and, around them, the token, the limits of requests, metrics and the access log."""

    def __init__(self, app: Any, state: State, apis: Sequence[Api]) -> None:
        self.app, self.state = app, state
        self.table = {(api.method, api.path): api for api in apis}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        api = self.table.get((method, scope["path"]))
        if api is not None and api.path in OPEN:
            await self._run(api, scope, receive, send, b"")
            return
        state, begun, sent = self.state, time.perf_counter(), {"status": 0, "bytes": 0}

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
            elif message["type"] == "http.response.body":
                sent["bytes"] += len(message.get("body", b""))
            await send(message)

        if (refusal := self._refused(scope)) is not None:
            await refusal(scope, receive, counted)
        else:
            state.in_flight += 1
            state.metrics.in_flight.inc()
            try:
                async with asyncio.timeout(state.settings.max_body_seconds):
                    body = await self._body(scope, receive)
                if body is not None and api is not None:
                    await self._unless_gone(self._run(api, scope, receive, counted, body), receive)
                elif body is not None:
                    await self._no_such(scope)(scope, receive, counted)
            except _TooLargeError:
                await self._too_large(scope)(scope, receive, counted)
            except TimeoutError:
                most = state.settings.max_body_seconds
                slow = failure(scope["path"], 408, "Validation", f"the body took more than {most:g} s")
                await slow(scope, receive, counted)
            except Exception as error:  # its message may hold texts, which no log does
                log.error("a request failed: %s at %s", type(error).__name__, _where(error))
                if not sent["status"]:
                    await failure(scope["path"], 500, "Backend", "the server failed")(scope, receive, counted)
            finally:
                state.in_flight -= 1
                state.metrics.in_flight.dec()
                state.count_waiting()
        seconds = time.perf_counter() - begun
        route = "other" if api is None else api.path  # of other paths there is no end
        state.metrics.requests.labels(route, str(sent["status"])).inc()
        state.metrics.latency.labels(route).observe(seconds)
        if log.isEnabledFor(logging.INFO):
            line = {"route": route, "method": scope["method"], **sent, "seconds": round(seconds, 6)}
            log.info("%s", json.dumps(line))

    async def _unless_gone(self, answer: Coroutine[Any, Any, None], receive: Any) -> None:
        """Runs a request to its end, unless its client goes meanwhile: then what waits of it need not run."""
        running, gone = asyncio.ensure_future(answer), asyncio.ensure_future(receive())
        try:
            await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            if not running.cancelled() and (error := running.exception()) is not None:
                raise error
        finally:
            gone.cancel()

    def _no_such(self, scope: Any) -> Response:
        path, allowed = scope["path"], [method for method, path in self.table if path == scope["path"]]
        if allowed:
            return failure(path, 405, "Validation", f"the method must be {allowed[0]}", Allow=", ".join(allowed))
        return failure(path, 404, "NotFound", "there is no such path; /docs lists them")

    async def _run(self, api: Api, scope: Any, receive: Any, send: Any, body: bytes) -> None:
        response = await _answer(api, Request(scope, receive), body)
        await response(scope, receive, send)

    def _refused(self, scope: Any) -> Response | None:
        settings, headers = self.state.settings, dict(scope["headers"])
        if settings.api_key is not None:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), settings.api_key.encode()):
                return failure(
                    scope["path"],
                    401,
                    "Unauthorized",
                    "the token is missing or wrong",
                    **{"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > settings.max_body_bytes:
            return self._too_large(scope)
        if not self.state.ready:
            return failure(scope["path"], 503, "Unhealthy", "the models are being loaded", **{"Retry-After": "1"})
        if self.state.in_flight >= settings.max_concurrent_requests:
            return failure(scope["path"], 429, "Overloaded", "too many requests at a time", **{"Retry-After": "1"})
        return None

    def _too_large(self, scope: Any) -> Response:
        most = self.state.settings.max_body_bytes
        return failure(scope["path"], 413, "Validation", f"the body is larger than {most} bytes")

    async def _body(self, scope: Any, receive: Any) -> bytes | None:
        """The body of a request; None where the client has gone.

        Raises:
            _TooLargeError: it is larger than it may be; no more than that is read.
        """
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.state.settings.max_body_bytes:
                raise _TooLargeError
        return b"".join(parts)


class _TooLargeError(Exception):
    """A body over the limit."""


def _where(error: BaseException) -> str:
    """The file and line that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "nowhere" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
