"""Adapters of PEFT on a tiny base, and what they compute."""

from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import (
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from tests.tiny import edit_json

TOKENS = np.arange(22).reshape(2, 11) * 4 % 96


TARGETS = ["q_proj", "v_proj"]


def torch_base(base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


def trained(model):
    """Moves everything that trains, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def peft_model(base, **settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
    return get_peft_model(torch_base(base), PeftLoraConfig(task_type="CAUSAL_LM", **settings))


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def edit(folder, **changes):
    edit_json(folder / "adapter_config.json", **changes)
    return folder
