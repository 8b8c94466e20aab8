"""NF4 in NumPy, by the two rules of bitsandbytes, and bitsandbytes' own tensors.

`golden/nf4_bitsandbytes_0_50_2_cpu.npz` holds matrices (out, in), the tensors to which bitsandbytes
0.50.2 quantised them on a CPU, and the dequantised values. On an H200 bitsandbytes 0.50.2 gave the
bytes of `quantised` with the rule ``cuda`` in 36 cases of such and larger shapes, and the values of
`dense`.
"""

import functools
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lorax_kernels.weights.nf4 import Nf4
from lorax_kernels.weights.nf4.levels import EDGES, LEVELS, nested_edges, nested_levels

_GOLDEN = Path(__file__).parent / "golden" / "nf4_bitsandbytes_0_50_2_cpu.npz"


@functools.cache
def golden():
    """Returns case → tensor → array of bitsandbytes."""
    cases = {}
    with np.load(_GOLDEN) as file:
        for name in file.files:
            case, tensor = name.split("/")
            cases.setdefault(case, {})[tensor] = file[name]
    for case, tensors in cases.items():
        shape = tuple(map(int, re.findall(r"\d+", case)[:2]))
        dtype = jnp.dtype(case.split("_")[1])
        for bits in ("input", "dequantised"):
            tensors[bits] = tensors[f"{bits}_bits"].view(dtype).reshape(shape)
    return cases


def state_of(tensors):
    """Returns the JSON that is stored with a weight."""
    return json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"]).decode())


def stored(tensors):
    """Returns a checkpoint's tensors as the library's `Nf4`."""
    state = state_of(tensors)
    n, k = state["shape"]
    nested, offset = tensors.get("weight.nested_absmax"), state.get("nested_offset")
    return Nf4.from_bitsandbytes(
        jnp.asarray(tensors["weight"].reshape(-1)),
        jnp.asarray(tensors["weight.absmax"]),
        None if nested is None else jnp.asarray(nested),
        None if offset is None else jnp.float32(offset),
        shape=(k, n),
        dtype=state["dtype"],
    )


def _over_absmax(flat, block, rule):
    blocks = np.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        if rule == "cuda":
            return (blocks * (np.float32(1) / absmax)[:, None]).reshape(-1)[: flat.size], absmax
        floor = np.maximum(absmax, np.float32(1e-38))
        scaled = blocks * (np.float32(1) / floor)[:, None]
        if flat.size % block:
            scaled[-1], absmax[-1] = blocks[-1] / floor[-1], floor[-1]
        return np.clip(scaled, -1, 1).reshape(-1)[: flat.size], absmax


def _nested(values, rule):
    scaled, absmax = _over_absmax(values, 256, "cuda")
    edges = np.array(nested_edges(), np.float32)
    if rule == "cuda":
        codes = np.searchsorted(edges, scaled, side="left")
        on_edge = scaled == edges[np.minimum(codes, 254)]
        codes += on_edge & (codes < 255) & (codes % 2 == 1)
    else:
        points = np.arange(65536, dtype=np.float32) * np.float32(2) / np.float32(65535)
        table = np.searchsorted(edges, points - np.float32(1), side="left")
        half = (np.clip(scaled, -1, 1) + np.float32(1)) * np.float32(0.5)
        codes = table[np.nan_to_num(half * np.float32(65535) + np.float32(0.5)).astype(int)]
    return np.where(np.repeat(absmax == 0, 256)[: codes.size], 0, codes).astype(np.uint8), absmax


def quantised(weight, double, rule, offset=None):
    """Returns (codes, absmax, nested absmax, offset) of a weight (out, in), flat."""
    flat = np.asarray(weight).astype(np.float32).reshape(-1)
    scaled, absmax = _over_absmax(flat, 64, rule)
    scaled = np.append(scaled, np.zeros(flat.size % 2, np.float32))
    codes = np.searchsorted(np.array(EDGES, np.float32), scaled, side="left").astype(np.uint8)
    codes[np.isnan(scaled)] = 0
    packed = codes[0::2] << 4 | codes[1::2]
    if not double:
        return packed, absmax, None, None
    if offset is None:
        offset = np.float32(absmax.astype(np.float64).mean())
    offset = np.float32(offset)
    return packed, *_nested(absmax - offset, rule), offset


def dense(codes, absmax, nested, offset, shape, dtype):
    """Returns the weight (out, in) of flat arrays."""
    if nested is not None:
        scale = np.repeat(nested, 256)[: absmax.size]
        absmax = np.array(nested_levels(), np.float32)[absmax] * scale + offset
    size = int(np.prod(shape))
    both = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:size]
    values = np.array(LEVELS, np.float32)[both] * np.repeat(absmax, 64)[:size]
    return values.astype(dtype).reshape(shape)
