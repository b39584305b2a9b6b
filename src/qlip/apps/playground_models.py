"""What the playground's page asks of the models: pictures in, words out; no page here.

Its limits are here too: whatever a browser sends is read as text, strokes or pictures, or refused.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from qlip.apps import token_explorer as explorer
from qlip.apps.caption import check_seed, open_to_write
from qlip.apps.generate import dtype_of
from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.data.items import Item
from qlip.data.scenes import SceneConfig, render, sample_scenes
from qlip.data.sources import open_source
from qlip.engine.parallel import pick_device
from qlip.evals.benchmark_files import picture_seed
from qlip.models.assistant import Assistant, ChatPrompt, open_assistant
from qlip.models.autoencoders import MeasuredAutoencoder
from qlip.models.caption_encoder import cleaned_prompt
from qlip.models.generator import Generator, open_generator
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer, VQTokenizer
from qlip.models.measured import MeasuredQLIP
from qlip.models.opening import open_measured
from qlip.models.sampling import OnTokens
from qlip.models.unified_model import Unified, WritingSettings

NUM_EXAMPLES = 12
VQ_SIDE = 256  # pixels, for tokenizers that take many
MOST_PIXELS = 64_000_000  # of an upload: cameras have up to 61 million
MOST_LABELS, LONGEST_LABEL = 100, 100
LONGEST_TEXT = 2000  # characters of a prompt or a question
MOST_POINTS = 5000  # of a stroke


@dataclass(kw_only=True, slots=True, frozen=True)
class Chosen:
    """The picture that a visitor looks at; each has their own."""

    source: bytes | Path
    """Encoded, as it came: models other than the tokenizer prepare it themselves."""
    pixels: Tensor
    """(3, S, S) uint8, what the tokenizer sees."""
    bits: Tensor
    """(n, L) bool."""
    reconstruction: Tensor
    """(3, S, S) uint8."""


@dataclass(kw_only=True, slots=True)
class Playground:
    """All models, and the pictures to pick from; nothing in it belongs to one visitor."""

    tokenizer: ImageTokenizer
    limits: ImageLimits
    examples: tuple[bytes | Path, ...]
    drawers: dict[str, Generator | Unified] = field(default_factory=dict)
    """By the name that the page shows."""
    unified: Unified | None = None
    assistant: Assistant | None = None

    @property
    def reads_text(self) -> bool:
        """Whether the tokenizer has a text tower, to classify with."""
        return isinstance(self.tokenizer, QLIPTokenizer)

    def choose(self, source: bytes | Path) -> Chosen:
        """An encoded picture through the tokenizer. Raises `ImageRejected` for anything that is none."""
        pixels = explorer.prepare(self._open(source), self.tokenizer)
        bits = explorer.encode(self.tokenizer, pixels)
        return Chosen(source=source, pixels=pixels, bits=bits, reconstruction=self.decode(bits))

    def decode(self, bits: Tensor) -> Tensor:
        """(n, L) bool -> (3, S, S) uint8."""
        return explorer.decode(self.tokenizer, bits)

    def classify(self, chosen: Chosen, labels: str) -> dict[str, float]:
        """Probabilities of the labels, one a line or between commas. Raises `UserError` as `labels_of`."""
        return explorer.classify(self.tokenizer, chosen.pixels, labels_of(labels))

    def draw(self, name: str, prompt: str, *, seed: int, guidance: float, on_tokens: OnTokens | None = None) -> Tensor:
        """(3, S, S) uint8: the first picture of `qlip generate` with this seed.

        Raises `UserError` for an empty or too long prompt and impossible numbers.
        """
        check_seed(seed)
        drawer = self._drawer(name, guidance)
        own_seed = picture_seed(seed, prompt_index=0, sample_index=0)
        bits = drawer.bits([cleaned_prompt(limited(prompt))], seeds=[own_seed], on_tokens=on_tokens)
        tokenizer = drawer.tokenizer if isinstance(drawer, Generator) else drawer.processor.image_tokenizer
        return tokenizer.decode(bits)[0].cpu()

    def guidance(self, name: str) -> float:
        """What a drawer was trained for."""
        return float(self.drawers[name].model.config.guidance)

    def caption(self, chosen: Chosen) -> str:
        """As `qlip caption`: the most probable words."""
        assert self.unified is not None
        return self.unified.caption([self._open(chosen.source)], WritingSettings(temperature=0))[0]

    def ask(self, chosen: Chosen, question: str) -> str:
        """As `qlip ask` of this picture. Raises `UserError` for an empty or too long question."""
        assert self.assistant is not None
        text = limited(question)
        if not text:
            raise UserError("the question is empty: write one")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        prompt = ChatPrompt(messages=[{"role": "user", "content": content}], images=[self._open(chosen.source)])
        return self.assistant.answer([prompt])[0]

    def _open(self, source: bytes | Path) -> Image.Image:
        if isinstance(source, Path) and not source.is_file():
            raise UserError("this picture is no longer kept: upload it again")
        return open_image(source, limits=self.limits)

    def _drawer(self, name: str, guidance: float) -> Generator | Unified:
        """The same network with another guidance; the last one is kept, compiled steps and all."""
        drawer = self.drawers[name]
        if drawer.settings.guidance == guidance:
            return drawer
        if isinstance(drawer, Unified):
            settings = replace(drawer.settings, guidance=guidance)
            self.drawers[name] = Unified(drawer.model, drawer.processor, settings)
        else:
            sampling = replace(drawer.settings, guidance=guidance)
            sampling.check()
            self.drawers[name] = Generator(
                drawer.model,
                captions=drawer.captions,
                tokenizer=drawer.tokenizer,
                sampling=sampling,
                compile=drawer.compile,
            )
        return self.drawers[name]


def open_playground(
    model: str, *, images: Path | None, generator: str, assistant: str, unified: str, device: str, max_upload_mb: int
) -> Playground:
    """Every model that is given, on its device. Raises `UserError` for one that is not what it should be."""
    place = pick_device(device)
    tokenizer = open_any_size(model)
    tokenizer.to(place)
    limits = ImageLimits(max_bytes=max_upload_mb * 1_000_000, max_pixels=MOST_PIXELS)
    playground = Playground(
        tokenizer=tokenizer,
        limits=limits,
        examples=scene_examples(tokenizer) if images is None else folder_examples(images, limits=limits),
    )
    if generator:
        drawer = open_generator(generator)
        drawer.to(place, dtype=dtype_of("auto", place))
        playground.drawers["text-to-image model"] = drawer
    if unified:
        playground.unified = open_to_write(Path(unified), device=device, precision="auto")
        playground.drawers["UM3"] = playground.unified
    if assistant:
        playground.assistant = open_assistant(assistant)
        playground.assistant.to(place)
    return playground


def open_any_size(model: str) -> ImageTokenizer:
    """A tokenizer on the CPU; one that takes many sides takes `VQ_SIDE`. Raises `UserError` for other models."""
    measured = open_measured(model)
    if isinstance(measured, MeasuredQLIP):
        return QLIPTokenizer(measured)
    if isinstance(measured, MeasuredAutoencoder):
        return VQTokenizer(measured, image_size=VQ_SIDE)
    raise UserError(f"{model} is a {measured.name}, which makes no tokens: give a QLIP, VQ or LlamaGen tokenizer")


def scene_examples(tokenizer: ImageTokenizer, *, num: int = NUM_EXAMPLES) -> tuple[bytes, ...]:
    """Procedural scenes as PNG, of the tokenizer's size, among them pairs that no training shows."""
    side = tokenizer.image_size
    scenes = sample_scenes(num, split="test", shard=0, config=SceneConfig(image_size=side))
    return tuple(_png(picture) for picture in render(scenes, image_size=side))


def folder_examples(images: Path, *, limits: ImageLimits, num: int = NUM_EXAMPLES) -> tuple[bytes | Path, ...]:
    """The first usable pictures of a folder or of other data. Raises `UserError` where there are none."""
    found: list[bytes | Path] = []
    for item in open_source(str(images)).items():
        if isinstance(item, Item) and _is_usable(item.image, limits):
            found.append(item.image)
        if len(found) == num:
            break
    if not found:
        raise UserError(f"no usable picture in {images}: give --images a folder with pictures, or leave it out")
    return tuple(found)


def _is_usable(source: bytes | Path, limits: ImageLimits) -> bool:
    try:
        open_image(source, limits=limits)
    except ImageRejected:
        return False
    return True


def _png(picture: Tensor) -> bytes:
    buffer = io.BytesIO()
    shown(picture, side=1).save(buffer, format="PNG")
    return buffer.getvalue()


def shown(picture: Tensor, *, side: int = 256) -> Image.Image:
    """(3, S, S) uint8 -> RGB, enlarged in whole steps to at least `side` pixels, each a sharp square."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    scale = max(1, -(-side // picture.shape[-1]))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def labels_of(text: str) -> list[str]:
    """Labels, one a line or between commas, each once. Raises `UserError` for none, too many and too long ones."""
    labels = list(dict.fromkeys(label.strip() for label in text.replace("\n", ",").split(",") if label.strip()))
    if not labels:
        raise UserError("no labels given: write some, one a line")
    if len(labels) > MOST_LABELS:
        raise UserError(f"{len(labels)} labels, at most {MOST_LABELS} are compared: leave some out")
    longest = max(labels, key=len)
    if len(longest) > LONGEST_LABEL:
        raise UserError(f"a label has {len(longest)} characters, at most {LONGEST_LABEL} are read: shorten it")
    return labels


def limited(text: str) -> str:
    """A prompt or question without white space around it. Raises `UserError` for a very long one."""
    if len(text) > LONGEST_TEXT:
        raise UserError(f"the text has {len(text)} characters, at most {LONGEST_TEXT} are read: shorten it")
    return text.strip()


def stroked(event: Any, *, grid: tuple[int, int]) -> Tensor:
    """What the browser sent of a stroke -> the patches it touches, (n,) bool. Raises `UserError` for anything else."""
    sent: dict[str, Any] = event if isinstance(event, dict) else {}
    points: Any = sent.get("points")
    diameter: Any = sent.get("diameter")
    is_line = isinstance(points, list) and 0 < len(points) <= MOST_POINTS and all(map(_is_place, points))
    if not is_line or not _is_share(diameter) or not 0 < diameter <= 1:
        raise UserError(f"that is no stroke of 1 to {MOST_POINTS} points: paint again, with a shorter one")
    return explorer.cells_under(explorer.painted([(x, y) for x, y in points], diameter=diameter), grid=grid)


def _is_place(point: object) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(map(_is_share, point))


def _is_share(value: Any) -> bool:
    """A number near [0, 1]: strokes may leave the picture."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) <= 10
