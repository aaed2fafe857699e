"""HTTP routes. `make_api` knows neither Ray nor torch: it asks `get_server` for the server when a request
comes, so the same app runs in a Serve replica, under uvicorn and in a test.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response

from axicon.generate.request import Delta, Overloaded, RequestError
from services import openapi
from services.adapters import Named
from services.answer import Answer
from services.auth import Gate
from services.capabilities import capabilities
from services.errors import ApiError, Json, api_error, bad_request, dump
from services.generation import GenerationServer
from services.plan import Plan, check_ids, plan_chat, plan_completion
from services.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
    parse,
)
from services.stream import EventStream, Stream
from services.sweeps import add_sweeps

log = logging.getLogger("axicon")

PAGES = Path(__file__).parent / "pages"
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-cache",
}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

T = TypeVar("T")


def make_api(get_server: Callable[[], GenerationServer]) -> FastAPI:
    """The application over one server."""
    api = FastAPI(title="axicon", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    api.add_middleware(Gate, get_access=lambda: get_server().access)
    for kind in (ApiError, RequestError, Overloaded):
        api.add_exception_handler(kind, _on_api_error)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(ClientDisconnect, _on_disconnect)
    _add_generation(api, get_server)
    _add_tokenizer(api, get_server)
    _add_models(api, get_server)
    _add_operations(api, get_server)
    _add_pages(api)
    add_sweeps(api, lambda: get_server().recipe.sweeps, PAGE_HEADERS)
    return api


def _add_generation(api: FastAPI, get_server: Callable[[], GenerationServer]) -> None:
    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        server = get_server()
        body = parse(CompletionBody, await read_body(request, server))
        await server.adapters.sync()
        return await answer(
            request, server, await plan_completion(body, server.served, server.recipe), body.stream
        )

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        server = get_server()
        body = parse(ChatBody, await read_body(request, server))
        await server.adapters.sync()
        return await answer(request, server, await plan_chat(body, server.served, server.recipe), body.stream)

    @api.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        raise bad_request(
            "Embeddings are not supported by this deployment: it generates text.", code="unsupported"
        )


def _add_tokenizer(api: FastAPI, get_server: Callable[[], GenerationServer]) -> None:
    @api.post("/tokenize")
    async def tokenize_text(request: Request) -> Response:
        server = get_server()
        body, served = parse(TokenizeBody, await read_body(request, server)), server.served
        served.answers_as(body.model)
        special = body.add_special_tokens is not False
        ids = await served.text.encode_beside(body.prompt, special=special)
        return Json({"tokens": ids, "count": len(ids), "max_model_len": served.max_len})

    @api.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        server = get_server()
        body, served = parse(DetokenizeBody, await read_body(request, server)), server.served
        served.answers_as(body.model)
        check_ids(body.tokens, served, "tokens")
        return Json({"prompt": await asyncio.to_thread(served.text.decode, body.tokens)})

    @api.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return Json(get_server().served.text.info())


def _add_models(api: FastAPI, get_server: Callable[[], GenerationServer]) -> None:
    def card(adapter: Named | None = None) -> dict[str, Any]:
        served = get_server().served
        found = {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "axicon",
            "max_model_len": served.max_len,
        }
        if adapter is None:
            return found
        about = {"parent": served.name, "root": adapter.path, "rank": adapter.rank, "sha256": adapter.digest}
        run = adapter.followed
        follows = {"step": adapter.step, "behind": adapter.behind, "trouble": run.trouble} if run else None
        return {
            **found, "id": adapter.name, "created": adapter.created, **about,
            "base_verified": adapter.verified, "follows": follows,
        }  # fmt: skip

    @api.get("/v1/models")
    async def models() -> Response:
        server = get_server()
        await server.adapters.sync()
        adapters = sorted(server.served.adapters.values(), key=lambda one: one.name)
        return Json({"object": "list", "data": [card(), *map(card, adapters)]})

    @api.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        server = get_server()
        body = parse(LoadAdapterBody, await read_body(request, server))
        _ = server.served
        named = await server.adapters.load(body.lora_name, body.lora_path, follow=body.follow is True)
        return Json(card(named))

    @api.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        server = get_server()
        body = parse(UnloadAdapterBody, await read_body(request, server))
        await server.adapters.unload(body.lora_name)
        return Json({"id": body.lora_name, "object": "model", "deleted": True})

    @api.get("/v1/capabilities")
    async def abilities() -> Response:
        server = get_server()
        return Json(capabilities(server.recipe, server.served))

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        server = get_server()
        await server.adapters.sync()
        server.served.answers_as(name)
        return Json(card(server.served.adapters.get(name)))


def _add_operations(api: FastAPI, get_server: Callable[[], GenerationServer]) -> None:
    @api.get("/health")
    async def health() -> Response:
        trouble = get_server().trouble()
        if trouble is not None:
            raise ApiError(503, trouble, code="not_ready")
        served = get_server().served
        return Json({"status": "ok", "format": served.format, "kernels": served.kernels})

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(get_server().metrics.render(), headers={"Content-Type": METRICS_TYPE})

    @api.get("/openapi.json")
    async def description() -> Response:
        server = get_server()
        return Json(openapi.describe(server.recipe, server.served))


def _add_pages(api: FastAPI) -> None:
    def page(path: str, file: str) -> None:
        @api.get(path)
        async def get() -> Response:
            return FileResponse(PAGES / file, headers=PAGE_HEADERS)

    page("/", "index.html")
    for file in ("playground.js", "playground.css", "icon.svg"):
        page(f"/pages/{file}", file)


async def read_body(request: Request, server: GenerationServer) -> bytes:
    """The body of a request, refused as soon as it is known to be too long. Raises ApiError 400 or 413."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps other sites' pages out: a browser asks first before it sends this type across sites.
        raise bad_request(
            "Send the body as JSON, with 'Content-Type: application/json'.", code="unsupported_media_type"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise bad_request("Send the body uncompressed.", code="unsupported_media_type")
    most = server.recipe.limits.body_bytes
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and (len(stated) > 18 or int(stated) > most):
        raise _too_large(most)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is larger than {most} bytes.", code="body_too_large")


async def answer(request: Request, server: GenerationServer, plan: Plan, streams: bool | None) -> Response:
    """Run a plan and answer with one body or with events. A client that leaves ends the work."""
    caller = server.access.namespace(request.headers)
    stream = server.submit([replace(one, namespace=caller) for one in plan.requests])
    handed_over = False
    try:
        result = Answer(plan)
        # Nothing is sent before the first delta, so that a refusal by the engine has a status of its own.
        first = await while_connected(request, stream.read())
        if streams:
            response = EventStream(events(stream, result, result.events(first)), stream)
            handed_over = True
            return response
        await while_connected(request, gather(stream, result, first))
        return Json(result.body())
    finally:
        if not handed_over:
            stream.close()


async def gather(stream: Stream, result: Answer, deltas: Sequence[Delta]) -> None:
    """Read a stream to its end. Raises what ended it early."""
    while deltas:
        for delta in deltas:
            result.add(delta)
        deltas = await stream.read()


async def events(stream: Stream, result: Answer, first: bytes) -> AsyncIterator[bytes]:
    """Server-sent events: what has arrived goes out at once, and a late reader gets what has gathered in one
    piece."""
    if first:
        yield first
    try:
        while result.trouble is None and (deltas := await stream.read()):
            if data := result.events(deltas):
                yield data
        if result.trouble is not None:
            raise result.trouble
        yield result.closing()
    except Exception as error:
        log.warning("a stream ended early: %s", error)
        yield b"data: " + dump(api_error(error).body) + b"\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is dropped with ClientDisconnect when the client goes away first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _on_api_error(request: Request, error: Exception) -> Response:
    return api_error(error).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, in the form of every other error."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    message = {404: f"There is nothing at {path}.", 405: f"{path} does not take {request.method}."}
    return ApiError(
        error.status_code, message.get(error.status_code, error.detail), headers=error.headers
    ).response()


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # Nobody reads it; logs and counters do.
