"""A config that is written where a test says."""

import textwrap

import pytest


@pytest.fixture
def write(tmp_path):
    def write_file(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return str(path)

    return write_file
