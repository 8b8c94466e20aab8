"""`lora_linear` and its group on Hopper: what is handed to the kernels, and what is added up.

The ranks of a group's updates lie side by side in blocks of 64 columns, so that q, k and v of rank
16 cost one step of the contraction together.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lorax_kernels.lora_linear.inline import InlineTerm, inline_matmul
from lorax_kernels.lora_linear.kernel import (
    STEP,
    Dropout,
    Epilogue,
    MatmulConfig,
    Term,
    grouped_matmul,
)
from lorax_kernels.lora_linear.skinny import gradient, padded_rank, project
from lorax_kernels.lora_linear.weights import Group
from lorax_kernels.tuning import (
    gradient_config,
    inline_config,
    inline_width,
    matmul_config,
    project_config,
)

ONE_PASS_RANK = 64  # up to here g and dB come from one read of dy


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each update's columns lie in h and g.

    Attributes:
        ranks: Of the updates.
        starts: First column of each.
        size: Columns in all, as `padded_rank` returns it.
    """

    ranks: tuple[int, ...]
    starts: tuple[int, ...]
    size: int

    def block(self, index: int) -> tuple[int, int]:
        """Returns (first, number) of the columns, in whole blocks, that update `index` lies in."""
        if self.size <= STEP:
            return 0, self.size
        first = self.starts[index] // STEP * STEP
        return first, -(-(self.starts[index] + self.ranks[index] - first) // STEP) * STEP


def lay_out(ranks: tuple[int, ...]) -> Layout:
    """Places the updates one after another; one that does not fit a block's rest begins the next."""
    starts, end = [], 0
    for r in ranks:
        if end % STEP and end % STEP + r > STEP:
            end = -(-end // STEP) * STEP
        starts.append(end)
        end += r
    return Layout(ranks, tuple(starts), padded_rank(end))


def _pack(parts, layout: Layout, axis: int, dtype) -> jax.Array:
    """Puts the updates' parts side by side in columns (or rows) `layout.size` long."""
    pieces, end = [], 0
    for part, start in zip(parts, layout.starts, strict=True):
        widths = [(0, 0), (0, 0)]
        widths[axis] = (start - end, 0)
        pieces.append(jnp.pad(part, widths))
        end = start + part.shape[axis]
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, layout.size - end)
    return jnp.pad(jnp.concatenate(pieces, axis=axis), widths).astype(dtype)


def _scaled_b(group: Group, index: int, dtype, before: int, rows: int) -> jax.Array:
    """Returns ``scale·B`` between zero rows."""
    b = group.scales[index] * group.b[index].astype(jnp.float32)
    return jnp.pad(b, ((before, rows - before - b.shape[0]), (0, 0))).astype(dtype)


def down_project(x, group: Group, dropout: Dropout | None) -> jax.Array | None:
    """Returns ``h = dropout(x)·[A₁|A₂|…]`` in the group's layout."""
    if not group.ranks:
        return None
    layout = lay_out(group.ranks)
    a = _pack([a.T for a in group.a], layout, 0, x.dtype)
    parts = project(x, a, config=project_config(*x.shape, layout.size), mask=dropout)
    return _add(parts).astype(x.dtype)


def _add(parts: jax.Array) -> jax.Array:
    return parts[0] if parts.shape[0] == 1 else parts.sum(axis=0)


def forward(x, group: Group, dropout: Dropout | None) -> tuple[list[jax.Array], jax.Array | None]:
    """Returns the outputs of the members, and h."""
    (m, k), n = x.shape, sum(w.shape[1] for w in group.w)
    config = matmul_config(m, k, n, transposed=False)
    layout, bias = lay_out(group.ranks), _padded_biases(group, config)
    blocks = []
    for index in range(len(group.members)):
        first, rows = layout.block(index)
        before = layout.starts[index] - first
        blocks.append((first, _scaled_b(group, index, x.dtype, before, rows)))
    begun, width = None, 0
    if dropout is None and group.members[:1] == (0,):
        width = inline_width(m, k, n, group.w[0].shape[1], layout.size)
    if width:
        a = _pack([a.T for a in group.a], layout, 0, x.dtype)
        y, h = inline_matmul(
            [InlineTerm(x, group.w[0], a)],
            blocks[0][1],
            width=width,
            config=inline_config(layout.size),
            bias=bias,
        )
        begun = (jax.new_ref(y), width)
    else:
        h = down_project(x, group, dropout)
    terms = []
    for member, w in enumerate(group.w):
        terms.append([Term(x, (w,))])
        if member in group.members:
            assert h is not None
            first, b = blocks[group.adapter(member)]
            terms[-1].append(Term(h, (b,), first))
    outputs = grouped_matmul(terms, config=config, bias=bias, begun=begun)
    return ([jax.freeze(begun[0]), *outputs] if begun else outputs), h


def _padded_biases(group: Group, config: MatmulConfig) -> jax.Array | None:
    if all(bias is None for bias in group.biases):
        return None
    parts = []
    for w, bias in zip(group.w, group.biases, strict=True):
        n = w.shape[1]
        whole = -(-n // config.block_n) * config.block_n
        part = jnp.zeros((n,), jnp.float32) if bias is None else bias.astype(jnp.float32)
        parts.append(jnp.pad(part, (0, whole - n)))
    return jnp.concatenate(parts)


def backward(x, h, group: Group, dropout: Dropout | None, dys):
    """Returns the gradients of x, of every A and of every B, the latter in float32."""
    dtype, (m, k), layout = x.dtype, x.shape, lay_out(group.ranks)
    n = sum(w.shape[1] for w in group.w)
    config = matmul_config(m, n, k, transposed=True)
    terms = [Term(dy, (w,)) for dy, w in zip(dys, group.w, strict=True)]
    if not group.ranks:
        return grouped_matmul([terms], config=config, transposed=True)[0], [], []
    a = _pack(group.a, layout, 1, dtype)
    width = inline_width(m, n, k, k, layout.size) if dropout is None else 0
    if width:
        dx, g = _through_x(group, layout, dys, a, config, width)
        db = [_gradient_of_b(h, group, i, layout, dys[j]) for i, j in enumerate(group.members)]
    else:
        pairs = [_through_b(h, group, i, layout, dys[j]) for i, j in enumerate(group.members)]
        db = [gradient_of_b for gradient_of_b, _ in pairs]
        g = _pack([projected for _, projected in pairs], layout, 1, dtype)
        terms.append(Term(g, (a,)))
        (dx,) = grouped_matmul([terms], config=config, transposed=True, dropout=dropout)
    (parts,) = gradient(x, g, config=gradient_config(m, k, layout.size), mask=dropout)
    packed = _add(parts)
    da = [
        packed[:, start : start + r] for start, r in zip(layout.starts, layout.ranks, strict=True)
    ]
    return dx, da, db


def _through_x(group: Group, layout: Layout, dys, a, config: MatmulConfig, width: int):
    """Returns ``dx = Σ dy·wᵀ + g·aᵀ``, and g from the same reads of dy."""
    inline, terms = [], []
    for member, (dy, w) in enumerate(zip(dys, group.w, strict=True)):
        if member in group.members:
            index = group.adapter(member)
            u = _scaled_b(group, index, dy.dtype, layout.starts[index], layout.size)
        else:
            u = jnp.zeros((layout.size, w.shape[1]), dy.dtype)
        inline.append(InlineTerm(dy, w, u))
        terms.append(Term(dy, (w,)))
    dx, g = inline_matmul(
        inline, a, width=width, config=inline_config(layout.size), transposed=True
    )
    dx = jax.new_ref(dx)
    terms.append(Term(g, (a,)))
    grouped_matmul([terms], config=config, transposed=True, begun=(dx, width))
    return jax.freeze(dx), g


def _gradient_of_b(h, group: Group, index: int, layout: Layout, dy) -> jax.Array:
    """Returns ``dB = scale·hᵀ·dy``, float32."""
    first, width = layout.block(index)
    at, r = layout.starts[index] - first, group.ranks[index]
    config = gradient_config(*dy.shape, width)
    (sums,) = gradient(dy, h, config=config, columns=(first, width))
    return group.scales[index] * _add(sums)[:, at : at + r].T


def _through_b(h, group: Group, index: int, layout: Layout, dy):
    """Returns ``dB = scale·hᵀ·dy`` and ``g = scale·dy·Bᵀ`` (m, r), both float32."""
    (m, n), r = dy.shape, group.ranks[index]
    rank = padded_rank(r)
    b = _scaled_b(group, index, dy.dtype, 0, rank)
    if rank > ONE_PASS_RANK:
        parts = project(dy, b, config=project_config(m, n, rank))
        return _gradient_of_b(h, group, index, layout, dy), _add(parts)[:, :r]
    first, width = layout.block(index)
    at = layout.starts[index] - first
    config = gradient_config(m, n, width, rank)
    sums, parts = gradient(dy, h, b, config=config, columns=(first, width))
    db = group.scales[index] * _add(sums)[:, at : at + r].T
    return db, _add(parts)[:, :r]


def swiglu_terms(x, h, group: Group) -> list[Term]:
    """Returns the terms of gate and up as one tile pair."""
    terms = [Term(x, (group.w[0], group.w[1]))]
    if h is not None:
        layout = lay_out(group.ranks)
        n = group.w[0].shape[1]
        pair = []
        for member in range(2):
            if member in group.members:
                index = group.adapter(member)
                start = layout.starts[index]
                pair.append(_scaled_b(group, index, x.dtype, start, layout.size))
            else:
                pair.append(jnp.zeros((layout.size, n), x.dtype))
        terms.append(Term(h, (pair[0], pair[1])))
    return terms


def swiglu(
    x, h, group: Group, epilogue: Epilogue, d_act: jax.Array | None = None
) -> list[jax.Array]:
    """Runs gate and up with a SwiGLU epilogue; see `grouped_matmul`."""
    (m, k), n = x.shape, group.w[0].shape[1]
    config = matmul_config(m, k, 2 * n, transposed=False, epilogue=epilogue)
    terms = [swiglu_terms(x, h, group)]
    return grouped_matmul(terms, config=config, epilogue=epilogue, d_act=d_act)
