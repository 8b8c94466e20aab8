"""Generates from a checkout: `PYTHONPATH=.:kernels python scripts/generate.py RUN`."""

import sys

from lorax.cli.main import run

if __name__ == "__main__":
    run(["generate", *sys.argv[1:]])
