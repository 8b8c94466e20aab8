"""What `apply_lora` is given: taken in the forms that people have it, or refused in plain words."""

import jax
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax import LoraConfig, apply_lora
from lorax.adapters.nnx.tree import adapted_layers
from lorax.adapters.targets import TargetError
from lorax.interop.peft import adapter_config
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from tests.tiny import LLAMA

CONFIG = LoraConfig(r=2)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.second(self.first(x))


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


def values(model):
    return jax.tree.leaves(nnx.state(model, nnx.LoRAParam))


@pytest.mark.parametrize(
    "rngs",
    [7, np.int64(7), jax.random.key(7), jax.random.PRNGKey(7)],
    ids=["seed", "numpy", "key", "old key"],
)
def test_a_seed_or_a_key_is_a_source_of_random_numbers(net, rngs):
    ours = values(apply_lora(net, CONFIG, rngs=rngs))
    right = values(apply_lora(net, CONFIG, rngs=nnx.Rngs(7)))
    for got, want in zip(ours, right, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "rngs, found",
    [
        (True, "True"),
        (None, "None"),
        ("7", "'7'"),
        (jax.random.split(jax.random.key(0), 2), r"key<fry>\[2\]"),
        (jax.random.PRNGKey(0)[None], r"uint32\[1, 2\]"),
    ],
    ids=["bool", "none", "text", "keys", "old keys"],
)
def test_what_is_no_source_of_random_numbers_is_refused(net, rngs, found):
    with pytest.raises(TypeError, match=rf"rngs must be an nnx.Rngs, a seed or one .*{found}"):
        apply_lora(net, CONFIG, rngs=rngs)


def test_what_is_no_model_is_refused_with_the_way_to_one(net):
    state = nnx.state(net)
    for given in (state, nnx.to_pure_dict(state)):
        with pytest.raises(TypeError, match=r"model must be an nnx.Module, got .*nnx\.merge\("):
            apply_lora(given, CONFIG, rngs=0)
    with pytest.raises(TypeError, match=r"model must be an nnx.Module, got function$"):
        apply_lora(lambda x: x, CONFIG, rngs=0)
    # The remedy works.
    module = nnx.merge(nnx.graphdef(net), state)
    assert len(values(apply_lora(module, CONFIG, rngs=0))) == 4


def test_what_are_no_settings_is_refused_with_the_way_to_them(net):
    with pytest.raises(TypeError, match=r"LoraConfig, got dict: write lorax.LoraConfig\(\*\*conf"):
        apply_lora(net, {"r": 2}, rngs=0)
    with pytest.raises(TypeError, match=r"config must be a lorax.LoraConfig, got int$"):
        apply_lora(net, 2, rngs=0)


def test_parameters_of_other_adapters_are_not_frozen_silently(net):
    class Adapted(nnx.Module):
        def __init__(self):
            self.inner = nnx.LoRALinear(8, 8, lora_rank=2, rngs=nnx.Rngs(0))
            self.last = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

    with pytest.raises(TargetError, match=r"inner\.lora has an nnx\.LoRAParam already.* frozen"):
        apply_lora(Adapted(), CONFIG, rngs=0)
    again = lorax.merge_lora(apply_lora(net, CONFIG, rngs=0))
    assert values(apply_lora(again, CONFIG, rngs=0))  # what was merged is gone


def test_a_model_without_layers_to_adapt_is_told_so():
    class Norms(nnx.Module):
        def __init__(self):
            self.norm = nnx.LayerNorm(8, rngs=nnx.Rngs(0))

    for config in (CONFIG, LoraConfig(r=2, target_modules=("q_proj",))):
        with pytest.raises(TargetError, match=r"matches no linear module; the model has none$"):
            apply_lora(Norms(), config, rngs=0)


def test_the_task_is_written_where_it_is_known(net):
    def adapt():
        model = CausalLM(read_architecture(LLAMA, "here"), rngs=nnx.Rngs(0))
        return apply_lora(model, CONFIG, rngs=nnx.Rngs(0))

    assert adapter_config(nnx.eval_shape(adapt))["task_type"] == "CAUSAL_LM"
    assert adapter_config(apply_lora(net, CONFIG, rngs=0))["task_type"] is None


def test_all_linear_leaves_out_a_classifier_s_head_and_says_so():
    class Classifier(nnx.Module):
        def __init__(self):
            self.body = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(8, 3, rngs=nnx.Rngs(1))

    said = r"all-linear leaves out head \(rank 4\): .*lora\.modules_to_save"
    with pytest.warns(UserWarning, match=said):
        model = apply_lora(Classifier(), LoraConfig(r=4), rngs=0)
    assert list(adapted_layers(model)) == ["body"]
    # What it says to do is done without a word.
    for more in ({"modules_to_save": ("head",)}, {"exclude_modules": ("head",)}):
        again = apply_lora(Classifier(), LoraConfig(r=4, **more), rngs=0)
        assert list(adapted_layers(again)) == ["body"]
    with pytest.raises(TargetError, match=r"head: rank must be in \[1, 3\]"):
        apply_lora(Classifier(), LoraConfig(r=4, target_modules=("head",)), rngs=0)
    layers = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    with pytest.warns(UserWarning, match=r"leaves out layers\.1 \(rank 4\)"):
        assert list(adapted_layers(apply_lora(layers, LoraConfig(r=4), rngs=0))) == ["layers.0"]

    class Stack(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([layers])

    with pytest.raises(TargetError, match=r"blocks\.0\.layers\.1: rank must be in \[1, 3\]"):
        apply_lora(Stack(), LoraConfig(r=4), rngs=0)  # no head, but a layer of each block


def test_layers_that_are_not_found_are_found_by_the_name_of_their_list():
    class Stack(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([Net(nnx.Rngs(i)) for i in range(2)])

    settings = {"r": 2, "target_modules": ("first",), "layers_to_transform": (1,)}
    with pytest.raises(TargetError, match=r"no layers are found; name the list .*layers_pattern$"):
        apply_lora(Stack(), LoraConfig(**settings), rngs=0)
    model = apply_lora(Stack(), LoraConfig(**settings, layers_pattern="layers"), rngs=0)
    assert list(adapted_layers(model)) == ["layers.1.first"]
