"""The process that renders chat templates, and its client."""

import atexit
import contextlib
import datetime
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from lorax.data.chat.tokenizer_files import NAMED_TOKENS
from lorax.data.reading.rows import DataError, RowError

type Span = tuple[int, int]

_WORKER = Path(__file__).with_name("render_worker.py")
_KEPT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ")
"""Variables that the process inherits. A template sees none; the process gets no access tokens."""

_ENDED = "it takes more time or memory than any conversation needs"

_AT_A_TIME = 256

_OWN = {
    *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("conversations", "compiled_template", "return_assistant_tokens_mask", "tokenize", "self"),
    *("raise_exception", "strftime_now"),
    *("range", "dict", "lipsum", "cycler", "joiner", "namespace"),
    *NAMED_TOKENS,
}
"""Variables of a template that its row cannot replace."""

MOST_LIMITS = 3
"""After so many conversations beyond the limits, rendering stops."""


class RenderError(RowError):
    """A conversation on which the chat template fails."""


class TemplateError(DataError):
    """A chat template that is no Jinja."""


class LimitError(RowError):
    """A conversation whose rendering takes too much time, memory or text."""


class Part(NamedTuple):
    """The first `length` messages, and whether the prompt for the assistant follows them."""

    length: int
    is_prompt: bool = False


class Request(NamedTuple):
    """Messages, the parts of them to render (the whole first), tools, and template variables."""

    messages: Sequence[Mapping[str, Any]]
    parts: Sequence[Part]
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] | None = None


class Rendered(NamedTuple):
    """The rendering of a request.

    Attributes:
        text: The rendering of the first part.
        blocks: The characters of its ``{% generation %}`` blocks.
        prefixes: Length of each part as a prefix of the text; None if it is no prefix.
        shared: Number of first characters that each part shares with the text.
        others: The rendering of each part that is no prefix of the text.
    """

    text: str
    blocks: list[Span]
    prefixes: dict[Part, int | None]
    shared: dict[Part, int]
    others: dict[Part, str]


class Renderer:
    """Renders conversations as transformers does, in a process with limits.

    The process starts when it is first needed and ends with this one.
    """

    def __init__(self):
        self._process: subprocess.Popen[str] | None = None
        self._is_ready = False
        self._lock = threading.Lock()
        self._owner = 0

    def render(
        self,
        template: str,
        requests: Sequence[Request],
        *,
        special_tokens: Mapping[str, Any],
        date: str | None = None,
        mark_generation: bool = False,
    ) -> Iterator[Rendered | RowError]:
        """Yields the rendering of each request, in order, or the error of a template that fails.

        Args:
            template: The Jinja source.
            requests: The requests.
            special_tokens: Their texts by name, such as ``eos_token``.
            date: The day for the template, as ``2026-11-30``; None is today.
            mark_generation: Whether to find the generation blocks; else there are none.

        Raises:
            TemplateError: If the template cannot be parsed; names its line.
            RuntimeError: If the process cannot be started.
        """
        options = {
            "chat_template": template,
            "return_assistant_tokens_mask": mark_generation,
            **special_tokens,
        }
        day = date or datetime.date.today().isoformat()
        taken = _OWN | options.keys()
        for group in itertools.batched(requests, _AT_A_TIME):
            clashes = [sorted(taken & (item.template_kwargs or {}).keys()) for item in group]
            asked = [item for item, names in zip(group, clashes, strict=True) if not names]
            answers = iter(self._ask(asked, {"options": options, "date": day}))
            for request, names in zip(group, clashes, strict=True):
                if names:
                    yield _taken(names)
                    continue
                answer = next(answers)
                if "line" in answer:
                    raise TemplateError(f"line {answer['line']}: {answer['error']}")
                if "error" in answer:
                    yield _error(request, answer)
                    continue
                found = list(zip(request.parts, answer["parts"], strict=True))
                yield Rendered(
                    answer["text"],
                    [(start, end) for start, end in answer["blocks"]],
                    {p: length if text is None else None for p, (length, _, text) in found},
                    {part: shared for part, (_, shared, _) in found},
                    {part: text for part, (_, _, text) in found if text is not None},
                )

    def _ask(self, group: Sequence[Request], options: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns the answers to some requests."""
        first = json.dumps(options)  # the template among it, once for all
        lines = [json.dumps(request._asdict(), default=str) for request in group]
        answers: list[dict[str, Any]] = []
        with self._lock:
            while len(answers) < len(lines):
                rest = slice(len(answers), None)
                answers += self._converse([first, *lines[rest]], group[rest])
                limits = [answer for answer in answers if answer.get("limit")]
                if len(limits) >= MOST_LIMITS:
                    answers += limits[-1:] * (len(lines) - len(answers))
        return answers

    def _converse(self, lines: Sequence[str], group: Sequence[Request]) -> list[dict[str, Any]]:
        """Returns the answers to the first requests: all, or up to one beyond the limits."""
        answers: list[dict[str, Any]] = []
        process = self._running()
        whole = False
        assert process.stdin is not None and process.stdout is not None
        writer = threading.Thread(target=_write, args=(process.stdin, lines), daemon=True)
        writer.start()
        try:
            for request in group:
                line = process.stdout.readline()
                ended = {"length": len(request.messages), "error": _ENDED, "limit": True}
                answers.append(json.loads(line) if line.endswith("\n") else ended)
                if answers[-1].get("limit"):
                    break
            else:
                whole = True
        finally:  # unread answers must not be mixed up with those of other requests
            if not whole:
                self.close()
            writer.join()
        return answers

    def start(self) -> None:
        """Starts the process without waiting for it, which takes a second."""
        with self._lock:
            self._started()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None or self._owner != os.getpid():  # a fork must not share it
            self._is_ready = False
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env={k: v for k, v in os.environ.items() if k in _KEPT}
                | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
            )
            self._owner = os.getpid()
        return self._process

    def _running(self) -> subprocess.Popen[str]:
        process = self._started()
        if not self._is_ready:
            try:
                assert process.stdout is not None
                said = process.stdout.readline()
            except BaseException:  # Ctrl-C: its later output must not count as an answer
                self.close()
                raise
            if said != "ready\n":
                self.close()
                raise RuntimeError(f"{_WORKER}, which renders chat templates, cannot be started")
            self._is_ready = True
        return process

    def close_unused(self) -> None:
        """Ends the process if it was started and nothing has been rendered."""
        with self._lock:
            if not self._is_ready:
                self.close()

    def close(self) -> None:
        """Ends the process; the next rendering starts another."""
        process = self._process
        self._process = None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # unread requests are not needed
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]


def _taken(names: Sequence[str]) -> RowError:
    return RowError(
        f"chat_template_kwargs of the row names {', '.join(map(repr, names))}, with which every "
        "row is rendered by lorax itself: remove that, or leave the column out with data.ignore: "
        "[chat_template_kwargs]"
    )


def _error(request: Request, answer: Mapping[str, Any]) -> RowError:
    roles = [str(message.get("role")) for message in request.messages]
    shown = ", ".join(roles[: min(answer["length"], 6)])
    more = ", …" if answer["length"] > 6 else ""
    kind = LimitError if answer.get("limit") else RenderError
    return kind(f"the chat template fails on the messages ({shown}{more}): {answer['error']}")


def _write(pipe: IO[str], lines: Sequence[str]) -> None:
    with contextlib.suppress(OSError, ValueError):  # it ended, which the reader notices
        for line in lines:
            pipe.write(line + "\n")
        pipe.flush()


RENDERER = Renderer()
"""One process for all: it takes a second to start."""

atexit.register(RENDERER.close)
