"""Trains from a checkout: `PYTHONPATH=.:kernels python scripts/train.py CONFIG`."""

import sys

from lorax.cli.main import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
