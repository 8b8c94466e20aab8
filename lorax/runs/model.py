"""The model of a run: of shapes, and of arrays."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.adapters.nnx.apply import apply_lora, set_kernels
from lorax.adapters.targets import TargetError
from lorax.config.run import RunConfig
from lorax.devices.host_memory import HostArray, embedding_obstacle
from lorax.interop.load import load_hf_config, load_model
from lorax.interop.peft import load_adapter
from lorax.interop.peft_config import read_adapter_config
from lorax.models.decoder import CausalLM
from lorax.models.stack.recompute import Recomputation
from lorax.system.threads import await_tracing


def model_shapes(config: RunConfig, base: Path) -> CausalLM:
    """Returns the model that trains, adapters included, with shapes instead of weights.

    Raises:
        TargetError: If the adapter's settings do not fit the model.
        ValueError: If more layers are to be kept than it has.
    """
    full = config.train.method == "full"
    adapter, dtype = config.model.adapter, jnp.dtype(config.model.dtype)
    settings = read_adapter_config(adapter) if adapter else config.lora
    architecture = load_hf_config(base)
    _check_kept_layers(config, architecture.num_hidden_layers)

    def build():
        model = CausalLM(
            architecture,
            dtype=dtype,
            param_dtype=jnp.float32 if full else dtype,
            attn_impl=config.model.attn_impl,
            rngs=nnx.Rngs(0),
        )
        if not full:
            model = apply_lora(model, settings, rngs=nnx.Rngs(0))
        set_kernels(model, config.model.kernels)
        return model

    try:
        model = nnx.eval_shape(build)
    except TargetError as error:
        place = f"{adapter} does not fit {base}: " if adapter else ""
        raise TargetError(f"{place}{error}") from None
    if config.model.offload_embedding:
        _put_embedding_on_host(model)
    return model


def _put_embedding_on_host(model: CausalLM) -> None:
    """Says of a model of shapes that its embedding stays in the host's memory."""
    if reason := embedding_obstacle(model):
        raise ValueError(f"model.offload_embedding must be false: {reason}")
    embedding = model.model.embed_tokens.embedding
    shape = embedding.get_value()
    nothing = np.broadcast_to(np.zeros((), shape.dtype), shape.shape)  # takes no memory
    embedding.set_value(nothing.view(HostArray))  # type: ignore[arg-type]


def _check_kept_layers(config: RunConfig, layers: int) -> None:
    kept = config.train.kept_layers
    if kept is not None and kept > layers:
        raise ValueError(f"train.kept_layers: needs 0 to the model's {layers} layers, got {kept}")


def load_base(config: RunConfig) -> CausalLM:
    """Loads the base model, which needs no other input of the run."""
    return load_model(
        config.model.name_or_path,
        revision=config.model.revision,
        dtype=jnp.dtype(config.model.dtype),
        # Weights that train are float32: in bfloat16 small updates would be rounded away.
        param_dtype=jnp.float32 if config.train.method == "full" else None,
        attn_impl=config.model.attn_impl,
        offload_embedding=config.model.offload_embedding,
        pace=await_tracing,
    )


def adapt_base(model: CausalLM, config: RunConfig, recomputation: Recomputation) -> CausalLM:
    """Puts fresh or loaded adapters on the base model, and says what it makes again.

    Args:
        model: From `load_base`.
        config: The run's settings.
        recomputation: From `choose_recomputation`.
    """
    _check_kept_layers(config, model.config.num_hidden_layers)
    recomputation.put_on(model)
    if config.model.adapter:
        model = load_adapter(model, config.model.adapter)
    elif config.train.method != "full":
        model = apply_lora(model, config.lora, rngs=nnx.Rngs(config.train.seed))
    set_kernels(model, config.model.kernels)
    return model
