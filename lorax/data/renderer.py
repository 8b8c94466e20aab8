"""The process that renders chat templates, and how it is asked."""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorax.data.rows import DataError

type Span = tuple[int, int]

_WORKER = Path(__file__).with_name("render_worker.py")
_KEPT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TZ")
"""Of the environment. A template sees none of it; that there are no tokens in it costs nothing."""


class Part(NamedTuple):
    """The first `length` messages, and whether the assistant's turn begins behind them."""

    length: int
    is_prompt: bool = False


class Renderer:
    """Renders conversations as transformers does, in a process that may not take too much.

    The process is started when it is first needed and ends with this one.
    """

    def __init__(self):
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._owner, self._template = 0, ""

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        parts: Sequence[Part],
        *,
        tools: Sequence[Any] | None = None,
        special_tokens: Mapping[str, Any],
        mark_generation: bool = False,
    ) -> dict[Part, tuple[str, list[Span]]]:
        """Returns the text of each part, and the characters of its ``{% generation %}`` blocks.

        Args:
            template: In Jinja.
            messages: As the template takes them.
            parts: What to render.
            tools: JSON schemas.
            special_tokens: By name, such as ``eos_token``.
            mark_generation: Whether to tell the blocks; else there are none.

        Raises:
            DataError: If the template fails, or takes too much time, memory or text.
        """
        request = {
            "messages": list(messages),
            "parts": parts,
            "options": {
                "tools": tools,
                "return_assistant_tokens_mask": mark_generation,
                **special_tokens,
            },
        }
        with self._lock:
            answer = self._ask(template, request)
        if "error" in answer:
            count = answer.get("count", len(messages))
            roles = ", ".join(str(message.get("role")) for message in messages[:count])
            raise DataError(f"the chat template fails on the messages ({roles}): {answer['error']}")
        return {
            part: (text, [(start, end) for start, end in blocks])
            for part, (text, blocks) in zip(parts, answer["rendered"], strict=True)
        }

    def _ask(self, template: str, request: dict[str, Any]) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        if template != self._template:
            request["template"] = template
        try:
            line = json.dumps(request)
        except (TypeError, ValueError) as error:
            return {"error": f"they hold what JSON does not: {error}"}
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = process.wait()
            self.close()
            return {"error": f"the process that rendered it was ended (status {status})"}
        self._template = template
        return json.loads(line)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._owner != os.getpid():  # a fork must not share it
            self._owner, self._template = os.getpid(), ""
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


RENDERER = Renderer()
"""One for all: it costs a second to start."""

atexit.register(RENDERER.close)
