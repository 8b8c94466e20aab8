"""x·W0 + s·(x·A)·B with the gradients of x, A and B: one layer, a group, a SwiGLU pair."""

from lorax_kernels.lora_linear.choice import explain_choice as explain_choice
from lorax_kernels.lora_linear.choice import padded_rank as padded_rank
from lorax_kernels.lora_linear.op import lora_linear as lora_linear
from lorax_kernels.lora_linear.op import lora_linear_group as lora_linear_group
from lorax_kernels.lora_linear.op import lora_mlp as lora_mlp
from lorax_kernels.lora_linear.op import lora_swiglu as lora_swiglu
from lorax_kernels.lora_linear.op import scale_columns as scale_columns
from lorax_kernels.lora_linear.weights import LoraWeights as LoraWeights
