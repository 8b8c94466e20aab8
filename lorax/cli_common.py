"""What `lorax generate` and `lorax export` share: notes beside the output, the dtype of a base."""

import sys
from collections.abc import Callable
from pathlib import Path

from lorax.interop.checkpoint import CONFIG_FILE, read_config

DTYPES = ("bfloat16", "float16", "float32")


def note(command: str) -> Callable[[str], object]:
    """Returns what tells a user something on standard error, which is not the command's output."""
    return lambda text: print(f"lorax {command}: {text}", file=sys.stderr)


def stored_dtype(base: Path) -> str:
    """Returns the dtype that a checkpoint says it is in; bfloat16 if it says nothing.

    Raises:
        ValueError: If it is in another one than lorax computes in.
    """
    config = read_config(base)
    name = "dtype" if config.get("dtype") is not None else "torch_dtype"
    found = config.get(name)
    if found is None:
        return "bfloat16"
    if found not in DTYPES:
        raise ValueError(
            f"{base / CONFIG_FILE}: {name} is {str(found)[:40]!r}, and lorax computes in "
            f"{', '.join(DTYPES)}: choose one with --dtype"
        )
    return found
