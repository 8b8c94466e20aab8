"""`lora_linear` and its group on Hopper: packing the kernels' operands, adding up their parts.

The ranks of a group's updates are packed side by side in blocks of 64 columns, so that q, k and v
of rank 16 cost one step of the contraction together. A is packed as ``a`` (r, k) and scale·B as
``b`` (r, all members' columns), each block on the rows of its own update and zero elsewhere.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lorax_kernels.lora_linear import xla
from lorax_kernels.lora_linear.choice import padded_rank
from lorax_kernels.lora_linear.gradient import gradient
from lorax_kernels.lora_linear.inline import InlineTerm, inline_matmul
from lorax_kernels.lora_linear.kernel import grouped_matmul
from lorax_kernels.lora_linear.plan import (
    RANK,
    STEP,
    Dropout,
    Epilogue,
    MatmulConfig,
    Term,
    Update,
)
from lorax_kernels.lora_linear.project import project
from lorax_kernels.lora_linear.weights import Group
from lorax_kernels.tuning import (
    gradient_config,
    inline_config,
    inline_width,
    matmul_config,
    project_config,
)

ONE_PASS_RANK = 16  # up to here g and dB come from one read of dy: g's parts are small


@dataclasses.dataclass(frozen=True)
class Layout:
    """The place of each update in h, g and the packed operands.

    Attributes:
        ranks: Ranks of the updates.
        starts: First row of each in ``a`` and ``b``, first column in h and g.
        size: Rows in all, as `padded_rank` returns it.
        columns: First column of every member in ``b``.
    """

    ranks: tuple[int, ...]
    starts: tuple[int, ...]
    size: int
    columns: tuple[int, ...]

    @property
    def is_short(self) -> bool:
        """Says whether all updates together are one short step of the matmul."""
        return 0 < len(self.ranks) and self.size == RANK

    def block(self, index: int) -> tuple[int, int]:
        """Returns (first, number) of the rows that contain update `index`: whole blocks, or all."""
        if self.size <= STEP:
            return 0, self.size
        first = self.starts[index] // STEP * STEP
        return first, -(-(self.starts[index] + self.ranks[index] - first) // STEP) * STEP


class Saved(NamedTuple):
    """Arrays that the backward pass takes from the forward one, without x and the weights.

    Attributes:
        h: ``dropout(x)·A``, (m, r).
        a: Packed A.
        b: Packed scale·B.
    """

    h: jax.Array
    a: jax.Array
    b: jax.Array


def lay_out(group: Group) -> Layout:
    """Places the updates one after another; one that does not fit a block begins the next."""
    starts = []
    end = 0
    for r in group.ranks:
        if end % STEP and end % STEP + r > STEP:
            end = -(-end // STEP) * STEP
        starts.append(end)
        end += r
    widths = [w.shape[1] for w in group.w]
    columns = tuple(sum(widths[:i]) for i in range(len(widths)))
    return Layout(group.ranks, tuple(starts), padded_rank(end), columns)


def _stack(parts, layout: Layout, dtype) -> jax.Array:
    """Puts the updates' parts below each other, in `layout.size` rows."""
    pieces = []
    end = 0
    for part, start in zip(parts, layout.starts, strict=True):
        pieces.append(jnp.pad(part, ((start - end, 0), (0, 0))))
        end = start + part.shape[0]
    stacked = jnp.concatenate(pieces, axis=0)
    return jnp.pad(stacked, ((0, layout.size - end), (0, 0))).astype(dtype)


def pack(group: Group, layout: Layout, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns the packed A and scale·B."""
    blocks = []
    for member, w in enumerate(group.w):
        if member not in group.members:
            blocks.append(jnp.zeros((layout.size, w.shape[1]), dtype))
            continue
        index = group.adapter(member)
        start = layout.starts[index]
        b = group.b[index].astype(jnp.float32)
        rows = (start, layout.size - start - b.shape[0])
        blocks.append(jnp.pad(group.scales[index] * b, (rows, (0, 0))).astype(dtype))
    a = _stack([a.T for a in group.a], layout, dtype)
    return a, jnp.concatenate(blocks, axis=1)


def down_project(x, a, dropout: Dropout | None) -> jax.Array:
    """Returns ``h = dropout(x)·A`` in the group's layout."""
    m, k = x.shape
    parts = project(x, a, config=project_config(m, k, a.shape[0]), mask=dropout)
    return _add(parts).astype(x.dtype)


def _add(parts: jax.Array) -> jax.Array:
    return parts[0] if parts.shape[0] == 1 else parts.sum(axis=0)


def forward(
    x,
    group: Group,
    dropout: Dropout | None,
    residual: jax.Array | None = None,
    keep: bool = False,
) -> tuple[list[jax.Array], list[jax.Array], Saved | None]:
    """Returns the outputs of the members, their products, and what the backward pass needs.

    `residual` is added to the output of a group of one. The products are what factors multiply:
    with `keep` those of all members, otherwise none.
    """
    if not group.ranks:
        return *multiply(x, None, group, residual=residual, keep=keep), None
    m, k = x.shape
    widths = [w.shape[1] for w in group.w]
    n = sum(widths)
    layout = lay_out(group)
    a, b = pack(group, layout, x.dtype)
    begun = None
    n0 = group.w[0].shape[1]
    width = 0 if dropout else inline_width(m, k, n, n0, layout.size)
    if width and residual is not None and inline_config(layout.size).store_n != STEP:
        # Its buffers leave no room to stage the residual. One of two extra passes: x read again for
        # h, or y and the residual read and their sum written.
        if k > 3 * n:
            (y,), products, saved = forward(x, group, dropout, keep=keep)
            return [residual + y], products, saved
        width = 0
    if width:
        config = _forward_config(x, group)
        *results, h = inline_matmul(
            [InlineTerm(x, group.w[0], a)],
            b,
            n=n0,
            width=width,
            config=inline_config(layout.size),
            bias=_padded(group.biases, widths, config, 0.0),
            residual=residual,
            factor=_padded(group.factors, widths, config, 1.0),
            keep=keep,
        )
        begun = (results, width)
    else:
        h = down_project(x, a, dropout)
    saved = Saved(h, a, b)
    return *multiply(x, saved, group, begun, residual, keep), saved


def multiply(
    x,
    saved: Saved | None,
    group: Group,
    begun: tuple[list[jax.Array], int] | None = None,
    residual: jax.Array | None = None,
    keep: bool = False,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the outputs of the members, and their products.

    Args:
        x: Input rows.
        saved: h and the packed operands, or None where no member has an update.
        group: The members.
        begun: As in `grouped_matmul`.
        residual: Added to the output of a group of one.
        keep: As in `forward`.
    """
    epilogue, tail = ("store", []) if residual is None else ("add", [residual])
    layout = lay_out(group)
    config = _forward_config(x, group, epilogue)
    groups = [[Term(x, (w,))] for w in group.w]
    update = None
    if saved is not None and layout.is_short:
        update = Update(saved.h, saved.b)
    elif saved is not None:
        for index, member in enumerate(group.members):
            first, rows = layout.block(index)
            columns = (layout.columns[member],)
            groups[member].append(Term(saved.h, (saved.b,), rows, first, first, columns))
    widths = [w.shape[1] for w in group.w]
    factor = _padded(group.factors, widths, config, 1.0)
    results = grouped_matmul(
        groups,
        config=config,
        epilogue=epilogue,
        bias=_padded(group.biases, widths, config, 0.0),
        tail=tail,
        update=update,
        begun=begun,
        factors=[] if factor is None else [factor],
        keep=keep,
    )
    return (results[::2], results[1::2]) if keep else (results, [])


def _forward_config(x, group: Group, epilogue: Epilogue = "store") -> MatmulConfig:
    m, k = x.shape
    n = sum(w.shape[1] for w in group.w)
    short = lay_out(group).is_short
    return matmul_config(m, k, n, transposed=False, epilogue=epilogue, short=short)


def _padded(
    vectors: xla.Factors, widths: Sequence[int], config: MatmulConfig, missing: float
) -> jax.Array | None:
    """Returns a vector for all members' columns, each part padded to whole tiles, float32.

    A member without a vector has `missing` in each column. Without any the result is None.
    """
    if all(vector is None for vector in vectors):
        return None
    parts = []
    for n, vector in zip(widths, vectors, strict=True):
        whole = -(-n // config.block_n) * config.block_n
        part = jnp.full((n,), missing, jnp.float32) if vector is None else vector
        parts.append(jnp.pad(part.astype(jnp.float32), (0, whole - n)))
    return jnp.concatenate(parts)


def _pair(factors: xla.Factors, n: int, config: MatmulConfig) -> list[jax.Array]:
    """Returns the factors of gate and up, n each, padded to whole tiles; or none."""
    both = _padded(factors, (n, n), config, 1.0) if factors else None
    return [] if both is None else jnp.split(both, 2)


def backward(
    x: jax.Array | None,
    saved: Saved | None,
    group: Group,
    dropout: Dropout | None,
    dys: Sequence[jax.Array],
    gate_up: Sequence[jax.Array] = (),
    factors: xla.Factors = (),
):
    """Returns the gradients ``[of x]``, of every A, of every B, and of `factors`.

    Those of A and B are float32. Where x is ``silu(gate)·up`` and `gate_up` holds the two before
    their `factors`, it returns their gradients instead of x's, and computes x from them: it may be
    None. `dys` are the gradients of the products that the group's own factors multiply.
    """
    m = dys[0].shape[0]
    k = group.w[0].shape[0]
    n = sum(w.shape[1] for w in group.w)
    layout = lay_out(group)
    if gate_up and dropout is not None and not layout.is_short:
        act, pull = jax.vjp(xla.swiglu, *gate_up, factors)
        (d_act,), da, db, _ = backward(act, saved, group, dropout, dys)
        *dxs, of_factors = pull(d_act)
        return dxs, da, db, of_factors
    epilogue: Epilogue = "swiglu_back" if gate_up else "store"
    config = matmul_config(m, n, k, transposed=True, epilogue=epilogue, short=layout.is_short)
    options = {"transposed": True, "epilogue": epilogue, "tail": gate_up}
    options["factors"] = _pair(factors, k, config)
    multiply = functools.partial(grouped_matmul, config=config, **options)
    terms = [Term(dy, (w,)) for dy, w in zip(dys, group.w, strict=True)]
    if saved is None:
        dxs = multiply([terms])[: len(gate_up) or 1]
        dxs, of_factors = xla.through_factors(factors, gate_up, dxs)
        return dxs, [], [], of_factors
    a = saved.a
    width = 0
    if dropout is None and layout.size > ONE_PASS_RANK and not gate_up:
        width = inline_width(m, n, k, k, layout.size)
    g, db, begun = _through_updates(saved, group, layout, dys, width)
    update = Update(g, a) if layout.is_short else None
    if update is None:
        terms.append(Term(g, (a.T,)))
    dxs = multiply([terms], update=update, dropout=dropout, begun=begun)
    if gate_up:
        *dxs, x = dxs
    assert x is not None
    config = gradient_config(m, k, layout.size)
    columns = (0, layout.size)
    (parts,) = gradient(x, g, config=config, columns=columns, mask=dropout)
    if gate_up:
        # x is as large as either, and not needed once their gradients are read.
        dxs, parts = jax.lax.optimization_barrier((dxs, parts))
    dxs, of_factors = xla.through_factors(factors, gate_up, dxs)
    spans = zip(layout.starts, layout.ranks, strict=True)
    return dxs, [_add(parts[:, :, start : start + r]) for start, r in spans], db, of_factors


def _through_updates(saved: Saved, group: Group, layout: Layout, dys, width: int):
    """Returns g (m, r), every dB, and dx with its first `width` columns, or None."""
    if not width:
        pairs = [_through_b(saved, group, i, layout, dys[j]) for i, j in enumerate(group.members)]
        g = _stack([projected.T for _, projected in pairs], layout, dys[0].dtype).T
        return g, [gradient_of_b for gradient_of_b, _ in pairs], None
    inline = [
        InlineTerm(dy, w, saved.b, column)
        for dy, w, column in zip(dys, group.w, layout.columns, strict=True)
    ]
    n = group.w[0].shape[0]
    config = inline_config(layout.size)
    *dx, g = inline_matmul(inline, saved.a, n=n, width=width, config=config, transposed=True)
    members = enumerate(group.members)
    return g, [_gradient_of_b(saved.h, group, i, layout, dys[j]) for i, j in members], (dx, width)


def _gradient_of_b(h, group: Group, index: int, layout: Layout, dy) -> jax.Array:
    """Returns ``dB = scale·hᵀ·dy``, float32."""
    m, n = dy.shape
    first, width = layout.block(index)
    config = gradient_config(m, n, width)
    # Called in the form of dA, so that passes of one shape are one kernel.
    (sums,) = gradient(dy, h, config=config, columns=(first, width), mask=None)
    return _own_rows(sums, group, index, layout)


def _own_rows(sums, group: Group, index: int, layout: Layout) -> jax.Array:
    """Returns update `index`'s part of ``dyᵀ·h``, added up, transposed and scaled: dB."""
    at = layout.starts[index] - layout.block(index)[0]
    return group.scales[index] * _add(sums[:, :, at : at + group.ranks[index]]).T


def _through_b(saved: Saved, group: Group, index: int, layout: Layout, dy):
    """Returns ``dB = scale·hᵀ·dy`` and ``g = scale·dy·Bᵀ`` (m, r), both float32."""
    m, n = dy.shape
    r = group.ranks[index]
    first, rows = layout.block(index)
    start = layout.starts[index]
    column = layout.columns[group.members[index]]
    b = saved.b
    if len(group.w) > 1 or rows < layout.size:
        own = b[start : start + r, column : column + n]
        b = jnp.pad(own, ((0, padded_rank(r) - r), (0, 0)))
    if b.shape[0] > ONE_PASS_RANK:
        parts = project(dy, b, config=project_config(m, n, b.shape[0]))
        projected = _add(parts)[:, :r].astype(jnp.float32)
        return _gradient_of_b(saved.h, group, index, layout, dy), projected
    config = gradient_config(m, n, rows, b.shape[0])
    sums, parts = gradient(dy, saved.h, b, config=config, columns=(first, rows))
    return _own_rows(sums, group, index, layout), _add(parts)[:, :r]


def swiglu(
    x, h, b, group: Group, epilogue: Epilogue, tail: Sequence[jax.Array] = ()
) -> list[jax.Array]:
    """Runs gate and up with a SwiGLU epilogue; see `grouped_matmul`."""
    m, k = x.shape
    n = group.w[0].shape[1]
    config = matmul_config(m, k, 2 * n, transposed=False, epilogue=epilogue)
    terms = [Term(x, (group.w[0], group.w[1]))]
    if h is not None:
        terms.append(Term(h, (b, b), b.shape[0], columns=(0, n)))
    return grouped_matmul(
        [terms],
        config=config,
        epilogue=epilogue,
        tail=tail,
        factors=_pair(group.factors, n, config),
    )
