"""A folder with a sound run in it, and commands that must refuse what was damaged."""

import re
import shutil

import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from lorax.cli.main import main
from lorax.interop.load import load_model
from lorax.interop.peft import save_adapter
from tests.cli.damage import CONFIG, GOOD_ROWS, TINY, listing


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(TINY, folder)
    before = listing(folder)
    yield folder
    assert listing(folder) == before


@pytest.fixture(scope="session")
def good_adapter(base, tmp_path_factory):
    settings = lorax.LoraConfig(r=4, target_modules=("q_proj",))
    model = lorax.apply_lora(load_model(base, dtype=jnp.float32), settings, rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return save_adapter(model, folder, base_model_name_or_path=str(base))


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """The working directory, with a good config and good rows in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=base))
    (tmp_path / "rows.jsonl").write_text(GOOD_ROWS)
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Runs a command that must fail, and compares its message with a pattern."""

    def check(pattern, command, *arguments):
        before = listing(here)
        capsys.readouterr()
        try:
            code = main([command, *arguments])
        except SystemExit as stop:  # argparse's own errors
            code = stop.code
        message = capsys.readouterr().err
        assert code == 2, message
        message = re.sub(r"\Ausage: .*?(?=^lorax )", "", message, flags=re.DOTALL | re.MULTILINE)
        # What is told of a base that was asked for stands before the error.
        message = re.sub(rf"\A(lorax {command}: (?!error: ).*\n)+", "", message)
        assert message.startswith(f"lorax {command}: error: ")
        assert re.search(pattern, message), message
        assert "Traceback" not in message
        assert message.count(": error: ") == 1
        assert message.strip().count("\n") <= 2
        assert len(message) < 1200
        assert listing(here) == before
        return message

    return check
