"""Saving models as Hugging Face checkpoints, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lorax.adapters.nnx.tree import adapted_layers
from lorax.interop.folder import write_checkpoint
from lorax.interop.tensors import convert, hf_name, listed, tensor_table
from lorax.models.decoder import CausalLM
from lorax.system.arguments import check_kind
from lorax_kernels import dense

type Value = jax.Array | Callable[[], jax.Array]


def model_tensors(
    model: CausalLM,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    overrides: Mapping[str, Value] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, host array) of every tensor of a checkpoint, one at a time.

    Args:
        model: The model; adapters are not merged here.
        dtype: Dtype of the arrays.
        overrides: Values to write instead of the model's own, by tensor name, in the model's layout
            (kernels are (in, out)), or functions that compute them when needed.

    Raises:
        ValueError: If the model lacks a parameter that no override gives, an override names no
            tensor, or a value has another shape.
    """
    overrides = overrides or {}
    table = tensor_table(model.config)
    unknown = [name for name in overrides if name not in table]
    if unknown:
        raise ValueError(f"overrides name {listed(unknown)}, which this model does not have")
    parameters = dict(nnx.to_flat_state(nnx.state(model)))
    for name, layer in adapted_layers(model).items():
        path = (*name.split("."), layer.weight_name)
        if hf_name(path, model.config.family)[0] not in overrides:
            raise ValueError(f"{name} carries adapters: merge_lora them first")
    for name, spec in table.items():
        if name in overrides:
            value = overrides[name]
            value = value() if callable(value) else value
        elif spec.path in parameters:
            value = dense(parameters[spec.path].get_value())
        else:
            where = ".".join(map(str, spec.path))
            raise ValueError(f"the model has no {where}; merge its adapters before saving")
        shape = value.shape[::-1] if spec.transpose else value.shape
        if shape != spec.shape:
            raise ValueError(f"{name} would have shape {shape}; config.json needs {spec.shape}")
        # safetensors writes the memory order of an array and ignores its strides.
        yield name, np.ascontiguousarray(convert(value, spec.transpose, jnp.dtype(dtype))[0])


def save_model(
    model: CausalLM,
    directory: str | Path,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    max_shard_bytes: int = 5 * 2**30,
    source_directory: str | Path | None = None,
    overrides: Mapping[str, Value] | None = None,
    files: Mapping[str, str | Path | None] | None = None,
) -> Path:
    """Writes a checkpoint that transformers, vLLM and `load_model` read; whole or not at all.

    Args:
        model: The model, without adapters (or with every adapted kernel in `overrides`).
        directory: A path that does not exist, or an empty folder.
        dtype: Dtype of the tensors written.
        max_shard_bytes: Size above which the weights are split over files.
        source_directory: Folder of the original checkpoint, whose tokenizer, chat template and
            generation settings are copied.
        overrides: See `model_tensors`.
        files: Texts by the name of their file, instead of the copied ones; a path is copied, and
            None leaves a file out.

    Returns:
        The folder.

    Raises:
        TypeError: If the model is no language model of lorax's.
        ValueError: If `directory` holds something, or `model_tensors` refuses the model.
    """
    check_kind("model", model, CausalLM, "a lorax.CausalLM, as of lorax.load_model")
    name = jnp.dtype(dtype).name
    # transformers 5 reads dtype, 4 reads torch_dtype.
    config = model.config.to_hf() | {"dtype": name, "torch_dtype": name}
    return write_checkpoint(
        model_tensors(model, dtype=dtype, overrides=overrides),
        config,
        directory,
        max_shard_bytes=max_shard_bytes,
        source_directory=source_directory,
        files=files,
    )
