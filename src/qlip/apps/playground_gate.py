"""What stands before gradio: requests of other pages, large bodies and addresses to fetch never reach it.

gradio would fetch a file whose path is an address, keeps what it is sent in memory, and prints a traceback for values
that its components do not know.
"""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = "/gradio_api/upload"
FORM_BYTES = 1_000_000  # of an upload besides its file
MOST_CALL_BYTES = 1_000_000  # of any other request: the longest stroke has a fifth of it
READ_FIRST = ("preprocess_data", "call_function")  # gradio's steps that read what the page sends
NOT_READ = "The page has sent something that cannot be read: reload it and try again."


class Gate:
    """An ASGI app before another one. A refusal is one line: 403 other pages, 411 and 413 bodies, 400 contents."""

    def __init__(self, app: ASGIApp, max_upload_bytes: int) -> None:
        self.app, self.max_upload_bytes = app, max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the page opens none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_upload = scope["path"] == UPLOAD
        most = self.max_upload_bytes + FORM_BYTES if is_upload else MOST_CALL_BYTES
        refusal = _refused(scope, most=most)
        if refusal is None and scope["method"] == "POST" and not is_upload:
            body = await _whole_body(receive)
            refusal = _refused_contents(body)
            receive = _again(body, receive)
        await (refusal or self.app)(scope, receive, send)


def _refused(scope: Scope, *, most: int) -> PlainTextResponse | None:
    """By its headers alone."""
    headers = Headers(scope=scope)
    origins = headers.getlist("origin")
    if any(origin != f"http://{headers.get('host')}" for origin in origins):
        return PlainTextResponse("Only the playground's own page may ask.", status_code=403)
    if "transfer-encoding" in headers:
        return PlainTextResponse("Say how long the body is.", status_code=411)
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > most:
        return PlainTextResponse(f"The maximum allowed size is {most:,} bytes.", status_code=413)
    return None


async def _whole_body(receive: Receive) -> bytes:
    """As long as its Content-Length, which the server holds to."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """What was read is given once more, then what comes after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Message:
        return first.pop() if first else await receive()

    return given


def _refused_contents(body: bytes) -> PlainTextResponse | None:
    try:
        waiting: list[Any] = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        return PlainTextResponse("That is no JSON.", status_code=400)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str) and "://" in value["path"]:
                return PlainTextResponse("Files of other machines are not fetched.", status_code=400)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return None


def quieten(page: gr.Blocks) -> None:
    """What gradio itself cannot read is a line on the page, not a traceback in the terminal."""
    for name in READ_FIRST:
        setattr(page, name, _said_by_gradio(getattr(page, name)))


def _said_by_gradio(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(function)
    async def run(*arguments: Any, **options: Any) -> Any:
        try:
            return await function(*arguments, **options)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:  # our own handlers' line
                raise
        raise gr.Error(html.escape(NOT_READ), title="", print_exception=False)

    return run
