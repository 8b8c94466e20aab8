"""Loading Hugging Face checkpoints, one tensor at a time."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lorax.devices.host_memory import HostArray
from lorax.devices.specs import parameter_sharding
from lorax.interop.folder import CONFIG_FILE, find_tensors, read_config, resolve_checkpoint
from lorax.interop.packed import Entry, PackedEntry, is_finite, pack_entries
from lorax.interop.safetensors import (
    READABLE_DTYPES,
    Part,
    open_tensors,
    read_ahead,
)
from lorax.interop.storage import check_quantised, matrix_formats, refuse_quantised
from lorax.interop.tensors import TensorSpec, convert, listed, tensor_table
from lorax.layers.attention import AttentionImplementation
from lorax.models.architecture import DecoderConfig, stored_dtype
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.models.stack.recompute import GradientCheckpointing
from lorax.system.files import CheckpointError
from lorax.weights.dense import DENSE
from lorax.weights.format import Format, axes_of

_IGNORED_TENSORS = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""Buffers in older checkpoints; the frequencies follow from config.json."""

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


def load_hf_config(path_or_id: str | Path, *, revision: str | None = None) -> DecoderConfig:
    """Reads the architecture of a checkpoint.

    Raises:
        ValueError: Naming the file and the field; see `read_architecture`.
    """
    directory = resolve_checkpoint(path_or_id, revision)
    return read_architecture(read_config(directory), str(directory / CONFIG_FILE))


def find_stored_dtype(directory: Path) -> str:
    """Returns the dtype of a checkpoint's weights: that in config.json, else that of most of them.

    Raises:
        ValueError: As `load_hf_config`, or `find_tensors` where config.json leaves it to them.
    """
    named = stored_dtype(read_config(directory), str(directory / CONFIG_FILE))
    if named is not None:
        return named
    sizes = dict.fromkeys(READABLE_DTYPES, 0)
    for entry in pack_entries(find_tensors(directory)).values():
        sizes[entry.dtype] += math.prod(entry.shape)
    return np.dtype(READABLE_DTYPES[max(sizes, key=lambda name: sizes[name])]).name


def load_model(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    param_dtype: DTypeLike | None = None,
    attn_impl: AttentionImplementation = "auto",
    gradient_checkpointing: GradientCheckpointing = "none",
    kept_layers: int = 1,
    offload_embedding: bool = False,
    architecture: DecoderConfig | None = None,
    pace: Callable[[], object] | None = None,
    mesh: Mesh | None = None,
    format: Format = DENSE,
    entries: Mapping[str, Entry] | None = None,
) -> CausalLM:
    """Loads a checkpoint, tensor by tensor, onto JAX's default device or a mesh.

    The host holds a few tensors at a time, which background threads read ahead; transposing and
    casting happen on the device. On a mesh each device gets its part of a tensor, or its copy, by
    the partitions of the model's family: no device holds a whole tensor first.

    Every tensor must exist, be expected, have its shape and be finite. Two extra ones are accepted:
    ``rotary_emb.inv_freq`` buffers, and a copy of tied embeddings as ``lm_head.weight`` if it
    equals them.

    Args:
        path_or_id: A folder (the network is never touched) or a hub id.
        revision: Branch, tag or commit on the hub.
        dtype: Dtype of activations and matmuls.
        param_dtype: Dtype of the weights; None is `dtype`.
        attn_impl: See `lorax.layers.attention.resolve_implementation`.
        gradient_checkpointing: See `CausalLM`.
        kept_layers: See `CausalLM`.
        offload_embedding: Leaves the input embedding in the host's memory, as a `HostArray`; not
            where the output head is the same array.
        architecture: From `load_hf_config` of this folder, to read it once.
        pace: Called after each tensor; it may wait, to give way to other work.
        mesh: The devices of the weights, as `make_train_step` needs them; None is JAX's default
            device.
        format: Format of the matrices of linear layers, except the head's, which the loss reads.
            Matrices that are quantised in the checkpoint stay as they are there.
        entries: From `check_checkpoint` of this folder, to read its headers once.

    Raises:
        ValueError: Naming the file and the field or tensor, what was found and what was needed.
    """
    directory = resolve_checkpoint(path_or_id, revision)
    config = load_hf_config(directory) if architecture is None else architecture
    param_dtype = dtype if param_dtype is None else param_dtype
    model = nnx.eval_shape(
        lambda: CausalLM(
            config,
            dtype=dtype,
            param_dtype=param_dtype,
            attn_impl=attn_impl,
            gradient_checkpointing=gradient_checkpointing,
            kept_layers=kept_layers,
            rngs=nnx.Rngs(0),
        )
    )
    if offload_embedding and config.tie_word_embeddings:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} has tie_word_embeddings: true, so the embedding is the "
            "output head too, which every step reads: offload_embedding must be false"
        )
    refuse_quantised(config, directory, format, full=False)
    found = check_checkpoint(directory, config) if entries is None else entries
    table = tensor_table(config)
    on_host = {config.family.stored_name(_EMBEDDING)} if offload_embedding else set()
    graph, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    shardings = {} if mesh is None else _shardings(config, mesh, on_host)
    formats = matrix_formats(config, found, format)
    for name, value in load_values(table, found, jnp.dtype(param_dtype), shardings, formats):
        if name in on_host:
            value = np.asarray(value).view(HostArray)
        variables[table[name].path].set_value(value)
        if pace is not None:
            pace()
    return nnx.merge(graph, nnx.from_flat_state(variables))


def check_checkpoint(directory: Path, config: DecoderConfig) -> dict[str, Entry]:
    """Compares a checkpoint's tensors with its config.json; only a tied head's data is read.

    Args:
        directory: Its folder.
        config: From `load_hf_config` of this folder.

    Returns:
        The tensors of the model, and their places.

    Raises:
        ValueError: As `load_model`, except for the values.
    """
    entries = pack_entries(find_tensors(directory))
    _check_entries(directory, config, tensor_table(config), entries)
    return entries


def _check_entries(
    directory: Path,
    config: DecoderConfig,
    table: Mapping[str, TensorSpec],
    entries: dict[str, Entry],
) -> None:
    """Compares names and shapes with what the architecture needs, before any data is read."""
    head, embedding = map(config.family.stored_name, (_HEAD, _EMBEDDING))
    missing = [name for name in table if name not in entries]
    if missing:
        hint = ""
        if head in missing and embedding in entries:
            hint = "; config.json has tie_word_embeddings: false, is that right?"
        raise CheckpointError(f"{directory} lacks {listed(missing)}{hint}")
    if config.tie_word_embeddings and head in entries:
        _check_tied_head((head, embedding), entries[head], entries[embedding])
        del entries[head]
    extra = [n for n in entries if n not in table and not _IGNORED_TENSORS.fullmatch(n)]
    if extra:
        raise CheckpointError(
            f"{entries[extra[0]].file} holds {listed(extra)}, which a {config.model_type} model "
            "of this config.json does not have"
        )
    check_quantised(directory, config, table, entries)
    for name, spec in table.items():
        if entries[name].shape != spec.shape:
            raise CheckpointError(
                f"{entries[name].file}: {name} has shape {entries[name].shape}; config.json needs "
                f"{spec.shape}"
            )


def _check_tied_head(names: tuple[str, str], head: Entry, embedding: Entry) -> None:
    """Accepts a stored head in addition to tied embeddings only as an exact copy."""
    for name, entry in zip(names, (head, embedding), strict=True):
        if isinstance(entry, PackedEntry):
            raise CheckpointError(f"{entry.file} quantises {name}, which is tied: remove the head")
    equal = head.shape == embedding.shape
    with open_tensors(head.file) as a, open_tensors(embedding.file) as b:
        heads = a.get_slice(names[0])
        embeddings = b.get_slice(names[1])
        for start in range(0, head.shape[0], 4096) if equal else ():
            rows = slice(start, min(start + 4096, head.shape[0]))
            wide = [part[rows].astype(np.float32) for part in (heads, embeddings)]
            equal = equal and np.array_equal(*wide, equal_nan=True)
    if not equal:
        raise CheckpointError(
            f"{head.file}: {names[0]} differs from {names[1]}, but config.json has "
            "tie_word_embeddings: true. Set it to false to use both, or remove the head"
        )


def load_values(
    table: Mapping[str, TensorSpec],
    entries: Mapping[str, Entry],
    dtype: jnp.dtype,
    shardings: Mapping[str, NamedSharding],
    formats: Mapping[str, Format] = MappingProxyType({}),
) -> Iterator[tuple[str, Any]]:
    """Yields name and parameter of every tensor in `table`, in the order of the files.

    Of a divided tensor, this process reads only the parts of its devices, and each part goes from
    the host to its device.

    Args:
        table: The tensors, and the place of each in the model.
        entries: The same tensors in the files.
        dtype: Dtype of the parameters.
        shardings: Shardings of parameters; those not named are on JAX's default device.
        formats: From `matrix_formats`; parameters not named are arrays.

    Raises:
        CheckpointError: If a file is cut off, or values are not finite (checked at the end).
    """
    finite: dict[str, tuple[jax.Array, jax.Array]] = {}
    previous = None
    divided = {name: _in_file(place, table[name]) for name, place in shardings.items()}
    parts = {name: _parts(place, table[name].shape) for name, place in divided.items()}
    for name, values in read_ahead({name: entries[name] for name in table}, parts):
        spec = table[name]
        entry = entries[name]
        held = formats.get(name, DENSE)
        places = _places(held, shardings.get(name))
        # No name holds the tensor itself, so that it is gone from the device before the next one.
        if isinstance(entry, PackedEntry):
            value, before, after = _restore(entry, values, dtype, held, places)
        else:
            value, before, after = _store(
                _assemble(values, divided.get(name), spec.shape),
                spec.transpose,
                dtype,
                held,
                places,
            )
        finite[name] = before, after
        # Waiting for the tensor before bounds the host's copies, without idling.
        jax.block_until_ready(previous)
        previous = value
        yield name, value
    # The flags stay on the device until all is loaded: one transfer instead of one per tensor.
    for name, (before, after) in jax.device_get(finite).items():
        where = f"{entries[name].file}: {name}"
        if not before:
            raise CheckpointError(f"{where} holds values that are not finite")
        if not after:
            raise CheckpointError(f"{where} overflows {dtype.name}; load it as bfloat16 or float32")


def _shardings(config: DecoderConfig, mesh: Mesh, on_host: Set[str]) -> dict[str, NamedSharding]:
    """Returns the sharding of each parameter on the mesh, except those in the host's memory."""
    table = tensor_table(config)
    parts = config.family.parts
    dotted = {name: ".".join(map(str, table[name].path)) for name in table if name not in on_host}
    return {name: parameter_sharding(path, mesh, parts) for name, path in dotted.items()}


def _in_file(sharding: NamedSharding, spec: TensorSpec) -> NamedSharding:
    """Returns the partition of a parameter as that of its tensor in the file."""
    if not spec.transpose:
        return sharding
    rows, columns = axes_of(sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(columns, rows))


def _parts(sharding: NamedSharding, shape: tuple[int, ...]) -> list[Part]:
    """Returns the parts of a tensor on this process's devices, each once."""
    indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(shape)
    return list(dict.fromkeys(indices.values()))


def _assemble(
    values: Sequence[np.ndarray], sharding: NamedSharding | None, shape: tuple[int, ...]
) -> Any:
    """Returns a tensor with its parts on their devices; without a sharding, the whole one."""
    if sharding is None:
        (whole,) = values
        return whole
    found: dict[Any, np.ndarray] = dict(zip(_parts(sharding, shape), values, strict=True))
    return jax.make_array_from_callback(shape, sharding, found.__getitem__)


def _places(format: Format, sharding: NamedSharding | None) -> tuple[NamedSharding, ...] | None:
    """Returns the sharding of each stored array of a matrix with `sharding`."""
    if sharding is None:
        return None
    return tuple(NamedSharding(sharding.mesh, part) for part in format.parts(sharding.spec))


@functools.partial(jax.jit, static_argnames=("transpose", "dtype", "format", "places"))
def _store(
    value: jax.Array,
    transpose: bool,
    dtype: jnp.dtype,
    format: Format,
    places: tuple[NamedSharding, ...] | None,
):
    """Returns the parameter, stored and placed, and whether it was finite; see `convert`."""
    matrix, before, after = convert(value, transpose, dtype)
    return _placed(format.store(matrix), places, jax.lax.with_sharding_constraint), before, after


def _restore(
    entry: PackedEntry,
    arrays: Mapping[str, np.ndarray],
    dtype: jnp.dtype,
    format: Format,
    places: tuple[NamedSharding, ...] | None,
):
    """Returns a quantised matrix, or with the format `DENSE` its values, as `_store` does."""
    matrix = entry.restore(arrays, dtype)
    finite = is_finite(matrix)
    stored = matrix.dense() if format is DENSE else matrix
    return _placed(stored, places, jax.device_put), finite, finite


def _placed(
    stored: Any, places: tuple[NamedSharding, ...] | None, place: Callable[..., jax.Array]
) -> Any:
    """Returns a stored matrix with its arrays on their devices, put there by `place`."""
    if places is None:
        return stored
    leaves, structure = jax.tree.flatten(stored)
    return jax.tree.unflatten(structure, map(place, leaves, places))
