"""The versions that decide a run's numbers."""

import importlib.metadata
import platform

import jax


def library_versions() -> dict[str, str]:
    """Returns the versions that decide a run's numbers, and the devices it ran on."""
    names = {"lorax": "lorax-train"} | {
        name: name for name in ("jax", "jaxlib", "flax", "optax", "transformers")
    }
    versions = {name: find_version(package) for name, package in names.items()}
    devices = jax.devices()
    return versions | {
        "python": platform.python_version(),
        "device": f"{len(devices)} × {devices[0].device_kind}",
    }


def find_version(package: str = "lorax-train") -> str:
    """Returns the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
