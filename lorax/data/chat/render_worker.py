"""Renders chat templates in a process of its own, with bounds on time, memory and output.

A template comes with a downloaded model. transformers' sandbox keeps it from running code, but not
from looping for ever or from rendering a text of many GiB. The process writes a line when it is
ready. Then it reads requests from standard input, a line of JSON each, and answers each with a
line; a line of options holds for all that follow. It ends with its input. It imports nothing of
lorax. Without a /proc, memory is not bounded.
"""

import datetime
import json
import math
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, TextIO

from jinja2 import TemplateSyntaxError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

CPU_SECONDS = 3.0
CHARACTERS = 2**20
BYTES = 2**28
"""Limits of one rendering; a long conversation gets more, in proportion to its length."""


class _LimitError(Exception):
    """A template that exceeded its limits."""


class Bounds:
    """Keeps a rendering within time and memory, with two system calls in the usual case."""

    def __init__(self):
        self._armed = -math.inf
        self._longest = 0

    def __enter__(self) -> None:
        # The alarm interrupts a loop; the kernel ends a single operation that never returns.
        # The alarm repeats: Jinja catches what is raised while it computes constants.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, 0.25)
        if time.monotonic() - self._armed > 1:
            self._armed = time.monotonic()
            used = resource.getrusage(resource.RUSAGE_SELF)
            seconds = math.ceil(used.ru_utime + used.ru_stime + CPU_SECONDS) + 1
            _set_limit(resource.RLIMIT_CPU, seconds + 1)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def make_room(self, size: int) -> None:
        """Raises the memory limit for a request of `size` characters."""
        pages = Path("/proc/self/statm")
        if size > self._longest and pages.exists():
            self._longest = 2 * size
            now = int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            _set_limit(resource.RLIMIT_AS, now + BYTES + 32 * self._longest)


def _set_limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def fix_date(date: str) -> None:
    """Gives templates that ask for today's date `date`, which is in ISO format."""
    day = datetime.datetime.fromisoformat(date)

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return day

    chat_template_utils.datetime = Day  # pyright: ignore[reportAttributeAccessIssue]
    asked = '{{ strftime_now("%Y-%m-%d") }}'
    if render_jinja_template([[]], chat_template=asked)[0] != [date]:
        raise RuntimeError(
            "this transformers cannot be given the date; install a supported version"
        )


def render(
    request: dict[str, Any], options: dict[str, Any], size: int, bounds: Bounds
) -> dict[str, Any]:
    """Returns the whole text, its generation blocks, and how each part compares with the whole.

    Each part gives its length, the number of its first characters that equal the whole's, and its
    text where those are not all. If a part fails, returns its error, and whether it exceeded its
    limits.
    """
    length = len(request["messages"])
    whole = None
    blocks = []
    parts = []
    try:
        for length, is_prompt in request["parts"]:
            with bounds:
                texts, found = render_jinja_template(
                    [request["messages"][:length]],
                    tools=request["tools"],
                    add_generation_prompt=is_prompt,
                    **{**options, **(request["template_kwargs"] or {})},
                )
            if len(texts[0]) > CHARACTERS + 4 * size:
                raise _LimitError(f"it renders {len(texts[0]):,} characters")
            if whole is None:
                whole = texts[0]
                blocks = found[0] if found else []
            shared = len(os.path.commonprefix([whole, texts[0]]))
            parts.append((len(texts[0]), shared, texts[0] if shared < len(texts[0]) else None))
    except _LimitError as error:
        said = f"{error}, more than any conversation needs"
        return {"length": length, "error": said, "limit": True}
    except MemoryError:
        said = "it takes more memory than any conversation needs"
        return {"length": length, "error": said, "limit": True}
    except TemplateSyntaxError as error:  # raised before a message is looked at
        return {"length": length, "error": str(error.message), "line": error.lineno}
    except Exception as error:
        words = [request["messages"], request["tools"]]
        return {"length": length, "error": _without_words(error, words, options["chat_template"])}
    return {"text": whole, "blocks": blocks, "parts": parts}


def _without_words(error: Exception, texts: list[Any], template: str) -> str:
    """Returns an error's message, unless a word of it may be from the row: that is training text.

    Words of the template and short words may be shown.
    """
    said = str(error)
    template = template.casefold()
    row = json.dumps(texts, ensure_ascii=False, default=str).casefold()
    words = {word for word in re.findall(r"\w+", said.casefold()) if len(word) > 3}
    if len(said) > 200 or any(word in row and word not in template for word in words):
        return f"{type(error).__name__}, whose text is too long or may repeat the messages"
    return said or type(error).__name__


def _stop(*_: object) -> NoReturn:
    raise _LimitError(f"it takes more than {CPU_SECONDS:g} s")


def _send(answers: TextIO, line: str) -> None:
    try:
        answers.write(line + "\n")
        answers.flush()
    except BrokenPipeError:  # the parent process has ended
        os._exit(0)


def main() -> None:
    """Answers requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    bounds = Bounds()
    options = {}
    _send(answers, "ready")
    for line in sys.stdin:
        bounds.make_room(len(line))
        request = json.loads(line)
        if "options" in request:
            options = request["options"]
            fix_date(request["date"])
            continue
        answer = render(request, options, len(line), bounds)
        if "error" in answer:
            bounds = Bounds()  # memory left by this template must not count against the next
        _send(answers, json.dumps(answer))


if __name__ == "__main__":
    main()
