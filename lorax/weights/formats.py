"""The formats that there are."""

from lorax.weights.dense import DENSE
from lorax.weights.format import Format

FORMATS: list[Format] = [DENSE]
