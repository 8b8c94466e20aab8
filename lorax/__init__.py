"""LoRA fine-tuning of language models in JAX."""

from lorax.adapters.nnx.apply import apply_lora as apply_lora
from lorax.adapters.nnx.apply import set_dropout_key as set_dropout_key
from lorax.adapters.nnx.apply import set_kernels as set_kernels
from lorax.adapters.nnx.merge import merge_lora as merge_lora
from lorax.adapters.nnx.merge import unload_lora as unload_lora
from lorax.adapters.nnx.merge import unmerge_lora as unmerge_lora
from lorax.adapters.nnx.tree import split_trainable as split_trainable
from lorax.config.adapter import LoraConfig as LoraConfig
from lorax.config.data import DataConfig as DataConfig
from lorax.config.run import RunConfig as RunConfig
from lorax.config.run import load_config as load_config
from lorax.config.train import TrainConfig as TrainConfig
from lorax.data.chat.tokenizer import load_tokenizer as load_tokenizer
from lorax.data.encode import load_encoded_dataset as load_encoded_dataset
from lorax.generation.generate import generate as generate
from lorax.interop.export import export_model as export_model
from lorax.interop.load import load_model as load_model
from lorax.interop.peft import load_adapter as load_adapter
from lorax.interop.peft import save_adapter as save_adapter
from lorax.interop.save import save_model as save_model
from lorax.objectives.linear_loss import linear_cross_entropy as linear_cross_entropy
from lorax.runs.setup import build_model as build_model
from lorax.training.accumulate import accumulate as accumulate
from lorax.training.step import make_train_step as make_train_step
from lorax.training.step import merge_state as merge_state
from lorax.training.trainer import Trainer as Trainer
