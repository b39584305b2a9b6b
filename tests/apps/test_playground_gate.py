"""What does not reach gradio: requests of other pages, large bodies, addresses to fetch."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("gradio", reason="no gradio: pip install 'qlip[app]'")

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from qlip.apps.playground_gate import FORM_BYTES, MOST_CALL_BYTES, UPLOAD, Gate

CALL = "/gradio_api/queue/join"
HOST = "127.0.0.1:7860"


@pytest.fixture(scope="module")
def client() -> TestClient:
    """An app that gives bodies back, behind the gate."""

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    routes = [Route("/{path:path}", echo, methods=["GET", "POST", "OPTIONS"])]
    app = Starlette(routes=routes, middleware=[Middleware(Gate, max_upload_bytes=2_000_000)])
    return TestClient(app, base_url=f"http://{HOST}")


@pytest.mark.parametrize("origin", [None, f"http://{HOST}"], ids=["none", "own"])
def test_the_page_itself_is_served(client: TestClient, origin: str | None) -> None:
    headers = {} if origin is None else {"Origin": origin}
    assert client.get("/", headers=headers).status_code == 200
    body = json.dumps({"data": [{"path": "/folder/picture.png", "url": f"http://{HOST}/file"}, "see http://there"]})
    answer = client.post(CALL, content=body, headers=headers)
    assert (answer.status_code, answer.text) == (200, body)
    assert client.post("/reset", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:9", "http://localhost:7860", f"https://{HOST}", ""],
    ids=["elsewhere", "null", "other port", "other name", "other scheme", "empty"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_pages_get_nothing(client: TestClient, origin: str, method: str) -> None:
    assert client.request(method, CALL, headers={"Origin": origin}).status_code == 403


@pytest.mark.parametrize("path", [UPLOAD, CALL], ids=["upload", "call"])
def test_bodies_are_as_long_as_they_may_be(client: TestClient, path: str) -> None:
    most = 2_000_000 + FORM_BYTES if path == UPLOAD else MOST_CALL_BYTES
    exact = b'"' + b"x" * (most - 2) + b'"'
    assert client.post(path, content=exact).content == exact
    assert client.post(path, content=exact + b" ").status_code == 413
    assert client.post(path, content=iter([b"chunks"])).status_code == 411, "of unknown length"
    for length in ("-1", "1e3", "9" * 40, "\N{SUPERSCRIPT TWO}"):
        assert client.post(path, headers={"Content-Length": length.encode("latin-1")}).status_code == 413


@pytest.mark.parametrize(
    "sent",
    [
        {"data": [{"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}]},
        {"data": [[{"path": "HTTPS://there/x.png"}]]},
        {"event_data": {"value": {"image": {"path": "file:///etc/passwd"}}}},
    ],
    ids=["value", "list", "event"],
)
@pytest.mark.parametrize("path", [CALL, "/gradio_api/call/upload", "/gradio_api/run/x"])
def test_addresses_are_not_fetched(client: TestClient, path: str, sent: Any) -> None:
    answer = client.post(path, json=sent)
    assert (answer.status_code, answer.text) == (400, "Files of other machines are not fetched.")


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b"9" * 5000], ids=["open", "bytes", "deep", "huge"])
def test_what_is_no_json_is_refused(client: TestClient, body: bytes) -> None:
    assert client.post(CALL, content=body).status_code == 400
