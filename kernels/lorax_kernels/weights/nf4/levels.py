"""The constants of NF4 and of double quantisation.

Source: Dettmers et al. 2023, "QLoRA", appendix E, https://arxiv.org/abs/2305.14314. The
values are bitsandbytes 0.50's, to the last digit.
"""

import functools
import itertools
import struct

BLOCK = 64
"""Elements that share a scale."""

NESTED_BLOCK = 256
"""Scales that share a second scale under double quantisation."""

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values of the codes 0 to 15, each a float32."""

EDGES = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)
"""The boundaries between the codes; a value on a boundary takes the lower code."""


@functools.cache
def nested_levels() -> tuple[float, ...]:
    """Returns the values of the 256 codes of a scale, ascending, each a float32.

    For i in 0 … 6 they are the midpoints of 2^i bins between 0.1 and 1, times 10^(i-6), with both
    signs; and 0 and 1.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = _spread(2**i)
        factor = _single(10.0 ** (i - 6))
        for low, high in itertools.pairwise(edges):
            level = _single(factor * (_single(low + high) / 2))
            levels += [level, -level]
    return tuple(sorted(levels))


def nested_edges() -> tuple[float, ...]:
    """Returns the float32 midpoints between neighbours of `nested_levels`."""
    pairs = itertools.pairwise(nested_levels())
    return tuple(_single(low + high) / 2 for low, high in pairs)


def _spread(bins: int) -> list[float]:
    """Returns the edges of equal bins between 0.1 and 1, as torch.linspace rounds them."""
    first = _single(0.1)
    step = _single(_single(1.0 - first) / bins)
    below = range((bins + 1) // 2)
    edges = [_single(first + step * i) for i in below]
    return edges + [_single(1.0 - step * (bins - i)) for i in range(len(below), bins + 1)]


def _single(value: float) -> float:
    """Returns the nearest float32."""
    return struct.unpack("f", struct.pack("f", value))[0]
