"""Generates from a checkout: `PYTHONPATH=.:kernels python scripts/generate.py RUN`."""

import sys

from lorax.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
