"""What trains of a Linen model in numbers: those of the NNX model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
import lorax.linen as ll
from tests.adapters.linen.nets import Decoder, ids_of


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="second")(nn.Dense(16, name="first")(x))


class NnxNet(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(16, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(self.first(x))


X = jnp.ones((1, 8))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["first"], "modules_to_save": ["second"]},
        {"target_modules": ["first"], "bias": "all"},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_the_count_is_that_of_nnx(settings):
    config = lorax.LoraConfig(r=2, **settings)
    adapted, variables = ll.apply_lora(Net(), Net().init(jax.random.key(0), X), config, X, rngs=0)
    found = ll.trainable_parameters(adapted, variables)
    wanted = lorax.trainable_parameters(lorax.apply_lora(NnxNet(), config, rngs=0))
    assert found == wanted and str(found) == str(wanted)
    shapes = jax.eval_shape(lambda: variables)
    assert ll.trainable_parameters(adapted, shapes) == found


def test_stacked_layers_count_as_often_as_they_are_there():
    config = lorax.LoraConfig(r=2, target_modules=["up"])
    for model, row in ((Decoder(), ("layers.up", 1)), (Decoder(scanned=False), ("up", 3))):
        variables = model.init(jax.random.key(0), ids_of(2, 5))
        adapted, variables = ll.apply_lora(model, variables, config, ids_of(2, 5), rngs=0)
        found = ll.trainable_parameters(adapted, variables)
        assert found.trained == 3 * 2 * (8 + 16)
        assert sum(each.count for each in found.modules) == row[1]
        assert all(row[0] in each.name for each in found.modules)


def test_other_arguments_are_refused():
    variables = Net().init(jax.random.key(0), X)
    adapted, _ = ll.apply_lora(Net(), variables, lorax.LoraConfig(r=2), X, rngs=0)
    with pytest.raises(TypeError, match=r"adapted must be the AdaptedModel"):
        ll.trainable_parameters(Net(), variables)
    with pytest.raises(ValueError, match=r"variables must hold 'params' and 'lora'"):
        ll.trainable_parameters(adapted, variables)
