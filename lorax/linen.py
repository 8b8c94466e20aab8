"""LoRA on Flax Linen models."""

from lorax.adapters.linen.apply import apply_lora as apply_lora
from lorax.adapters.linen.eva import initialize_eva as initialize_eva
from lorax.adapters.linen.merge import merge_lora as merge_lora
from lorax.adapters.linen.model import AdaptedModel as AdaptedModel
from lorax.interop.peft_linen import load_adapter as load_adapter
from lorax.interop.peft_linen import save_adapter as save_adapter
from lorax.report.linen import trainable_parameters as trainable_parameters
from lorax.training.linen import make_train_step as make_train_step
from lorax.training.linen import merge_state as merge_state
