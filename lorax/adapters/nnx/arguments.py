"""The arguments of `apply_lora`: checked, and converted from their usual forms."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.adapters.targets import TargetError
from lorax.config.adapter import LoraConfig
from lorax.system.wording import clip


def check_arguments(model: Any, config: Any) -> None:
    """Refuses what is no model, and what are no settings.

    Raises:
        TypeError: Naming what came, what is needed and what to write.
    """
    if not isinstance(model, nnx.Module):
        kind = type(model).__name__
        advice = ""
        if isinstance(model, nnx.State | Mapping):
            advice = "; of parameters make a module first: nnx.merge(graphdef, state)"
        raise TypeError(f"model must be an nnx.Module, got {kind}{advice}")
    if not isinstance(config, LoraConfig):
        kind = type(config).__name__
        advice = ": write lorax.LoraConfig(**config)" if isinstance(config, Mapping) else ""
        raise TypeError(f"config must be a lorax.LoraConfig, got {kind}{advice}")


def as_rngs(rngs: Any) -> nnx.Rngs:
    """Returns a source of random numbers, made of a seed or a key if it is none.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(rngs, nnx.Rngs):
        return rngs
    if isinstance(rngs, int | np.integer) and not isinstance(rngs, bool):
        return nnx.Rngs(int(rngs))
    if isinstance(rngs, jax.Array):
        is_key = jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key) and rngs.shape == ()
        if is_key or (rngs.dtype == jnp.uint32 and rngs.shape == (2,)):  # of jax.random.PRNGKey
            return nnx.Rngs(rngs)
    found = f"{rngs.dtype}{list(rngs.shape)}" if isinstance(rngs, jax.Array) else clip(repr(rngs))
    raise TypeError(f"rngs must be an nnx.Rngs, a seed or one jax.random.key, got {found}")


def refuse_other_adapters(model: nnx.Module) -> None:
    """Refuses parameters of other adapters, as of `nnx.LoRA`: they would be frozen.

    Raises:
        TargetError: Naming their modules.
    """
    paths = [path[:-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))]
    if paths:
        names = ", ".join(dict.fromkeys(".".join(map(str, path)) for path in paths))
        raise TargetError(
            f"{names or 'the model'} has an nnx.LoRAParam already, which would be frozen: build "
            "the model without nnx.LoRA, and let apply_lora add what trains"
        )
