"""Folders with sound inputs and with a finished run; commands that must succeed or refuse."""

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
from tests.cli.runs import prepare


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run of three steps."""
    folder = tmp_path_factory.mktemp("trained")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml"]) == 0
    return folder / "run"


@pytest.fixture
def lorax_prints(capsys):
    """Runs a command that must succeed; returns what it prints."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        told = [line for line in captured.err.splitlines() if "are those of the run in" not in line]
        assert (code, told) == (0, [])
        return captured.out

    return run
