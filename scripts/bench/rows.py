"""Rows of docs/measurements: their origin, and appending them."""

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from lorax.system.versions import library_versions


def origin(commit: str) -> dict[str, Any]:
    """Returns the device, the libraries, the commit and the date of a measurement made now."""
    return {
        "device": jax.devices()[0].device_kind,
        "versions": library_versions(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows to a file of JSON lines, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
