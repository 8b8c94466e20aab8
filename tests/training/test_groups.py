"""Learning rates by parameter: PEFT's LoRA+ is the oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer

import lorax
import lorax.linen
from lorax.adapters.nnx.tree import split_trainable
from lorax.config.train import TrainConfig
from lorax.runs.checks import check_targets
from lorax.runs.model import Blueprint
from lorax.training.optim.groups import groups_of
from lorax.training.optim.optimizer import make_optimizer
from tests.bounds import assert_equal_after_steps
from tests.tiny import TINY

STEPS = 6
SETTINGS: dict[str, Any] = dict(
    learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.1
)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed_tokens = nnx.Embed(11, 6, rngs=rngs)
        self.fc1 = nnx.Linear(6, 8, rngs=rngs)
        self.fc2 = nnx.Linear(8, 5, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.head = nnx.Linear(5, 11, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.norm(self.fc2(self.fc1(self.embed_tokens(ids)))))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(11, 6)
        self.fc1 = torch.nn.Linear(6, 8)
        self.fc2 = torch.nn.Linear(8, 5, bias=False)
        self.norm = torch.nn.LayerNorm(5)
        self.head = torch.nn.Linear(5, 11)


WHOLE = ["norm", "head"]


def adapted():
    settings = lorax.LoraConfig(
        r=2, target_modules=("fc1", "fc2"), bias="lora_only", modules_to_save=tuple(WHOLE)
    )
    return lorax.apply_lora(Net(), settings, rngs=0)


def peft_adapted(*targets):
    settings = PeftConfig(
        r=2, target_modules=["fc1", "fc2", *targets], bias="lora_only", modules_to_save=WHOLE
    )
    return get_peft_model(TorchNet(), settings)  # pyright: ignore[reportArgumentType]


def peft_values(model):
    """What trains in PEFT's model, by lorax's paths and in its layouts."""
    inner = {"base_layer.bias": "bias", "weight": "kernel", "bias": "bias"}
    found = {}
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        module, _, rest = name.removeprefix("base_model.model.").partition(".")
        rest = rest.removeprefix("modules_to_save.default.")
        if "lora_" in rest:
            which, path = rest.split(".")[0], (module, "attached", "default")
            place = (*path, which.replace("_embedding", "").lower())
        else:
            kind = "scale" if (module, rest) == ("norm", "weight") else inner[rest]
            place = (module, kind)
        # PEFT keeps (out, in), but of an adapter on an embedding, which is (r, rows) and (d, r).
        found[place] = tensor
    return found


def to_numpy(tensors):
    return {path: np.array(t.detach().numpy().T, order="C") for path, t in tensors.items()}


def tree_of(flat):
    return nnx.State(nnx.traversals.unflatten_mapping(flat))


def flat_of(tree):
    return {path: np.asarray(value) for path, value in nnx.traversals.flatten_mapping(tree).items()}


def run_both(targets=(), **settings):
    """Returns the parameters after some steps of equal gradients: ours, PEFT's, and the first."""
    model = peft_adapted(*targets)
    tensors = peft_values(model)
    draw = np.random.default_rng(0)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.tensor(draw.normal(size=tuple(tensor.shape))))
    train = TrainConfig(**SETTINGS | settings)
    theirs = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=train.learning_rate,
        loraplus_lr_ratio=settings["loraplus_lr_ratio"],
        loraplus_lr_embedding=train.loraplus_lr_embedding,
        loraplus_weight_decay=train.weight_decay,
    )
    ours: Any = make_optimizer(train, STEPS)
    start = to_numpy(tensors)
    params = tree_of({path: jnp.asarray(value) for path, value in start.items()})
    state = ours.init(params)
    update = jax.jit(ours.update)
    for _ in range(STEPS):
        for tensor in tensors.values():
            tensor.grad = torch.tensor(draw.normal(size=tuple(tensor.shape)), dtype=torch.float32)
        gradients = {path: jnp.asarray(t.grad.numpy().T) for path, t in tensors.items()}
        theirs.step()
        updates, state = update(tree_of(gradients), state, params)
        params = optax.apply_updates(params, updates)
    return flat_of(params), to_numpy(tensors), start


@pytest.mark.parametrize("targets", [(), ("embed_tokens",)])
def test_lora_plus_equals_peft(targets):
    rate = 1e-2 if targets else 1e-6
    ours, theirs, start = run_both(targets, loraplus_lr_ratio=16.0, loraplus_lr_embedding=rate)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 9 + 2 * len(targets)
    for path, value in theirs.items():
        assert_equal_after_steps(ours[path], value, STEPS)
        assert not np.array_equal(value, start[path])


def test_the_paths_of_the_oracle_are_those_of_a_model():
    trained = nnx.to_flat_state(nnx.state(adapted(), nnx.Param))
    assert {path for path, _ in trained} == peft_values(peft_adapted()).keys()


def one_update(settings, params):
    """Returns the first update of sgd by ones, by path."""
    optimizer: Any = make_optimizer(TrainConfig(optim="sgd", **SETTINGS | settings), 10)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(ones, optimizer.init(params), params)
    return {
        ".".join(map(str, path)): np.unique(np.asarray(value.get_value()))
        for path, value in nnx.to_flat_state(updates)
    }


def test_modules_trained_whole_have_a_rate_of_their_own():
    params = jax.tree.map(jnp.zeros_like, nnx.state(adapted(), nnx.Param))
    saved = {"head.kernel", "head.bias", "norm.scale", "norm.bias"}
    rates = one_update({"modules_to_save_learning_rate": 1e-4}, params)
    assert saved < rates.keys() and "fc1.bias" in rates
    for name, value in rates.items():
        np.testing.assert_allclose(value, -1e-4 if name in saved else -1e-3, rtol=1e-6)
    both = one_update({"modules_to_save_learning_rate": 1e-4, "loraplus_lr_ratio": 4}, params)
    for name, value in both.items():
        quick = name.endswith("lora_b") or name == "fc1.bias"
        expected = -1e-4 if name in saved else -4e-3 if quick else -1e-3
        np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("optim", ["adamw", "adafactor"])
def test_the_schedule_of_each_group_has_one_shape(optim):
    settings = SETTINGS | dict(optim=optim, lr_scheduler_type="linear", warmup_steps=2)
    params = nnx.state(adapted(), nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, params)
    moved = []
    for more in ({}, dict(loraplus_lr_ratio=8.0, modules_to_save_learning_rate=5e-4)):
        optimizer: Any = make_optimizer(TrainConfig(**settings | more), 8)
        state = optimizer.init(params)
        steps = []
        for _ in range(5):
            updates, state = optimizer.update(gradients, state, params)
            steps.append(dict(nnx.to_flat_state(updates)))
        moved.append(steps)
    groups = groups_of(params)
    factors = {"lora_b": 8.0, "modules_to_save": 0.5, "others": 1.0}
    for plain, scaled in zip(*moved, strict=True):
        for path, value in plain.items():
            factor = 8.0 if path == ("fc1", "bias") else factors[groups[path]]
            expected = factor * np.asarray(value.get_value())
            np.testing.assert_allclose(scaled[path].get_value(), expected, rtol=1e-6)


def test_without_rates_of_their_own_the_optimizer_is_the_one_it_was():
    params = nnx.state(adapted(), nnx.Param)
    plain: Any = make_optimizer(TrainConfig(), 10).init(params)
    assert len(plain) == 4  # clipping, Adam, decay, schedule
    scaled: Any = make_optimizer(TrainConfig(loraplus_lr_ratio=2.0), 10).init(params)
    assert jax.tree.structure(scaled[:4]) == jax.tree.structure(plain)
    assert not jax.tree.leaves(scaled[4:])


def test_a_rate_of_nothing_is_refused():
    params = nnx.state(lorax.apply_lora(Net(), lorax.LoraConfig(r=2), rngs=0), nnx.Param)
    for settings, said in (
        (
            dict(modules_to_save_learning_rate=1e-4),
            "a module that is trained whole.*with lora.modules",
        ),
        (dict(loraplus_lr_ratio=2.0, loraplus_lr_embedding=1e-5), "an adapter on an embedding"),
    ):
        optimizer = make_optimizer(TrainConfig(**settings), 10)
        with pytest.raises(ValueError, match=rf"train\.{[*settings][-1]} needs {said}"):
            optimizer.init(params)
    with pytest.raises(ValueError, match=r"^modules_to_save needs a module that is trained whole"):
        lorax.scale_learning_rates(modules_to_save=2.0).init(params)
    with pytest.raises(ValueError, match=r"train\.loraplus_lr_ratio needs a B of an adapter"):
        make_optimizer(TrainConfig(loraplus_lr_ratio=2.0), 10).init({"kernel": jnp.ones((2, 2))})


def test_a_rate_of_nothing_is_found_before_a_run_begins(tmp_path):
    rates = ["train.loraplus_lr_ratio=2", "train.loraplus_lr_embedding=1e-5"]
    settings = [f"model.name_or_path={TINY / 'model'}", f"save.output_dir={tmp_path}/run", *rates]
    blueprint = Blueprint.of(lorax.load_config("configs/tiny_cpu.yaml", settings))
    with pytest.raises(ValueError, match=r"^train\.loraplus_lr_embedding needs an adapter on an"):
        check_targets(blueprint)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), True, "16"])
def test_a_factor_is_a_number_above_zero(factor):
    with pytest.raises(ValueError, match=r"^lora_b must be a finite number > 0, got "):
        lorax.scale_learning_rates(lora_b=factor)


def test_any_optimizer_takes_the_factors():
    model = adapted()
    moved = {}
    for name, after in (
        ("plain", optax.identity()),
        ("scaled", lorax.scale_learning_rates(lora_b=16.0, modules_to_save=0.25)),
    ):
        step, state = lorax.make_train_step(
            model,
            optax.chain(optax.sgd(1e-3), after),
            lambda model, batch: (model(batch["ids"]).sum(), jnp.float32(1)),
        )
        before = {path: np.array(v.get_value()) for path, v in nnx.to_flat_state(state.trainable)}
        state, _ = step(state, {"ids": jnp.arange(8).reshape(1, 2, 4)})
        after = {path: np.array(v.get_value()) for path, v in nnx.to_flat_state(state.trainable)}
        moved[name] = {path: after[path] - before[path] for path in before}
    for path, factor in ((("fc1", "attached", "default", "lora_b"), 16), (("head", "bias"), 0.25)):
        assert np.abs(moved["plain"][path]).max() > 0
        np.testing.assert_allclose(moved["scaled"][path], factor * moved["plain"][path], rtol=1e-3)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, ids):
        x = linen.Embed(11, 6, name="embed_tokens")(ids)
        x = linen.Dense(8, name="fc1")(x)
        x = linen.LayerNorm(name="norm")(linen.Dense(5, use_bias=False, name="fc2")(x))
        return linen.Dense(11, name="head")(x)


def test_groups_of_a_linen_model_are_those_of_an_nnx_model():
    settings = lorax.LoraConfig(
        r=2,
        use_dora=True,
        target_modules=["fc1", "fc2", "embed_tokens"],
        bias="lora_only",
        modules_to_save=WHOLE,
    )
    ids = jnp.zeros((1, 3), int)
    net = LinenNet()
    variables = net.init(jax.random.key(0), ids)
    _, variables = lorax.linen.apply_lora(net, variables, settings, ids, rngs=0)
    found = groups_of(variables["lora"])
    ours = groups_of(split_trainable(lorax.apply_lora(Net(), settings, rngs=0))[1])
    place = lambda path: (path[0], path[-1])
    assert {place(path): group for path, group in found.items()} == {
        place(path): group for path, group in ours.items()
    }
    assert set(found.values()) == {"lora_b", "lora_embedding", "modules_to_save", "others"}


def test_vectors_of_stacked_layers_have_the_rate_of_b():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    class Stacked(nnx.Module):
        def __init__(self):
            self.fc = make(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x):
            return nnx.scan(lambda x, fc: fc(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.fc
            )

    settings = lorax.LoraConfig(r=2, use_dora=True, target_modules=["fc"])
    trainable = split_trainable(lorax.apply_lora(Stacked(), settings, rngs=0))[1]
    ones = jax.tree.map(jnp.ones_like, trainable)
    transformation = lorax.scale_learning_rates(lora_b=16.0)
    updates, _ = transformation.update(ones, transformation.init(trainable), trainable)
    rates = {
        path[-2].key if hasattr(path[-2], "key") else str(path[-2]): float(leaf.max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert sorted(rates.values()) == [1.0, 16.0, 16.0], rates
