"""Matrices that a checkpoint holds as several tensors: bitsandbytes' codes and scales."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lorax.interop.safetensors import (
    PACKED_DTYPES,
    READABLE_DTYPES,
    Part,
    TensorEntry,
    read_tensor,
    unreadable,
)
from lorax.system.files import CheckpointError
from lorax.system.json_fields import JsonFields
from lorax.weights.format import Format
from lorax.weights.nf4 import NF4, NF4_DOUBLE
from lorax_kernels.weights.nf4 import Nf4
from lorax_kernels.weights.nf4.levels import BLOCK, LEVELS, NESTED_BLOCK, nested_levels

_STATE = ".quant_state.bitsandbytes__nf4"
_ANY_STATE = ".quant_state."
_TABLES = {"quant_map": LEVELS, "nested_quant_map": nested_levels()}


@dataclasses.dataclass(frozen=True)
class PackedEntry:
    """A quantised matrix of a checkpoint, whose header and description have been read.

    Attributes:
        parts: Its tensors: ``codes``, ``absmax`` and, with double quantisation, ``nested_absmax``.
        shape: Shape of the matrix in the file, (n, k).
        dtype: Dtype of its values, as safetensors names it.
        offset_of_scales: The mean of the scales; None without double quantisation.
    """

    parts: Mapping[str, TensorEntry]
    shape: tuple[int, ...]
    dtype: str
    offset_of_scales: float | None

    @property
    def file(self) -> Path:
        """The file of its codes."""
        return self.parts["codes"].file

    @property
    def offset(self) -> int:
        """Byte of the file at which its codes begin."""
        return self.parts["codes"].offset

    @property
    def format(self) -> Format:
        """The format of the matrix."""
        return NF4 if self.offset_of_scales is None else NF4_DOUBLE

    def read(self, parts: Sequence[Part] = ()) -> dict[str, np.ndarray]:
        """Reads its arrays, by name, each whole.

        Args:
            parts: Not used: blocks may span what a partition divides.

        Raises:
            CheckpointError: As `read_tensor`.
        """
        arrays = {name: read_tensor(entry) for name, entry in self.parts.items()}
        # `bnb_4bit_quant_storage` is a dtype in which the same bytes are seen.
        return arrays | {"codes": arrays["codes"].reshape(-1).view(np.uint8)}

    def restore(self, arrays: Mapping[str, Any], dtype: DTypeLike) -> Nf4:
        """Returns the matrix (k, n) of the arrays from `read`, to be multiplied in `dtype`."""
        n, k = self.shape
        offset = self.offset_of_scales
        return Nf4.from_bitsandbytes(
            arrays["codes"],
            arrays["absmax"],
            arrays.get("nested_absmax"),
            None if offset is None else jnp.float32(offset),
            shape=(k, n),
            dtype=jnp.dtype(dtype),
        )


type Entry = TensorEntry | PackedEntry


def pack_entries(entries: Mapping[str, TensorEntry]) -> dict[str, Entry]:
    """Returns a checkpoint's tensors, those of each quantised matrix as one entry.

    Args:
        entries: All tensors, from `lorax.interop.folder.find_tensors`.

    Raises:
        CheckpointError: If a quantised matrix is not NF4 of bitsandbytes, lacks a tensor, has one
            of another shape, or was made with other blocks or levels.
    """
    packed: dict[str, Entry] = {}
    used: set[str] = set()
    for name, entry in entries.items():
        if name.endswith(_STATE):
            weight = name.removesuffix(_STATE)
            packed[weight] = _read_matrix(weight, entries, used)
        elif _ANY_STATE in name:
            kind = name.rpartition("__")[2]
            raise CheckpointError(
                f"{entry.file}: {name} describes {kind}; of bitsandbytes' 4-bit types lorax reads "
                "nf4: name the 16-bit checkpoint, which model.quantization quantises"
            )
    rest = {name: entry for name, entry in entries.items() if name not in used}
    for name, entry in rest.items():
        if entry.dtype in PACKED_DTYPES:
            raise unreadable(name, entry)
    return {**rest, **packed}


def _read_matrix(weight: str, entries: Mapping[str, TensorEntry], used: set[str]) -> PackedEntry:
    """Returns the entry of a matrix, and adds the names of its tensors to `used`."""
    state_entry = entries[weight + _STATE]
    state = _read_state(state_entry, weight + _STATE)
    n, k = state.shape
    blocks = -(-n * k // BLOCK)
    sizes = {"codes": -(-n * k // 2), "absmax": blocks, "quant_map": len(LEVELS)}
    if state.offset is not None:
        sizes |= {"nested_absmax": -(-blocks // NESTED_BLOCK), "nested_quant_map": 256}
    names = {part: weight if part == "codes" else f"{weight}.{part}" for part in sizes}
    if missing := [name for name in names.values() if name not in entries]:
        raise CheckpointError(f"{state_entry.file} lacks {', '.join(missing)}; fetch it again")
    for part, name in names.items():
        entry = entries[name]
        kind = (READABLE_DTYPES | PACKED_DTYPES)[entry.dtype]
        elements = int(np.prod(entry.shape))
        if part == "codes":
            elements *= np.dtype(kind).itemsize
        nested = part == "absmax" and state.offset is not None
        wanted = entry.dtype if part == "codes" else "U8" if nested else "F32"
        if (elements, entry.dtype) != (sizes[part], wanted):
            raise CheckpointError(
                f"{entry.file}: {name} is {entry.dtype} {list(entry.shape)}; a matrix of "
                f"{[n, k]} needs {sizes[part]} of {'bytes' if part == 'codes' else wanted}"
            )
        if part in _TABLES:
            _check_table(name, entry, _TABLES[part])
    used.update([*names.values(), weight + _STATE])
    kept = ("codes", "absmax", "nested_absmax")
    parts = {part: entries[names[part]] for part in kept if part in names}
    return PackedEntry(parts, state.shape, state.dtype, state.offset)


@dataclasses.dataclass(frozen=True)
class _State:
    """The description of a matrix: its shape (n, k), dtype, and the mean of its scales."""

    shape: tuple[int, int]
    dtype: str
    offset: float | None


def _read_state(entry: TensorEntry, name: str) -> _State:
    """Reads the JSON that bitsandbytes keeps beside a matrix."""
    where = f"{entry.file}: {name}"
    try:
        values = json.loads(bytes(read_tensor(entry)))
    except ValueError as error:
        raise CheckpointError(f"{where} is no JSON ({error}); fetch the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} must be a JSON object")
    fields = JsonFields(values, where)
    fields.only("quant_type", ("nf4",), "lorax reads nf4")
    fields.only("blocksize", (BLOCK,), "lorax reads blocks of 64")
    fields.only("nested_blocksize", (NESTED_BLOCK,), "lorax reads nested blocks of 256")
    fields.only("nested_dtype", ("float32",), "lorax reads scales in float32")
    dtypes = {np.dtype(dtype).name: label for label, dtype in READABLE_DTYPES.items()}
    if fields.raw("dtype") not in dtypes:
        raise fields.error("dtype", f"must be one of {', '.join(dtypes)}")
    shape = fields.raw("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape))):
        raise fields.error("shape", "must be two numbers, a matrix's")
    offset = None
    if "nested_offset" in values or "nested_blocksize" in values:
        offset = fields.number("nested_offset", minimum=-3.5e38)
    fields.finish()
    return _State((shape[0], shape[1]), dtypes[fields.raw("dtype")], offset)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _check_table(name: str, entry: TensorEntry, levels: tuple[float, ...]) -> None:
    if not np.array_equal(read_tensor(entry), np.asarray(levels, np.float32)):
        raise CheckpointError(
            f"{entry.file}: {name} holds other levels than bitsandbytes 0.50's, which lorax "
            "computes with: quantise the 16-bit checkpoint again"
        )


def is_finite(matrix: Nf4) -> jax.Array:
    """Says whether all values of a matrix are finite: its scales are."""
    return jnp.isfinite(matrix.scales()).all()
