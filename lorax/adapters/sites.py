"""Which layers can carry an adapter."""

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype


def is_adaptable(module: nnx.Module) -> bool:
    """Says whether `module` is a plain linear layer, with nothing of its own in `__call__`."""
    return isinstance(module, nnx.Linear) and obstacle(module) is None


def obstacle(linear: nnx.Linear) -> str | None:
    """Returns what an adapted layer would not carry over from `linear`, or None."""
    if type(linear).__call__ is not nnx.Linear.__call__:
        return "it has a __call__ of its own"
    if linear.dot_general is not jax.lax.dot_general or linear.promote_dtype is not promote_dtype:
        return "it has a dot_general or promote_dtype of its own"
    if linear.precision is not None:
        return f"it sets precision={linear.precision}; set jax_default_matmul_precision instead"
    if linear.kernel.ndim != 2:
        return f"its kernel has shape {linear.kernel.shape}, of several layers at once"
    return None
