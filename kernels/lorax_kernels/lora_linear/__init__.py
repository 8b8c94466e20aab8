"""x·W0 + s·(x·A)·B with the gradients of x, A and B."""

from lorax_kernels.lora_linear.op import lora_linear as lora_linear
