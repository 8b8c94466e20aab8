"""A cache of compiled steps between runs, whose keys need no tracing.

JAX's own cache uses the lowered program as its key. A run must trace and lower to compute it, which
takes many seconds of Python for a model of eight billion parameters. Here the key is everything
that decides the traced program.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import lorax_kernels
from lorax.devices.xla_cache import default_directory, make_private
from lorax.system.threads import in_background
from lorax.system.versions import library_versions
from lorax.system.wording import describe

type Facts = Mapping[str, str]

_MOST = 24
"""Programs kept; the least recently used one is removed first."""

_LIBRARIES = ("jax", "nvidia", "flax", "optax", "numpy", "ml_dtypes")
_ENVIRONMENT = ("JAX_", "XLA_", "TF_", "NVIDIA_TF32")


def open_program_cache(tell: Callable[[str], object]) -> "ProgramCache | None":
    """Returns the user's own cache, or None with a line about why it cannot be trusted."""
    folder = default_directory().with_name("steps")
    if problem := make_private(folder):
        tell(f"compiled steps are not kept: {problem}")
        return None
    return ProgramCache(folder, tell)


class ProgramCache:
    """Compiled functions of ``(state, frozen, batch)`` in a folder.

    Args:
        folder: A folder that only the user can write to: a program that is read is run.
        tell: Called with a line about each entry that could not be read or kept.
    """

    def __init__(self, folder: Path, tell: Callable[[str], object]):
        self.folder = folder
        self._tell = tell
        self._waiting: list[Callable[[], None]] = []

    def find(self, facts: Facts, arguments: tuple[Any, ...], results: Any) -> Any | None:
        """Returns a compiled function, or None if there is none.

        Args:
            facts: All that decides it, except its arguments, the code and the libraries.
            arguments: Its arguments, or their shapes, with shardings.
            results: Its results, or anything of that structure.
        """
        path = self._path(facts, arguments)
        try:
            stored = path.read_bytes()
        except OSError:
            return None
        try:
            digest = stored[:32]
            payload = stored[32:]
            if hashlib.sha256(payload).digest() != digest:
                raise ValueError("it is damaged")
            lorax_kernels.load_runtime()
            structures = jax.tree.structure((arguments, {})), jax.tree.structure(results)
            devices = _devices(arguments)
            program = deserialize_and_load(payload, *structures, execution_devices=devices)
            os.utime(path)
            return program
        except Exception as error:  # any error: the program can be compiled
            self._tell(f"{path} cannot be used, the step is compiled instead: {describe(error)}")
            return None

    def keep_later(self, *program_and_facts: Any) -> None:
        """Queues a compiled function for `keep_waiting`: writing it takes seconds."""
        self._waiting.append(functools.partial(self.keep, *program_and_facts))

    def keep_waiting(self) -> None:
        """Writes the queue in background threads; `finish_in_background("keep")` waits for them."""
        while self._waiting:
            in_background("keep", self._waiting.pop())

    def keep(self, program: Any, facts: Facts, arguments: tuple[Any, ...], results: Any) -> None:
        """Keeps a compiled function; see `find`."""
        path = self._path(facts, arguments)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            payload, *found = serialize(program)
            expected = [jax.tree.structure((arguments, {})), jax.tree.structure(results)]
            if found != expected:
                raise ValueError("its arguments or results have another structure")
            partial.write_bytes(hashlib.sha256(payload).digest() + payload)
            partial.replace(path)
        except Exception as error:  # such as a full disk: the run has its program
            partial.unlink(missing_ok=True)
            self._tell(f"the compiled step is not kept in {self.folder}: {describe(error)}")
        self._tidy()

    def _tidy(self) -> None:
        """Removes the least recently used programs, and partial files of ended processes."""
        with contextlib.suppress(OSError):  # another process tidies too
            kept = sorted(self.folder.glob("step-*.program"), key=lambda p: p.stat().st_mtime)
            partial = self.folder.glob(".step-*")
            hour_ago = time.time() - 3600
            for old in (*kept[:-_MOST], *(p for p in partial if p.stat().st_mtime < hour_ago)):
                old.unlink(missing_ok=True)

    def _path(self, facts: Facts, arguments: tuple[Any, ...]) -> Path:
        leaves = jax.tree_util.tree_leaves_with_path(arguments)
        shapes = [
            (jax.tree_util.keystr(path), x.shape, x.dtype.name, str(x.sharding))
            for path, x in leaves
        ]
        text = json.dumps([facts, _surroundings(), shapes], sort_keys=True)
        return self.folder / f"step-{hashlib.sha256(text.encode()).hexdigest()[:32]}.program"


def _devices(arguments: Any) -> list[Any]:
    """Returns the devices of the arguments' mesh, in its order."""
    return list(jax.tree.leaves(arguments)[0].sharding.mesh.devices.flat)


def _surroundings() -> dict[str, Any]:
    """Returns all that decides a program but its settings: code, libraries, environment, device."""
    environment = {k: v for k, v in os.environ.items() if k.startswith(_ENVIRONMENT)}
    options = {k: str(v) for k, v in jax.config.values.items() if "cache" not in k}
    installed = [(d.name, d.version) for d in importlib.metadata.distributions()]
    return {
        "code": _code(),
        "libraries": sorted(d for d in installed if d[0].lower().startswith(_LIBRARIES)),
        "versions": library_versions(),
        "runtime": jax.devices()[0].client.platform_version,
        "target": _target(),
        "environment": environment,
        "options": options,
    }


def _target() -> str:
    """Returns a fingerprint of XLA's target; a CPU's includes its instructions.

    Two machines may share a folder, and a step with instructions that a CPU lacks ends the process.
    """
    # Private: there is no public way. JAX's own cache uses it too.
    from jax._src.lib import xla_client

    return str(xla_client.get_topology_for_devices(jax.local_devices()).fingerprint())


@functools.cache
def _code() -> str:
    return _fingerprint((Path(__file__).parents[1], Path(lorax_kernels.__file__).parent))


def _fingerprint(packages: Iterable[Path]) -> str:
    """Returns a fingerprint of the code of some packages, independent of their folders."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".json")):
            name = path.relative_to(package.parent).as_posix()
            content = path.read_bytes()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()
