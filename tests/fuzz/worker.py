"""A process that runs commands one after another, in folders that it is given; see `pool`."""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.processes import cpu_seconds

SPACE = 8 * 2**30
"""Addresses that a case may take beyond what the process has, in bytes; a guard of the machine."""


def main() -> None:
    """Answers requests, a line of JSON each, until there are no more."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    with contextlib.redirect_stdout(io.StringIO()):
        import jax

        from lorax.cli.main import main as command
        from lorax.data.chat.tokenizer import WITHOUT_TORCH
        from lorax.system.streams import Outlet

    WITHOUT_TORCH.set()  # as the command itself does
    jax.devices()
    bytes_now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (bytes_now + SPACE, limit))
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    answer("ready")
    for line in requests:
        request = json.loads(line)
        if request["do"] == "run":
            answer(_run(command, request["words"], Path(request["folder"]), Path(request["logs"])))
        else:
            answer(_argue(request))


def _run(command: Any, words: list[str], folder: Path, logs: Path) -> dict[str, Any]:
    """Runs a command in a folder; says what it returned, and what it took."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    error, status = None, None
    started, worked = time.monotonic(), cpu_seconds()
    with _redirected(folder, logs):
        try:
            status = command(words)
        except SystemExit as stop:  # argparse's own errors
            status = stop.code
        except BaseException:
            error = traceback.format_exc()
        seconds, taken = time.monotonic() - started, cpu_seconds() - worked
        is_alone = _await_others()
        _await_renderer()
    return {
        "status": status,
        "error": error,
        "seconds": seconds,
        "cpu_seconds": taken,
        "peak_mib": _peak_mib(),
        "is_alone": is_alone,
    }


@contextlib.contextmanager
def _redirected(folder: Path, logs: Path) -> Iterator[None]:
    """Gives a command its folder and its streams, and afterwards the process its signals."""
    os.chdir(folder)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    hook, stdin, kept = sys.unraisablehook, sys.stdin, [os.dup(i) for i in (1, 2)]
    given = folder / "stdin"
    opened = [os.open(given if given.exists() else os.devnull, os.O_RDONLY)]
    opened += [
        os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in ("out", "err")
    ]
    for number, file in enumerate(opened):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            with contextlib.suppress(OSError, TypeError, ValueError):
                signal.signal(number, handler)
        sys.stdout.flush()
        sys.stderr.flush()
        sys.unraisablehook, sys.stdin = hook, stdin
        for number, file in zip((1, 2), kept, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.chdir("/")


def _await_others() -> bool:
    """Waits for what works on beside a command that has failed, where the process would end.

    Returns:
        Whether it has ended; else this process cannot be used again.
    """
    from lorax.system.threads import works_in_background

    end = time.monotonic() + 5
    while works_in_background() and time.monotonic() < end:
        time.sleep(0.01)
    return not works_in_background()


def _await_renderer() -> None:
    """Waits for the process that renders: it would not start in a folder that is gone."""
    from lorax.data.chat.renderer import RENDERER, Part, Request

    messages = [{"role": "user", "content": ""}]
    list(RENDERER.render("", [Request(messages, [Part(1)])], special_tokens={}))


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _argue(request: dict[str, Any]) -> dict[str, Any]:
    from tests.fuzz.argue import argue
    from tests.fuzz.kinds import Case

    try:
        case = Case.from_json(request["case"])
        return {"reason": argue(case, Path(request["folder"]), request["out"])}
    except BaseException:
        return {"reason": None, "error": traceback.format_exc()}


if __name__ == "__main__":
    main()
