"""Questions about pictures, asked of an assistant: answers, figures beside their baselines, files for other scorers.

OUT/<protocol>_answers.jsonl   {question_id, prompt, text, answer_id, model_id, metadata} a line (LLaVA's form);
                               one for each question file where there are several: OUT/<protocol>_<file>_answers.jsonl
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.items import Item
from qlip.data.question_files import Question, QuestionFiles, questions_of
from qlip.evals.answers import Answers, Asking, collect_answers
from qlip.evals.card import run_card_fields, sha256_of_names
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import Protocol, QuestionSettings
from qlip.evals.question_scores import (
    refuse_unscorable,
    score_kinds,
    score_match,
    score_nothing,
    score_yes_no,
)
from qlip.models.assistant import AnswerSettings, Assistant, ChatPrompt
from qlip.models.measured import MeasuredGenerator, MeasuredModel

SCORERS = {"kinds": score_kinds, "yes_no": score_yes_no, "match": score_match, "none": score_nothing}
AnyModel = MeasuredModel | MeasuredGenerator | Assistant


def require_assistant(model: AnyModel, protocol: Protocol) -> Assistant:
    """The model as an assistant. Raises `UserError` when it answers no questions."""
    if "answer" not in model.abilities:
        raise UserError(
            f"a {model.name} answers no questions: leave {protocol.name} out of --evals, or give an assistant (the "
            "export of `qlip train scenes_llava_tiny`)"
        )
    return cast(Assistant, model)


def asked_text(question: Question, *, suffix: str) -> str:
    """What the assistant is asked: the question, and on a line of its own `suffix`, unless the question ends so."""
    text = question.text.rstrip()
    return text if not suffix or text.endswith(suffix) else f"{text}\n{suffix}"


def _template_sha256(assistant: Assistant) -> str:
    """Of what turns messages into the text that the language model reads; empty for a stand-in without one."""
    template = assistant.processor.chat_template if isinstance(assistant, Assistant) else ""
    return hashlib.sha256(str(template).encode()).hexdigest() if template else ""


class QuestionEvaluator:
    """Answers of an assistant, scored as the protocol says."""

    def __init__(self, protocol: Protocol, data: EvalInput) -> None:
        assert isinstance(protocol.settings, QuestionSettings)
        self.protocol, self.settings, self.data = protocol, protocol.settings, data
        self.details: dict[str, Any] = {}
        self._card: dict[str, Any] = {}
        self._answers: Answers | None = None
        self._said_too_long = False
        self._num_answers = 0  # of the first question: one person's or ten

    @torch.inference_mode()
    def run(self, model: AnyModel, device: torch.device) -> dict[str, float]:
        """The scorer's figures; `<figure>_baseline` is what the card's `baseline` says. Ranks share the questions.

        Raises `UserError` before any work for a model that answers nothing, and as `collect_answers`.
        """
        started = time.monotonic()
        assistant = require_assistant(model, self.protocol)
        source = self.data.source
        if isinstance(source, QuestionFiles):  # all in memory: refuse the last line before the first answer
            for item in source.items():
                for question in questions_of(item) if isinstance(item, Item) else ():
                    self._check(question)
        asking = Asking(
            source=source,
            ask=partial(self._ask, assistant),
            check=self._check,
            max_samples=self.data.max_samples,
            batch_size=self.data.batch_size,
            max_skip_share=self.data.max_skip_share,
            limits=self.data.limits,
        )
        folder = self.data.work_folder(
            "parts",
            model=cast(MeasuredModel, assistant),  # whose identity alone is used
            device=device,
            source=source,
            max_samples=self.data.max_samples,
            chat_template=_template_sha256(assistant),
            **self.protocol.card(),
        )
        self._answers = collect_answers(asking, title=self.protocol.name, folder=folder)
        scores = SCORERS[self.settings.scorer](self._answers.answered)
        self.details = scores.details
        self._card = self._card_of(assistant, self._answers, device) | scores.card
        self._card |= run_card_fields(seconds=time.monotonic() - started)
        return scores.figures

    def card(self) -> dict[str, Any]:
        """The protocol of the last run."""
        return self._card

    def write_answers(self, folder: Path) -> None:
        """The answers of the last run for the benchmarks' own scorers; a file appears whole or not at all.

        `model_id` is the model's fingerprint; `answer_id` a digest of model, question and answer.
        """
        assert self._answers is not None, "run first"
        model_id = self._card["model_fingerprint"][:12]
        lines: dict[str, list[str]] = defaultdict(list)
        for entry in self._answers.answered:
            question = entry.question
            digest = hashlib.sha256(f"{model_id}\0{question.file}\0{question.question_id}\0{entry.text}".encode())
            row = {
                "question_id": question.question_id,
                "prompt": question.text,
                "text": entry.text,
                "answer_id": digest.hexdigest()[:22],
                "model_id": model_id,
                "metadata": {"category": question.kind} if question.kind else {},
            }
            lines[question.file].append(json.dumps(row, ensure_ascii=False) + "\n")
        for file, rows in lines.items():
            between = f"_{file}" if len(lines) > 1 else ""
            path = folder / f"{self.protocol.name}{between}_answers.jsonl"
            temporary = path.with_suffix(".tmp")
            try:
                temporary.write_text("".join(rows), encoding="utf-8", errors="replace")
                temporary.replace(path)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from None

    def _check(self, question: Question) -> None:
        refuse_unscorable(question, scorer=self.settings.scorer, source=self.data.source.name)
        self._num_answers = self._num_answers or len(question.answers)
        if self.settings.scorer == "match" and len(question.answers) != self._num_answers:
            raise UserError(
                f"{self.data.source.name}: question {question.question_id} has another number of answers "
                f"({len(question.answers)}) than the first ({self._num_answers}): give all of them one, or ten"
            )

    def _ask(self, assistant: Assistant, questions: list[Question], pictures: list[Image.Image]) -> list[str]:
        prompts = []
        for question, picture in zip(questions, pictures, strict=True):
            text = asked_text(question, suffix=self.settings.suffix)
            content = [{"type": "image"}, {"type": "text", "text": text}]
            prompts.append(ChatPrompt(messages=[{"role": "user", "content": content}], images=[picture]))
        answers = assistant.answer_what_fits(prompts, AnswerSettings(max_new_tokens=self.settings.max_new_tokens))
        if None in answers and not self._said_too_long:
            self._said_too_long = True
            console.print(f"{self.protocol.name}: a question is longer than the context; such are left without answer")
        return [answer or "" for answer in answers]

    def _card_of(self, assistant: Assistant, answers: Answers, device: torch.device) -> dict[str, Any]:
        asked = [(key, entry.question) for key, entry in zip(answers.keys, answers.answered, strict=True)]
        items = len(set(answers.keys)) + answers.skipped.total()
        cut = bool(self.data.max_samples) and items >= self.data.max_samples
        return {
            **self.protocol.card(),
            "preparation": {"size": 0, "by": "the assistant's processor"},
            "complete": not cut,
            "max_samples": self.data.max_samples,
            "data": self.data.source.name,
            "count": len(asked),
            "skipped": answers.skipped.total(),
            "skipped_reasons": dict(answers.skipped),
            "empty_answers": sum(not entry.text.strip() for entry in answers.answered),
            "keys_sha256": sha256_of_names(answers.keys),
            "questions_sha256": sha256_of_names(f"{key}\0{question.text}" for key, question in asked),
            "truths_sha256": sha256_of_names(f"{key}\0{q.question_id}\0{'|'.join(q.answers)}" for key, q in asked),
            "decoding": "greedy",
            "chat_template_sha256": _template_sha256(assistant),
            "image_size": assistant.image_size,
            "model_name": assistant.name,
            **assistant.identity(),
            "device": device.type,
            "ranks": distributed.world_size(),
            "batch_size": self.data.batch_size,
            "resumed_parts": answers.num_resumed,
        }
