"""Parts that the commands share."""

import functools
import sys
from collections.abc import Callable

from rich.console import Console

from lorax.config.run import RunConfig, load_config
from lorax.interop.adapter_base import with_recorded_revision
from lorax.report.lines import print_line
from lorax.runs.folder import SavedRun
from lorax.weights.dense import DENSE
from lorax.weights.format import Format
from lorax.weights.formats import format_of

DTYPES = ("bfloat16", "float16", "float32")


def note(command: str) -> Callable[[str], object]:
    """Returns what tells a user something on standard error, which is not the command's output."""
    return lambda text: print(f"lorax {command}: {text}", file=sys.stderr)


def read_config(parsed, console: Console) -> RunConfig:
    """Returns the settings, with the base revision that an adapter names."""
    tell = functools.partial(print_line, console)
    return with_recorded_revision(load_config(parsed.config, parsed.overrides), tell)


def base_format(run: SavedRun | None) -> Format:
    """Returns the format in which a run keeps the matrices of its base; `DENSE` without a run."""
    return DENSE if run is None else format_of(run.config.model)
