"""`qlip app`: the playground in a browser, served on this machine alone.

The page makes no request to any other machine, and neither does the server; uploads lie in a folder of their own that
goes when the server ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlip.apps.playground_folder import temporary_folder
from qlip.apps.playground_models import Playground, open_playground
from qlip.core.errors import UserError
from qlip.core.log import console

HOST = "127.0.0.1"
HOSTS = [HOST, "localhost"]  # as what the page may be asked for: names of elsewhere that lead here are refused
PORTS_TRIED = 100
MOST_WAITING = 64  # calls in the queue; further ones are told to come back
MOST_VISITORS = 200  # whose state is kept
MOST_UPLOAD_MB = 1000
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when gradio is imported


def launch_playground(
    model: str,
    *,
    images: Path | None = None,
    generator: str = "",
    assistant: str = "",
    unified: str = "",
    device: str = "auto",
    port: int = 7860,
    max_upload_mb: int = 20,
    open_browser: bool = True,
) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C, SIGTERM or SIGHUP; a port that is taken gives way to the next.

    `images` is a folder (or other data) whose first pictures can be picked, procedural scenes if not given;
    `generator`, `assistant` and `unified` bring the tabs that need them. Raises `UserError` for models and pictures
    that are not there, impossible numbers and a missing gradio.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs gradio: pip install 'qlip[app]'")
    if not 1 <= port <= 65535:
        raise UserError(f"--port is {port}: give a number from 1 to 65535")
    if not 1 <= max_upload_mb <= MOST_UPLOAD_MB:
        raise UserError(f"--max-upload-mb is {max_upload_mb}: give a number from 1 to {MOST_UPLOAD_MB}")
    os.environ.update(OFFLINE)
    for name in ("no_proxy", "NO_PROXY"):  # gradio looks whether its own page answers
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
    playground = open_playground(
        model,
        images=images,
        generator=generator,
        assistant=assistant,
        unified=unified,
        device=device,
        max_upload_mb=max_upload_mb,
    )
    with ended_by_signals(), temporary_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        _serve_until_stopped(playground, port=port, max_upload_mb=max_upload_mb, open_browser=open_browser)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP unless it is ignored (nohup), raise KeyboardInterrupt as Ctrl-C does, once."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]

    def interrupt(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # a second one would cut off the cleaning
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve_until_stopped(playground: Playground, *, port: int, max_upload_mb: int, open_browser: bool) -> None:
    from qlip.apps.playground_page import build_page

    page = build_page(playground)
    try:
        found = _serve(page, playground, port=port, max_upload_mb=max_upload_mb, open_browser=open_browser)
        taken = "" if found == port else f" (port {port} is taken)"
        console.print(f"The playground is at http://{HOST}:{found}{taken}, for this machine alone; Ctrl-C ends it.")
        threading.Event().wait()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be gone
            console.print("\nThe playground has ended.")
    finally:
        _close(page)


def _serve(page: Any, playground: Playground, *, port: int, max_upload_mb: int, open_browser: bool) -> int:
    """Start serving in a thread; returns the port."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from qlip.apps.playground_gate import Gate, quieten
    from qlip.apps.playground_page import style, theme

    page.queue(max_size=MOST_WAITING, api_open=False)
    quieten(page)
    free = free_port(port)
    max_bytes = max_upload_mb * 1_000_000
    gates = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS), Middleware(Gate, max_upload_bytes=max_bytes)]
    page.launch(
        server_name=HOST,
        server_port=free,
        share=False,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        max_file_size=max_bytes,
        state_session_capacity=MOST_VISITORS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        app_kwargs={"middleware": gates},
        theme=theme(),
        css=style(playground),
    )
    return free


def _close(page: Any) -> None:
    """Stop serving at once: pages that are still open are not waited for, and what they miss is not listed."""
    if page.server is not None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        page.server.force_exit = True
    page.close(verbose=False)


def free_port(first: int) -> int:
    """The first port from `first` on that nobody listens at. Raises `UserError` when none may be had."""
    last = min(first + PORTS_TRIED, 65536) - 1
    for port in range(first, last + 1):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except PermissionError:
                raise UserError(f"port {port} needs more rights than yours: take one above 1023") from None
            except OSError:
                continue
            return port
    raise UserError(f"ports {first} to {last} are all taken: give another --port")
