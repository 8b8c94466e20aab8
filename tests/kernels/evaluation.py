"""A traced function evaluated in NumPy, one operation after another, without compiling it.

The interpreter of Mosaic GPU kernels hands XLA a program per kernel for what one thread of it does:
hundreds of scalars, a call back into Python at each of its steps. To compile that takes several
times as long as to do it.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Arrays = Sequence[np.ndarray]


class EvaluationError(Exception):
    """NumPy is not told how to do this."""


def evaluate(
    jaxpr: ClosedJaxpr, arguments: Sequence[Any], constants: Sequence[Any] | None = None
) -> list[np.ndarray]:
    """Returns the results of a traced function.

    Callbacks get scalars that are integers or booleans as Python's own, and all else as NumPy's
    arrays.

    Args:
        jaxpr: The function.
        arguments: Its flat arguments.
        constants: Instead of its own, which are tracers where it was traced inside another.

    Raises:
        EvaluationError: Naming the operation that NumPy is not told how to do.
    """
    constants = jaxpr.consts if constants is None else constants
    with np.errstate(all="ignore"):
        return _evaluate(jaxpr.jaxpr, map(np.asarray, constants), map(np.asarray, arguments))


def _evaluate_closed(closed: ClosedJaxpr, arguments: Arrays) -> list[np.ndarray]:
    return _evaluate(closed.jaxpr, map(np.asarray, closed.consts), arguments)


def _evaluate(
    jaxpr: Jaxpr, constants: Iterable[np.ndarray], arguments: Iterable[np.ndarray]
) -> list[np.ndarray]:
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(v: Any) -> np.ndarray:
        if not isinstance(v, Literal):
            return values[v]
        aval: Any = v.aval
        return np.asarray(v.val, aval.dtype)

    for equation in jaxpr.eqns:
        results = [np.asarray(r) for r in _apply(equation, [read(v) for v in equation.invars])]
        for result, variable in zip(results, equation.outvars, strict=True):
            aval: Any = variable.aval
            found, promised = (result.shape, result.dtype), (aval.shape, aval.dtype)
            _demand(found == promised, f"{equation.primitive}: {found} in the place of {promised}")
            values[variable] = result
    return [read(v) for v in jaxpr.outvars]


def _apply(equation: JaxprEqn, operands: Arrays) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _CONTROL:
        return _CONTROL[name](operands, **params)
    if name in _ARITHMETIC:
        return [_ARITHMETIC[name](*operands)]
    if name in _SHAPES:
        return [_SHAPES[name](*operands, **params)]
    # JAX would compile it, in one of a kernel's many threads.
    raise EvaluationError(f"{name}: say in this file how NumPy does it")


def _demand(holds: Any, what: str) -> None:
    if not holds:
        raise EvaluationError(what)


def _loop(operands, *, cond_jaxpr, cond_nconsts, body_jaxpr, body_nconsts, **_):
    tested, rest = operands[:cond_nconsts], operands[cond_nconsts:]
    held, carry = rest[:body_nconsts], rest[body_nconsts:]
    while _evaluate_closed(cond_jaxpr, [*tested, *carry])[0]:
        carry = _evaluate_closed(body_jaxpr, [*held, *carry])
    return carry


def _repeat(operands, *, jaxpr, length, ft_in, **_):
    held, carry, scanned = map(list, ft_in.update(operands).unpack())
    _demand(not scanned and len(jaxpr.out_avals) == len(carry), "scan: a loop over arrays")
    for _ in range(length):
        carry = _evaluate_closed(jaxpr, [*held, *carry])
    return carry


def _branch(operands, *, branches, **_):
    index, *operands = operands
    return _evaluate_closed(branches[min(max(int(index), 0), len(branches) - 1)], operands)


def _call_back(operands, *, callback, result_avals, **_):
    plain = lambda v: v.item() if v.ndim == 0 and v.dtype.kind in "iub" else v
    results = callback(*map(plain, operands))
    # Python's numbers take the promised type; what is an array must have it.
    return [
        result if isinstance(result, np.ndarray | np.generic) else np.asarray(result, aval.dtype)
        for result, aval in zip(results, result_avals, strict=True)
    ]


_CONTROL: dict[str, Callable[..., Sequence[Any]]] = {
    "while": _loop,
    "scan": _repeat,
    "cond": _branch,
    "jit": lambda operands, *, jaxpr, **_: _evaluate_closed(jaxpr, operands),
    "io_callback": _call_back,
}


def _divide(p, q):
    if p.dtype.kind == "f":
        return p / q
    _demand(np.all(q != 0), "div: a whole number divided by zero")
    whole = p // q  # rounded down, and not towards zero
    return whole + ((whole < 0) & (whole * q != p)).astype(whole.dtype)


def _shift_right(v, count):
    _demand(v.dtype.kind == "u", "shift_right_logical of signed numbers")
    return np.right_shift(v, count)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, v, high: np.minimum(np.maximum(v, low), high),
    "div": _divide,
    "eq": np.equal,
    "exp": np.exp,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": np.fmod,
    "rsqrt": lambda v: (1.0 / np.sqrt(v)).astype(v.dtype),
    "select_n": lambda which, *cases: np.choose(which.astype(np.int32), cases),
    "shift_left": np.left_shift,
    "shift_right_logical": _shift_right,
    "sign": np.sign,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}


def _broadcast(v, *, shape, broadcast_dimensions, **_):
    aligned = [1] * len(shape)
    for dimension, size in zip(broadcast_dimensions, v.shape, strict=True):
        aligned[dimension] = size
    return np.broadcast_to(v.reshape(aligned), shape)


def _slice(v, *, start_indices, limit_indices, strides):
    steps = strides or (1,) * v.ndim
    return v[tuple(map(slice, start_indices, limit_indices, steps))]


def _slice_at(v, *starts, slice_sizes, **_):
    sizes = zip(starts, slice_sizes, v.shape, strict=True)
    first = [min(max(int(start), 0), whole - size) for start, size, whole in sizes]
    return v[tuple(slice(i, i + size) for i, size in zip(first, slice_sizes, strict=True))]


def _multiply(p, q, *, dimension_numbers, preferred_element_type, **_):
    contracted, (p_batch, q_batch) = dimension_numbers
    narrow = all(v.dtype.itemsize <= 4 and v.dtype.kind not in "iub" for v in (p, q))
    _demand(narrow and not p_batch and not q_batch, "dot_general: other than of float32 matrices")
    product = np.tensordot(p.astype(np.float32), q.astype(np.float32), contracted)
    return product.astype(preferred_element_type or p.dtype)


_SHAPES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "convert_element_type": lambda v, *, new_dtype, **_: v.astype(new_dtype),
    "dot_general": _multiply,
    "dynamic_slice": _slice_at,
    "iota": lambda *, dtype, shape, dimension, **_: np.indices(shape)[dimension].astype(dtype),
    "reshape": lambda v, *, new_sizes, **_: v.reshape(new_sizes),
    "slice": _slice,
    "squeeze": lambda v, *, dimensions: v.squeeze(dimensions),
    "transpose": lambda v, *, permutation: v.transpose(permutation),
}
