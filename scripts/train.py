"""Trains from a checkout: `PYTHONPATH=.:kernels python scripts/train.py CONFIG`."""

import sys

from lorax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
