"""Frozen matrices that are not stored as one dense array."""

from lorax_kernels.weights.weight import Matrix as Matrix
from lorax_kernels.weights.weight import Weight as Weight
from lorax_kernels.weights.weight import computed_after as computed_after
from lorax_kernels.weights.weight import dense as dense
from lorax_kernels.weights.weight import kernel_obstacle as kernel_obstacle
