"""The operations that decide lorax's speed: pure functions on arrays, importing jax only."""

from lorax_kernels.cross_entropy import IGNORED as IGNORED
from lorax_kernels.cross_entropy import token_nll as token_nll
from lorax_kernels.cross_entropy import token_nll_and_gradient as token_nll_and_gradient
from lorax_kernels.device import compile_kernels as compile_kernels
from lorax_kernels.device import load_runtime as load_runtime
from lorax_kernels.device import xla_options as xla_options
from lorax_kernels.dispatch import Kernels as Kernels
from lorax_kernels.dispatch import check_kernels_name as check_kernels_name
from lorax_kernels.dispatch import runs_row_kernels as runs_row_kernels
from lorax_kernels.dtypes import accumulation_dtype as accumulation_dtype
from lorax_kernels.lora_linear import LoraWeights as LoraWeights
from lorax_kernels.lora_linear import explain_choice as explain_choice
from lorax_kernels.lora_linear import lora_linear as lora_linear
from lorax_kernels.lora_linear import lora_linear_group as lora_linear_group
from lorax_kernels.lora_linear import lora_mlp as lora_mlp
from lorax_kernels.lora_linear import lora_swiglu as lora_swiglu
from lorax_kernels.lora_linear import padded_rank as padded_rank
from lorax_kernels.lora_linear import scale_columns as scale_columns
from lorax_kernels.lora_linear.xla import swiglu as swiglu
from lorax_kernels.rms_norm import rms_norm as rms_norm
from lorax_kernels.rms_norm import rms_norm_fork as rms_norm_fork
from lorax_kernels.weights import Matrix as Matrix
from lorax_kernels.weights import Weight as Weight
from lorax_kernels.weights import dense as dense
from lorax_kernels.weights import kernel_obstacle as kernel_obstacle
