"""Training against PEFT and torch: gradients of every LoRA leaf, and fifty AdamW steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import lorax
from lorax.adapters.nnx.tree import adapted_layers
from lorax.config.train import TrainConfig
from lorax.interop.load import load_model
from lorax.interop.peft import save_adapter
from lorax.objectives.sft import causal_lm_loss
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.step import make_train_step
from lorax_kernels import IGNORED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
STEPS = 50


def make_batches(count, rows=4, length=24):
    """Batches as both sides read them: tokens, and labels that are not shifted yet."""
    draw = np.random.default_rng(0)
    batches = []
    for _ in range(count):
        tokens = draw.integers(0, 96, (rows, length)).astype(np.int32)
        tokens[:, 1::2] = tokens[:, ::2]  # something to learn
        supervised = np.arange(length)[None, :] >= draw.integers(1, length // 2, (rows, 1))
        batches.append((tokens, np.where(supervised, tokens, IGNORED)))
    return batches


def ours(tokens, labels):
    shifted = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    return {"input_ids": jnp.asarray(tokens), "labels": jnp.asarray(shifted)}


def theirs(model, tokens, labels):
    """The mean over supervised tokens, computed by transformers."""
    return model(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
    ).loss


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request, tmp_path_factory):
    """The same model with the same random adapters, here and in PEFT."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "base")
    base = load_model(folder / "base", dtype=jnp.float32)
    config = lorax.LoraConfig(r=4, lora_alpha=8, rank_pattern={"o_proj": 2})
    adapted = lorax.apply_lora(base, config, rngs=nnx.Rngs(0))
    for index, layer in enumerate(adapted_layers(adapted).values()):
        # With B at zero the gradient of A would be zero and would test nothing.
        shape = layer.adapter.lora_b.shape
        layer.adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(index), shape))
    save_adapter(adapted, folder / "adapter")
    make_torch = lambda: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        folder / "adapter",
        is_trainable=True,
    )
    return adapted, make_torch


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def test_every_adapter_gradient_equals_pefts(pair):
    adapted, make_torch = pair
    tokens, labels = make_batches(1)[0]
    torch_model = make_torch()
    expected_loss = theirs(torch_model, tokens, labels)
    expected_loss.backward()
    expected_loss = expected_loss.detach()
    graph, trainable, frozen = lorax.split_trainable(adapted)

    def mean_loss(trainable):
        total, count = causal_lm_loss(nnx.merge(graph, trainable, frozen), ours(tokens, labels))
        return total / count.astype(jnp.float32)

    loss, gradients = jax.value_and_grad(mean_loss)(trainable)
    assert abs(float(loss) - float(expected_loss)) <= 1e-5 * float(expected_loss)
    model = nnx.merge(graph, gradients, frozen)
    compared = 0
    for name, layer in adapted_layers(model).items():
        module = torch_model.get_submodule(f"base_model.model.{name}")
        for ours_, theirs_ in (
            (layer.adapter.lora_a, module.lora_A),
            (layer.adapter.lora_b, module.lora_B),
        ):
            expected = theirs_["default"].weight.grad.numpy().T
            assert np.abs(expected).max() > 0
            assert relative(np.asarray(ours_[...]), expected) <= 1e-4, name
            compared += 1
    assert compared == 2 * 7 * 2


def test_fifty_adamw_steps_have_the_losses_of_torch(pair):
    adapted, make_torch = pair
    settings = TrainConfig(
        learning_rate=1e-2, weight_decay=0.1, warmup_steps=5, max_grad_norm=1.0, max_steps=STEPS
    )
    step, state = make_train_step(adapted, make_optimizer(settings, STEPS))
    torch_model = make_torch().train()
    parameters = [p for p in torch_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, eps=1e-8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: _cosine(t, 5, STEPS))
    losses = []
    for tokens, labels in 10 * make_batches(STEPS // 10):
        batch = {k: v[None] for k, v in ours(tokens, labels).items()}
        state, metrics = step(state, batch)
        loss = theirs(torch_model, tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append((float(metrics["loss"]), float(loss.detach())))
    found, expected = np.array(losses).T
    assert np.abs(found - expected).max() <= 1e-3
    assert expected[-5:].mean() < expected[:5].mean() - 0.1  # there was something to follow


def _cosine(step, warmup, total):
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup)))
