"""In CI what the tests need must be there: nothing is skipped for want of it."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import real

ROOT = Path(__file__).parents[1]


def test_ci_tells_the_tests_that_it_is_ci(tmp_path):
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$CI: make $*"\n')
    make.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "CI"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (
        0,
        "true: make --jobs=3 .venv/.test .aot/.done .assets/.done\ntrue: make test\n",
    )


@pytest.mark.parametrize(
    ("said", "raised"),
    [("true", pytest.fail.Exception), ("", pytest.skip.Exception), (None, pytest.skip.Exception)],
)
def test_a_missing_asset_fails_in_ci_and_skips_elsewhere(tmp_path, monkeypatch, said, raised):
    monkeypatch.setattr(real, "ASSETS", tmp_path / ".assets")
    monkeypatch.delenv("CI", raising=False)
    if said is not None:
        monkeypatch.setenv("CI", said)
    with pytest.raises(
        raised, match=r"needs \.assets/llama2, which `make \.assets/\.done` fetches"
    ):
        real.asset("llama2")
    real.ASSETS.mkdir()
    (real.ASSETS / ".done").touch()
    assert real.asset("llama2") == real.ASSETS / "llama2"


def test_every_test_asks_for_its_assets_where_their_absence_is_judged():
    mine = {"real.py", Path(__file__).name}
    files = [path for path in Path(__file__).parent.rglob("*.py") if path.name not in mine]
    own = [path.name for path in files if '".assets' in path.read_text(encoding="utf-8")]
    assert files and not own
