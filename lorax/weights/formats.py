"""The list of formats."""

from lorax.config.model import ModelConfig
from lorax.weights.dense import DENSE
from lorax.weights.format import Format
from lorax.weights.int8 import INT8
from lorax.weights.nf4 import NF4, NF4_DOUBLE

FORMATS: list[Format] = [NF4, NF4_DOUBLE, INT8, DENSE]
"""The first that claims a model's settings is taken; `DENSE` claims all, and comes last."""


def format_of(model: ModelConfig) -> Format:
    """Returns the format of frozen matrices that the settings ask for."""
    return next(format for format in FORMATS if format.claims(model))
