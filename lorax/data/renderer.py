"""The process that renders chat templates, and how it is asked."""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax.data.rows import DataError

type Span = tuple[int, int]

_LONGEST_LINE = 2**20

_WORKER = Path(__file__).with_name("render_worker.py")
_KEPT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ")
"""Of the environment. A template sees none of it; that there are no tokens in it costs nothing."""


class Part(NamedTuple):
    """The first `length` messages, and whether the assistant's turn begins behind them."""

    length: int
    is_prompt: bool = False


class Request(NamedTuple):
    """Messages, the parts of them to render, and JSON schemas of tools."""

    messages: Sequence[Mapping[str, Any]]
    parts: Sequence[Part]
    tools: Sequence[Any] | None = None


type Rendered = dict[Part, tuple[str, list[Span]]]
"""The text of each part, and the characters of its ``{% generation %}`` blocks."""


class Renderer:
    """Renders conversations as transformers does, in a process that may not take too much.

    The process is started when it is first needed and ends with this one.
    """

    def __init__(self):
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._owner = 0

    def render(
        self,
        template: str,
        requests: Sequence[Request],
        *,
        special_tokens: Mapping[str, Any],
        mark_generation: bool = False,
    ) -> Iterator[Rendered]:
        """Yields what each request asks for, in order; asks the process for many at a time.

        Args:
            template: In Jinja.
            requests: What to render.
            special_tokens: By name, such as ``eos_token``.
            mark_generation: Whether to tell the generation blocks; else there are none.

        Raises:
            DataError: In its turn, if the template fails or takes too much time, memory or text.
        """
        options = {
            "chat_template": template,
            "return_assistant_tokens_mask": mark_generation,
            **special_tokens,
        }
        for group in _group(requests):
            for (request, _), answer in zip(group, self._answer(options, group), strict=False):
                if "error" in answer:
                    messages = request.messages[: answer.get("length")]
                    roles = ", ".join(str(message.get("role")) for message in messages)
                    raise DataError(
                        f"the chat template fails on the messages ({roles}): {answer['error']}"
                    )
                yield {
                    part: (text, [(start, end) for start, end in blocks])
                    for part, (text, blocks) in zip(request.parts, answer["rendered"], strict=True)
                }

    def _answer(
        self, options: Mapping[str, Any], group: Sequence[tuple[Request, str]]
    ) -> Iterator[dict[str, Any]]:
        """Yields the answers up to the first error."""
        found = self._ask(options, group)
        if found is not None:
            yield from found
        elif len(group) == 1:
            yield {"error": "it takes more time or memory than any conversation needs"}
        else:  # which one ended the process shows when they are asked for one by one
            for one in group:
                yield from self._answer(options, [one])

    def _ask(
        self, options: Mapping[str, Any], group: Sequence[tuple[Request, str]]
    ) -> list[dict[str, Any]] | None:
        """Returns the answers up to the first error, or None if the process ended."""
        texts = ", ".join(text for _, text in group)
        line = f'{{"options": {json.dumps(options)}, "requests": [{texts}]}}\n'
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                self.close()
        return json.loads(answer) if answer else None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():  # a fork must not share it
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env={k: v for k, v in os.environ.items() if k in _KEPT}
                | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
            )
        return self._process

    def close(self) -> None:
        """Ends the process; the next rendering starts another."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            with process:  # closes its pipes, which ends it, and waits
                pass


def _group(requests: Sequence[Request]) -> Iterator[list[tuple[Request, str]]]:
    """Yields requests with their JSON, as many at a time as are asked for together."""
    group: list[tuple[Request, str]] = []
    size = 0
    for request in requests:
        try:
            text = json.dumps(request._asdict())
        except (TypeError, ValueError) as error:
            if group:
                yield group
            raise DataError(f"the messages hold what JSON does not: {error}") from error
        if group and size + len(text) > _LONGEST_LINE:
            yield group
            group, size = [], 0
        group.append((request, text))
        size += len(text)
    if group:
        yield group


RENDERER = Renderer()
"""One for all: it costs a second to start."""

atexit.register(RENDERER.close)
