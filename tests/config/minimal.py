"""A minimal config, and what loading one says."""

import pytest

from lorax.config.explain import ConfigError
from lorax.config.run import load_config

MINIMAL = """\
model: {name_or_path: tiny}
data: {train: rows.jsonl}
save: {output_dir: out}
"""


def problems(path, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.replace(str(path), "run.yaml") for line in str(caught.value).splitlines()]


def problem(path, overrides=()) -> str:
    found = problems(path, overrides)
    assert len(found) == 1, found
    return found[0]
