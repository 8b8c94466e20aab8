"""The mesh of devices, and its axes."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA_AXIS = "data"
ROW_AXES = (DATA_AXIS,)  # mesh axes that divide the rows of a batch


def make_mesh(data: int = 1) -> Mesh:
    """Returns a mesh with a data axis of `data` devices; -1 takes all.

    Raises:
        ValueError: If there are fewer devices than asked for.
    """
    devices = jax.devices()
    size = len(devices) if data == -1 else data
    if not 1 <= size <= len(devices):
        raise ValueError(
            f"mesh.data asks for {size} devices and JAX sees {len(devices)} "
            f"({devices[0].device_kind}); set it to at most {len(devices)}, or to -1 for all"
        )
    return Mesh(np.array(devices[:size]), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def refuse_explicit_axes(x: jax.Array) -> None:
    """Refuses an array on a mesh that has axes of JAX's type Explicit.

    Raises:
        ValueError: Saying how to make the mesh.
    """
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        names = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(
            f"the mesh's axes ({names}) have JAX's type Explicit, and the compiler divides this "
            "model: make it with jax.make_mesh(…, axis_types=(jax.sharding.AxisType.Auto,) * "
            f"{len(mesh.axis_names)})"
        )
