"""The FastAPI routes. Takes a Desk and turns HTTP into calls of it; knows nothing of Ray, so that tests run it in process."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from persona_models.errors import AuthError, DeskrouteError, InputError, NotReadyError, TooLargeError
from persona_models.protocol import BASE, BUILTIN, EngineStatus, TokenEvent
from router.desk import Desk
from router.live import Live
from router.query import Profile
from router.schema import AUTO, ChatRequest, Conversation, FeedbackRequest, RouteRequest, completion, error_body, first_fault, parse_model
from router.stream import server_sent_events
from router.telemetry import CONTENT_TYPE, log

# How long /readyz and /v1/models wait for a pool before they call it not ready.
STATUS_TIMEOUT_S = 5.0
# The counted endpoints' names in the metrics.
ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/route": "route", "/v1/feedback": "feedback"}
OPEN_PATHS = {"/", "/healthz", "/readyz", "/metrics"}

StatusOf = Callable[[], Awaitable[Mapping[str, EngineStatus]]]


def create_app(desk: Desk, pool_status: StatusOf, live: Live | None = None) -> FastAPI:
    """The application. pool_status: async function -> status by pool name, raising or timing out where a pool is down.

    live: keeps the desk on the registry's versions; None where the engines' versions never change.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        task = asyncio.create_task(live.start()) if live else None
        yield
        if task:
            task.cancel()

    app = FastAPI(title="Deskroute", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(BodyLimit, most=desk.config.http.max_body_bytes)
    telemetry = desk.telemetry

    async def statuses() -> Mapping[str, EngineStatus]:
        try:
            return await asyncio.wait_for(pool_status(), STATUS_TIMEOUT_S)
        except TimeoutError:
            raise NotReadyError("a pool does not answer; see the server's log") from None

    def authorise(request: Request) -> None:
        keys = desk.config.api_keys
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if keys and request.url.path not in OPEN_PATHS and not any(hmac.compare_digest(given, k.encode()) for k in keys):
            raise AuthError("missing or wrong API key; send it as `Authorization: Bearer KEY`")

    async def read(request: Request, kind: type[Any]) -> Any:
        authorise(request)
        try:
            return kind.model_validate(json.loads(await request.body()))
        except ValidationError as e:
            raise first_fault(e.errors()) from None
        except (ValueError, RecursionError) as e:
            raise InputError(f"the body is not valid JSON: {e}") from None

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body: ChatRequest = await read(request, ChatRequest)
        plan = await desk.begin(body)
        labels = ("chat", plan.route.decision, plan.route.persona or "")
        headers = {"x-request-id": plan.request_id}
        events = desk.answer(body, plan)
        # The first event is awaited before the status is sent, so that a full queue or too long a prompt is a plain HTTP error.
        request.state.labels = labels
        first = await anext(events)
        telemetry.requests.labels(*labels, "200").inc()
        if body.stream:
            options = body.stream_options
            stream = server_sent_events(_chain(first, events), plan.block, body.model, include_usage=bool(options and options.include_usage))
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers | {"cache-control": "no-cache"})
        text, last, logprobs = first.text, first, list(first.logprobs)
        try:
            async for last in events:
                text += last.text
                logprobs += last.logprobs
                if await request.is_disconnected():
                    break
        finally:
            await events.aclose()
        block = plan.block.model_copy(update={"versions": dict(last.versions)})
        return JSONResponse(completion(block, body.model, text, last, logprobs), headers=headers)

    @app.post("/v1/route")
    async def route(request: Request) -> Response:
        raw = await read(request, _Either)
        if isinstance(raw, RouteRequest):
            blocks = [desk.plan_input(item).model_dump() | ({"id": item.id} if item.id is not None else {}) for item in raw.inputs]
            telemetry.requests.labels("route", "", "", "200").inc()
            return JSONResponse({"object": "list", "data": blocks})
        plan = desk.plan(raw.turns(), Profile.from_metadata(raw.metadata), parse_model(raw.model, desk.personas))
        telemetry.requests.labels("route", plan.route.decision, plan.route.persona or "", "200").inc()
        return JSONResponse({"object": "deskroute.route", "model": raw.model, "deskroute": plan.block.model_dump()})

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> Response:
        body: FeedbackRequest = await read(request, FeedbackRequest)
        stored = await desk.rate(body)
        telemetry.requests.labels("feedback", "", "", "201").inc()
        return JSONResponse({"object": "deskroute.feedback", "request_id": body.request_id, "text_stored": stored}, 201)

    async def known_models() -> list[dict[str, Any]]:
        versions = {p: v for status in (await statuses()).values() for p, v in status.versions.items()}
        if desk.lineup:
            # A persona that nothing ships for answers as "none"; its pool says so.
            versions |= {p: desk.lineup.champion(p).version for p in desk.personas if desk.lineup.champion(p).version != BUILTIN}
        titles = {p.id: p.title for p in desk.config.catalogue()}
        head = {"object": "model", "created": int(time.time()), "owned_by": "deskroute"}
        data = [{**head, "id": AUTO, "title": "Routed by content and profile"}, {**head, "id": BASE, "title": desk.config.base}]
        return data + [{**head, "id": p, "title": titles[p], "version": versions.get(p)} for p in desk.personas]

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        authorise(request)
        return JSONResponse({"object": "list", "data": await known_models()})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        authorise(request)
        parse_model(name, desk.personas)
        return JSONResponse(next(m for m in await known_models() if m["id"] == name))

    @app.post("/v1/reload")
    async def reload(request: Request) -> Response:
        authorise(request)
        if live is None:
            raise InputError("the versions of this server's models are fixed")
        return JSONResponse((await live.reload()).body(desk.personas))

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> Response:
        pools = await statuses()
        ready = all(s.ready for s in pools.values()) and (live is None or live.settled)
        shown = {name: {"ready": s.ready, "versions": dict(s.versions), "device": s.device, "notes": list(s.notes)} for name, s in pools.items()}
        return JSONResponse({"status": "ready" if ready else "not ready", "pools": shown}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(telemetry.page(), media_type=CONTENT_TYPE)

    @app.get("/")
    async def index() -> Response:
        paths = [
            "POST /v1/chat/completions",
            "POST /v1/route",
            "POST /v1/feedback",
            "GET /v1/models",
            "GET /v1/models/{model}",
            "POST /v1/reload",
            "GET /healthz",
            "GET /readyz",
            "GET /metrics",
        ]
        return JSONResponse({"name": "deskroute", "personas": list(desk.personas), "endpoints": paths})

    def count(request: Request, status: int) -> None:
        """Count a request that failed; an unknown path is no label, since anybody could make up many."""
        endpoint = ENDPOINTS.get(request.url.path, "other")
        telemetry.requests.labels(*getattr(request.state, "labels", (endpoint, "", "")), str(status)).inc()

    @app.exception_handler(DeskrouteError)
    async def said(request: Request, error: DeskrouteError) -> Response:
        count(request, error.status)
        headers = {"retry-after": "2"} if error.status == 503 else {}
        return JSONResponse(error_body(error), error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        fault = first_fault(error.errors())
        return JSONResponse(error_body(fault), fault.status)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        count(request, error.status_code)
        what = f"{request.method} {request.url.path}"
        message = {404: f"{what} does not exist here; see GET / for what does", 405: f"{what}: the method is not allowed"}.get(
            error.status_code, str(error.detail)
        )
        body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        count(request, 500)
        log.exception("unexpected error", exc_info=error)
        return JSONResponse(error_body(DeskrouteError("an unexpected error happened; the server's log has it")), 500)

    return app


class _Either:
    """The body of /v1/route: a list of inputs, or one conversation."""

    @staticmethod
    def model_validate(body: Any) -> RouteRequest | Conversation:
        return RouteRequest.model_validate(body) if isinstance(body, dict) and "inputs" in body else Conversation.model_validate(body)


async def _chain(first: TokenEvent, rest: AsyncGenerator[TokenEvent]) -> AsyncGenerator[TokenEvent]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()


class BodyLimit:
    """ASGI middleware: reads the body up to a limit and answers 413 beyond it, before any of it is parsed."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        chunks: list[bytes] = []
        size, more = int(declared) if declared.isdigit() else 0, True
        if size <= self.most:
            size = 0
            while more and size <= self.most:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                more = message.get("more_body", False)
        if size > self.most:
            error = TooLargeError(f"the body is larger than {self.most} bytes (http.max_body_bytes); shorten the conversation")
            return await JSONResponse(error_body(error), error.status)(scope, receive, send)
        whole: list[dict[str, Any]] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        return await self.app(scope, replay, send)
