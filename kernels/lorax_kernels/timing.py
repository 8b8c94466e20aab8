"""Timing programs against each other on a device whose clock varies.

A GPU slows down as it warms up and draws power, so times taken minutes apart differ by a tenth.
Programs are timed interleaved, in turns of a few milliseconds and more. The result is the median
over the turns of the ratio to the first program within the same turn.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one call.

    Attributes:
        us: Median over the turns, microseconds.
        ratio: Median over the turns of the time over the first program's.
    """

    us: float
    ratio: float


def compile_all(
    programs: Mapping[str, tuple[Callable[..., Any], dict[str, Any] | None]],
    operands: Sequence[Sequence[Any]],
    threads: int = 12,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compiles programs at once, each running its function on every operand set in one dispatch.

    Args:
        programs: Name → (function, compiler options).
        operands: The operand sets, as of consecutive layers: none is in the cache already.
        threads: Compilations at a time.

    Returns:
        Name → compiled program, and name → error.
    """

    def build(item):
        name, (function, options) = item
        call = jax.jit(function)  # compiled once, however many sets there are
        every = jax.jit(lambda sets: [call(*one) for one in sets])
        try:
            return name, every.lower(operands).compile(compiler_options=options)
        except Exception as error:  # one candidate that does not compile must not end the rest
            return name, f"{type(error).__name__}: {str(error)[:200]}"

    with ThreadPoolExecutor(threads) as pool:
        built = list(pool.map(build, programs.items()))
    failed = {name: result for name, result in built if isinstance(result, str)}
    return {name: result for name, result in built if name not in failed}, failed


def time_interleaved(
    compiled: Mapping[str, Any],
    operands: Sequence[Sequence[Any]],
    *,
    turns: int = 9,
    turn_ms: float = 12.0,
    lead_ms: float = 0.0,
) -> dict[str, Timing]:
    """Times compiled programs interleaved, and returns each one's time per operand set.

    Args:
        compiled: Name → program; the others are compared with the first.
        operands: The operand sets of the programs.
        turns: Turns of every program.
        turn_ms: Least length of a turn.
        lead_ms: How long a program runs before each of its turns is timed. The chip takes a tenth
            of a second to reach the clock at which a program draws the permitted power: a shorter
            turn runs at the clock of the program before.
    """
    repeats = {}
    for name, program in compiled.items():
        jax.block_until_ready(program(operands))
        begin = time.perf_counter()
        jax.block_until_ready(program(operands))
        repeats[name] = max(1, round(turn_ms / 1e3 / (time.perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in compiled}
    order = random.Random(0)
    for _ in range(turns):
        # The program before decides the clock at the start, so the order changes.
        for name in order.sample(list(compiled), len(compiled)):
            program = compiled[name]
            if lead := round(repeats[name] * lead_ms / turn_ms):
                _run(program, operands, lead)
            begin = time.perf_counter()
            _run(program, operands, repeats[name])
            elapsed = time.perf_counter() - begin
            times[name].append(elapsed * 1e6 / repeats[name] / len(operands))
    first = next(iter(times.values()))
    return {
        name: Timing(
            statistics.median(series),
            statistics.median(t / base for t, base in zip(series, first, strict=True)),
        )
        for name, series in times.items()
    }


def _run(program, operands, times: int) -> None:
    result = None
    for _ in range(times):
        result = program(operands)
    jax.block_until_ready(result)
