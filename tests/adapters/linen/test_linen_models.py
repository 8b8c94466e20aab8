"""Whole Linen models: transformers, scans and recomputing, dropout, what trains of the base."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax
import lorax.linen as ll
from lorax.interop.peft_config import AdapterError
from tests.adapters.linen.kinds import One, moved
from tests.adapters.linen.nets import Decoder, ViT, ids_of

KEY = jax.random.key(0)
JitDense = nn.jit(nn.Dense)  # whose traces JAX keeps


def begun(model, x, **settings):
    plain = model.init(KEY, x)
    config = lorax.LoraConfig(**{"r": 2, "lora_alpha": 4.0} | settings)
    return plain, *ll.apply_lora(model, plain, config, x, rngs=0)


def agree(model, adapted, variables, x):
    """Checks that merged weights compute what the adapted model does; returns that."""
    got = jax.jit(adapted.for_evaluation().apply)(variables, x)
    want = jax.jit(model.apply)(ll.merge_lora(adapted, variables), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    return got


def test_a_vision_transformer_is_adapted_throughout(tmp_path):
    model, x = ViT(), jax.random.normal(KEY, (2, 8, 8, 3))
    targets = ["patches", "positions", "query", "key", "value", "out", "Dense_0", "Dense_1"]
    plain, adapted, variables = begun(model, x, target_modules=targets, modules_to_save=["head"])
    assert len(adapted.layers) == 2 + 2 * 6
    np.testing.assert_array_equal(adapted.apply(variables, x), model.apply(plain, x))
    variables = moved(variables)
    got = agree(model, adapted, variables, x)
    path = ll.save_adapter(adapted, variables, tmp_path / "adapter", card="A card.")
    loaded, again = ll.load_adapter(model, plain, path, x)
    np.testing.assert_array_equal(jax.jit(loaded.for_evaluation().apply)(again, x), got)
    files = load_file(path / "adapter_model.safetensors")
    assert files["base_model.model.patches.lora_A.weight"].shape == (2, 3, 4, 4)
    assert files["base_model.model.positions.lora_embedding_A"].shape == (2, 5)
    assert files["base_model.model.block_0.Dense_0.lora_B.weight"].shape == (16, 2)
    assert files["base_model.model.head.weight"].shape == (3, 8)


@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_scanned_layers_are_those_of_a_loop(method, tmp_path):
    scanned, looped = Decoder(), Decoder(scanned=False)
    x = ids_of(2, 5)
    targets = ["query", "value", "up", "down"]
    plain, adapted, variables = begun(scanned, x, target_modules=targets, **method)
    assert {layer.stack for layer in adapted.layers} == {(3,)}
    np.testing.assert_array_equal(
        jax.jit(adapted.apply)(variables, x), jax.jit(scanned.apply)(plain, x)
    )
    first, second = (variables["lora"]["layers"]["up"]["lora_a"][i] for i in (0, 1))
    assert not np.array_equal(first, second)
    variables = moved(variables)
    got = agree(scanned, adapted, variables, x)

    def unrolled(tree):
        rest = {name: value for name, value in tree.items() if name != "layers"}
        layers = [jax.tree.map(lambda v, i=i: v[i], tree["layers"]) for i in range(3)]
        return rest | {f"layers_{i}": layer for i, layer in enumerate(layers)}

    config = lorax.LoraConfig(r=2, lora_alpha=4.0, target_modules=targets, **method)
    base = {"params": unrolled(plain["params"])}
    other, its = ll.apply_lora(looped, base, config, x, rngs=0)
    its = its | {name: unrolled(v) for name, v in variables.items() if name.startswith("lora")}
    want = jax.jit(other.for_evaluation().apply)(its, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    path = ll.save_adapter(adapted, variables, tmp_path / "adapter")
    loaded, again = ll.load_adapter(scanned, plain, path, x)
    np.testing.assert_array_equal(jax.jit(loaded.for_evaluation().apply)(again, x), got)


def test_layers_that_nn_vmap_stacks_are_adapted_each():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0
            )
            return JitDense(3)(dense(5, name="experts")(x))

    model, x = Model(), jax.random.normal(KEY, (4, 2, 6))
    plain = model.init(KEY, x)
    before = model.apply(plain, x)  # what nn.jit has traced without adapters is not what runs
    begun(model, x)
    _, adapted, variables = begun(model, x)  # nor what it has traced to find the layers
    assert [layer.stack for layer in adapted.layers] == [(4,), ()]
    np.testing.assert_array_equal(adapted.apply(variables, x), before)
    variables = moved(variables)
    got = agree(model, adapted, variables, x)
    _, other, _ = begun(model, x, lora_alpha=8.0)
    assert not np.allclose(other.apply(variables, x), got, atol=1e-2)


class Ones(nn.Module):
    """Layers of one weight, scanned, each of whose outputs is added up apart."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x, nn.Dense(6, name="layer")(x)

        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[1]


def test_dropout_is_that_of_its_key_and_differs_from_layer_to_layer():
    model, x = Ones(), jnp.ones((5, 8))
    plain, adapted, variables = begun(model, x, lora_dropout=0.5)
    ones = jax.tree.map(jnp.ones_like, variables["lora"])
    variables = {**variables, "lora": ones}
    base = model.apply(plain, x)

    def run(seed):
        return adapted.apply(variables, x, rngs={"lora": jax.random.key(seed)}) - base

    first = run(1)
    np.testing.assert_array_equal(first, run(1))
    assert not np.array_equal(first, run(2))
    assert not np.array_equal(first[0], first[1])
    full = adapted.for_evaluation().apply(variables, x) - base
    np.testing.assert_allclose(full, 2 * 2 * 8, rtol=1e-4)
    many = jnp.stack([run(seed) for seed in range(40)]).mean(0)
    assert np.abs(many / full - 1).mean() < 0.1
    old = adapted.apply(variables, x, rngs={"lora": jax.random.PRNGKey(1)})
    np.testing.assert_array_equal(old - base, first)
    np.testing.assert_array_equal(adapted.apply(variables, x, rngs=jax.random.key(1)) - base, first)


def test_dropout_is_never_off_unasked():
    model, x = Decoder(scanned=False, dropout=0.5), ids_of(2, 5)
    _, adapted, variables = begun(model, x, lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"adapted\.for_evaluation\(\)\.apply"):
        adapted.apply(variables, x)
    with pytest.raises(ValueError, match="lora_dropout needs a fresh key"):
        adapted.apply(variables, x, rngs={"dropout": KEY}, train=True)
    adapted.apply(variables, x, rngs={"lora": KEY, "dropout": KEY}, train=True)
    adapted.for_evaluation().apply(variables, x)


def test_only_the_collection_of_adapters_trains_and_holds_the_bases_parts_that_do():
    model, x = Decoder(), ids_of(2, 5)
    more = {"modules_to_save": ["norm"], "bias": "lora_only"}
    plain, adapted, variables = begun(model, x, target_modules=["up"], **more)
    lora = variables["lora"]
    assert set(lora) == {"layers", "norm"} and set(lora["layers"]) == {"up"}
    assert set(lora["layers"]["up"]) == {"lora_a", "lora_b", "bias"}
    assert set(lora["norm"]) == {"scale", "bias"}
    variables = moved(variables)
    agree(model, adapted, variables, x)
    merged = ll.merge_lora(adapted, variables)["params"]
    np.testing.assert_array_equal(merged["norm"]["scale"], variables["lora"]["norm"]["scale"])
    same = jax.tree.map(np.array_equal, merged["embed"], plain["params"]["embed"])
    assert jax.tree.all(same)


def test_what_trains_of_the_base_is_float32_where_the_layer_declares_its_dtype():
    for dtype, wanted in ((jnp.bfloat16, "float32"), (None, "bfloat16")):
        model = One(nn.Dense(5, dtype=dtype, param_dtype=jnp.bfloat16))
        x = jnp.ones((2, 6), jnp.bfloat16)
        _, adapted, variables = begun(model, x, target_modules=["layer"], bias="all")
        assert variables["lora"]["layer"]["bias"].dtype == wanted
        assert adapted.apply(variables, x).dtype == jnp.bfloat16
        merged = ll.merge_lora(adapted, moved(variables))["params"]["layer"]
        assert {str(value.dtype) for value in merged.values()} == {"bfloat16"}


def test_batch_statistics_are_the_models_own():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))

    model, x = Model(), jax.random.normal(KEY, (5, 6))
    plain, adapted, variables = begun(model, x)
    y, changed = adapted.apply(variables, x, train=True, mutable=["batch_stats"])
    want, expected = model.apply(plain, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, want)
    assert jax.tree.all(jax.tree.map(np.array_equal, changed, expected))
    assert set(ll.merge_lora(adapted, variables)) == {"params", "batch_stats"}


def test_pissa_begins_as_the_base_and_is_saved_as_plain_lora(tmp_path):
    model, x = Decoder(), ids_of(2, 5)
    plain, adapted, variables = begun(model, x, target_modules=["up"], init_lora_weights="pissa")
    assert "lora_fixed" in variables
    want = model.apply(plain, x)
    np.testing.assert_allclose(adapted.apply(variables, x), want, rtol=1e-4, atol=1e-4)
    variables = moved(variables)
    got = agree(model, adapted, variables, x)
    path = ll.save_adapter(adapted, variables, tmp_path / "adapter")
    loaded, again = ll.load_adapter(model, plain, path, x)
    np.testing.assert_allclose(loaded.for_evaluation().apply(again, x), got, rtol=1e-5, atol=1e-5)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    model, x = Decoder(), ids_of(2, 5)
    _, adapted, variables = begun(model, x, target_modules=["up"])
    path = ll.save_adapter(adapted, variables, tmp_path / "adapter", format="peft-portable")
    with pytest.raises(ValueError, match="adapter"):  # the folder holds something
        ll.save_adapter(adapted, variables, path)
    looped = Decoder(scanned=False)
    with pytest.raises(AdapterError, match="lacks 6 tensors"):
        ll.load_adapter(looped, looped.init(KEY, x), path, x)
    other = One(nn.Dense(5))
    with pytest.raises(lorax.adapters.targets.TargetError, match="does not fit this model"):
        ll.load_adapter(other, other.init(KEY, jnp.ones((2, 6))), path, jnp.ones((2, 6)))
    bad = jax.tree.map(lambda v: v * jnp.nan, variables["lora"])
    with pytest.raises(ValueError, match=r"not saved: .* holds values that are not finite"):
        ll.save_adapter(adapted, {**variables, "lora": bad}, tmp_path / "bad")
    with pytest.raises(ValueError, match="merging gives values that are not finite"):
        ll.merge_lora(adapted, {**variables, "lora": bad})
    _, adapted, variables = begun(model, x, target_modules=["up"], bias="all")
    with pytest.raises(ValueError, match="peft-portable holds A and B only"):
        ll.save_adapter(adapted, variables, tmp_path / "portable", format="peft-portable")
