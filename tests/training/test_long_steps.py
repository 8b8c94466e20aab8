"""A signal during a step that takes long: the step is dropped, and nothing before it is lost."""

import math
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax.config.run import RunConfig
from lorax.data.dataset import EncodedDataset
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.objectives.sft import causal_lm_loss
from lorax.recovery.tree import flatten_tree
from lorax.system.signals import RunStopped, StopRequest
from lorax.training import long_steps
from lorax.training.course import Course
from lorax.training.step import TrainState
from lorax.training.trainer import Trainer
from tests.tiny import LLAMA

pytestmark = pytest.mark.slow

ARCHITECTURE = read_architecture(LLAMA, "test")


MARK = 63
"""A token that makes the step on its row take long."""


@pytest.fixture
def turns():
    """How many turns of the loop take about five seconds."""
    spin = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, turn, x))
    spin(jnp.ones((128, 128)), 10).block_until_ready()
    started = time.monotonic()
    spin(jnp.ones((128, 128)), 1000).block_until_ready()
    return int(5 * 1000 / (time.monotonic() - started))


def turn(_, x):
    return jnp.tanh(x @ x) * 0.9


def slow_loss(turns):
    """Returns the usual loss, which takes long where the mark stands."""

    def loss_fn(model, batch):
        total, count = causal_lm_loss(model, batch)
        marked = (batch["input_ids"] == MARK).any()
        start = jnp.ones((128, 128)) * marked.astype(jnp.float32)
        spun = jax.lax.fori_loop(0, marked.astype(jnp.int32) * turns, turn, start)
        return total + 0.0 * spun.sum(), count

    return loss_fn


def build(folder, turns, slow=3, resume=False, **train):
    """Returns a trainer of five steps, of which one takes some seconds if `turns` is not 0."""
    base = CausalLM(ARCHITECTURE, rngs=nnx.Rngs(0))
    adapter = lorax.LoraConfig(r=4, lora_dropout=0.1, target_modules=("q_proj", "down_proj"))
    draw = np.random.default_rng(0)
    rows = [(draw.integers(1, 40, 20), np.arange(20) >= 2) for _ in range(16)]
    settings = {
        "model": {"name_or_path": "unnamed", "dtype": "float32"},
        "data": {"train": "rows.jsonl"},
        "train": {"max_steps": 5, "learning_rate": 1e-2, "per_device_train_batch_size": 4} | train,
        "mesh": {"data": 1},  # several virtual devices run a step at once, while its call waits
        "save": {"output_dir": str(folder), "save_steps": 100},
    }
    model = lorax.apply_lora(base, adapter, rngs=nnx.Rngs(1))
    config = RunConfig.model_validate(settings)
    data = EncodedDataset.from_rows(rows)
    plan = Course.of(config, data).batches
    epoch, at = divmod(slow - 1, plan.steps_per_epoch)
    data.tokens[data.offsets[plan.rows(epoch, at)[0][0]]] = MARK
    return Trainer(model, config, data, loss_fn=slow_loss(turns), resume=resume)


def values_of(trainer):
    return {path: np.asarray(leaf) for path, leaf in flatten_tree(trainer.state).items()}


@pytest.fixture
def signal_in(monkeypatch):
    """Has SIGTERM come while a trainer waits for a step, and before that nothing."""

    def plan(trainer, step):
        hear, sent = StopRequest.hear_while_waiting, []

        def hear_and_ask(self, arrays):
            for _ in hear(self, arrays):
                before = trainer._long.before
                if not sent and before is not None and int(before.step) == step - 1:
                    sent.append(step)
                    os.kill(os.getpid(), signal.SIGTERM)
                yield

        monkeypatch.setattr(StopRequest, "hear_while_waiting", hear_and_ask)

    return plan


@pytest.mark.as_shipped
@pytest.mark.parametrize("skip", [0, 2])
def test_a_step_that_takes_too_long_is_dropped_and_made_again(
    tmp_path, turns, monkeypatch, signal_in, skip
):
    monkeypatch.setattr(long_steps, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(long_steps, "PATIENCE_SECONDS", 0.0)
    plain = build(tmp_path / "plain", 0, skip_nonfinite_steps=skip)
    plain.train()
    trainer = build(tmp_path / "run", turns, skip_nonfinite_steps=skip)
    signal_in(trainer, 3)
    with pytest.raises(RunStopped, match="stopped by SIGTERM after step 2, saved"):
        trainer.train()
    assert trainer.checkpoints.steps() == [2]
    again = build(tmp_path / "run", 0, resume=True, skip_nonfinite_steps=skip)
    again.train()
    found, wanted = values_of(again), values_of(plain)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)


@pytest.mark.as_shipped
def test_a_first_step_that_takes_too_long_is_dropped_and_the_trainer_can_go_on(
    tmp_path, turns, monkeypatch, signal_in
):
    monkeypatch.setattr(long_steps, "PATIENCE_SECONDS", 0.0)
    plain = build(tmp_path / "plain", 0, slow=1)
    plain.train()
    trainer = build(tmp_path / "run", turns, slow=1)
    signal_in(trainer, 1)
    with pytest.raises(RunStopped, match="by SIGTERM before the first step was done"):
        trainer.train()
    assert trainer.checkpoints.steps() == []
    assert trainer._stop.dropped
    assert trainer.train().steps == 5
    found, wanted = values_of(trainer), values_of(plain)
    assert all(np.array_equal(found[path], wanted[path]) for path in wanted)


def test_an_error_within_a_long_step_saves_what_was_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(long_steps, "LONG_SECONDS", 0.0)

    def fail(marked):
        if marked:
            raise RuntimeError("planned")
        return np.float32(0)

    def failing(_):
        def loss_fn(model, batch):
            total, count = causal_lm_loss(model, batch)
            marked = (batch["input_ids"] == MARK).any()
            shape = jax.ShapeDtypeStruct((), jnp.float32)
            return total + jax.pure_callback(fail, shape, marked), count

        return loss_fn

    monkeypatch.setitem(globals(), "slow_loss", failing)
    trainer = build(tmp_path / "run", 0)
    with pytest.raises(RuntimeError, match="planned"):
        trainer.train()
    assert trainer.checkpoints.steps() == [2]


def test_an_error_beside_a_signal_saves_what_was_before_the_step_that_is_dropped(
    tmp_path, turns, monkeypatch
):
    monkeypatch.setattr(long_steps, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(long_steps, "PATIENCE_SECONDS", 0.0)
    trainer = build(tmp_path / "run", turns)
    check = trainer.saver.check

    def fail():
        if trainer._pending is not None and trainer._pending.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("planned")
        check()

    trainer.saver.check = fail
    with pytest.raises(RuntimeError, match="planned"):
        trainer.train()
    assert trainer.checkpoints.steps() == [2]


def test_a_step_that_ends_in_time_is_finished(tmp_path, turns, monkeypatch, signal_in):
    monkeypatch.setattr(long_steps, "LONG_SECONDS", 0.0)
    monkeypatch.setattr(long_steps, "PATIENCE_SECONDS", math.inf)
    trainer = build(tmp_path / "run", turns)
    signal_in(trainer, 3)
    with pytest.raises(RunStopped, match="stopped by SIGTERM after step 3, saved"):
        trainer.train()


@pytest.fixture
def kept(monkeypatch):
    """A list that grows with every state that is copied."""
    kept, keep = [], long_steps.LongSteps.keep
    monkeypatch.setattr(
        long_steps.LongSteps, "keep", lambda self, state: (kept.append(1), keep(self, state))
    )
    return kept


def test_short_steps_are_not_copied(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(long_steps, "LONG_SECONDS", 1000.0)
    build(tmp_path / "run", 0).train()
    assert len(kept) == 1  # before the first step, of which nothing is known
    monkeypatch.setattr(long_steps, "LONG_SECONDS", 0.0)
    build(tmp_path / "long", 0).train()
    assert len(kept) == 1 + 5


def test_what_the_host_takes_between_steps_makes_none_of_them_long(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(long_steps, "LONG_SECONDS", 1000.0)
    later, clock = [], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 2000 * len(later))
    trainer = build(tmp_path / "run", 0, max_steps=8)

    def take_long(event):
        if trainer._pending is not None:  # the step that runs meanwhile ends in that time
            jax.block_until_ready(trainer._pending.metrics)
        later.append(event)

    trainer.listeners += (take_long,)
    trainer.train()
    assert len(later) >= 8 and len(kept) == 1


def test_what_is_the_same_on_all_devices_is_copied_once():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    value = jax.device_put(jnp.arange(8.0), everywhere)
    state = TrainState(jnp.int32(1), {"a": value}, {"m": value}, jnp.zeros((), bool))
    steps = long_steps.LongSteps()
    steps.keep(state)
    assert len(value.addressable_shards) == len(jax.devices()) > 1
    assert len(steps.before.trainable["a"].addressable_shards) == 1
    assert np.array_equal(steps.before.trainable["a"], np.arange(8.0))


def test_a_copy_outlives_what_it_was_copied_from_unless_it_is_large(monkeypatch):
    steps, values = long_steps.LongSteps(), jnp.arange(1000.0)
    state = TrainState(jnp.int32(1), {"a": values}, {"m": values * 2}, jnp.zeros((), bool))
    change = lambda x: ~x if x.dtype == bool else x * 2
    consume = jax.jit(lambda s: jax.tree.map(change, s), donate_argnums=0)
    steps.keep(state)
    after = consume(state)
    assert state.trainable["a"].is_deleted()
    assert np.array_equal(steps.before.trainable["a"], np.arange(1000.0))
    monkeypatch.setattr(long_steps, "LARGEST_BYTES", 1000)
    steps.keep(after)
    assert steps.before is None
