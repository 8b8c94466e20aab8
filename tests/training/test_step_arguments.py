"""What `make_train_step` and its step are given: refused by name where nothing would train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorax
from lorax.config.train import TrainConfig
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.training.arguments import check_arguments
from lorax.training.optim.optimizer import make_optimizer
from tests.tiny import LLAMA

SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def model():
    base = CausalLM(read_architecture(LLAMA, "here"), rngs=nnx.Rngs(0))
    return lorax.apply_lora(base, lorax.LoraConfig(r=2), rngs=1)


class Net(nnx.Module):
    def __init__(self):
        self.first, self.second = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2))

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.fixture
def net():
    return lorax.apply_lora(Net(), lorax.LoraConfig(r=2), rngs=0)


def squares(model, batch):
    error = (model(batch["x"]) - batch["y"]) ** 2
    return error.sum(), jnp.float32(error.size)


def batch_of(micro_batches=2, rows=4):
    x = jax.random.normal(jax.random.key(1), (micro_batches, rows, 8))
    return {"x": x, "y": x + 1}


def test_merged_adapters_train_nothing_and_are_refused(model):
    merged = lorax.merge_lora(model, keep_adapters=True)
    with pytest.raises(ValueError, match=r"14 layers are merged, model\.layers\.0.* unmerge_lora"):
        lorax.make_train_step(merged, SGD)
    lorax.make_train_step(lorax.unmerge_lora(merged), SGD)


def test_a_batch_without_micro_batches_is_refused_by_name(model):
    step, state = lorax.make_train_step(model, SGD)
    ids = jnp.ones((2, 8), jnp.int32)
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match=r"input_ids of a micro-batch .* the shape \(8,\); .*None"):
        step(state, batch)
    _, metrics = step(state, jax.tree.map(lambda x: x[None], batch))  # the remedy
    assert metrics["tokens"] == 16


def test_a_batch_for_a_loss_of_one_s_own_is_refused_by_name(net):
    step, state = lorax.make_train_step(net, SGD, squares)
    x = jnp.ones((4, 8))
    for batch, said in (
        ({"x": x, "label": x[:, 0]}, r"batch\['label'\] has the shape \(4,\): every array .*None"),
        ({"x": x, "weight": 2.0}, r"batch\['weight'\] has the shape \(\): every array"),
        (
            {"x": x[None], "y": x[None, :, 0].repeat(2, 0)},
            r"on its first axis, got .*'x'\] 1, .* 2",
        ),
        ({}, r"the batch holds no array"),
    ):
        with pytest.raises(ValueError, match=said):
            step(state, batch)
    _, metrics = step(state, {"x": x[None], "y": x[None]})  # the remedy; the state is whole
    assert metrics["tokens"] == 32


def test_a_state_that_was_donated_is_refused_with_what_to_pass(net):
    step, first = lorax.make_train_step(net, SGD, squares)
    batch = batch_of()
    second, _ = step(first, batch)
    with pytest.raises(ValueError, match=r"donated to an earlier call .*state, metrics = step"):
        step(first, batch)
    third, _ = step(second, batch)
    with pytest.raises(ValueError, match=r"donated to a later step: merge the state that the last"):
        lorax.merge_state(net, second)
    assert lorax.merge_state(net, third)
    with pytest.raises(TypeError, match=r"takes a model and a TrainState, got TrainState, Net"):
        lorax.merge_state(third, net)


def test_adapters_that_are_inactive_or_merged_name_what_to_do(net):
    model = nnx.clone(net)
    lorax.use_adapter(model, None)
    with pytest.raises(ValueError, match=r"no adapter is active\. Choose one with lorax\.use_adap"):
        lorax.make_train_step(model, SGD, squares)
    with pytest.raises(ValueError, match=r"no adapter is active: choose one with lorax\.use_adapt"):
        lorax.merge_lora(model)
    lorax.use_adapter(model, "default")  # the remedy
    lorax.make_train_step(model, SGD, squares)
    merged = lorax.merge_lora(net, keep_adapters=True)
    with pytest.raises(ValueError, match=r"first is merged already; unmerge_lora the model first"):
        lorax.merge_lora(merged)
    with pytest.raises(ValueError, match=r"unmerge_lora and then merge_lora it first"):
        lorax.apply_lora(merged, lorax.LoraConfig(r=2), rngs=0)
    plain = lorax.merge_lora(lorax.unmerge_lora(merged))  # the remedy
    lorax.apply_lora(plain, lorax.LoraConfig(r=2), rngs=0)


def test_a_batch_holds_what_the_loss_reads_and_nothing_else(model):
    step, state = lorax.make_train_step(model, SGD)
    ids = jnp.ones((1, 2, 8), jnp.int32)
    for batch, said in (
        ({"input_ids": ids, "labels": ids, "attention_mask": ids}, r"holds attention_mask, which"),
        ({"input_ids": ids}, r"lacks labels: .* make_train_step\(model, optimizer, loss_fn\)"),
        ({"x": ids}, r"the batch lacks input_ids and labels"),
    ):
        with pytest.raises(ValueError, match=said):
            step(state, batch)
    with pytest.raises(TypeError, match=r"state must be the TrainState, and the batch comes sec"):
        step({"input_ids": ids}, state)


def test_arguments_in_another_order_are_refused(net):
    for arguments, said in (
        ((net, 1e-3, squares), r"optimizer must be an optax transformation.*got 0\.001"),
        ((net, squares, SGD), r"optimizer must be .*the order is make_train_step\(model, optim"),
        ((net, SGD, None), r"loss_fn must be a function .*got None"),
        ((nnx.state(net), SGD, squares), r"model must be an nnx\.Module, got State"),
    ):
        with pytest.raises(TypeError, match=said):
            lorax.make_train_step(*arguments)


def test_further_sums_of_the_loss_come_back_in_the_metrics(net):
    def loss_fn(model, batch):
        total, count = squares(model, batch)
        near = jnp.abs(model(batch["x"]) - batch["y"]) < 1
        return total, count, {"near": near.sum(), "outputs": model(batch["x"]).sum()}

    batch = batch_of(micro_batches=3)
    step, state = lorax.make_train_step(net, SGD, loss_fn)
    _, metrics = step(state, batch)
    outputs = np.asarray(net(batch["x"]), np.float64)
    near = np.abs(outputs - np.asarray(batch["y"])) < 1
    assert metrics.keys() == {"loss", "grad_norm", "tokens", "applied", "near", "outputs"}
    np.testing.assert_allclose(metrics["near"], near.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["outputs"], outputs.mean(), rtol=1e-4)
    # The gradient is the loss's alone.
    plain, state = lorax.make_train_step(net, SGD, squares)
    assert plain(state, batch)[1]["grad_norm"] == metrics["grad_norm"]


def test_further_sums_are_named_and_scalar(net):
    for figures, said in (
        ({"loss": 1.0}, r"names a figure 'loss', which the step reports itself"),
        ({"each": jnp.ones(3)}, r"dict of further sums, each one scalar"),
        (jnp.ones(()), r"dict of further sums, each one scalar"),
    ):
        loss_fn = lambda model, batch, figures=figures: (*squares(model, batch), figures)
        step, state = lorax.make_train_step(net, SGD, loss_fn)
        with pytest.raises(ValueError, match=said):
            step(state, batch_of())


def test_further_sums_are_accumulated_too(net):
    graph, params, rest = lorax.split_trainable(net)

    def loss_fn(params, batch):
        total, count = squares(nnx.merge(graph, params, rest), batch)
        return total, count, {"rows": jnp.float32(batch["x"].shape[0])}

    loss, count, figures, gradients = jax.jit(lorax.accumulate(loss_fn))(params, batch_of(3, 4))
    assert count == 96 and figures == {"rows": 12 / 96}
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    assert loss > 0


@pytest.mark.parametrize("scaled", [True, False])
def test_an_optimizer_that_would_leave_b_at_zero_is_refused(net, scaled):
    optimizer = optax.adafactor(1e-2, multiply_by_parameter_scale=scaled)
    if scaled:
        with pytest.raises(ValueError, match=r"B starts at zero.*multiply_by_parameter_scale=Fal"):
            lorax.make_train_step(net, optimizer, squares)
        lorax.make_train_step(Net(), optimizer, squares)  # without adapters nothing starts at zero
        return
    _, after = trained(net, optimizer)
    assert np.abs(after.first.adapter.lora_b[...]).max() > 0.05


def by_the_models_own_tree(net, optimizer):
    """Returns an optimizer that takes the model's own tree alone."""
    _, trainable, _ = lorax.split_trainable(net)
    labels = jax.tree.map(lambda _: "all", trainable)
    return optax.multi_transform({"all": optimizer}, labels)


@pytest.mark.parametrize("name", ["gathered", "late", "labelled", "clipped"])
def test_an_optimizer_that_scales_by_size_is_found_within_others(net, name):
    adafactor = optax.adafactor(1e-2)
    late = optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(1e-2)], [9])
    optimizer = {
        "gathered": lambda: optax.MultiSteps(adafactor, 4),
        "late": lambda: optax.adafactor(late),
        "labelled": lambda: by_the_models_own_tree(net, adafactor),
        "clipped": lambda: optax.chain(optax.adaptive_grad_clip(0.01), SGD),
    }[name]()
    with pytest.raises(ValueError, match=r"B starts at zero.*such as adaptive_grad_clip; with Ad"):
        check_arguments(net, optimizer, squares)


def test_an_optimizer_by_the_models_own_tree_is_taken(net):
    check_arguments(net, by_the_models_own_tree(net, optax.adam(1e-3)), squares)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(optax.warmup_constant_schedule(0.0, 1e-2, 2)),
        optax.lamb(1e-2),
        optax.lion(1e-3, weight_decay=0.1),
        optax.multi_transform(
            {"a": optax.sgd(0.1)}, lambda tree: jax.tree.map(lambda _: "a", tree)
        ),
    ],
    ids=["warm-up", "lamb", "lion", "labels"],
)
def test_other_optimizers_are_taken(net, optimizer):
    check_arguments(net, optimizer, squares)


def test_the_config_s_adafactor_trains_b_from_zero(net):
    settings = TrainConfig(optim="adafactor", learning_rate=1e-2, lr_scheduler_type="constant")
    before, after = trained(net, make_optimizer(settings, 10))
    assert not np.any(before.first.adapter.lora_b[...])
    assert np.abs(after.first.adapter.lora_b[...]).max() > 0.05


def trained(net, optimizer, steps=10):
    """Returns the model before and after some steps."""
    step, state = lorax.make_train_step(net, optimizer, squares)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            state, _ = step(state, batch_of())
    return net, lorax.merge_state(net, state)


def test_a_step_of_shapes_is_checked_too(net):
    def build():
        return lorax.make_train_step(Net(), SGD, squares)[1]

    assert jax.eval_shape(build).step.shape == ()

    def stalls():
        return lorax.make_train_step(
            lorax.apply_lora(Net(), lorax.LoraConfig(r=2), rngs=0), optax.adafactor(1e-2), squares
        )[1]

    with pytest.raises(ValueError, match=r"B starts at zero"):
        jax.eval_shape(stalls)
