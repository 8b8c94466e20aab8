"""`lora_linear`: checks its arguments and defines the gradient, once for all implementations."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lorax_kernels.lora_linear.reference import accumulation_dtype, apply_dropout


def lora_linear(
    x: Float[Array, "*batch k"],
    w: Float[Array, "k n"],
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "*batch n"]:
    """Applies a frozen linear map and its low-rank update: ``x·w + scale · (dropout(x)·a)·b``.

    Operands take `x`'s dtype and every product accumulates in float32. The gradient, with
    ``dy`` the cotangent of the result, ``d`` the dropout and ``g = scale · dy·bᵀ``, is::

        dx = dy·wᵀ + d'(g·aᵀ)      da = d(x)ᵀ·g      db = scale · (d(x)·a)ᵀ·dy

    with `da` and `db` in the dtypes of `a` and `b`. `w` is frozen: its gradient is never
    computed, and differentiating with respect to it gives zeros.

    Args:
        x: Input rows.
        w: Frozen weight.
        a: Down-projection to the rank r.
        b: Up-projection from the rank r.
        scale: ``alpha / r``, or ``alpha / √r`` under rank stabilisation.
        dropout_rate: Probability with which an element of `x` is zeroed on the update's path.
        dropout_key: Decides the dropout mask; required when `dropout_rate` is not 0.

    Returns:
        The adapted output, in `x`'s dtype.

    Raises:
        ValueError: If shapes disagree, `x` is not floating point, `dropout_rate` is outside
            [0, 1), or a dropout has no key.

    Source: Hu et al. 2021, "LoRA", eq. 3, https://arxiv.org/abs/2106.09685
    """
    _validate(x, w, a, b, dropout_rate, dropout_key)
    rows = x.reshape(-1, x.shape[-1])
    y: jax.Array = _lora_linear(rows, w, a, b, dropout_key, float(scale), float(dropout_rate))
    return y.reshape(*x.shape[:-1], w.shape[1])


def _validate(x, w, a, b, dropout_rate, dropout_key):
    shapes = f"x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape}"
    if x.ndim < 1 or w.ndim != 2 or a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"need x (…, k), w (k, n), a (k, r), b (r, n); got {shapes}")
    k, n, r = w.shape[0], w.shape[1], a.shape[1]
    if x.shape[-1] != k or a.shape[0] != k or b.shape != (r, n):
        raise ValueError(f"need x (…, k), w (k, n), a (k, r), b (r, n); got {shapes}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate > 0.0 and dropout_key is None:
        raise ValueError(f"dropout_rate is {dropout_rate} but no dropout_key was given")


def _accumulating_dot(p, q):
    return jnp.dot(p, q, preferred_element_type=accumulation_dtype(p.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _lora_linear(x, w, a, b, key, scale, rate) -> jax.Array:
    return _forward(x, w, a, b, key, scale, rate)[0]


def _forward(x, w, a, b, key, scale, rate):
    dtype = x.dtype
    dropped = apply_dropout(x, rate, key)
    h = _accumulating_dot(dropped, a.astype(dtype)).astype(dtype)
    # Both products leave the matrix unit in x's dtype, so that XLA can fold the sum into the
    # second one instead of writing a float32 copy of y.
    update = jnp.dot(scale * h, b.astype(dtype))
    return jnp.dot(x, w.astype(dtype)) + update, (x, w, a, b, h, key)


def _backward(scale, rate, saved, dy):
    x, w, a, b, h, key = saved
    dtype = x.dtype
    g = scale * _accumulating_dot(dy, b.astype(dtype).T)
    dx = jnp.dot(dy, w.astype(dtype).T)
    dx += apply_dropout(jnp.dot(g.astype(dtype), a.astype(dtype).T), rate, key)
    da = _accumulating_dot(apply_dropout(x, rate, key).T, g.astype(dtype))
    db = scale * _accumulating_dot(h.T, dy)
    return dx, None, da.astype(a.dtype), db.astype(b.dtype), None


_lora_linear.defvjp(_forward, _backward)
