"""Exports from a checkout: `PYTHONPATH=.:kernels python scripts/export.py RUN --format …`."""

import sys

from lorax.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
