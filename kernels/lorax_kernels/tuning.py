"""The choice of kernels and tiles: a table measured on the device, and rules for other shapes.

Nothing is timed here or inside a trace. `scripts/bench/tune.py` measures and writes
``tuned/<device>.json``; see `Table`.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from lorax_kernels.device import core_count, device_kind
from lorax_kernels.lora_linear.plan import STEP, Epilogue, MatmulConfig, with_short_step
from lorax_kernels.lora_linear.skinny import COLUMNS, ROWS, SkinnyConfig

TUNED = Path(__file__).parent / "tuned"
RING_BYTES = 176 * 1024  # of shared memory for a skinny kernel's ring
FAR = math.log(2.0)  # a measured shape stands for others if no side differs by more


@dataclasses.dataclass(frozen=True)
class Table:
    """The measurements on one device.

    Attributes:
        path: The file.
        alike: Other devices of the same chip, which use it until they have a table.
        matmul: Rows {"transposed", "epilogue", "m", "k", "n", "config"}: the fastest tiles.
        linear: Rows {"m", "k", "n", "r", "ours_us", "xla_us"}: whole operations, both ways, forward
            and backward.
    """

    path: Path
    alike: tuple[str, ...]
    matmul: tuple[dict[str, Any], ...]
    linear: tuple[dict[str, Any], ...]


@functools.cache
def load_table(path: Path) -> Table:
    """Reads a table.

    Raises:
        ValueError: If the file is not a table.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        matmul = tuple(fields["matmul"])
        for row in matmul:
            MatmulConfig(**row["config"])
        alike = fields.get("alike", [])
        if not isinstance(alike, list):
            raise TypeError(f'"alike" must be a list of devices, got {alike!r}')
        return Table(path, tuple(alike), matmul, tuple(fields["linear"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of tuned kernels: {error!r}") from None


def find_table(device_kind: str) -> Table | None:
    """Returns the table of a device or of one alike, or None if none was measured there."""
    path = TUNED / f"{device_kind.lower().replace(' ', '_')}.json"
    if path.exists():
        return load_table(path)
    tables = map(load_table, sorted(TUNED.glob("*.json")))
    return next((table for table in tables if device_kind in table.alike), None)


def _distance(row: dict[str, Any], sizes: dict[str, int]) -> float:
    return max(abs(math.log(row[side] / size)) for side, size in sizes.items())


def matmul_config(
    m: int, k: int, n: int, *, transposed: bool, epilogue: Epilogue = "store", short: bool = False
) -> MatmulConfig:
    """Returns the tiles for a matmul: those of the nearest measured shape, or the default.

    Args:
        m: Rows.
        k: Contraction of the frozen matmul.
        n: Columns, of all members.
        transposed: Whether the right operands are read transposed.
        epilogue: Name of the epilogue.
        short: Whether a short step needs room in addition to the ring.
    """
    table = find_table(device_kind())
    rows = [
        row
        for row in (table.matmul if table else ())
        if row["transposed"] == transposed and row["epilogue"] == epilogue
    ]
    config = MatmulConfig()
    if rows:
        sizes = {"m": m, "k": k, "n": n}
        config = MatmulConfig(**min(rows, key=lambda row: _distance(row, sizes))["config"])
    return with_short_step(config) if short else config


def is_faster(m: int, k: int, n: int, r: int) -> bool:
    """Says whether the kernel beat XLA at the nearest measured shape, forward and backward."""
    table = find_table(device_kind())
    measured = table.linear if table else ()
    # Beyond the most rows measured the device is full many times over, so nothing changes.
    most = max((row["m"] for row in measured), default=m)
    sizes = {"m": min(m, most), "k": k, "n": n, "r": r}
    rows = [row for row in measured if _distance(row, sizes) <= FAR]
    if not rows:
        return False
    nearest = min(rows, key=lambda row: _distance(row, sizes))
    return nearest["ours_us"] < nearest["xla_us"]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def project_config(m: int, c: int, r: int, sms: int | None = None) -> SkinnyConfig:
    """Returns the tiling of ``t·uᵀ``: as few parts as keep every multiprocessor reading."""
    rows = _cdiv(m, 64)
    sms = sms or core_count()
    parts = 1 if rows >= sms * 3 // 4 else min(_cdiv(sms, rows), _cdiv(c, 8 * COLUMNS))
    boxes = 4 if r <= STEP else 2
    slot = boxes * STEP * (64 + r) * 2
    block_c = _cdiv(_cdiv(c, parts), boxes * STEP) * boxes * STEP
    return SkinnyConfig(1, block_c, min(8, RING_BYTES // slot), boxes)


def gradient_config(
    m: int, c: int, r: int, u_rank: int = 0, sms: int | None = None
) -> SkinnyConfig:
    """Returns the tiling of ``tᵀ·v``, with ``t·uᵀ`` in the same pass if `u_rank` is not 0."""
    sms = sms or core_count()
    wide = _cdiv(r, STEP) * STEP
    tiles = 2 if wide <= 2 * STEP else 1  # the sums of a block's tiles stay in registers
    columns = _cdiv(c, tiles * COLUMNS)
    chunks = _cdiv(m, ROWS)

    def cost(blocks: int) -> float:
        waves = _cdiv(blocks * columns, sms)
        return waves * (chunks / blocks + 1.5) + 0.25 * blocks

    row_blocks = min(range(1, chunks + 1), key=cost)
    slot = 2 * STEP * (ROWS + u_rank) * 2
    v_slots = 2 if wide <= 2 * STEP else 1
    rest = v_slots * ROWS * wide * 2 + 2 * 64 * (STEP + u_rank % STEP) * 4
    stages = min(6, (220 * 1024 - rest) // slot)
    return SkinnyConfig(row_blocks, tiles * COLUMNS, stages, v_slots=v_slots)


# Share of a tile's time by rank. 16 was measured (rank / 256, by the arithmetic, would be 0.06), 64
# follows the arithmetic, and 32 is between the two, above the arithmetic's 0.13.
INLINE_COST = {16: 0.16, 32: 0.2, 64: 0.25}
TILE_SECONDS_PER_K = 128 * 256 * 2 / 5.3e12  # per step of the contraction, at 700 TFLOP/s
STREAM_BYTES_PER_S = 3.6e12


def inline_width(m: int, k: int, n: int, n0: int, r: int, sms: int | None = None) -> int:
    """Returns how many columns to compute together with h, or 0 if h is faster on its own.

    Args:
        m: Rows.
        k: Contraction.
        n: Columns of the whole group.
        n0: Columns of its first member, which must contain them.
        r: Rank of the group, as `padded_rank` returns it.
        sms: Multiprocessors; None asks the device.
    """
    if r not in INLINE_COST:
        return 0
    config = inline_config(r)
    sms = sms or core_count()
    rows = _cdiv(m, config.block_m)
    columns = _cdiv(n, config.block_n)
    tile = TILE_SECONDS_PER_K * k

    def waves(tiles):
        return _cdiv(tiles, sms)

    def cost(width: int) -> float:
        inline = waves(rows * width) * (1.0 + INLINE_COST[r])
        return (inline + waves(rows * (columns - width))) * tile

    width = min(range(1, max(1, n0 // config.block_n) + 1), key=cost)
    apart = waves(rows * columns) * tile + m * k * 2 / STREAM_BYTES_PER_S
    if n0 < config.block_n or cost(width) > apart:
        return 0
    return width * config.block_n


def inline_config(r: int) -> MatmulConfig:
    """Returns the tiles of `inline_matmul`, which keeps three more buffers in shared memory."""
    small = r <= STEP // 2
    return MatmulConfig(stages=3, store_n=64 if small else 32, store_slots=2 if small else 1)
