"""Single tokens that train: their rows of an embedding, their columns of a head."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorax
from lorax import LoraConfig, apply_lora, merge_lora, unload_lora, unmerge_lora, use_adapter
from lorax.adapters.nnx.tree import adapted_layers

VOCABULARY = 20
WIDTH = 8


class Net(nnx.Module):
    """An embedding, a layer and a head of its own, or the embedding again."""

    def __init__(self, tied, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed_tokens = nnx.Embed(VOCABULARY, WIDTH, **options)
        self.fc = nnx.Linear(WIDTH, WIDTH, **options)
        self.tied = tied
        if not tied:
            self.lm_head = nnx.Linear(WIDTH, VOCABULARY, **options)

    def __call__(self, ids):
        x = jnp.tanh(self.fc(self.embed_tokens(ids)))
        return self.embed_tokens.attend(x) if self.tied else self.lm_head(x)


IDS = jax.random.randint(jax.random.key(1), (4, 6), 0, VOCABULARY).at[0, 0].set(3)
BOTH = {"embed_tokens": [7, 3], "lm_head": [3, 7, 11]}


def adapt(net, tokens, **settings):
    config = LoraConfig(r=2, target_modules=["fc"], trainable_token_indices=tokens, **settings)
    return apply_lora(net, config, rngs=nnx.Rngs(1))


def change(model):
    """Moves what trains away from where it starts."""
    for index, layer in enumerate(adapted_layers(model).values()):
        for name in layer.adapter.params:
            variable = layer.adapter.variable(name)
            noise = 0.3 * jax.random.normal(jax.random.key(index), variable.shape)
            variable.set_value(variable[...] + noise)
    return model


@pytest.mark.parametrize("tied, tokens", [(True, [7, 3]), (False, [3, 7]), (False, BOTH)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_their_values_stand_in_the_place_of_the_tables(tied, tokens, dtype):
    net = Net(tied, dtype)
    model = adapt(net, tokens)
    np.testing.assert_array_equal(np.float32(model(IDS)), np.float32(net(IDS)))
    change(model)
    got = np.float32(model(IDS))
    assert np.abs(got - np.float32(net(IDS))).max() > 0.05
    whole = nnx.clone(net)
    for name, layer in adapted_layers(model).items():
        if name == "fc":
            continue
        table = getattr(whole, name)
        rows = layer.adapter.params["rows"].astype(dtype)
        ids = jnp.array(layer.adapter.spec.tokens)
        if name == "lm_head":
            table.kernel.set_value(table.kernel[...].at[:, ids].set(rows))
        else:
            table.embedding.set_value(table.embedding[...].at[ids].set(rows.T))
    whole.fc = merge_lora(model).fc
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    np.testing.assert_allclose(got, np.float32(whole(IDS)), rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(np.float32(unload_lora(model)(IDS)), np.float32(net(IDS)))
    use_adapter(model, None)
    np.testing.assert_array_equal(np.float32(model(IDS)), np.float32(net(IDS)))
    use_adapter(model, "default")
    np.testing.assert_array_equal(np.float32(model(IDS)), got)


@pytest.mark.parametrize("tied, tokens", [(True, [7, 3]), (False, BOTH)], ids=str)
def test_merged_and_unmerged_and_saved(tied, tokens, tmp_path):
    net = Net(tied)
    model = change(adapt(net, tokens))
    got = model(IDS)
    np.testing.assert_allclose(merge_lora(model)(IDS), got, rtol=1e-5, atol=1e-5)
    back = unmerge_lora(merge_lora(model, keep_adapters=True))
    np.testing.assert_allclose(back(IDS), got, rtol=1e-5, atol=1e-5)
    for name in set(adapted_layers(model)) - {
        "fc"
    }:  # the table's own values come back as they were
        np.testing.assert_array_equal(getattr(back, name).matrix, getattr(model, name).matrix)
    lorax.save_adapter(model, tmp_path / "out")
    again = lorax.load_adapter(net, tmp_path / "out")
    np.testing.assert_array_equal(again(IDS), got)


def test_only_their_rows_train():
    net = Net(True)
    model = adapt(net, [3, 7])

    def loss_fn(model, ids):
        logits = model(ids[:, :-1])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return nll.sum(), jnp.float32(nll.size)

    step, state = lorax.make_train_step(model, optax.sgd(1.0), loss_fn)
    state, metrics = step(state, IDS[None])
    trained = merge_lora(lorax.merge_state(model, state))
    moved = np.abs(
        np.asarray(trained.embed_tokens.embedding[...] - net.embed_tokens.embedding[...])
    )
    assert set(np.nonzero(moved.max(1))[0]) == {3, 7} and moved[3].max() > 1e-3

    def whole(table):
        other = nnx.clone(net)
        other.embed_tokens.embedding.set_value(table)
        total, count = loss_fn(other, IDS)
        return total / count

    gradient = jax.grad(whole)(net.embed_tokens.embedding[...])
    difference = trained.embed_tokens.embedding[...] - net.embed_tokens.embedding[...]
    np.testing.assert_allclose(difference[3], -gradient[3], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(difference[7], -gradient[7], rtol=1e-4, atol=1e-6)
    assert metrics["applied"]


@pytest.mark.parametrize(
    "tokens, settings, message",
    [
        ([20], {}, "embed_tokens cannot .* needs tokens of 0 to 19, got 20"),
        ([3, 5, 3], {}, "'embed_tokens' has token 3 more than once"),
        ({"fc2": [1]}, {}, "'fc2' names no embedding and no head; .*embed_tokens"),
        ([1], {"modules_to_save": ["embed_tokens"]}, "modules_to_save trains embed_tokens whole"),
        (
            [1],
            {"target_modules": ["fc", "embed_tokens"]},
            "embed_tokens carries an adapter of targ",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tokens, settings, message):
    settings = {"target_modules": ["fc"], **settings}
    config = LoraConfig(r=2, trainable_token_indices=tokens, **settings)
    with pytest.raises(ValueError, match=message):
        apply_lora(Net(False), config, rngs=nnx.Rngs(1))


def test_a_model_of_two_embeddings_needs_their_names():
    class Two(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first = nnx.Embed(4, 4, rngs=rngs)
            self.second = nnx.Embed(4, 4, rngs=rngs)
            self.fc = nnx.Linear(4, 4, rngs=rngs)

    with pytest.raises(ValueError, match="one embedding, and it has first, second; write a map"):
        adapt(Two(), [1])
    assert set(adapted_layers(adapt(Two(), {"first": [1]}))) == {"fc", "first"}
