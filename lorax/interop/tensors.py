"""Names and shapes of a checkpoint's tensors, and their places in the model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.models.architecture import DecoderConfig
from lorax.models.decoder import CausalLM
from lorax.models.family import Family

type ParameterPath = tuple[Any, ...]

# Last part of our path: last part of the tensor's name, and whether it is transposed there.
# `nnx.Linear` stores (in, out), torch (out, in).
_LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "weight": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint, and its place in the model.

    Attributes:
        path: Path of the parameter in `nnx.state(model)`.
        transpose: Whether the file holds the transpose.
        shape: Shape in the file.
    """

    path: ParameterPath
    transpose: bool
    shape: tuple[int, ...]


def hf_name(path: ParameterPath, family: Family | None = None) -> tuple[str, bool]:
    """Returns the checkpoint's name of a parameter, and whether it is transposed there.

    This is the only translation of names, used in both directions: modules are named as in
    Hugging Face's models, so only the last part differs. The family lists further exceptions.

    Args:
        path: For example ``("model", "layers", 0, "mlp", "up_proj", "kernel")``.
        family: The model's family, whose files may use other names. None gives the name by the
            rule, which is the module's in transformers: PEFT's files use it.

    Raises:
        ValueError: If the last part is no weight of a checkpoint.
    """
    *modules, leaf = (str(part) for part in path)
    if leaf not in _LEAVES:
        raise ValueError(
            f"{'.'.join([*modules, leaf])} has no place in a Hugging Face checkpoint, which holds "
            f"{', '.join(_LEAVES)}; merge adapters first"
        )
    name, transpose = _LEAVES[leaf]
    full = ".".join([*modules, name])
    return (full if family is None else family.stored_name(full)), transpose


@functools.lru_cache(maxsize=8)
def tensor_table(config: DecoderConfig) -> Mapping[str, TensorSpec]:
    """Returns every tensor of a checkpoint of this architecture, in the order of the layers."""
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    table = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name, transpose = hf_name(path, config.family)
        shape = tuple(variable.get_value().shape)
        table[name] = TensorSpec(path, transpose, shape[::-1] if transpose else shape)
    return table


def listed(names: list[str]) -> str:
    """Names the first three tensors, and counts the others."""
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@functools.partial(jax.jit, static_argnames=("transpose", "dtype"))
def convert(value: jax.Array, transpose: bool, dtype: jnp.dtype):
    """Returns the parameter, and whether it was finite before and after the cast."""
    cast = (value.T if transpose else value).astype(dtype)
    return cast, jnp.isfinite(value).all(), jnp.isfinite(cast).all()
