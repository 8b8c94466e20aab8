"""EVA: A begins with the directions in which the inputs of a layer vary most.

While batches run through the base model, each layer has a `Directions` that `update` moves. When
`converged` says so for the components that each layer is to have, `redistribute` gives the ranks,
and `first_values` A; B begins at zero. A layer of rank 0 carries no adapter.

Source: Paischer et al. 2024, "One Initialization to Rule them All", §3,
https://arxiv.org/abs/2410.07170; the incremental PCA is Ross et al. 2008, "Incremental Learning for
Robust Visual Tracking", §3.2, as in PEFT 0.21.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lorax.adapters.initial import leading_svd

_NOISE = 1e-12
"""Shares of the variance below this are the rounding of float32, squared."""

_EPSILON = 10 * float(jnp.finfo(jnp.float32).eps)
"""Relative error of a mean."""

_ITERATIONS = 4
"""Of `leading_svd`, with twice the components, as in PEFT."""


class Directions(NamedTuple):
    """The principal components of all rows so far.

    Attributes:
        components: Orthonormal, (c, k); zero before the first row.
        singular_values: Of the centred rows, (c,), descending.
        mean: Of the rows, (k,).
        variation: Sum of the squared distances of all rows from their mean.
        seen: Rows so far.
    """

    components: Float[Array, "c k"]
    singular_values: Float[Array, " c"]
    mean: Float[Array, " k"]
    variation: Float[Array, ""]
    seen: Int[Array, ""]


def components_for(r: int, rho: float, k: int) -> int:
    """Returns the components that a layer of rank r and k inputs needs: ρ·r, at most k.

    Raises:
        ValueError: If r is above k, or ρ below 1.
    """
    _check_rho(rho)
    if r > k:
        raise ValueError(
            f"r={r} is more than the {k} directions that inputs of width {k} have; give the layer "
            f"a rank of at most {k} in rank_pattern, or write init_lora_weights: true"
        )
    return min(round(min(r * rho, k)), k)


def _check_rho(rho: float) -> None:
    if not rho >= 1:
        raise ValueError(f"rho must be at least 1, got {rho}: 1 leaves every rank as it is")


def no_directions(components: int, k: int) -> Directions:
    """Returns the state before the first row."""
    return Directions(
        jnp.zeros((components, k), jnp.float32),
        jnp.zeros(components, jnp.float32),
        jnp.zeros(k, jnp.float32),
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.int32),
    )


def update(
    state: Directions, x: Float[Array, "rows k"], mask: Bool[Array, " rows"] | None = None
) -> Directions:
    """Returns the state after more rows.

    The new components are the first right-singular vectors of the old ones, each times its singular
    value, the centred rows, and the movement of the mean, in one matrix. What components beyond the
    c-th would have held of former rows is lost, as in any incremental PCA.

    Args:
        state: The state before.
        x: Inputs of the layer.
        mask: Which rows count; all where it is not given. It is for tokens that are padding.
    """
    x = x.astype(jnp.float32)
    counts = jnp.ones(len(x), bool) if mask is None else mask
    rows = counts.sum(dtype=jnp.int32)
    total = state.seen + rows
    mean = jnp.where(counts[:, None], x, 0).sum(0) / _at_least_one(rows)
    centred = jnp.where(counts[:, None], x - mean[None], 0)
    share = rows.astype(jnp.float32) / _at_least_one(total)
    moved = (mean - state.mean) * jnp.sqrt(state.seen.astype(jnp.float32) * share)
    old = state.singular_values[:, None] * state.components
    values, components = _right_vectors(jnp.concatenate([old, centred, moved[None]]), len(old))
    after = Directions(
        components,
        values,
        state.mean + (mean - state.mean) * share,
        state.variation + jnp.sum(centred**2) + jnp.sum(moved**2),
        total,
    )
    return jax.tree.map(lambda new, before: jnp.where(rows > 0, new, before), after, state)


def _at_least_one(count: Array) -> Array:
    return jnp.maximum(count, 1).astype(jnp.float32)


def _right_vectors(matrix: Array, number: int) -> tuple[Array, Array]:
    """Returns the first singular values, and right vectors whose largest element is positive."""
    width = min(2 * number, *matrix.shape)
    if width == min(matrix.shape):
        _, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    else:
        # The key is fixed, so that equal rows give equal components.
        _, s, vt = leading_svd(jax.random.key(0), matrix, width, _ITERATIONS)
    vt = vt[:number]
    largest = jnp.argmax(jnp.abs(vt), axis=1, keepdims=True)
    return s[:number], jnp.where(jnp.take_along_axis(vt, largest, 1) < 0, -vt, vt)


def converged(old: Directions, new: Directions, tau: float) -> Bool[Array, " c"]:
    """Says of each component whether it kept its direction: |cos| ≥ τ. None has at the start.

    A layer is done when all of the first r' are, where r' is its rank by `redistribute`.
    """
    products = jnp.sum(old.components * new.components, axis=-1)
    norms = [jnp.linalg.norm(each.components, axis=-1) for each in (old, new)]
    length = norms[0] * norms[1]
    return (length > 0) & (jnp.abs(products) >= tau * length)


def explained_variance_ratios(state: Directions) -> Float[Array, " c"]:
    """Returns each component's share of the variance of all rows, (c,).

    They are NaN where the rows differ by the rounding of their mean alone.
    """
    rounding = state.seen.astype(jnp.float32) * jnp.sum((_EPSILON * state.mean) ** 2)
    varies = state.variation > rounding
    return jnp.where(varies, state.singular_values**2 / state.variation, jnp.nan)


def redistribute(
    ratios: Mapping[str, Array | np.ndarray], r: int | Mapping[str, int], rho: float
) -> dict[str, int]:
    """Returns the rank of each layer: the ranks go to the largest shares of variance in the model.

    The sum of all ranks stays, and no layer gets more than ρ·r. Of equal shares, that of an earlier
    layer is taken first.

    Args:
        ratios: Per layer, the shares of its components in descending order.
        r: Rank before: of all layers, or of each.
        rho: ρ ≥ 1; 1 leaves all ranks as they are.

    Raises:
        ValueError: If ρ is below 1, a layer has too few components, or directions that do not vary
            would be taken.
    """
    _check_rho(rho)
    before = {name: r if isinstance(r, int) else r[name] for name in ratios}
    shares: list[tuple[float, str]] = []
    for name, given in ratios.items():
        values = np.asarray(given, np.float64)[: round(before[name] * rho)]
        if not np.all(np.isfinite(values)):
            raise ValueError(
                f"{name}: EVA found no variance in its inputs: they had no rows, equal rows, or "
                "values that are not finite; use other rows, or leave the layer out with "
                "exclude_modules"
            )
        if len(values) < before[name]:
            raise ValueError(
                f"{name}: EVA has {len(values)} components for r={before[name]}; it needs "
                "components_for(r, rho, k) of them"
            )
        shares.extend((value, name) for value in values)
    chosen = sorted(shares, key=lambda share: -share[0])[: sum(before.values())]
    for value, name in chosen:
        if value < _NOISE:
            raise ValueError(
                f"{name}: EVA would take directions in which its inputs do not vary; use more rows "
                "or a lower r, or leave the layer out with exclude_modules"
            )
    ranks = dict.fromkeys(ratios, 0)
    for _, name in chosen:
        ranks[name] += 1
    return ranks


def first_values(state: Directions, r: int, *, whiten: bool = False) -> Float[Array, "k r"]:
    """Returns A: the first r components as columns; with `whiten`, each over ``√singular value``.

    Raises:
        ValueError: If there are fewer than r components.
    """
    if r > len(state.components):
        raise ValueError(
            f"EVA has {len(state.components)} components for r={r}; compute at least {r}"
        )
    a = state.components[:r].T
    return a / jnp.sqrt(state.singular_values[None, :r]) if whiten else a


def adjusted_alpha(lora_alpha: float, r: int, new_r: int) -> float:
    """Returns ``alpha·r'/r``, PEFT's `adjust_scaling_factors`: alpha/r' is then alpha/r again."""
    return lora_alpha * new_r / r
