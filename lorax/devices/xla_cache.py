"""JAX's cache of compiled programs, so that a second start does not compile."""

import contextlib
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import jax

_JAX_SECONDS = 1.0
"""JAX's default: programs with a shorter compile time are not cached."""


def default_directory() -> Path:
    """Returns the folder of the user's compiled programs, ``$XDG_CACHE_HOME/lorax/xla``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lorax" / "xla"


def use_compilation_cache(directory: str | Path | None = None) -> tuple[Path | None, str]:
    """Keeps compiled programs in a folder that only the user can write, and reads them from there.

    A folder, or one right above it, that others can write to is not used: a program put there would
    run as this user. A folder set by ``JAX_COMPILATION_CACHE_DIR`` or in Python stays.

    Args:
        directory: The folder; None is `default_directory`.

    Returns:
        The folder, or None where nothing is kept, and a line about it for the user.
    """
    if configured := jax.config.jax_compilation_cache_dir:
        return Path(configured), f"compiled programs are kept in {configured}, as set for JAX"
    path = default_directory() if directory is None else Path(directory)
    if problem := make_private(path):
        return None, f"compiled programs are not kept: {problem}"
    jax.config.update("jax_compilation_cache_dir", str(path))
    if jax.config.jax_persistent_cache_min_compile_time_secs == _JAX_SECONDS:
        # A start compiles dozens of small programs, which take seconds together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return path, f"compiled programs are kept in {path}"


@contextlib.contextmanager
def kept_elsewhere() -> Iterator[None]:
    """Keeps this thread's programs out of JAX's cache: writing a large one takes seconds."""
    from jax._src.config import persistent_cache_min_compile_time_secs

    with persistent_cache_min_compile_time_secs(math.inf):
        yield


def make_private(path: Path) -> str | None:
    """Creates a folder that only the user can write to; returns why it is not safe, or None."""
    try:
        for folder in (path.parent, path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if problem := _distrust(folder):
                return problem
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def _distrust(path: Path) -> str | None:
    """Returns why `path` cannot be trusted, or None."""
    status = path.stat()
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return f"{path} belongs to another user"
    if stat.S_IMODE(status.st_mode) & 0o022:
        return f"others can write to {path}; chmod 700 it"
    if not os.access(path, os.W_OK):
        return f"{path} cannot be written to"
    return None
