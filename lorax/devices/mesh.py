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
