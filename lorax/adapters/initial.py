"""The first values of LoRA's A and B, by their names in PEFT (`init_lora_weights`).

W is (k, n), and a layer computes ``x·W + s·(x·A)·B`` with A (k, r) and B (r, n). All functions are
pure and work under `jax.jit`, `jax.vmap` and `jax.eval_shape`; r is static.

Source: the behaviour of PEFT 0.21 (`LoraLayer.update_layer`), whose matrices are transposed.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lorax.adapters.method import Shape
from lorax.system.wording import clip, did_you_mean, show
from lorax_kernels import Matrix, dense

type Factors = tuple[Float[Array, "k r"], Float[Array, "r n"]]
"""A and B, float32."""


class Start(NamedTuple):
    """What a layer trains from.

    Attributes:
        a: A, (k, r), float32.
        b: B, (r, n), float32.
        w: The frozen matrix: the given one, or a dense one where a part of it is in A and B now.
    """

    a: Float[Array, "k r"]
    b: Float[Array, "r n"]
    w: Matrix


def _fits(shape: Shape, r: int) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Initialisation:
    """A way to begin: `INITIALISATIONS` lists them.

    Attributes:
        name: Its name in PEFT, in lower case.
        factors: ``(key, w, r, s)`` → A and B in float32.
        changes_base: Whether W becomes ``W - s·A·B``. Otherwise A·B is zero.
        obstacle: Why a layer of a shape cannot begin so with a rank, and what to do; or None.
    """

    name: str
    factors: Callable[[Key[Array, ""], Matrix, int, float], Factors]
    changes_base: bool = False
    obstacle: Callable[[Shape, int], str | None] = _fits


def start(
    initialisation: Initialisation, key: Key[Array, ""], w: Matrix, r: int, scale: float
) -> Start:
    """Returns A, B and the W with which the layer's output is still that of the given W.

    Where W changes, ``W' = W - s·A·B`` is computed in float32 and rounded once to W's dtype. It is
    dense: a W that is stored otherwise is to be stored again.

    Args:
        initialisation: How to begin.
        key: For the random ones.
        w: The frozen matrix, (k, n).
        r: Rank; static.
        scale: s > 0.

    Raises:
        ValueError: If there is no such start with this shape and rank.
    """
    shape = Shape(*w.shape)
    if reason := initialisation.obstacle(shape, r):
        raise ValueError(f"{reason} (the weight is {shape.inputs} × {shape.outputs})")
    a, b = initialisation.factors(key, w, r, scale)
    if not initialisation.changes_base:
        return Start(a, b, w)
    rest = dense(w, jnp.float32) - jnp.float32(scale) * _matmul(a, b)
    return Start(a, b, rest.astype(w.dtype))


def as_plain(a: Array, b: Array, a0: Array, b0: Array) -> Factors:
    """Returns the plain LoRA of rank 2r on the original W, with the scale unchanged.

    ``A' = [A, A0]`` and ``B' = [B; -B0]``, so ``W + s·A'·B' = (W - s·A0·B0) + s·A·B``. A base of
    fewer bits than float32 differs from this by the rounding of ``W - s·A0·B0``.

    Args:
        a: The trained A, (…, k, r).
        b: The trained B, (…, r, n).
        a0: The A that training began with.
        b0: The B that training began with.

    Source: the behaviour of PEFT 0.21 (`LoraModel.subtract_mutated_init`).
    """
    return jnp.concatenate([a, a0], axis=-1), jnp.concatenate([b, -b0], axis=-2)


def plain_alpha(lora_alpha: float, use_rslora: bool) -> float:
    """Returns the alpha that keeps the scale at rank 2r: 2·alpha, or √2·alpha with rsLoRA."""
    return lora_alpha * (2**0.5 if use_rslora else 2)


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision="highest")


def _zero_b(a: Array, w: Matrix, r: int) -> Factors:
    return a, jnp.zeros((r, w.shape[1]), jnp.float32)


def _uniform(key, w: Matrix, r: int, scale: float) -> Factors:
    k = w.shape[0]
    return _zero_b(jax.random.uniform(key, (k, r), jnp.float32, -(k**-0.5), k**-0.5), w, r)


def _gaussian(key, w: Matrix, r: int, scale: float) -> Factors:
    return _zero_b(jax.random.normal(key, (w.shape[0], r), jnp.float32) / r, w, r)


def _embedding(key, w: Matrix, r: int, scale: float) -> Factors:
    k, n = w.shape
    return jnp.zeros((k, r), jnp.float32), jax.random.normal(key, (r, n), jnp.float32)


def _orthogonal(key, w: Matrix, r: int, scale: float) -> Factors:
    """Returns A and B of rank r/2 with ``A·B = 0``: their inner sides are orthogonal.

    ``A = X·Q₀/10`` and ``B = Q₁ᵀ·Y/10``: X and Y are normal, Q₀ and Q₁ every other row of an
    orthonormal (r, r).

    Source: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
    """
    k, n = w.shape
    inner, left, right = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(inner, (r, r), jnp.float32))[0]
    a = _matmul(jax.random.normal(left, (k, r // 2), jnp.float32), q[0::2])
    b = _matmul(q[1::2].T, jax.random.normal(right, (r // 2, n), jnp.float32))
    return a / 10, b / 10


def _pissa(key, w: Matrix, r: int, scale: float) -> Factors:
    u, s, vt = jnp.linalg.svd(dense(w, jnp.float32), full_matrices=False)
    return _split(u[:, :r], s[:r], vt[:r], scale)


def _pissa_niter(key, w: Matrix, r: int, scale: float, *, iterations: int) -> Factors:
    return _split(*leading_svd(key, dense(w, jnp.float32), r, iterations), scale)


def _split(u: Array, s: Array, vt: Array, scale: float) -> Factors:
    """Returns ``A = U·√(S/s)`` and ``B = √(S/s)·Vᵀ``, so that s·A·B is U·S·Vᵀ.

    Source: Meng et al. 2024, "PiSSA", eq. 2 and 3, https://arxiv.org/abs/2404.02948
    """
    root = jnp.sqrt(s / scale)
    return u * root[None, :], root[:, None] * vt


def _olora(key, w: Matrix, r: int, scale: float) -> Factors:
    """Returns ``A = Rᵀ`` and ``B = Qᵀ``, the first r of ``Wᵀ = Q·R``.

    The first r columns of Q are those of the first r columns of Wᵀ, and ``Rᵀ = W·Q``.

    Source: Büyükakyüz 2024, "OLoRA", §3, https://arxiv.org/abs/2406.01775
    """
    matrix = dense(w, jnp.float32)
    q = jnp.linalg.qr(matrix[:r].T)[0]
    return _matmul(matrix, q), q.T


def leading_svd(
    key: Key[Array, ""], matrix: Float[Array, "m n"], rank: int, iterations: int
) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "r n"]]:
    """Returns about the first U, S and Vᵀ of a matrix, at the cost of narrow matmuls.

    The range of ``(M·Mᵀ)ⁱ·M·Ω`` with a normal Ω (n, r), orthonormal again after each factor.

    Args:
        key: For Ω.
        matrix: M, (m, n), float32.
        rank: r ≤ min(m, n).
        iterations: i; the more, the closer, and the more time.

    Source: Halko, Martinsson and Tropp 2009, algorithms 4.4 and 5.1,
        https://arxiv.org/abs/0909.4061
    """

    def closer(_, q):
        q = jnp.linalg.qr(_matmul(matrix.T, q))[0]
        return jnp.linalg.qr(_matmul(matrix, q))[0]

    omega = jax.random.normal(key, (matrix.shape[1], rank), jnp.float32)
    basis = jnp.linalg.qr(_matmul(matrix, omega))[0]
    basis = jax.lax.fori_loop(0, iterations, closer, basis)
    u, s, vt = jnp.linalg.svd(_matmul(basis.T, matrix), full_matrices=False)
    return _matmul(basis, u), s, vt


def _refuse_wide(shape: Shape, r: int) -> str | None:
    most = min(shape)
    if r <= most:
        return None
    return (
        f"r={r} is more than the {most} directions that the weight has to take r of; give the "
        f"layer a rank of at most {most} in rank_pattern, or write init_lora_weights: true"
    )


def _refuse_odd(shape: Shape, r: int) -> str | None:
    if r % 2 == 0:
        return None
    return (
        f"r={r} is odd, and init_lora_weights: orthogonal divides the rank in two halves; take "
        f"r={r + 1}, or write init_lora_weights: true"
    )


INITIALISATIONS: list[Initialisation] = [
    Initialisation("true", _uniform),
    Initialisation("gaussian", _gaussian),
    Initialisation("orthogonal", _orthogonal, obstacle=_refuse_odd),
    Initialisation("pissa", _pissa, changes_base=True, obstacle=_refuse_wide),
    Initialisation("olora", _olora, changes_base=True, obstacle=_refuse_wide),
]
"""All but ``pissa_niter_<i>``, which `initialisation` makes."""

EMBEDDING = Initialisation("embedding", _embedding)
"""How an embedding begins in PEFT, whatever the name: A is zero, B normal with deviation 1."""

NEEDS_MORE: Mapping[str, str] = {
    "loftq": "needs a base that LoftQ quantises together with A and B",
    "corda": "needs the covariance of each layer's inputs, from data",
    "lora_ga": "needs the gradient of each layer's weight, from data",
    "eva": "needs the inputs of each layer, from data",
    "mica": "freezes B, and lorax trains A and B",
}
"""PEFT's other names, and why they are not in the list."""


def initialisation(name: bool | str) -> Initialisation:
    """Returns the initialisation of a value of `init_lora_weights`: true or a name, in any case.

    Raises:
        ValueError: If there is none; the message lists those that there are.
    """
    word = "true" if name is True else name.lower() if isinstance(name, str) else ""
    known = {each.name: each for each in INITIALISATIONS}
    if word in known:
        return known[word]
    if found := re.fullmatch(r"pissa_niter_([0-9]{1,3})", word):
        factors = functools.partial(_pissa_niter, iterations=int(found[1]))
        return Initialisation(word, factors, changes_base=True, obstacle=_refuse_wide)
    reason = f"is not known{did_you_mean(clip(word), known)}"
    if word in NEEDS_MORE:
        reason = NEEDS_MORE[word]
    elif name is False:
        reason = "would begin with a random B, and change what the model computes"
    raise ValueError(
        f"init_lora_weights: {show(name)} {reason}; write {', '.join(known)} or pissa_niter_<i>, "
        "where i is a number of iterations below 1000, such as 16"
    )


def is_known(name: bool | str) -> bool:
    """Says whether `initialisation` has this name."""
    try:
        initialisation(name)
    except ValueError:
        return False
    return True
