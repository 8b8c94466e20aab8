"""The folder of compiled programs: whose it is, and that a second process compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lorax.devices.xla_cache import default_directory, use_compilation_cache


@pytest.fixture(autouse=True)
def restored():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_folder_is_the_users_own_and_nobody_else_can_enter(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, words = use_compilation_cache()
    assert path == default_directory() == tmp_path / "lorax" / "xla"
    assert path.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(path)
    assert words == f"compiled programs are kept in {path}"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory() == Path.home() / ".cache" / "lorax" / "xla"


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path):
    tmp_path.chmod(0o770)
    path, words = use_compilation_cache(tmp_path)
    assert path is None and jax.config.jax_compilation_cache_dir is None
    assert f"others can write to {tmp_path}; chmod 700 it" in words


def test_nor_one_in_a_folder_that_others_can_write_to(tmp_path):
    tmp_path.chmod(0o777)
    path, words = use_compilation_cache(tmp_path / "cache")
    assert path is None and f"others can write to {tmp_path}; chmod 700 it" in words


def test_another_users_folder_is_not_used(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    path, words = use_compilation_cache(tmp_path)
    assert path is None and words.endswith(" belongs to another user")


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    path, words = use_compilation_cache(tmp_path / "file" / "cache")
    assert path is None
    assert words.startswith("compiled programs are not kept: ") and str(tmp_path) in words


def test_what_jax_was_told_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    path, words = use_compilation_cache(tmp_path)
    assert str(path) == jax.config.jax_compilation_cache_dir == "/elsewhere"
    assert "as set for JAX" in words


PROGRAM = """
import sys, jax, jax.numpy as jnp
from lorax.devices.xla_cache import kept_elsewhere, use_compilation_cache
use_compilation_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
x = jnp.ones((8, 8))
with kept_elsewhere():
    jax.jit(lambda x: jnp.cos(x) @ x)(x).block_until_ready()
elsewhere = len(hits)
jax.jit(lambda x: jnp.sin(x) @ x)(x).block_until_ready()
print(*(sum("cache_hits" in name for name in part) for part in (hits[:elsewhere], hits)))
"""


def test_a_second_process_finds_what_the_first_compiled_but_for_what_is_kept_elsewhere(tmp_path):
    def run():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "cache")],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("JAX_")},
                "PYTHONPATH": os.pathsep.join([".", "kernels"]),
                "JAX_PLATFORMS": "cpu",
            },
        )  # fmt: skip
        kept = list((tmp_path / "cache").glob("jit__lambda*-cache"))
        return [int(word) for word in done.stdout.split()], len(kept)

    (first_elsewhere, first), kept = run()
    assert first_elsewhere == first == 0 and kept == 1
    (elsewhere, both), _ = run()
    assert both > elsewhere
