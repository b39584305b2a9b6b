"""What the playground's page asks of the models: pictures in, words out; no page here."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from qlip.apps import token_explorer as explorer
from qlip.apps.caption import open_to_write
from qlip.apps.generate import dtype_of
from qlip.apps.playground_sent import labels_of, limited, seed_of
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
from qlip.models.generator import Generator, is_generator, open_generator
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer, VQTokenizer
from qlip.models.measured import MeasuredQLIP
from qlip.models.opening import OPENABLE, open_measured
from qlip.models.sampling import OnTokens
from qlip.models.unified_model import Unified, WritingSettings

NUM_EXAMPLES = 12
VQ_SIDE = 256  # pixels, for tokenizers that take many
MOST_PIXELS = 64_000_000  # of an upload: cameras have up to 61 million
TOKENIZERS = "give a QLIP folder or hub id, a VQModel folder of diffusers, or a VQGAN file of LlamaGen"


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
        own_seed = picture_seed(seed_of(seed), prompt_index=0, sample_index=0)
        text = limited(prompt)
        if not any(character.isprintable() for character in text):
            raise UserError("the prompt is empty: say what the picture should show")
        drawer = self._drawer(name, guidance)
        bits = drawer.bits([cleaned_prompt(text)], seeds=[own_seed], on_tokens=on_tokens)
        tokenizer = drawer.tokenizer if isinstance(drawer, Generator) else drawer.processor.image_tokenizer
        return tokenizer.decode(bits)[0].cpu()

    def guidance(self, name: str) -> float:
        """What a drawer was trained for."""
        return float(self.drawer(name).model.config.guidance)

    def drawer(self, name: str) -> Generator | Unified:
        """By the name that the page shows. Raises `UserError` for any other."""
        if not isinstance(name, str) or name not in self.drawers:
            raise UserError("no model is chosen: choose which one draws")
        return self.drawers[name]

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
        drawer = self.drawer(name)
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
        if not is_generator(generator):
            raise UserError(
                f"{generator} holds no text-to-image model: give the export of `qlip train scenes_t2i_tiny`, and a UM3 "
                "with --unified"
            )
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
    try:
        measured = open_measured(model)
    except UserError as error:  # names models too that write no tokens
        raise UserError(str(error).replace(OPENABLE, TOKENIZERS)) from None
    if isinstance(measured, MeasuredQLIP):
        return QLIPTokenizer(measured)
    if isinstance(measured, MeasuredAutoencoder):
        return VQTokenizer(measured, image_size=VQ_SIDE)
    raise UserError(f"{model} is a {measured.name}, which makes no tokens: {TOKENIZERS}")


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
