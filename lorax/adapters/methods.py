"""The list of adapter methods."""

from lorax.adapters.dora import DORA
from lorax.adapters.lora import LORA
from lorax.adapters.lora_bias import LORA_BIAS
from lorax.adapters.method import Method, Spec
from lorax.adapters.targets import Target
from lorax.config.adapter import LoraConfig

METHODS: list[Method] = [DORA, LORA_BIAS, LORA]
"""The first that claims the settings is taken; `LORA` claims all."""


def spec_of(target: Target, config: LoraConfig) -> Spec:
    """Returns the adapter that the settings give a matched module."""
    return Spec(
        method=next(method for method in METHODS if method.claims(config)),
        r=target.r,
        lora_alpha=target.lora_alpha,
        scale=target.scale,
        dropout=config.lora_dropout,
        start=config.init_lora_weights,
    )
