"""The operations that decide lorax's speed: pure functions on arrays, importing jax only."""

from lorax_kernels.lora_linear import lora_linear as lora_linear
