"""The real tokenizers, chat templates and model that `make test` fetches into `.assets`."""

import os
from pathlib import Path

import pytest

ASSETS = Path(__file__).parents[1] / ".assets"
TOKENIZERS = ("llama3", "llama3_1", "qwen3", "gemma3", "llama2")
MODEL = "smollm2"


def asset(name: str) -> Path:
    """Returns the folder of one of them; where they are not, skips the test, or fails it in CI."""
    if not (ASSETS / ".done").exists():
        reason = f"needs {ASSETS.name}/{name}, which `make {ASSETS.name}/.done` fetches"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return ASSETS / name
