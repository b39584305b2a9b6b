"""COCO's caption scores: BLEU, METEOR 1.5, ROUGE-L, CIDEr-D, all times 100, after the PTB tokenizer.

Scorers and Java archives are pycocoevalcap's, which is COCO's own evaluation; the two Java programs are run from here,
so that they end with us and need no place to write. Captions of another tokenizer or another METEOR are not comparable.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from qlip.core.errors import UserError
from qlip.core.log import progress

PACKAGE = "pycocoevalcap"
PTB_JAR, METEOR_JAR = "tokenizer/stanford-corenlp-3.4.1.jar", "meteor/meteor-1.5.jar"
FIGURES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")
TIMES = 100
UTF8 = "-Dfile.encoding=UTF-8"  # what Java reads and writes does not depend on the user's language
REMEDY = "install a Java runtime, for example `apt install default-jre-headless`"
BETWEEN = " ||| "  # METEOR's fields
LONGEST_START = 60  # seconds for `java -version`


def require_scorers() -> str:
    """What scores, for cards. Raises `UserError` without pycocoevalcap or a Java that runs."""
    folder = _folder()
    for jar in (PTB_JAR, METEOR_JAR):
        if not (folder / jar).is_file():
            raise UserError(f"{folder / jar} is missing: reinstall it, pip install --force-reinstall {PACKAGE}")
    if shutil.which("java") is None:
        raise UserError(f"captions are scored by Java programs (PTB tokenizer, METEOR), and there is no java: {REMEDY}")
    _run(["java", "-version"], "", timeout=LONGEST_START)
    return f"{PACKAGE} {version(PACKAGE)}: PTB tokenizer 3.4.1, METEOR 1.5, CIDEr-D"


def tokenized(texts: Sequence[str]) -> list[str]:
    """Texts as COCO's evaluation tokenizes them: PTB's rules, lower case, no punctuation. Each stays in its place."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines = [" ".join(text.split()) for text in texts]  # all that Unicode takes for the end of a line, too
    program = ["java", UTF8, "-cp", str(_folder() / PTB_JAR), "edu.stanford.nlp.process.PTBTokenizer"]
    written = _run([*program, "-preserveLines", "-lowerCase"], "".join(f"{line}\n" for line in lines)).split("\n")
    if len(written) != len(lines) + 1:  # behind the last end of a line is nothing
        raise UserError(f"the PTB tokenizer made {len(written) - 1} lines of {len(lines)}: {REMEDY} of another version")
    dropped = set(PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in written[:-1]]


def tokenized_references(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """The same for several texts of each picture."""
    flat = iter(tokenized([text for texts in references for text in texts]))
    return [[next(flat) for _ in texts] for texts in references]


def caption_scores(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]], *, title: str
) -> list[dict[str, float]]:
    """`FIGURES` of each set of captions, one caption for each picture; all texts are `tokenized`.

    CIDEr's document frequencies are those of the references. METEOR's tables take ten seconds to load, so all sets are
    scored by one process. Raises `UserError` when Java fails.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    right = dict(enumerate(map(list, references)))
    meteors = meteor_scores(candidates, references, title=title)
    scores = []
    for captions, meteor in zip(candidates, meteors, strict=True):
        given = {place: [caption] for place, caption in enumerate(captions)}
        bleu, _ = Bleu(4).compute_score(right, given, verbose=0)
        rouge, _ = Rouge().compute_score(right, given)
        cider, _ = Cider().compute_score(right, given)
        scores.append(
            {name: TIMES * float(value) for name, value in zip(FIGURES, (*bleu, meteor, rouge, cider), strict=True)}
        )
    return scores


def meteor_scores(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[str]], *, title: str
) -> list[float]:
    """METEOR 1.5 in [0, 1] of each set of captions over all pictures, by its default parameters for English."""
    found = []
    with ExitStack() as stack:
        ask = stack.enter_context(_meteor())
        ask(BETWEEN.join(["SCORE", "a", "a"]))  # answered when the tables are read: the bar does not count that
        bar = stack.enter_context(progress(f"{title} METEOR", len(candidates) * len(references), unit="captions"))
        for number, captions in enumerate(candidates):
            statistics = []
            for place, (caption, right) in enumerate(zip(captions, references, strict=True)):
                statistics.append(ask(BETWEEN.join(["SCORE", *right, caption])))
                bar.update(number * len(references) + place + 1)
            # A score for each caption, then that of all of them together.
            found.append(ask(BETWEEN.join(["EVAL", *statistics]), answers=len(statistics) + 1))
    return [_number(text) for text in found]


@contextmanager
def _meteor() -> Iterator[Ask]:
    """A running METEOR as a function: a line in, the last of so many lines out. It is killed at the end."""
    program = ["java", UTF8, "-Xmx2G", "-jar", str(_folder() / METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
    process = _start(program)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Ask(process.stdin, process.stdout)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):  # what METEOR has not read is of no interest
                pipe.close()


class Ask:
    """Lines in, lines out."""

    def __init__(self, questions: IO[str], answers: IO[str]) -> None:
        self.questions, self.answers = questions, answers

    def __call__(self, line: str, *, answers: int = 1) -> str:
        """The last of as many lines of answer. Raises `UserError` when the program has ended."""
        try:
            self.questions.write(line + "\n")
            self.questions.flush()
        except BrokenPipeError:
            raise _meteor_ended() from None
        for _ in range(answers):
            said = self.answers.readline()
            if not said:
                raise _meteor_ended()
        return said.strip()


def _meteor_ended() -> UserError:
    return UserError("METEOR ended before its time: give Java 2 GB of memory, or see what `java -version` says")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"METEOR said {text[:80]!r} for a score: {REMEDY} of another version") from None


def _folder() -> Path:
    """Where pycocoevalcap lies. Raises `UserError` when it is not installed."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"captions are scored by {PACKAGE}, which is not installed: pip install 'qlip[captions]'")
    return Path(next(iter(found.submodule_search_locations)))


def _start(program: list[str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise UserError(f"java cannot be started ({error.strerror}): {REMEDY}") from None


def _run(program: list[str], given: str, *, timeout: float | None = None) -> str:
    """What a program writes when it is given that text; it has ended when this returns or raises."""
    try:
        done = subprocess.run(
            program,
            input=given.encode(errors="replace"),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except OSError as error:
        raise UserError(f"java cannot be started ({error.strerror}): {REMEDY}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"java did not start within {timeout:.0f} s: {REMEDY}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"java failed ({said[0][:120] if said else f'code {done.returncode}'}): {REMEDY}")
    return done.stdout.decode(errors="replace")
