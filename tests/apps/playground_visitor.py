"""Somebody who looks at the playground in a browser, and tiny models and pictures to give it."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from qlip.apps.playground_models import Playground, open_playground
from tiny_assistants import save_tiny_assistant
from tiny_unified import tiny_unified_folder

MILLISECONDS = 60_000  # waited for anything on the page
HAS_LINE = """id => {
  const canvas = document.querySelector(`#${id} canvas`);
  const empty = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  return canvas.toDataURL() !== empty.toDataURL();
}"""


@dataclass
class Visitor:
    """A page in a browser context of its own, and what it has asked of whom."""

    page: Any
    outside: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def upload(self, content: bytes, *, button: str = "upload", name: str = "picture.png") -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        self.page.locator(f"#{button}").locator("xpath=..").locator("input[type=file]").set_input_files(files=[file])

    def choose(self, content: bytes) -> None:
        """Upload a picture and wait until it is there."""
        before = self.source("chosen")
        self.upload(content)
        self.changed("chosen", before)

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def source(self, name: str) -> str:
        return self.page.locator(f"#{name} img").first.get_attribute("src", timeout=MILLISECONDS)

    def changed(self, name: str, before: str) -> str:
        """The address of a picture as soon as it is another than `before`."""
        script = (
            "([id, old]) => { const p = document.querySelector(`#${id} img`); return p && p.src && p.src !== old; }"
        )
        self.page.wait_for_function(script, arg=[name, before], timeout=MILLISECONDS)
        return self.source(name)

    def pixels(self, name: str, *, size: int = 16) -> np.ndarray:
        """(S, S, 3) uint8 of a picture on the page, whose enlargement must be exact."""
        source = self.source(name)
        data = source.split(",", 1)[1] if source.startswith("data:") else ""
        content = base64.b64decode(data) if data else self.page.request.get(source).body()
        image = Image.open(io.BytesIO(content))
        assert image.format == "PNG" and image.width >= 256
        large, scale = np.array(image.convert("RGB")), image.width // size
        small = large[::scale, ::scale]
        assert (np.kron(small, np.ones((scale, scale, 1), np.uint8)) == large).all()
        return small

    def paint(self, name: str, places: list[tuple[float, float]]) -> None:
        """One stroke by mouse; places are shares of the picture."""
        board = self.page.locator(f"#{name} .board")
        board.scroll_into_view_if_needed()
        box = board.bounding_box()
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point, steps=4)
        self.page.mouse.up()

    def is_clean(self, name: str) -> None:
        """Wait until no line of a stroke is left."""
        self.page.wait_for_function(f"id => !({HAS_LINE})(id)", arg=name, timeout=MILLISECONDS)

    def has_line(self, name: str) -> bool:
        """Whether the line of a stroke is there."""
        return bool(self.page.evaluate(HAS_LINE, name))

    def written(self, name: str) -> str:
        """What a model has written into a box, as soon as it has."""
        script = "name => document.querySelector(`#${name} textarea`).value"
        self.page.wait_for_function(script, arg=name, timeout=MILLISECONDS)
        return self.page.locator(f"#{name} textarea").input_value()

    def message(self, words: str) -> str:
        toast = self.page.locator("[data-testid=toast-body]").filter(has_text=words).first
        toast.wait_for(timeout=MILLISECONDS)
        return toast.inner_text()


@contextmanager
def visiting(browser: Any, url: str) -> Iterator[Visitor]:
    """Somebody with the page open, who in the end has asked no other machine and seen no error of the page."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    visitor = _arrived(context, url)
    yield visitor
    context.close()
    assert visitor.outside == []
    assert visitor.complaints == []


def _arrived(context: Any, url: str) -> Visitor:
    visitor = Visitor(page=context.new_page())

    def on_request(request: Any) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            visitor.outside.append(request.url)

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            visitor.complaints.append(message.text)

    visitor.page.on("request", on_request)
    visitor.page.on("console", on_console)
    visitor.page.on("pageerror", lambda error: visitor.complaints.append(str(error)))
    visitor.page.goto(url)
    visitor.page.locator("#figures table").wait_for(timeout=MILLISECONDS)  # the first example has been encoded
    return visitor


def png_of(seed: int, *, size: tuple[int, int] = (40, 30)) -> bytes:
    """Blocks of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize(size, Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


def array_of(picture: Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).numpy()


def bomb() -> bytes:
    """The beginning of a black and white PNG of 60,000 x 60,000."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(7501))) + chunk(b"IEND", b"")
    )


class Models(NamedTuple):
    """Folders of a tokenizer of 16 px, of a UM3 that writes its tokens, and of an assistant."""

    tokenizer: Path
    unified: Path
    assistant: Path


def save_models(folder: Path) -> Models:
    unified = tiny_unified_folder(folder / "um3")
    return Models(folder / "um3_images", unified, save_tiny_assistant(folder / "assistant"))


def open_models(models: Models) -> Playground:
    return open_playground(
        str(models.tokenizer),
        images=None,
        generator="",
        assistant=str(models.assistant),
        unified=str(models.unified),
        device="cpu",
        max_upload_mb=1,
    )
