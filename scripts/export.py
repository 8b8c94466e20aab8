"""Exports from a checkout: `PYTHONPATH=.:kernels python scripts/export.py RUN --format …`."""

import sys

from lorax.cli.main import run

if __name__ == "__main__":
    run(["export", *sys.argv[1:]])
