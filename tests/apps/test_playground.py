"""The playground in a real browser: every tab gives what a direct call of the model gives; nothing hostile gets in."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playground_visitor import MILLISECONDS, Models, Visitor, array_of, bomb, open_models, png_of, save_models, visiting

from qlip.apps import token_explorer as explorer
from qlip.apps.playground_models import Playground

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PROXY = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # where nobody listens
START = "from qlip.cli import main; main()"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Folders of tiny models."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server keeps uploads while it runs."""
    return tmp_path_factory.mktemp("temporary").resolve()


@pytest.fixture(scope="module")
def starting(models: Models, temporary: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server that comes up while the tests load their own models, and the port that it will find taken."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("no gradio: pip install 'qlip[app]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = ["--unified", str(models.unified), "--assistant", str(models.assistant), "--device", "cpu"]
        options += ["--port", str(port), "--max-upload-mb", "1", "--no-open-browser"]
        process = subprocess.Popen(
            [sys.executable, "-c", START, "app", str(models.tokenizer), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(temporary)} | PROXY,
        )
        yield process, port
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def direct(models: Models, starting: object) -> Playground:
    """The same models in this process."""
    return open_models(models)


@pytest.fixture(scope="module")
def server(starting: tuple[subprocess.Popen[str], int], temporary: Path, direct: Playground) -> Iterator[str]:
    """On the first free port after the taken one; SIGTERM has to end it with one line and nothing left behind."""
    process, port = starting
    assert process.stdout is not None
    lines: list[str] = []
    while not (lines and "playground is at" in lines[-1]):
        lines.append(process.stdout.readline())
        assert lines[-1], f"the server ended: {''.join(lines)}"
    found = re.search(r"http://127\.0\.0\.1:(\d+)", lines[-1])
    assert found and int(found[1]) > port and f"port {port} is taken" in lines[-1]
    yield found[0]
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert (process.returncode, rest.split()) == (0, ["The", "playground", "has", "ended."])
    assert list(temporary.iterdir()) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The distribution's own Chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=BROWSER_OPTIONS)
        yield running
        running.close()


@pytest.fixture
def visitor(browser: Any, server: str) -> Iterator[Visitor]:
    """One person."""
    with visiting(browser, server) as found:
        yield found


@pytest.fixture
def visitors(browser: Any, server: str, visitor: Visitor) -> Iterator[list[Visitor]]:
    """Two people in browsers of their own."""
    with visiting(browser, server) as second:
        yield [visitor, second]


@pytest.mark.slow
def test_an_uploaded_picture_is_reconstructed_as_by_the_tokenizer(visitor: Visitor, direct: Playground) -> None:
    content, before = png_of(1), visitor.source("reconstruction")
    visitor.upload(content)
    visitor.changed("reconstruction", before)
    expected = direct.choose(content)
    assert (visitor.pixels("original") == array_of(expected.pixels)).all()
    assert (visitor.pixels("reconstruction") == array_of(expected.reconstruction)).all()
    difference = explorer.difference_picture(expected.pixels, expected.reconstruction)
    assert (visitor.pixels("difference") == array_of(difference)).all()
    figures = explorer.figures(expected.pixels, expected.reconstruction, expected.bits)
    shown = visitor.page.locator("#figures").inner_text()
    assert (
        f"{figures.psnr:.1f} dB" in shown and "112 (4 tokens \N{MULTIPLICATION SIGN} 28)" in shown and "0.438" in shown
    )


@pytest.mark.slow
def test_painting_flips_exactly_the_chosen_bits_of_the_touched_patches(visitor: Visitor, direct: Playground) -> None:
    content = png_of(2)
    visitor.choose(content)
    chosen = direct.choose(content)
    visitor.open_tab("Bits")
    before = visitor.source("flip-brush")
    assert (visitor.pixels("flip-brush") == array_of(chosen.reconstruction)).all()
    sheet = visitor.page.locator("#planes img")
    corner = explorer.contact_sheet(explorer.bit_planes(chosen.bits, grid=(2, 2))).corners[17]
    scale = sheet.bounding_box()["width"] / sheet.evaluate("image => image.naturalWidth")
    sheet.click(position={"x": (corner[0] + 20) * scale, "y": (corner[1] + 20) * scale})
    visitor.page.wait_for_function("document.querySelector('#which-bits input').value === 'bit 17'")
    visitor.paint("flip-brush", [(0.25, 0.75), (0.75, 0.75)])  # the lower two of four patches
    once = visitor.changed("flip-brush", before)
    flipped = explorer.flip(chosen.bits, torch.tensor([False, False, True, True]), which=[17])
    assert (visitor.pixels("flip-brush") == array_of(direct.decode(flipped))).all()
    assert "2 bits of 112 flipped, in 2 patches" in visitor.page.locator("#flipped").inner_text()
    visitor.page.locator("#which-bits input").click()
    visitor.page.get_by_role("option", name="all 28 bits").click()
    visitor.paint("flip-brush", [(0.75, 0.25)])
    twice = visitor.changed("flip-brush", once)
    both = explorer.flip(flipped, torch.tensor([False, True, False, False]), which=range(28))
    assert (visitor.pixels("flip-brush") == array_of(direct.decode(both))).all()
    visitor.page.locator("#flip-undo").click()
    assert visitor.changed("flip-brush", twice) == once
    visitor.page.locator("#flip-reset").click()
    assert visitor.changed("flip-brush", once) == before


@pytest.mark.slow
def test_the_line_of_a_stroke_goes_with_every_answer(visitor: Visitor) -> None:
    visitor.open_tab("Swap")
    before = visitor.source("swap-brush")
    visitor.paint("swap-brush", [(0.25, 0.25), (0.3, 0.3)])
    swapped = visitor.changed("swap-brush", before)
    visitor.paint("swap-brush", [(0.25, 0.25), (0.3, 0.3)])  # changes no bit
    assert visitor.has_line("swap-brush")
    visitor.is_clean("swap-brush")
    assert visitor.source("swap-brush") == swapped
    visitor.open_tab("Bits")
    for _ in range(4):  # faster than answers come; in the end nothing is flipped
        visitor.paint("flip-brush", [(0.25, 0.25)])
    visitor.is_clean("flip-brush")
    visitor.page.locator("#flip-brush input").fill("4")  # wider than this tiny picture: refused
    visitor.paint("flip-brush", [(0.5, 0.5), (0.6, 0.6)])
    visitor.message("that is no stroke")
    visitor.is_clean("flip-brush")


@pytest.mark.slow
def test_painting_swaps_exactly_the_touched_patches(visitor: Visitor, direct: Playground) -> None:
    first, second = direct.choose(png_of(3)), direct.choose(png_of(4))
    visitor.choose(png_of(3))
    visitor.open_tab("Swap")
    other, before = visitor.source("other"), visitor.source("swap-brush")
    visitor.upload(png_of(4), button="upload-other")
    visitor.changed("other", other)
    assert (visitor.pixels("other") == array_of(second.reconstruction)).all()
    visitor.paint("swap-brush", [(0.25, 0.25)])
    visitor.changed("swap-brush", before)
    swapped = torch.cat([second.bits[:1], first.bits[1:]])
    assert (visitor.pixels("swap-brush") == array_of(direct.decode(swapped))).all()


@pytest.mark.slow
def test_words_are_those_of_direct_calls(visitor: Visitor, direct: Playground) -> None:
    chosen = direct.choose(png_of(5))
    visitor.choose(png_of(5))
    visitor.open_tab("Classify")
    visitor.page.locator("#labels textarea").fill("blue star, <b>red</b> circle\nring")
    visitor.page.locator("#classify").click()
    visitor.page.locator("#probabilities").get_by_text("ring", exact=True).first.wait_for(timeout=MILLISECONDS)
    shown = visitor.page.locator("#probabilities").inner_text()
    for label, probability in direct.classify(chosen, "blue star,<b>red</b> circle,ring").items():
        assert re.search(rf"{re.escape(label)}\s+{round(100 * probability)}%", shown), shown
    visitor.open_tab("Caption")
    visitor.page.locator("#caption").click()
    assert visitor.written("caption-text") == (direct.caption(chosen) or "(the model wrote no caption)")
    visitor.open_tab("Ask")
    visitor.page.locator("#question textarea").fill("What color is the star?")
    visitor.page.locator("#ask").click()
    assert visitor.written("answer") == (direct.ask(chosen, "What color is the star?") or "(the model wrote no answer)")
    visitor.choose(png_of(6))
    answers = "#caption-text textarea, #answer textarea"
    assert visitor.page.eval_on_selector_all(answers, "boxes => boxes.map(box => box.value)") == ["", ""]
    assert "ring" not in visitor.page.locator("#probabilities").text_content()
    visitor.open_tab("Draw")
    visitor.page.locator("#draw-seed input").fill("3")
    visitor.page.locator("#draw").click()
    visitor.changed("drawn", "")
    drawn = direct.draw("UM3", "a red star", seed=3, guidance=direct.guidance("UM3"))
    assert (visitor.pixels("drawn") == array_of(drawn)).all()


@pytest.mark.slow
def test_hostile_uploads_are_messages_and_the_page_works_on(visitor: Visitor, direct: Playground) -> None:
    before = visitor.source("reconstruction")
    visitor.upload(b"<!doctype html><script>alert(1)</script>")
    assert "cannot be used: not an image: a web page" in visitor.message("web page")
    visitor.upload(bomb())
    assert "too many pixels: decompression bomb" in visitor.message("too many pixels")
    visitor.upload(np.random.default_rng(0).bytes(1_200_000))
    assert "size" in visitor.message("maximum").lower()
    assert visitor.source("reconstruction") == before
    visitor.choose(png_of(6))
    assert (visitor.pixels("reconstruction") == array_of(direct.choose(png_of(6)).reconstruction)).all()
    visitor.open_tab("Classify")
    visitor.page.locator("#labels textarea").fill(" ,\n")
    visitor.page.locator("#classify").click()
    assert "no labels given: write some, one a line" in visitor.message("no labels")
    visitor.complaints = [line for line in visitor.complaints if "413" not in line]  # the browser's own line about it


@pytest.mark.slow
def test_two_people_at_once_see_their_own_pictures(visitors: list[Visitor], direct: Playground) -> None:
    contents = [png_of(7), png_of(8)]
    chosen = [direct.choose(content) for content in contents]
    before = [visitor.source("reconstruction") for visitor in visitors]
    for visitor, content in zip(visitors, contents, strict=True):
        visitor.upload(content)
    for visitor, old, expected in zip(visitors, before, chosen, strict=True):
        visitor.changed("reconstruction", old)
        assert (visitor.pixels("reconstruction") == array_of(expected.reconstruction)).all()
    for visitor in visitors:
        visitor.open_tab("Bits")
    before = [visitor.source("flip-brush") for visitor in visitors]
    visitors[0].paint("flip-brush", [(0.25, 0.25)])
    visitors[1].paint("flip-brush", [(0.75, 0.75)])
    for visitor, old, expected, cell in zip(visitors, before, chosen, (0, 3), strict=True):
        visitor.changed("flip-brush", old)
        flipped = explorer.flip(expected.bits, torch.arange(4) == cell, which=range(28))
        assert (visitor.pixels("flip-brush") == array_of(direct.decode(flipped))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=pyproject.toml",
    ],
    ids=["absolute", "dots", "working folder"],
)
def test_no_file_of_the_machine_is_served(server: str, path: str) -> None:
    assert _refusal(urllib.request.Request(server + path)) == 403


@pytest.mark.slow
def test_other_names_of_the_machine_and_other_pages_are_refused(server: str) -> None:
    """A page of elsewhere whose name was made to mean 127.0.0.1 (DNS rebinding) gets nothing."""
    port = server.rsplit(":", 1)[1]
    assert _refusal(urllib.request.Request(server, headers={"Host": f"evil.example:{port}"})) == 400
    with urllib.request.urlopen(
        urllib.request.Request(server, headers={"Host": f"localhost:{port}"}), timeout=60
    ) as answer:
        assert answer.status == 200


@pytest.mark.slow
def test_the_page_lists_no_calls_and_uploads_stay_in_their_folder(server: str, temporary: Path) -> None:
    with urllib.request.urlopen(f"{server}/gradio_api/info", timeout=60) as answer:
        assert json.load(answer) == {"named_endpoints": {}, "unnamed_endpoints": {}}
    disposition = 'Content-Disposition: form-data; name="files"; filename="../../../evil.png"'
    body = f"--x\r\n{disposition}\r\nContent-Type: image/png\r\n\r\nhello\r\n--x--\r\n".encode()
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{server}/gradio_api/upload", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        (path,) = json.load(answer)
    assert Path(path).resolve().is_relative_to(temporary) and Path(path).read_text() == "hello"


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", [None, -1, [], {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], ids=str
)
def test_values_of_any_kind_are_lines_on_the_page(server: str, value: Any) -> None:
    """The terminal stays clean, as the server's end shows."""
    with urllib.request.urlopen(f"{server}/config", timeout=60) as answer:
        calls = [call for call in json.load(answer)["dependencies"] if call["backend_fn"]]
    session = f"session of {value}".replace(" ", "").replace("/", "")[:20]
    for call in calls:
        data = {"data": [value] * len(call["inputs"]), "fn_index": call["id"], "session_hash": session}
        body = json.dumps(data | {"event_data": value, "trigger_id": None}).encode()
        request = urllib.request.Request(f"{server}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).close()
    lines: list[str] = []
    with urllib.request.urlopen(f"{server}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        while len(lines) < len(calls):
            message = json.loads(stream.readline().removeprefix(b"data:").strip() or "{}")
            if message.get("msg") == "process_completed":
                lines.append(message["output"].get("error") or "")
    assert len(lines) > 8 and not any("Traceback" in line or "our mistake" in line or "--" in line for line in lines)
    assert any("reload it" in line or "there is no picture yet" in line for line in lines), lines


@pytest.mark.slow
def test_other_pages_and_addresses_to_fetch_get_nowhere(server: str) -> None:
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.listen()
        elsewhere.settimeout(0.2)
        file = {"path": f"http://localhost:{elsewhere.getsockname()[1]}/x.png", "meta": {"_type": "gradio.FileData"}}
        body = json.dumps({"data": [file], "fn_index": 0, "session_hash": "elsewhere"}).encode()
        for headers, status in (({}, 400), ({"Origin": "http://localhost:1"}, 403)):
            headers |= {"Content-Type": "application/json"}
            assert _refusal(urllib.request.Request(f"{server}/gradio_api/queue/join", body, headers)) == status
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def _refusal(request: urllib.request.Request) -> int:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    refused.value.close()
    return refused.value.code
