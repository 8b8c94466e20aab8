"""An adapted model in numbers: Flax's own table, and what trains."""

import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from tests.tiny import LLAMA


class Net(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(16, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(self.first(x))


def stock():
    return CausalLM(read_architecture(LLAMA, "here"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "make, x",
    [(Net, jnp.ones((1, 8))), (stock, jnp.ones((1, 8), jnp.int32))],
    ids=["foreign", "stock"],
)
def test_flax_tabulates_an_adapted_model(make, x):
    model = lorax.apply_lora(make(), lorax.LoraConfig(r=2), rngs=0)
    text = nnx.tabulate(model, x, console_kwargs={"width": 240, "force_terminal": False})
    trained = lorax.trainable_parameters(model)
    assert "LoRAParam" in text and "Frozen" in text
    assert f"Total Parameters: {trained.total:,}" in text
    assert f" {trained.trained:,} (" in text


def test_what_trains_is_counted():
    assert lorax.trainable_parameters(Net()).share == 1
    settings = lorax.LoraConfig(r=2, target_modules=("first",), modules_to_save=("second",))
    found = lorax.trainable_parameters(lorax.apply_lora(Net(), settings, rngs=0))
    assert [(row.name, row.count, row.rank, row.parameters) for row in found.modules] == [
        ("first", 1, 2, 2 * (8 + 16))
    ]
    assert found.others == 16 * 4 + 4
    assert found.trained == 48 + 68
    assert found.total == 48 + 68 + 8 * 16 + 16
    assert str(found).splitlines()[-2:] == [
        "other parameters that train: 68",
        "trained 116 of 260 parameters (44.615 %)",
    ]


def test_what_trains_is_counted_without_arrays():
    def adapt():
        return lorax.apply_lora(Net(), lorax.LoraConfig(r=2), rngs=nnx.Rngs(0))

    shapes = nnx.eval_shape(adapt)
    assert lorax.trainable_parameters(shapes) == lorax.trainable_parameters(adapt())
