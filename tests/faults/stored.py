"""A checkpoint's arrays, and a run that gets stuck."""

import jax.numpy as jnp
import numpy as np

DTYPES = ["float32", "bfloat16", "float16", "int32", "bool", "uint32"]


def arrays(step=1):
    values = np.arange(6).reshape(2, 3)
    made = {dtype: jnp.asarray(values.astype(jnp.dtype(dtype))) for dtype in DTYPES}
    return made | {"scalar": jnp.float32(-0.0), "step": np.int32(step)}


STUCK = """
import time
from lorax.system.watchdog import Watchdog
def waits_for_ever():
    time.sleep(3600)
with Watchdog(0.5).watching():
    waits_for_ever()
"""
