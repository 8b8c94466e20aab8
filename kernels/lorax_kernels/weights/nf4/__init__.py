"""NF4 in bitsandbytes' layout: four bits an element and one scale per block of 64."""

from lorax_kernels.weights.nf4.quantise import Rule as Rule
from lorax_kernels.weights.nf4.quantise import quantise as quantise
from lorax_kernels.weights.nf4.weight import Nf4 as Nf4
