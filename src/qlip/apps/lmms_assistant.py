"""`qlip_llava` of lmms-eval: its requests -> prompts and settings of `models.assistant`, and the answers back in order.

    lmms-eval --model qlip_llava --model_args pretrained=FOLDER --tasks pope

Interface of lmms-eval 0.7.3: `lmms_eval.api.model.lmms`, chat requests `(context, doc_to_messages, gen_kwargs, doc_id,
task, split)`. The document of a request is `task_dict[task][split][doc_id]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL import Image
from tqdm import tqdm

from qlip.core.errors import UserError, nearest_name
from qlip.core.images import ImageRejected
from qlip.engine.parallel import pick_device
from qlip.models.assistant import AnswerSettings, Assistant, ChatPrompt, Message, open_assistant
from qlip.models.qlip.pictures import picture_from

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS = ("pretrained", "batch_size", "device", "dtype", "max_new_tokens")
GENERATION = ("until", "max_new_tokens", "temperature", "do_sample", "top_p", "num_beams")
FILLER = ["\n\n"]
"""What lmms-eval puts for `until` where a task names none; no task of its own means it, and it would end an answer at
its first paragraph. Its own model classes drop it too."""


class LmmsAssistant(lmms):
    """An assistant's folder, as lmms-eval asks it."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_new_tokens: int = AnswerSettings().max_new_tokens,
        **unknown: Any,
    ) -> None:
        """Called by lmms-eval with the pairs of `--model_args` and with `--batch_size` and `--device`.

        pretrained: the folder that a run exported. dtype: what it computes in; auto is bfloat16 on GPUs that have it,
        else that of the folder's weights.
        max_new_tokens: of answers to tasks that name none. Raises `UserError` for whatever else is given.
        """
        super().__init__()
        if unknown:
            name = next(iter(unknown))
            raise UserError(f"model_args has {name}, which qlip_llava does not take: "
                            f"{nearest_name(name, OPTIONS)}")  # fmt: skip
        if max_batch_size is not None:
            raise UserError("max_batch_size has no effect without automatic batch sizes: leave it out")
        if not pretrained:
            raise UserError("no model given: add --model_args pretrained=FOLDER, an export of an assistant")
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is unknown: {nearest_name(str(dtype), DTYPES)}")
        self.batch_size = whole_number(batch_size, name="batch_size")
        self.max_new_tokens = whole_number(max_new_tokens, name="max_new_tokens")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = shared_device(device, self.accelerator)
        self.assistant: Assistant | None = open_assistant(str(pretrained))
        self.assistant.to(self.device, dtype=DTYPES[dtype])
        self._said: set[str] = set()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each request; in batches of equal generation settings, whatever order that takes.

        Raises `UserError` for videos, sound and pictures that cannot be read, with task and document.
        """
        assert self.assistant is not None, "lmms-eval has called clean()"
        groups: dict[AnswerSettings, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[2]), []).append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="answering") as progress:
            for settings, indices in groups.items():
                for batch in batches(indices, self.batch_size):
                    prompts = [self._prompt(requests[index]) for index in batch]  # pictures of one batch at a time
                    for index, answer in zip(batch, self.assistant.answer_what_fits(prompts, settings), strict=True):
                        if answer is None:
                            logger.warning(f"{self._place(requests[index])} is longer than the context: no answer")
                        answers[index] = answer or ""
                    progress.update(len(batch))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: raises `UserError`."""
        raise UserError("qlip_llava writes answers and scores none: take tasks whose output_type is generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: raises `UserError`."""
        raise UserError("qlip_llava answers one round only: take tasks whose output_type is generate_until")

    def clean(self) -> None:
        """lmms-eval's word that the answers are complete: give the memory back, a local judge may need it."""
        self.assistant = None
        super().clean()

    def _settings(self, wanted: dict[str, Any]) -> AnswerSettings:
        for name in sorted(set(wanted) - set(GENERATION) - self._said):
            logger.warning(f"generation setting {name}={wanted[name]} of a task has no effect on qlip_llava")
            self._said.add(name)
        return answer_settings(wanted, max_new_tokens=self.max_new_tokens)

    def _prompt(self, request: Instance) -> ChatPrompt:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        return chat_prompt(messages, place=self._place(request))

    def _place(self, request: Instance) -> str:
        return f"document {request.args[3]} of {request.args[4]}"


def answer_settings(wanted: dict[str, Any], *, max_new_tokens: int) -> AnswerSettings:
    """A task's `gen_kwargs` -> settings; greedy unless `do_sample` or, where that is not named, a temperature asks.

    `max_new_tokens` is for tasks that name none. Raises `UserError` for values that make no sense.
    """
    until = wanted.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    drawn, temperature = wanted.get("do_sample"), wanted.get("temperature")
    if drawn is None:
        drawn = bool(temperature)
    temperature = 0.0 if not drawn else 1.0 if temperature is None else float(temperature)
    top_p = 1.0 if wanted.get("top_p") is None or temperature == 0 else float(wanted["top_p"])
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"cannot draw with temperature {temperature:g} and top_p {top_p:g}: "
                        "give a temperature of 0 or more and a top_p in (0, 1]")  # fmt: skip
    return AnswerSettings(
        max_new_tokens=whole_number(wanted.get("max_new_tokens") or max_new_tokens, name="max_new_tokens"),
        temperature=temperature,
        top_p=top_p,
        num_beams=whole_number(wanted.get("num_beams") or 1, name="num_beams"),
        until=() if until == FILLER else tuple(until),
    )


def chat_prompt(messages: ChatMessages, *, place: str) -> ChatPrompt:
    """lmms-eval's messages -> ours, each picture's place where it was. `place` names the document in errors.

    Raises `UserError` for videos, sound and pictures that cannot be read.
    """
    converted: list[Message] = []
    images: list[Image.Image] = []
    for message in messages.messages:
        parts: list[dict[str, str]] = []
        for part in message.content:
            if part.type == "text":
                parts.append({"type": "text", "text": part.text})
            elif part.type == "image":
                parts.append({"type": "image"})
                images.append(readable_picture(part.url, place=place))
            else:
                raise UserError(f"{place} has a part of kind {part.type}: qlip_llava sees pictures; take another task")
        converted.append({"role": message.role, "content": parts})
    return ChatPrompt(messages=converted, images=images)


def readable_picture(source: Any, *, place: str) -> Image.Image:
    """A picture or its file's path -> upright RGB. Raises `UserError` for anything else."""
    try:
        picture = picture_from(source)
    except (ImageRejected, TypeError, ValueError) as error:
        raise UserError(f"{place}: {error}; leave the document out or mend its picture") from None
    if not isinstance(picture, Image.Image):
        raise UserError(f"{place}: a picture of numbers with a fraction: give 8-bit pictures")
    return picture


def shared_device(name: str, accelerator: Accelerator) -> torch.device:
    """The device to compute on; of several processes the one on which lmms-eval's own exchanges take place.

    Raises `UserError` for one that is not usable or, with several processes, another than accelerate's.
    """
    device = pick_device(str(name))
    if accelerator.num_processes > 1 and device.type != accelerator.device.type:
        raise UserError(
            f"device {device.type}, but the processes exchange their results on {accelerator.device.type}: "
            "leave device out, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    return device


def whole_number(value: Any, *, name: str) -> int:
    """`value` as a number of at least 1. Raises `UserError` for anything else, `auto` included."""
    text = str(value)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"{name} {value!r} is not a number of at least 1: give one")
    return int(text)


def batches(indices: list[int], size: int) -> Iterator[list[int]]:
    """Runs of at most `size`."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
