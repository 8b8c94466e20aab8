"""Rotary position embedding: inverse frequencies of every supported scaling, and the rotation."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorax.system.json_fields import JsonFields

DEFAULT_THETA = 10_000.0

# Fields that transformers reads for each type; it ignores a field of another type.
_FIELDS_OF_TYPE = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """The parameters of a rotary embedding, under transformers' names.

    Attributes:
        rope_type: default, linear, dynamic, llama3 or yarn.
        rope_theta: Base of the wavelengths.
        factor: How far the context is stretched.
        original_max_position_embeddings: Context before stretching; None is the model's own
            ``max_position_embeddings``.
        low_freq_factor: llama3: wavelengths above context / this are divided by `factor`.
        high_freq_factor: llama3: wavelengths below context / this stay.
        attention_factor: yarn: scale of cos and sin; None derives it from `factor`.
        beta_fast: yarn: rotations above which a dimension stays; None is 32.
        beta_slow: yarn: rotations below which a dimension is stretched; None is 1.
        mscale: yarn: numerator's weight of log(factor) in the attention factor.
        mscale_all_dim: yarn: denominator's weight of log(factor) in the attention factor.
        truncate: yarn: round the correction range to whole dimensions.
    """

    rope_type: str = "default"
    rope_theta: float = DEFAULT_THETA
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @classmethod
    def from_hf(cls, fields: JsonFields) -> "RopeConfig":
        """Reads ``rope_parameters`` or ``rope_theta`` and ``rope_scaling`` of a config.json.

        Raises:
            ValueError: Naming file and field, if the type is not supported, a value is out of
                range, or two spellings of the same setting disagree.
        """
        found = {k: fields.raw(k, None) for k in ("rope_parameters", "rope_scaling")}
        found = {k: dict(_object(fields, k, v)) for k, v in found.items() if v is not None}
        outer = fields.number("rope_theta", None, minimum=0, above=True)
        configs = [_read_type(v, fields.where, f"{k}.", outer) for k, v in found.items()]
        if len(configs) == 2 and configs[0] != configs[1]:
            raise fields.error("rope_parameters", "must agree with rope_scaling")
        if configs:
            return configs[0]
        return cls(rope_theta=DEFAULT_THETA if outer is None else outer)

    def to_hf(self) -> dict[str, Any]:
        """Returns both spellings: transformers 5 reads either, older versions the second."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        scaling = {k: v for k, v in given.items() if k != "rope_theta"}
        return {
            "rope_parameters": given,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_type == "default" else scaling,
        }


def _object(fields: JsonFields, name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise fields.error(name, "must be an object")
    return value


def _read_type(values: dict[str, Any], where: str, prefix: str, theta: float | None) -> RopeConfig:
    fields = JsonFields(values, where, prefix)
    old = fields.raw("type", None)
    new = fields.raw("rope_type", None)
    if old is not None and new is not None and old != new:
        raise fields.error("rope_type", f"must equal {prefix}type={old!r}")
    rope_type = next((t for t in (new, old) if t is not None), "default")
    if not isinstance(rope_type, str) or rope_type not in _FIELDS_OF_TYPE:
        name = "rope_type" if new is not None else "type"
        raise fields.error(name, f"must be one of {', '.join(_FIELDS_OF_TYPE)}")
    inner = fields.number("rope_theta", theta, minimum=0, above=True)
    if theta is not None and inner != theta:
        raise fields.error("rope_theta", f"must equal the rope_theta={theta} outside")
    fields.only("partial_rotary_factor", (1,), "lorax rotates whole heads")
    readers = {
        "factor": lambda n: fields.number(n, minimum=1),
        "original_max_position_embeddings": lambda n: fields.integer(n, None),
        "low_freq_factor": lambda n: fields.number(n, minimum=0, above=True),
        "high_freq_factor": lambda n: fields.number(n, minimum=0, above=True),
        "truncate": lambda n: fields.boolean(n, None),
    }

    def optional(n):
        return fields.number(n, None, minimum=0)

    read = {name: readers.get(name, optional)(name) for name in _FIELDS_OF_TYPE[rope_type]}
    fields.finish()
    config = RopeConfig(
        rope_type=rope_type, rope_theta=DEFAULT_THETA if inner is None else inner, **read
    )
    if rope_type == "llama3" and read["high_freq_factor"] <= read["low_freq_factor"]:
        raise fields.error("high_freq_factor", f"must exceed {prefix}low_freq_factor")
    if (config.beta_fast or 32) < (config.beta_slow or 1):
        raise fields.error("beta_fast", f"must be at least {prefix}beta_slow")
    return config


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int
) -> tuple[np.ndarray, float]:
    """Returns ``ω_i = θ^(-2i / head_dim)`` after scaling, and the factor on cos and sin.

    All arithmetic is float32, operation for operation as in transformers, so that the angles at
    large positions are those that the model was trained with. For ``dynamic`` these are the
    frequencies up to ``max_position_embeddings``; see `rotary_tables` for beyond.

    Args:
        rope: The embedding.
        head_dim: Size of a head, even.
        max_position_embeddings: The model's context.

    Returns:
        (head_dim / 2 float32 frequencies, attention factor).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # numpy's float32 power is off by a unit in the last place, torch's hardly ever is.
    powers = (np.float64(rope.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    match rope.rope_type:
        case "linear":
            return frequencies / np.float32(rope.factor), 1.0
        case "llama3":
            return _llama3(rope, frequencies, max_position_embeddings), 1.0
        case "yarn":
            return _yarn(rope, powers, head_dim, max_position_embeddings)
    return frequencies, 1.0


def _llama3(rope: RopeConfig, frequencies: np.ndarray, max_position: int) -> np.ndarray:
    """Stretches long wavelengths and blends in between (Llama 3.1)."""
    context = rope.original_max_position_embeddings or max_position
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor
    low = rope.low_freq_factor
    high = rope.high_freq_factor
    # A scalar over an array is the array's reciprocal times the scalar, in torch.
    wavelengths = np.float32(1) / frequencies * np.float32(2 * math.pi)
    stretched = frequencies / np.float32(rope.factor)
    turns = np.float32(1) / wavelengths * np.float32(context)
    blend = (turns - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - blend) * frequencies / np.float32(rope.factor)
    blended = blended + blend * frequencies
    result = np.where(wavelengths > np.float32(context / low), stretched, blended)
    return np.where(wavelengths < np.float32(context / high), frequencies, result)


def _yarn(
    rope: RopeConfig, powers: np.ndarray, head_dim: int, max_position: int
) -> tuple[np.ndarray, float]:
    """Stretches slow dimensions, keeps fast ones, ramps between.

    Source: Peng et al. 2023, "YaRN", §3.2-3.4, https://arxiv.org/abs/2309.00071
    """
    context = rope.original_max_position_embeddings or max_position
    assert rope.factor is not None

    def dimension(rotations: float) -> float:
        ratio = math.log(context / (rotations * 2 * math.pi))
        return head_dim * ratio / (2 * math.log(rope.rope_theta))

    low = dimension(rope.beta_fast or 32)
    high = dimension(rope.beta_slow or 1)
    if rope.truncate is not False:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    stretched = np.float32(1) / (np.float32(rope.factor) * powers)
    frequencies = stretched * (np.float32(1) - kept) + np.float32(1) / powers * kept
    return frequencies, _yarn_attention_factor(rope, rope.factor)


def _yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(m):
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rotary_tables(
    rope: RopeConfig,
    head_dim: int,
    max_position_embeddings: int,
    positions: Int[Array, "b t"],
    lengths: Int[Array, "b #t"],
) -> tuple[Float[Array, "b t half"], Float[Array, "b t half"]]:
    """Returns ``cos(p·ω)`` and ``sin(p·ω)``, times the attention factor, in float32.

    Args:
        rope: The embedding.
        head_dim: Size of a head.
        max_position_embeddings: The model's context.
        positions: Position of each token in its document.
        lengths: Length of the document of each token (or of each sequence); only ``dynamic`` reads
            it, and only where it exceeds `max_position_embeddings`.
    """
    frequencies, factor = inverse_frequencies(rope, head_dim, max_position_embeddings)
    omega = jnp.asarray(frequencies)[None, None, :]
    if rope.rope_type == "dynamic":
        beyond = (lengths > max_position_embeddings)[..., None]
        grown = _dynamic_frequencies(rope, head_dim, max_position_embeddings, lengths)
        omega = jnp.where(beyond, grown, omega)
    angles = positions.astype(jnp.float32)[..., None] * omega
    return jnp.cos(angles) * jnp.float32(factor), jnp.sin(angles) * jnp.float32(factor)


def _dynamic_frequencies(
    rope: RopeConfig, head_dim: int, max_position: int, lengths: Int[Array, "b #t"]
) -> Float[Array, "b #t half"]:
    """NTK scaling: the base grows with the length, ``θ·(factor·L/max - factor + 1)^(d/(d-2))``."""
    assert rope.factor is not None
    length = jnp.maximum(lengths, max_position).astype(jnp.float32)
    growth = jnp.float32(rope.factor) * length / jnp.float32(max_position)
    growth = growth - jnp.float32(rope.factor - 1)
    base = jnp.float32(rope.rope_theta) * growth ** jnp.float32(head_dim / (head_dim - 2))
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / jnp.float32(head_dim)
    return jnp.float32(1) / base[..., None] ** exponents[None, None, :]


def rotate(
    x: Float[Array, "b t heads d"],
    cos: Float[Array, "b t half"],
    sin: Float[Array, "b t half"],
) -> Float[Array, "b t heads d"]:
    """Rotates each pair (x_i, x_{i + d/2}) by its angle; float32 inside, `x`'s dtype outside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos = cos[:, :, None, :]
    sin = sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
