"""`lora_linear` and its group in plain XLA, for all cases that the kernel does not run.

The gradients of factors are here for both.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lorax_kernels.dtypes import accumulation_dtype
from lorax_kernels.lora_linear.dropout import apply_dropout
from lorax_kernels.lora_linear.weights import Group

type Factors = Sequence[jax.Array | None]

# Ranks that are one step of a matmul, so that a member may as well read all of them: others' are
# multiplied by zero, which is exact for finite values.
_FEW = 64


def _fold(total, product):
    """Adds in the order in which XLA folds a sum into the last matmul."""
    return product + total


def _wide(p, q):
    return jnp.dot(p, q, preferred_element_type=accumulation_dtype(p.dtype))


def _span(group: Group, member: int) -> slice | None:
    """Returns the columns of h that a member's matmul reads: all of them where they are few."""
    own = group.columns(member)
    return slice(0, sum(group.ranks)) if own and _reads_all(group) else own


def _reads_all(group: Group) -> bool:
    return sum(group.ranks) <= _FEW


def _rows(group: Group, member: int) -> slice:
    """Returns the place of the member's own columns in its span."""
    own = group.columns(member)
    span = _span(group, member)
    assert own is not None and span is not None
    return slice(own.start - span.start, own.stop - span.start)


def _scaled_b(group: Group, member: int, dtype):
    """Returns ``scale·B`` on its own rows of the span, zero on others'.

    It is multiplied before it is rounded: elsewhere that would cost another pass.
    """
    index = group.adapter(member)
    rows = _rows(group, member)
    span = _span(group, member)
    assert span is not None
    scaled = group.scales[index] * group.b[index].astype(accumulation_dtype(dtype))
    outside = (rows.start, span.stop - span.start - rows.stop)
    return jnp.pad(scaled, (outside, (0, 0))).astype(dtype)


def forward(x, group: Group, residual=None):
    """Returns the outputs of the members, their products, and ``h = dropout(x)·[A₁|A₂|…]`` or None.

    The products are what factors multiply: empty where no member has one. `residual` is added to
    the output of a group of one.
    """
    dtype = x.dtype
    h = None
    if group.ranks:
        # One matmul for all members: x is read once.
        a = jnp.concatenate([a.astype(dtype) for a in group.a], axis=1)
        # Named before it is used, so that where it is stored no pass recomputes it.
        h = checkpoint_name(jnp.dot(apply_dropout(x, group.rate, group.key), a), "lora_h")
    outputs = []
    products = []
    for member, w in enumerate(group.w):
        y = jnp.dot(x, w.astype(dtype))
        if (span := _span(group, member)) is not None:
            assert h is not None
            # Both matmuls give x's dtype, so that XLA can fold the sum into the second one instead
            # of writing a float32 copy of y.
            y += jnp.dot(h[:, span], _scaled_b(group, member, dtype))
        bias = group.biases[member]
        factor = group.factors[member]
        if group.has_factors:
            products.append(checkpoint_name(y, "lora_linear"))
        if factor is not None:
            # From what is kept the rest takes no matmul, so no policy needs its name.
            outputs.append(_scale(products[-1], factor, bias, residual))
            continue
        if bias is not None:
            y += bias.astype(dtype)[None, :]
        if residual is not None:
            y = residual + y
        # One name, so that a policy of jax.checkpoint keeps the sum and not its terms.
        outputs.append(checkpoint_name(y, "lora_linear"))
    return outputs, products, h


def _scale(product, factor, bias, residual):
    """Returns ``factor·product (+ bias + residual)``, rounded once."""
    wide = accumulation_dtype(product.dtype)
    y = product.astype(wide) * factor.astype(wide)[None, :]
    if bias is not None:
        y += bias.astype(wide)[None, :]
    if residual is not None:
        y = residual.astype(wide) + y
    return y.astype(product.dtype)


def through_factors(
    factors: Factors, products: Sequence[jax.Array], dys
) -> tuple[list[jax.Array], list[jax.Array | None]]:
    """Returns the gradients of products, and those of their factors or None.

    Of a product u and ``y = f∘u`` they are ``f∘dy``, rounded once, and ``Σ_rows dy∘u``. A quotient
    ``y / f`` in the place of u would need no u, but not be there where f is 0.
    """
    if all(factor is None for factor in factors):
        return list(dys), list(factors)
    gradients = []
    of_factors: list[jax.Array | None] = []
    for factor, product, dy in zip(factors, products, dys, strict=True):
        if factor is None:
            gradients.append(dy)
            of_factors.append(None)
            continue
        wide = dy.astype(accumulation_dtype(dy.dtype))
        gradients.append((factor.astype(wide.dtype)[None, :] * wide).astype(dy.dtype))
        of_factors.append((wide * product.astype(wide.dtype)).sum(0))
    return gradients, of_factors


def backward(x, h, group: Group, dys):
    """Returns the gradients of x, of every A and of every B."""
    dtype = x.dtype
    g = []
    db = []
    for member in group.members:
        span = _span(group, member)
        scale = group.scales[group.adapter(member)]
        g.append(jnp.dot(dys[member], _scaled_b(group, member, dtype).T))
        db.append(scale * _wide(h[:, span].T, dys[member])[_rows(group, member)])
    dx = None
    if g:
        # Where all have the whole span each is zero outside its own, and the sum is exact.
        g = functools.reduce(_fold, g) if _reads_all(group) else jnp.concatenate(g, axis=1)
        a = jnp.concatenate([a.astype(dtype) for a in group.a], axis=1)
        dx = apply_dropout(jnp.dot(g, a.T), group.rate, group.key)
    # The large matmuls come last: XLA folds the sum so far into each of them.
    for dy, w in zip(dys, group.w, strict=True):
        product = jnp.dot(dy, w.astype(dtype).T)
        dx = product if dx is None else _fold(dx, product)
    if not group.ranks:
        return dx, [], []
    da = _wide(apply_dropout(x, group.rate, group.key).T, g)
    splits = [sum(group.ranks[: i + 1]) for i in range(len(group.ranks) - 1)]
    return dx, jnp.split(da, splits, axis=1), db


def swiglu(gate: jax.Array, up: jax.Array, factors: Factors = (None, None)) -> jax.Array:
    """Returns ``silu(gate)·up``, computed in float32 and rounded once.

    `factors` are those of the columns of gate and up, which are multiplied here.
    """
    wide = accumulation_dtype(gate.dtype)

    def scaled(v, factor):
        v = v.astype(wide)
        return v if factor is None else v * factor.astype(wide)[None, :]

    of_gate, of_up = factors
    return (jax.nn.silu(scaled(gate, of_gate)) * scaled(up, of_up)).astype(gate.dtype)
