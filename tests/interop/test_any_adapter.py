"""Two hundred random adapters: each starts as the base, and is saved as it computes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lorax
from lorax.adapters.nnx.adapter import cost_of
from lorax.adapters.nnx.tree import adapted_layers, split_trainable
from lorax.interop.export_formats import refuse_formats
from lorax.models.decoder import init_model
from lorax.models.families import read_architecture
from tests.tiny import SMALL

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
CONFIG = SMALL | SIZES | HEADS | {"model_type": "qwen2", "tie_word_embeddings": False}
BIASED = ["q_proj", "k_proj", "v_proj"]
LINEAR = [*BIASED, "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
TOKENS = jax.random.randint(jax.random.key(0), (1, 9), 0, 40)
STARTS = [True, True, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"]
CASES, PARTS = 200, 10


@pytest.fixture(scope="module")
def base():
    model = init_model(read_architecture(CONFIG, "here"), dtype=jnp.float32, seed=3)
    for index, layer in enumerate(nnx.iter_graph(model)):
        variable = layer[1]
        if isinstance(variable, nnx.Param) and variable.ndim == 1:  # biases are zero
            variable.set_value(0.2 * jax.random.normal(jax.random.key(index), variable.shape) + 1)
    return model


def draw(seed: int) -> dict[str, Any]:
    """Returns settings of `LoraConfig` that go together."""
    rng = np.random.default_rng(seed)
    pick = lambda values: values[rng.integers(len(values))]
    often = lambda share: rng.random() < share
    method = pick(["lora", "lora", "dora", "lora_bias"])
    # A bias of the update can be merged into a bias alone.
    possible = BIASED if method == "lora_bias" else [*LINEAR, "embed_tokens"]
    count = rng.integers(1, len(possible) + 1)
    targets = sorted(rng.choice(possible, size=count, replace=False).tolist())
    settings: dict[str, Any] = {
        "target_modules": targets,
        "r": pick([2, 4]),
        "lora_alpha": pick([4, 6.5]),
        "lora_dropout": pick([0.0, 0.3]),
        "use_rslora": often(0.3),
        "init_lora_weights": pick(STARTS),
        "use_dora": method == "dora",
        "lora_bias": method == "lora_bias",
    }
    if often(0.3):
        settings["rank_pattern"] = {pick(targets): pick([2, 4, 6])}
        settings["alpha_pattern"] = {pick(targets): 3}
    free = [name for name in ("embed_tokens", "lm_head", "norm") if name not in targets]
    if free and often(0.3):
        settings["modules_to_save"] = [saved] if (saved := pick(free)) != "norm" else ["model.norm"]
        free.remove(saved)
    tables = [name for name in free if name != "norm"]
    if tables and often(0.4):
        settings["trainable_token_indices"] = {pick(tables): rng.permutation(40)[:3].tolist()}
    if set(BIASED) & set(targets) and often(0.3):
        settings["bias"] = pick(["all", "lora_only"])
    return settings


def relative(found, expected) -> float:
    found = np.float64(found)
    expected = np.float64(expected)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def change(model) -> None:
    """Moves everything that trains away from where it starts."""
    leaves = [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)]
    for index, variable in enumerate(leaves):
        noise = 0.1 * jax.random.normal(jax.random.key(index), variable.shape)
        variable.set_value(variable[...] + noise)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_any_adapter_starts_as_the_base_and_is_saved_as_it_computes(base, part, tmp_path):
    for seed in range(part, CASES, PARTS):
        settings = draw(seed)
        model = lorax.apply_lora(base, lorax.LoraConfig(**settings), rngs=seed)
        model.eval()
        start = model(TOKENS)
        if settings["init_lora_weights"] in (True, "gaussian"):
            np.testing.assert_array_equal(start, base(TOKENS), err_msg=str(settings))
        assert relative(start, base(TOKENS)) <= 1e-5, settings
        change(model)
        got = model(TOKENS)
        assert relative(got, base(TOKENS)) > 1e-3, settings
        assert relative(lorax.merge_lora(model)(TOKENS), got) <= 1e-5, settings
        again = lorax.load_adapter(base, lorax.save_adapter(model, tmp_path / f"{seed}"))
        again.eval()
        np.testing.assert_array_equal(again(TOKENS), got, err_msg=str(settings))
        check_sizes(model, tmp_path / f"{seed}", settings)
        check_portable(base, model, tmp_path / f"portable-{seed}", got, settings)


def check_sizes(model, folder, settings) -> None:
    """Compares what is counted before a run with what trains, and with what the file holds."""
    trains = split_trainable(model)[1]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trains))
    table = lorax.trainable_parameters(model)
    assert table.trained == count, settings
    costs = [cost_of(layer).parameters for layer in adapted_layers(model).values()]
    assert sum(row.parameters for row in table.modules) == sum(costs), settings
    held = sum(value.size for value in load_file(folder / "adapter_model.safetensors").values())
    doubled = sum(
        spec.r * sum(layer.linear_map.shape)
        for layer in adapted_layers(model).values()
        if layer.adapter.fixed_names and "first_a" in layer.adapter.fixed_names
        for spec in [layer.adapter.spec]
    )
    assert held == count + doubled, settings


def check_portable(base, model, folder, got, settings) -> None:
    """Exports A and B of one rank, or is refused before a run would begin."""
    try:
        refuse_formats(model, ["peft-portable"])
    except ValueError as error:
        with pytest.raises(ValueError, match="peft-portable holds A and B only"):
            lorax.save_adapter(model, folder, format="peft-portable")
        assert "peft-portable holds A and B only" in str(error), settings
        return
    lorax.save_adapter(model, folder, format="peft-portable")
    again = lorax.load_adapter(base, folder)
    again.eval()
    assert relative(again(TOKENS), got) <= 1e-5, settings
