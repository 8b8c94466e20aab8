"""Renders chat templates in a process of its own, with bounds on time, memory and output.

A template comes with a downloaded model. transformers' sandbox keeps it from running code, but not
from looping for ever or from making a text of many GiB. Reads a JSON request per line from standard
input and answers each with a JSON line; ends with its input. Imports nothing of lorax.
"""

import json
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

CPU_SECONDS = 3.0
CHARACTERS = 2**24
BYTES = 2**28
"""What one rendering may take; a long conversation, as much again as it is long, and more."""


class _LimitError(Exception):
    """A template that took more than it may."""


def render(request: dict[str, Any], size: int) -> dict[str, Any]:
    """Returns text and generation blocks of each part, or the error of the first that fails."""
    from transformers.utils.chat_template_utils import render_jinja_template

    count, rendered = 0, []
    try:
        _limit(size)
        for count, is_prompt in request["parts"]:
            messages = request["messages"][:count]
            texts, blocks = render_jinja_template(
                [messages], add_generation_prompt=is_prompt, **request["options"]
            )
            if len(texts[0]) > CHARACTERS + 4 * size:
                raise _LimitError(f"it renders {len(texts[0]):,} characters")
            rendered.append((texts[0], blocks[0] if blocks else []))
    except _LimitError as error:
        return {"count": count, "error": f"{error}, more than any conversation needs"}
    except MemoryError:
        return {"count": count, "error": "it takes more memory than any conversation needs"}
    except Exception as error:
        return {"count": count, "error": str(error) or type(error).__name__}
    finally:
        _release()
    return {"rendered": rendered}


def _limit(size: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    # The alarm interrupts a loop; a single operation without end is ended by the kernel.
    seconds = math.ceil(used.ru_utime + used.ru_stime + CPU_SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    if (pages := Path("/proc/self/statm")).exists():
        now = int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES + 32 * size, hard))


def _release() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (hard, hard))


def _stop(*_: object) -> NoReturn:
    raise _LimitError(f"it takes more than {CPU_SECONDS:g} s")


def main() -> None:
    """Answers requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    template = ""
    for line in sys.stdin:
        request = json.loads(line)
        template = request.pop("template", template)
        request["options"]["chat_template"] = template
        answers.write(json.dumps(render(request, len(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
