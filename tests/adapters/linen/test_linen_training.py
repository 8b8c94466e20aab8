"""Training Linen models: lorax's step, flax.training's loop, micro-batches, devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import lorax
import lorax.linen as ll
from lorax.devices.mesh import make_mesh
from tests.adapters.linen.kinds import moved
from tests.adapters.linen.nets import Decoder, batch_of, loss_fn
from tests.bounds import EXACT, distance, in_float64

STEPS = 3


def begun(model=None, **settings):
    model = model or Decoder()
    batch = batch_of(4, 4)
    x = batch["ids"][0, :, :-1]
    plain = model.init(jax.random.key(0), x)
    chosen = {"r": 2, "target_modules": ["query", "value", "up", "down", "embed"]} | settings
    adapted, variables = ll.apply_lora(model, plain, lorax.LoraConfig(**chosen), x, rngs=0)
    return adapted, moved(variables, 0.1), batch


def optimizer():
    return optax.adamw(1e-2)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        yield


def ran(step, state, batches):
    """Returns the state after some steps."""
    for batch in batches:
        state, metrics = step(state, batch)
        assert bool(metrics["applied"])
    return state


def test_a_step_does_what_a_loop_of_flax_does():
    adapted, variables, batch = begun(modules_to_save=["norm"])
    batches = [jax.tree.map(lambda x, i=i: x[i][None], batch) for i in range(STEPS)]
    step, state = ll.make_train_step(adapted, variables, optimizer(), loss_fn)
    trained = ran(step, state, batches)

    frozen = {name: value for name, value in variables.items() if name != "lora"}
    loop = TrainState.create(apply_fn=adapted.apply, params=variables["lora"], tx=optimizer())

    @jax.jit
    def train_step(loop, batch):
        def mean_loss(lora):
            model = lambda ids, **more: loop.apply_fn({**frozen, "lora": lora}, ids, **more)
            total, count = loss_fn(model, batch)
            return total / count

        return loop.apply_gradients(grads=jax.grad(mean_loss)(loop.params))

    for each in batches:
        loop = train_step(loop, jax.tree.map(lambda x: x[0], each))
    jax.tree.map(lambda a, b: close(a, b), trained.trainable, loop.params)
    merged = ll.merge_state(variables, trained)
    assert merged["params"] is variables["params"]
    jax.tree.map(np.testing.assert_array_equal, merged["lora"], trained.trainable)


def close(a, b):
    # Adam divides by what may be a rounding: a step is at most its learning rate.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


def in_doubles():
    """Returns what `begun` does, to be trained in float64."""
    adapted, variables, batch = begun()
    variables, weights = jax.tree.map(
        lambda x: x.astype(jnp.float64), (variables, batch["weights"])
    )
    return adapted, variables, batch | {"weights": weights}


def agree(one, other):
    for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert got.dtype == jnp.float64
        assert distance(got, want) < EXACT


def test_micro_batches_come_to_the_large_batch():
    with in_float64():
        adapted, variables, batch = in_doubles()
        whole = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)
        found = []
        for each in (batch, whole):
            step, state = ll.make_train_step(adapted, variables, optax.sgd(0.1), loss_fn)
            found.append(ran(step, state, [each]).trainable)
        agree(*found)


def test_four_devices_come_to_what_one_does():
    with in_float64():
        adapted, variables, batch = in_doubles()
        mesh = make_mesh(4)
        placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
        found = []
        for where, each in ((None, batch), (mesh, placed)):
            step, state = ll.make_train_step(
                adapted, variables, optax.sgd(0.1), loss_fn, mesh=where
            )
            found.append(ran(step, state, [each] * STEPS).trainable)
        one, four = found
        assert all(len(x.sharding.device_set) == 4 for x in jax.tree.leaves(four))
        agree(one, four)


def test_dropout_has_a_fresh_mask_every_step_and_micro_batch():
    class Sums(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x), nn.Dropout(0.5, deterministic=False)(x)

    model, x = Sums(), jnp.ones((2, 2, 64))
    config = lorax.LoraConfig(r=1, lora_dropout=0.5, target_modules=["Dense_0"])
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    adapted, variables = ll.apply_lora(model, model.init(rngs, x[0]), config, x[0], rngs=0)

    def masks(model, batch):
        y, dropped = model(batch["x"])
        # What adapters and nn.Dropout leave, as numbers that differ wherever a mask does.
        places = jnp.arange(64.0)
        return 0 * y.sum(), jnp.float32(1), {"own": (dropped[0] * places).sum(), "lora": y[0].sum()}

    variables = {**variables, "lora": jax.tree.map(jnp.ones_like, variables["lora"])}
    step, state = ll.make_train_step(adapted, variables, optax.sgd(0.1), masks)
    seen = []
    for _ in range(3):
        state, metrics = step(state, {"x": x})
        seen.append((float(metrics["own"]), float(metrics["lora"])))
    assert len({own for own, _ in seen}) == len({lora for _, lora in seen}) == 3
    step, state = ll.make_train_step(adapted, variables, optax.sgd(0.1), masks)
    _, metrics = step(state, {"x": x})
    assert (float(metrics["own"]), float(metrics["lora"])) == seen[0]


def test_what_a_step_cannot_be_made_of_is_refused():
    adapted, variables, _ = begun()
    plain = {"params": variables["params"]}
    make = ll.make_train_step
    for call, error, message in (
        (lambda: make(adapted.model, variables, optimizer(), loss_fn), TypeError, "AdaptedModel"),
        (lambda: make(adapted, plain, optimizer(), loss_fn), ValueError, "must hold 'params' and"),
        (
            lambda: make(adapted, variables, loss_fn, optimizer()),
            TypeError,
            r"the order is make_train_step\(adapted, variables, optimizer, loss_fn\)",
        ),
        (
            lambda: make(adapted, variables, optax.adafactor(1e-3), loss_fn),
            ValueError,
            "scales its updates by the size",
        ),
        (lambda: ll.merge_state(adapted, variables), TypeError, "takes variables and a TrainState"),
    ):
        with pytest.raises(error, match=message):
            call()
