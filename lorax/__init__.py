"""LoRA fine-tuning of language models in JAX."""

from lorax.config import LoraConfig as LoraConfig
from lorax.lora import apply_lora as apply_lora
from lorax.lora import merge_lora as merge_lora
from lorax.lora import set_dropout_key as set_dropout_key
from lorax.lora import split_trainable as split_trainable
from lorax.lora import unmerge_lora as unmerge_lora
from lorax.loss import accumulate as accumulate
from lorax.step import make_train_step as make_train_step
from lorax.step import merge_state as merge_state
