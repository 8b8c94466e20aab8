"""Training against PEFT and torch: fifty AdamW steps."""

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lorax.config.train import TrainConfig
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.step import make_train_step
from tests.models.contract import adapted_pair, as_ours, make_batch, torch_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.as_shipped,
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
    return adapted_pair(model, folder / "base", folder)


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
    losses, draw = [], np.random.default_rng(0)
    batches = [make_batch(96, draw) for _ in range(STEPS // 10)]
    for tokens, labels in 10 * batches:
        batch = {k: v[None] for k, v in as_ours(tokens, labels).items()}
        state, metrics = step(state, batch)
        loss = torch_loss(torch_model, tokens, labels)
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
