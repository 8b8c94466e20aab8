"""Draws what `scripts.bench.kernels` measured: ratios to the frozen products, and the roofline.

python -m scripts.make.kernel_figure docs/measurements/kernels_h200.jsonl \
        docs/images/kernels_h200.png
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

BYTES = 2
CEILING_TFLOPS = 989.0  # H200 datasheet, dense bf16; power keeps long runs well below
STREAM_TBS = 4.8  # H200 datasheet


def arithmetic(row: dict) -> tuple[float, float]:
    """Returns the FLOPs of the frozen products and the bytes they must move."""
    m = row["m"]
    k = row["k"]
    n = row["n"]
    flops = 2.0 * m * k * n
    moved = BYTES * (m * k + k * n + m * n)
    return (flops, moved) if row["what"] == "fwd" else (2 * flops, 2 * moved)


def draw_ratios(axes, rows: list[dict], what: str) -> None:
    """Draws one group of bars per workload."""
    chosen = [row for row in rows if row["what"] == what and not row["dropout"]]
    names = [
        f"{row['workload'].replace('/', ' ').replace('_proj', '')}, m {row['m']}, r {row['r']}"
        for row in chosen
    ]
    places = range(len(chosen))
    width = 0.38
    axes.bar([p - width / 2 for p in places], [row["ratio_xla"] for row in chosen], width,
             label="XLA, products through cuBLAS", color="#b8b8b8")  # fmt: skip
    axes.bar([p + width / 2 for p in places], [row["ratio_ours"] for row in chosen], width,
             label="fused kernels", color="#2f6db5")  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(list(places), names, fontsize=6, rotation=60, ha="right")
    axes.set_ylim(0.9, None)
    title = "forward" if what == "fwd" else "forward and backward"
    axes.set_title(f"{title}: time over the frozen products' (cuBLAS)")
    axes.legend(fontsize=8)


def draw_roofline(axes, rows: list[dict]) -> None:
    """Draws achieved arithmetic of the frozen products within the whole operation's time."""
    intensities = [2.0**p for p in range(6, 15)]
    roof = [min(CEILING_TFLOPS, STREAM_TBS * i) for i in intensities]
    axes.loglog(intensities, roof, color="black", linewidth=1)
    for name, marker, color in (("base_us", "o", "#b8b8b8"), ("ours_us", "^", "#2f6db5")):
        points = [(arithmetic(row), row[name]) for row in rows if not row["dropout"]]
        x = [flops / moved for (flops, moved), _ in points]
        y = [flops / us / 1e6 for (flops, _), us in points]
        label = "frozen products, cuBLAS" if name == "base_us" else "with LoRA, fused kernels"
        axes.scatter(x, y, marker=marker, s=18, color=color, label=label, zorder=3)
    axes.set_xlabel("FLOPs of the frozen products per byte they must move")
    axes.set_ylabel("TFLOP/s of the frozen products")
    axes.set_title(f"roofline (datasheet): {CEILING_TFLOPS:.0f} TFLOP/s, {STREAM_TBS} TB/s")
    axes.legend(fontsize=8)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parsed = parser.parse_args()
    rows = [json.loads(line) for line in parsed.rows.read_text(encoding="utf-8").splitlines()]
    # A cell that was measured again counts as it was last.
    cells = {(r["workload"], r["m"], r["r"], r["what"], r["dropout"]): r for r in rows}
    rows = list(cells.values())
    figure, axes = plt.subplots(3, 1, figsize=(11, 13), layout="constrained")
    draw_ratios(axes[0], rows, "fwd")
    draw_ratios(axes[1], rows, "fwd_bwd")
    draw_roofline(axes[2], rows)
    first = rows[0]
    figure.suptitle(f"{first['device']}, jax {first['jax']}, {first['date']}", fontsize=10)
    figure.savefig(parsed.out, dpi=130)
    print(f"wrote {parsed.out}")


if __name__ == "__main__":
    main()
