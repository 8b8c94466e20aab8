"""Meshes whose axes have JAX's type Explicit, the default of `jax.make_mesh`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lorax
from lorax.devices.mesh import make_mesh
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from tests.tiny import LLAMA

X = jax.random.normal(jax.random.key(0), (2, 8, 8))


class Net(nnx.Module):
    def __init__(self):
        self.first, self.second = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.fixture
def net():
    return lorax.apply_lora(Net(), lorax.LoraConfig(r=2, lora_dropout=0.1), rngs=0)


def squares(model, batch):
    error = (model(batch["x"]) - batch["y"]) ** 2
    return error.sum(), jnp.float32(error.size)


def on(mesh, tree):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(None, "data")))


def test_a_step_on_explicit_axes_is_that_on_one_device(net):
    explicit = jax.make_mesh((2,), ("data",))
    assert explicit.axis_types == (AxisType.Explicit,)
    batch = {"x": X, "y": X + 1}
    losses = {}
    for name, mesh, given in (
        ("one", None, batch),
        ("explicit", explicit, on(explicit, batch)),
        ("batch alone", None, on(explicit, batch)),
    ):
        step, state = lorax.make_train_step(net, optax.sgd(0.1), squares, mesh=mesh)
        found = []
        for _ in range(3):
            state, metrics = step(state, given)
            found.append(float(metrics["loss"]))
        losses[name] = found
    assert losses["one"][0] > losses["one"][-1]
    np.testing.assert_allclose(losses["explicit"], losses["one"], rtol=1e-5)
    np.testing.assert_allclose(losses["batch alone"], losses["one"], rtol=1e-5)


def test_a_loop_of_one_s_own_runs_on_explicit_axes(net):
    mesh = jax.make_mesh((2,), ("data",))
    net.eval()
    x = X[0]
    pull = nnx.grad(lambda m, x: ((m(x) - 1) ** 2).sum(), argnums=nnx.DiffState(0, nnx.Param))
    want = pull(net, x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        assert jax.typeof(net(placed)).sharding.spec == PartitionSpec("data", None)
        got = pull(net, placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_a_batch_on_another_mesh_than_the_step_is_refused(net):
    explicit = jax.make_mesh((2,), ("data",))
    for mine, other in ((make_mesh(2), explicit), (explicit, make_mesh(2))):
        step, state = lorax.make_train_step(net, optax.sgd(0.1), squares, mesh=mine)
        with pytest.raises(ValueError, match=r"batch\['x'\] lies on another mesh .*of the batch"):
            step(state, on(other, {"x": X, "y": X}))


def test_micro_batches_that_are_divided_are_refused(net):
    mesh = jax.make_mesh((2,), ("data",))
    step, state = lorax.make_train_step(net, optax.sgd(0.1), squares, mesh=mesh)
    batch = jax.device_put({"x": X, "y": X}, NamedSharding(mesh, PartitionSpec("data")))
    with pytest.raises(ValueError, match=r"has its micro-batches divided.*Spec\(None, 'data'\)"):
        step(state, batch)


def test_the_loss_of_a_head_names_the_mesh_that_it_needs():
    mesh = jax.make_mesh((2,), ("data",))
    head = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    hidden = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    with pytest.raises(ValueError, match=r"have JAX's type Explicit"):
        lorax.linear_cross_entropy(head, hidden, jnp.ones((2, 8), jnp.int32))


def test_the_stock_models_name_the_mesh_that_they_need():
    base = CausalLM(read_architecture(LLAMA, "here"), rngs=nnx.Rngs(0))
    model = lorax.apply_lora(base, lorax.LoraConfig(r=2), rngs=1)
    ids = jnp.ones((1, 2, 8), jnp.int32)
    batch = {"input_ids": ids, "labels": ids}
    mesh = jax.make_mesh((2,), ("data",))
    step, state = lorax.make_train_step(model, optax.sgd(0.1), mesh=mesh)
    said = (
        r"axes \('data'\) have JAX's type Explicit.*axis_types=\(jax\.sharding\.AxisType\.Auto,\)"
    )
    with pytest.raises(ValueError, match=said):
        step(state, on(mesh, batch))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))  # the remedy
    step, state = lorax.make_train_step(model, optax.sgd(0.1), mesh=mesh)
    assert step(state, on(mesh, batch))[1]["tokens"] == 16
