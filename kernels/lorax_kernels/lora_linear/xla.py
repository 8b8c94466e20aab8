"""`lora_linear` and its group in plain XLA: what runs wherever the kernel does not."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lorax_kernels.lora_linear.dropout import apply_dropout
from lorax_kernels.lora_linear.reference import accumulation_dtype
from lorax_kernels.lora_linear.weights import Group


def _wide(p, q):
    return jnp.dot(p, q, preferred_element_type=accumulation_dtype(p.dtype))


def forward(x, group: Group, rate: float, key):
    """Returns the outputs of the members, and ``h = dropout(x)·[A₁|A₂|…]`` or None."""
    dtype = x.dtype
    h = None
    if group.ranks:
        # One product for all members: x is read once.
        a = jnp.concatenate([a.astype(dtype) for a in group.a], axis=1)
        # Named before it is used, so that where it is kept no pass multiplies for it again.
        h = checkpoint_name(_wide(apply_dropout(x, rate, key), a).astype(dtype), "lora_h")
    outputs = []
    for member, w in enumerate(group.w):
        y = jnp.dot(x, w.astype(dtype))
        if (columns := group.columns(member)) is not None:
            assert h is not None
            b = group.b[group.adapter(member)].astype(dtype)
            # Both products leave the matrix unit in x's dtype, so that XLA can fold the sum into
            # the second one instead of writing a float32 copy of y.
            y += jnp.dot(group.scales[group.adapter(member)] * h[:, columns], b)
        if (bias := group.biases[member]) is not None:
            y += bias.astype(dtype)[None, :]
        # One name, so that a policy of jax.checkpoint keeps the sum and not its terms.
        outputs.append(checkpoint_name(y, "lora_linear"))
    return outputs, h


def backward(x, h, group: Group, rate: float, key, dys):
    """Returns the gradients of x, of every A and of every B."""
    dtype = x.dtype
    g, db = [], []
    for member in range(len(group.w)):
        if (columns := group.columns(member)) is None:
            continue
        index = group.adapter(member)
        g.append(group.scales[index] * _wide(dys[member], group.b[index].astype(dtype).T))
        db.append(group.scales[index] * _wide(h[:, columns].T, dys[member]))
    dx = None
    if g:
        g = jnp.concatenate(g, axis=1).astype(dtype)
        a = jnp.concatenate([a.astype(dtype) for a in group.a], axis=1)
        dx = apply_dropout(jnp.dot(g, a.T), rate, key)
    # The large products come last: XLA folds what there is so far into each of them.
    for dy, w in zip(dys, group.w, strict=True):
        product = jnp.dot(dy, w.astype(dtype).T)
        dx = product if dx is None else dx + product
    if not group.ranks:
        return dx, [], []
    da = _wide(apply_dropout(x, rate, key).T, g)
    splits = [sum(group.ranks[: i + 1]) for i in range(len(group.ranks) - 1)]
    return dx, jnp.split(da, splits, axis=1), db


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns ``silu(gate)·up``, formed in float32 and rounded once."""
    wide = gate.astype(accumulation_dtype(gate.dtype))
    return (jax.nn.silu(wide) * up.astype(wide.dtype)).astype(gate.dtype)
