"""Decoders of the Llama family."""

from lorax.models.attention import AttentionImplementation as AttentionImplementation
from lorax.models.attention import DocumentLayout as DocumentLayout
from lorax.models.config import DecoderConfig as DecoderConfig
from lorax.models.llama import CausalLM as CausalLM
from lorax.models.llama import init_model as init_model
from lorax.models.recompute import GradientCheckpointing as GradientCheckpointing
