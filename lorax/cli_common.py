"""What `lorax generate` and `lorax export` share."""

import sys
from collections.abc import Callable

DTYPES = ("bfloat16", "float16", "float32")


def note(command: str) -> Callable[[str], object]:
    """Returns what tells a user something on standard error, which is not the command's output."""
    return lambda text: print(f"lorax {command}: {text}", file=sys.stderr)
