"""A checkpoint store that notes what it says."""

import pytest

from lorax.recovery.store import CheckpointStore


@pytest.fixture
def store(tmp_path):
    said = []
    found = CheckpointStore(tmp_path / "checkpoints", tell=said.append)
    found.said = said
    yield found
    found._error = None
    found.close()
