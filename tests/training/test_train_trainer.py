"""The trainer: what each step reports, what runs equal each other, and what stays on disk."""

import io
import itertools
import json
import math
import os
import re
import signal
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import lorax
from lorax.adapters.nnx.tree import adapted_layers
from lorax.config.run import RunConfig
from lorax.data.dataset import EncodedDataset
from lorax.interop.load import load_model
from lorax.interop.peft import load_adapter
from lorax.interop.save import save_model
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.objectives.sft import causal_lm_loss
from lorax.recovery.files import read_checkpoint
from lorax.report.listener import Recorder
from lorax.system.clock import Phases
from lorax.system.signals import RunStopped
from lorax.training.evaluate import Evaluator
from lorax.training.nonfinite import report_rows
from lorax.training.optim.schedules import make_schedule
from lorax.training.trainer import Trainer
from tests.tiny import LLAMA

pytestmark = pytest.mark.slow

VOCAB = LLAMA["vocab_size"]
ARCHITECTURE = read_architecture(LLAMA, "test")
COMPILED = "/jax/core/compile/backend_compile_duration"


def make_model(dropout=0.0, checkpointing="none"):
    base = CausalLM(ARCHITECTURE, gradient_checkpointing=checkpointing, rngs=nnx.Rngs(0))
    targets = ("q_proj", "down_proj", "lm_head")
    settings = lorax.LoraConfig(r=4, lora_dropout=dropout, target_modules=targets)
    return lorax.apply_lora(base, settings, rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_rows(count, lengths=(6, 20), seed=0):
    """Rows of eight of the tokens, each next to itself: something to learn."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(draw.integers(*lengths))
        tokens = draw.integers(1, 9, length)
        tokens[1::2] = tokens[: length // 2 * 2 : 2]
        rows.append((tokens, np.arange(length) >= 1 + index % 3))
    return EncodedDataset.from_rows(rows)


@pytest.fixture(scope="module")
def rows():
    return make_rows(16)


def build_trainer(folder, of, train_rows, held_out, loss_fn=causal_lm_loss, **sections: Any):
    """Returns a trainer and the list that will hold its events."""
    config: dict[str, Any] = {
        "model": {"name_or_path": "unnamed", "dtype": "float32"},
        "data": {"train": "rows.jsonl"} | ({"eval": "rows.jsonl"} if held_out else {}),
        "train": {"max_steps": 5, "learning_rate": 1e-2, "per_device_train_batch_size": 4},
        "save": {"output_dir": str(folder)},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    run = RunConfig.model_validate(config)
    events: list[dict[str, Any]] = []
    listeners = (events.append,)
    trainer = Trainer(of, run, train_rows, held_out, loss_fn=loss_fn, listeners=listeners)
    return trainer, events


@pytest.fixture
def make_trainer(model, rows, tmp_path):
    folders = (tmp_path / str(index) for index in itertools.count())

    def build(train_rows=rows, held_out=None, *, of=model, **settings: Any):
        return build_trainer(next(folders), of, train_rows, held_out, **settings)

    return build


@pytest.fixture(scope="module")
def plain(model, rows, tmp_path_factory):
    """What a run of five steps without any special setting came to."""
    trainer, events = build_trainer(tmp_path_factory.mktemp("plain") / "run", model, rows, rows)
    result = trainer.train()
    return SimpleNamespace(result=result, events=events, weights=values_of(trainer.model))


def steps_of(events):
    return [e for e in events if "loss" in e]


def losses_of(events):
    return [e["loss"] for e in steps_of(events)]


def values_of(model, kind: Any = nnx.Param):
    """The weights of a kind by name, as numpy copies."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {path: np.array(variable.get_value()) for path, variable in flat}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=str(name))


def differ(first, second):
    return any(not np.array_equal(first[name], second[name]) for name in first)


# --- Steps and their metrics -------------------------------------------------------------------


def test_the_loss_falls_and_every_step_reports_its_numbers(make_trainer, rows):
    schedule = {"warmup_steps": 3, "max_steps": 24, "learning_rate": 2e-2}
    trainer, events = make_trainer(train=schedule)
    result = trainer.train()
    steps = steps_of(events)
    assert [e["step"] for e in steps] == list(range(1, 25))
    assert [e["epoch"] for e in steps] == [1 + index // 4 for index in range(24)]
    rate = make_schedule(trainer.config.train, 24)
    assert [e["learning_rate"] for e in steps] == [float(rate(index)) for index in range(24)]
    assert steps[0]["learning_rate"] == 0.0
    assert steps[3]["learning_rate"] == pytest.approx(2e-2)
    for event in steps:
        assert math.isfinite(event["loss"]) and event["grad_norm"] > 0
        assert event["step_seconds"] > 0 and event["tokens_per_s"] > 0 and event["memory_gib"] > 0
        assert event["total_steps"] == 24
    for epoch in range(6):
        part = steps[4 * epoch : 4 * epoch + 4]
        assert sum(e["tokens"] for e in part) == len(rows.tokens)
        assert sum(e["supervised_tokens"] for e in part) == rows.supervised.sum()
    losses = losses_of(events)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    assert (result.steps, result.train_loss) == (24, losses[-1])
    assert result.eval_loss is result.best_step is None and not result.stopped_early


@pytest.mark.parametrize(
    "rows_read, settings, steps",
    [
        (8, {"num_train_epochs": 1.0}, 4),
        (8, {"num_train_epochs": 3.0}, 12),
        (8, {"num_train_epochs": 0.5}, 2),
        (9, {"num_train_epochs": 1.0}, 5),  # the last window holds one row
        (9, {"num_train_epochs": 0.1}, 1),
        (9, {"num_train_epochs": 1.0, "gradient_accumulation_steps": 4}, 2),
        (9, {"num_train_epochs": 2.0, "max_steps": 3}, 3),
        (9, {"max_steps": 11}, 11),
    ],
)
def test_the_number_of_steps_follows_epochs_or_max_steps(make_trainer, rows_read, settings, steps):
    settings = {"max_steps": -1, "per_device_train_batch_size": 2} | settings
    trainer, _ = make_trainer(make_rows(rows_read), train=settings)
    assert trainer.total_steps == steps


def test_the_last_partial_window_is_a_step_of_its_own(make_trainer):
    data = make_rows(5)
    settings = {"max_steps": -1, "num_train_epochs": 2.0}
    trainer, events = make_trainer(data, data={"shuffle": False}, train=settings)
    assert trainer.train().steps == 4
    last = int(data.row(4)[1].sum())
    assert [e["supervised_tokens"] for e in steps_of(events)[1::2]] == [last, last]
    assert [e["tokens"] for e in steps_of(events)[1::2]] == [len(data.row(4)[0])] * 2


def test_only_the_adapters_move_and_the_model_that_came_stays(make_trainer, model):
    def everything(module):
        return values_of(module, nnx.Variable)

    before = everything(model)
    trainer, _ = make_trainer()
    trainer.train()
    assert_same(everything(model), before)
    after, trained = everything(trainer.model), values_of(model)
    frozen = before.keys() - trained.keys()
    assert any(path[-1] == "kernel" for path in frozen)
    assert_same({p: after[p] for p in frozen}, {p: before[p] for p in frozen})
    assert all(not np.array_equal(after[path], before[path]) for path in trained)


def test_nothing_is_compiled_after_the_first_step(make_trainer):
    compiled, at_step = 0, []

    def count(event: str, _seconds: float, **_: Any):
        nonlocal compiled
        compiled += event == COMPILED

    data = make_rows(12, lengths=(60, 350))
    trainer, events = make_trainer(data, train={"max_steps": 9, "per_device_train_batch_size": 1})
    trainer.listeners += (lambda event: at_step.append(compiled) if "loss" in event else None,)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        trainer.train()
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    widths = [e["compiled_width"] for e in events if "compiled_width" in e]
    assert len(widths) >= 3
    assert len(set(data.lengths.tolist())) > 8
    assert at_step[0] >= len(widths)  # the listener does count
    assert at_step == at_step[:1] * 9


# --- Runs that must equal each other -----------------------------------------------------------


def test_the_seed_decides_the_run_bit_by_bit(make_trainer, plain):
    again, found = make_trainer()
    again.train()
    assert losses_of(found) == losses_of(plain.events)
    assert_same(values_of(again.model), plain.weights)
    other, found = make_trainer(train={"seed": 1})
    other.train()
    assert losses_of(found) != losses_of(plain.events)
    assert differ(values_of(other.model), plain.weights)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
        {"train": {"per_device_train_batch_size": 1}, "mesh": {"data": 4}},
        {"train": {"per_device_train_batch_size": 1}, "mesh": {"data": -1}},
    ],
    ids=["2 x 2", "four devices", "all devices"],
)
def test_the_same_rows_give_the_same_steps_however_they_are_split(make_trainer, plain, settings):
    assert len(jax.devices()) == 4
    split, found = make_trainer(**settings)
    split.train()
    for name in ("loss", "grad_norm"):
        pairs = zip(steps_of(found), steps_of(plain.events), strict=True)
        assert max(abs(a[name] - b[name]) / b[name] for a, b in pairs) <= 1e-5
    # Adam divides by the root of tiny second moments, so weights agree less than losses do.
    after = values_of(split.model)
    for path, value in plain.weights.items():
        np.testing.assert_allclose(after[path], value, atol=1e-4, err_msg=str(path))


def test_packed_rows_give_the_losses_of_padded_ones(make_trainer, rows):
    settings = {"train": {"per_device_train_batch_size": 16, "max_steps": 4}}
    padded, expected = make_trainer(**settings)
    packed, found = make_trainer(data={"packing": True, "max_seq_length": 128}, **settings)
    padded.train()
    packed.train()
    assert [e["supervised_tokens"] for e in steps_of(found)] == [rows.supervised.sum()] * 4
    np.testing.assert_allclose(losses_of(found), losses_of(expected), rtol=1e-5)


def test_recomputing_layers_does_not_change_the_losses(make_trainer, plain):
    recomputed, found = make_trainer(of=make_model(checkpointing="full"))
    recomputed.train()
    np.testing.assert_allclose(losses_of(found), losses_of(plain.events), rtol=1e-6)


def test_dropout_trains_reproducibly_and_is_off_in_evaluation(make_trainer, rows, plain):
    def run():
        trainer, events = make_trainer(held_out=rows, of=make_model(dropout=0.3))
        return trainer.train(), losses_of(events), values_of(trainer.model)

    first, again = run(), run()
    assert first[:2] == again[:2]
    assert_same(first[2], again[2])
    assert first[0].eval_loss_before == plain.result.eval_loss_before
    assert first[1] != losses_of(plain.events)


# --- Evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, packing", [(1, False), (5, False), (2, True)])
def test_held_out_loss_is_token_weighted_whatever_the_batch(make_trainer, batch_size, packing):
    held_out = make_rows(7, lengths=(4, 40), seed=1)
    trainer, events = make_trainer(
        held_out=held_out,
        data={"packing": packing, "max_seq_length": 128},
        eval={"strategy": "no", "per_device_eval_batch_size": batch_size},
        train={"max_steps": 1},
    )
    result = trainer.train()
    for found, weights in (
        (result.eval_loss_before, make_model()),
        (result.eval_loss, trainer.model),
    ):
        assert found == pytest.approx(token_weighted_loss(weights, held_out), rel=1e-5)
    measured = [(e["step"], e["eval_loss"]) for e in events if "eval_loss" in e]
    assert measured == [(0, result.eval_loss_before), (1, result.eval_loss)]


def token_weighted_loss(model, data):
    """The mean over supervised tokens, computed in float64 and in the open."""
    model.eval()
    padded = np.zeros((len(data), int(data.lengths.max())), np.int32)
    for index in range(len(data)):
        padded[index, : data.lengths[index]] = data.row(index)[0]
    logits = np.asarray(nnx.jit(lambda m, x: m(x))(model, padded), np.float64)
    total = count = 0
    for index in range(len(data)):
        tokens, supervised = data.row(index)
        scores = logits[index, : len(tokens) - 1]
        nll = np.log(np.exp(scores).sum(-1)) - scores[np.arange(len(scores)), tokens[1:]]
        total += nll[supervised[1:]].sum()
        count += supervised.sum()
    return total / count


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"strategy": "no"}, [0, 7]),
        ({"strategy": "steps", "steps": 3}, [0, 3, 6, 7]),
        ({"strategy": "epoch"}, [0, 4, 7]),
    ],
)
def test_evaluation_comes_when_the_config_says_and_at_the_end(
    make_trainer, rows, monkeypatch, settings, steps
):
    monkeypatch.setattr(Evaluator, "__call__", lambda *_: {"loss": 1.0})
    trainer, events = make_trainer(held_out=rows, eval=settings, train={"max_steps": 7})
    trainer.train()
    assert [e["step"] for e in events if "eval_loss" in e] == steps
    order = [e["step"] for e in events if "step" in e]
    assert order == sorted(order)


@pytest.fixture
def scripted(make_trainer, rows, monkeypatch):
    """A trainer whose held-out losses are given: one before training and one after each step."""

    def build(losses, **sections):
        left = iter(losses)
        monkeypatch.setattr(Evaluator, "__call__", lambda *_: {"loss": next(left)})
        sections["eval"] = {"strategy": "steps", "steps": 1} | sections.get("eval", {})
        sections["train"] = {"max_steps": len(losses) - 1} | sections.get("train", {})
        return make_trainer(held_out=rows, **sections)

    return build


def test_early_stopping_waits_for_its_patience(scripted):
    losses = [5.0, 4.0, 3.0, 3.5, 3.0, 1.0]
    trainer, events = scripted(losses, eval={"early_stopping_patience": 2})
    result = trainer.train()
    assert result.stopped_early and result.steps == 4
    assert result.eval_loss == 3.0 and result.best_step is None
    assert [e["step"] for e in steps_of(events)] == [1, 2, 3, 4]


def test_a_gain_starts_the_patience_anew(scripted):
    trainer, _ = scripted([5.0, 4.0, 4.5, 3.0, 3.5, 2.0], eval={"early_stopping_patience": 2})
    result = trainer.train()
    assert not result.stopped_early and result.steps == 5


def test_the_best_and_the_newest_weights_stay_on_disk(scripted, model):
    trainer, _ = scripted([9.0, 4.0, 3.0, 3.5, 3.25, 3.75], save={"save_steps": 1})
    seen = []
    folder = trainer.store.directory
    trainer.listeners += (lambda _: seen.append(sorted(p.name for p in folder.glob("step-*"))),)
    result = trainer.train()
    assert result.best_step is None and result.eval_loss == 3.75
    assert max(map(len, seen)) == 2
    assert sorted(p.name for p in folder.iterdir()) == ["best.json", "step-000002", "step-000005"]
    best = json.loads((folder / "best.json").read_text())
    assert best == {"step": 2, "eval_loss": 3.0, "path": "step-000002"}
    assert trainer.store.best_path() == folder / best["path"]
    base = lorax.unload_lora(model)
    newest = load_adapter(base, folder / "step-000005")
    assert_same(values_of(newest), values_of(trainer.model))
    assert differ(values_of(load_adapter(base, folder / best["path"])), values_of(newest))


def test_the_best_weights_are_restored_when_asked(scripted, model):
    losses = [9.0, 4.0, 3.0, 3.5, 3.25, 3.75]
    trainer, _ = scripted(
        losses,
        save={"load_best_model_at_end": True},
        train={"lr_scheduler_type": "constant"},
    )
    result = trainer.train()
    assert (result.best_step, result.eval_loss, result.steps) == (2, 3.0, 5)
    best = load_adapter(lorax.unload_lora(model), trainer.store.directory / "step-000002")
    assert_same(values_of(trainer.model), values_of(best))
    # The first two of five steps, at one rate, are a run of two steps.
    straight, _ = scripted(losses[:3], train={"lr_scheduler_type": "constant"})
    straight.train()
    assert_same(values_of(straight.model), values_of(trainer.model))


def test_weights_are_saved_every_save_steps_and_at_the_end(make_trainer, monkeypatch):
    trainer, _ = make_trainer(train={"max_steps": 5}, save={"save_steps": 2})
    saved = []
    write = trainer.store._write
    monkeypatch.setattr(trainer.store, "_write", lambda f: (saved.append(f.name), write(f)))
    trainer.train()
    assert saved == ["step-000002", "step-000004", "step-000005"]
    assert [p.name for p in trainer.store.directory.iterdir()] == ["step-000005"]


# --- What is refused ---------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(make_trainer, model):
    data = EncodedDataset.from_rows(
        [(np.full(8, 63 if index == 2 else index + 1), np.ones(8)) for index in range(5)]
    )

    def poisoned(module, batch):
        total, count = causal_lm_loss(module, batch)
        return jnp.where((batch["input_ids"] == 63).any(), jnp.nan, total), count

    trainer, events = make_trainer(
        data,
        loss_fn=poisoned,
        data={"shuffle": False},
        train={"per_device_train_batch_size": 1},
        save={"save_steps": 1},
    )
    with pytest.raises(FloatingPointError, match=r"step 3: loss nan.*Lower train.learning_rate"):
        trainer.train()
    assert [e["step"] for e in steps_of(events)] == [1, 2, 3]
    (last,) = trainer.store.directory.iterdir()
    assert last.name == "step-000002"
    restored = values_of(load_adapter(lorax.unload_lora(model), last))
    assert all(np.isfinite(value).all() for value in restored.values())
    assert trainer.progress.skipped == 0
    # A run that goes on may leave the step out.
    train = trainer.config.train.model_copy(update={"skip_nonfinite_steps": 1})
    config = trainer.config.model_copy(update={"train": train})
    again = Trainer(model, config, data, loss_fn=poisoned, resume=True)
    assert again.train().steps == 5
    assert again.progress.skipped == 1
    assert all(np.isfinite(value).all() for value in values_of(again.model).values())


@pytest.mark.parametrize("max_steps", [2, 3])
def test_a_window_without_supervision_is_refused_before_training(make_trainer, max_steps):
    mask = [index != 2 for index in range(4)]
    data = EncodedDataset.from_rows([(np.arange(1, 9), np.full(8, on)) for on in mask])
    settings = {
        "data": {"shuffle": False},
        "train": {"per_device_train_batch_size": 1, "max_steps": max_steps},
    }
    if max_steps == 2:  # the step without supervision is never reached
        assert make_trainer(data, **settings)[0].train().steps == 2
        return
    with pytest.raises(ValueError, match="step 3 of epoch 1 holds no supervised token"):
        make_trainer(data, **settings)


def test_a_model_without_anything_to_train_is_refused(make_trainer, model):
    frozen = nnx.clone(model)
    graph, trained, rest = nnx.split(frozen, nnx.Param, ...)
    still = jax.tree.map(
        lambda v: nnx.Variable(v.get_value()), trained, is_leaf=lambda x: isinstance(x, nnx.Param)
    )
    with pytest.raises(ValueError, match=r"nothing would train: the model has no nnx.Param"):
        make_trainer(of=nnx.merge(graph, still, rest))


def test_more_devices_than_there_are_are_refused(make_trainer):
    with pytest.raises(ValueError, match=r"mesh.data asks for 8 devices and JAX sees 4"):
        make_trainer(mesh={"data": 8})


# --- Full fine-tuning and other losses ---------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_fine_tuning_moves_every_weight_and_writes_a_checkpoint(make_trainer, tmp_path, dtype):
    base = CausalLM(ARCHITECTURE, rngs=nnx.Rngs(0))
    save_model(base, tmp_path / "base", dtype=jnp.float32)
    trainer, events = make_trainer(
        of=base,
        model={"name_or_path": str(tmp_path / "base"), "dtype": dtype},
        train={"method": "full", "max_steps": 6},
        save={"export": ["merged"]},
    )
    trainer.train()
    assert losses_of(events)[-1] < losses_of(events)[0]
    before, after = values_of(base), values_of(trainer.model)
    assert all(not np.array_equal(after[path], before[path]) for path in before)
    found = load_model(
        trainer.store.directory / "step-000006", dtype=dtype, param_dtype=jnp.float32
    )
    rounded = {path: np.asarray(jnp.asarray(v, dtype), np.float32) for path, v in after.items()}
    assert_same(values_of(found), rounded)


def test_full_fine_tuning_of_a_missing_base_is_refused_before_training(make_trainer, tmp_path):
    settings = {
        "model": {"name_or_path": str(tmp_path / "absent")},
        "train": {"method": "full"},
        "save": {"export": ["merged"]},
    }
    with pytest.raises(ValueError, match="absent: no such folder"):
        make_trainer(of=CausalLM(ARCHITECTURE, rngs=nnx.Rngs(0)), **settings)


def test_a_loss_of_the_users_own_is_trained_and_evaluated(make_trainer, rows, plain):
    def doubled(module, batch):
        total, count = causal_lm_loss(module, batch)
        return 2.0 * total, count

    own, found = make_trainer(held_out=rows, loss_fn=doubled)
    result = own.train()
    first, expected = steps_of(found)[0], steps_of(plain.events)[0]
    for name in ("loss", "grad_norm"):
        assert first[name] == pytest.approx(2 * expected[name], rel=1e-5)
    assert result.eval_loss_before == pytest.approx(2 * plain.result.eval_loss_before, rel=1e-6)


def test_listeners_hear_the_same_events(make_trainer):
    trainer, events = make_trainer()
    second: list[dict[str, Any]] = []
    trainer.listeners += (second.append,)
    trainer.train()
    assert second == events
    kinds = Counter("step" if "loss" in e else min(e) for e in events)
    assert kinds == {"step": 5, "compiled_width": 1, "note": 1}
    assert "checkpoint of step 5 saved at " in events[-1]["note"]


def test_scales_of_the_adapters_survive_the_run(make_trainer, model):
    trainer, _ = make_trainer(train={"max_steps": 1})
    trainer.train()
    scales = lambda m: {n: x.adapter.spec.scale for n, x in adapted_layers(m).items()}
    assert scales(trainer.model) == scales(model)


def resumed(trainer, of, rows, held_out=None, loss_fn=causal_lm_loss):
    """Returns a trainer that goes on where another one stopped."""
    return Trainer(of, trainer.config, rows, held_out, loss_fn=loss_fn, resume=True)


def signal_at(step, name="loss"):
    def listen(event):
        if event.get("step") == step and name in event:
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


def test_a_signal_during_the_last_step_is_not_lost(make_trainer, model, rows, plain):
    trainer, _ = make_trainer()
    trainer.listeners += (signal_at(5),)
    with pytest.raises(RunStopped, match=r"stopped by SIGTERM after step 5, saved"):
        trainer.train()
    again = resumed(trainer, model, rows)
    assert again.train().steps == 5
    assert_same(values_of(again.model), plain.weights)


def test_a_signal_during_an_evaluation_ends_it_and_the_resumed_run_makes_it_again(
    make_trainer, model, rows, plain
):
    trainer, _ = make_trainer(held_out=rows, eval={"strategy": "steps", "steps": 2})
    evaluated = trainer.evaluator._sums
    calls = []

    def slow(*arguments):
        calls.append(trainer.progress.step)
        if trainer.progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluated(*arguments)

    trainer.evaluator._sums = slow
    with pytest.raises(RunStopped, match=r"stopped by SIGTERM after step 2, saved"):
        trainer.train()
    assert calls.count(2) == 1 < calls.count(0)
    again = resumed(trainer, model, rows, rows)
    events = []
    again.listeners = (events.append,)
    again.train()
    assert [e["step"] for e in events if "eval_loss" in e] == [2, 4, 5]
    assert_same(values_of(again.model), plain.weights)


def test_a_signal_before_the_first_step_ends_the_run(make_trainer, model, rows, plain):
    trainer, _ = make_trainer(held_out=rows)
    trainer.listeners += (signal_at(0, "eval_loss"),)
    with pytest.raises(RunStopped, match="stopped by SIGTERM before the first step"):
        trainer.train()
    again = resumed(trainer, model, rows, rows)
    again.train()
    assert_same(values_of(again.model), plain.weights)


def test_where_too_many_steps_are_left_out_none_that_follows_is_run(make_trainer, model, rows):
    bad = {2, 4}

    def loss_fn(model, batch):
        total, count = causal_lm_loss(model, batch)
        spoiled = jnp.isin(batch["input_ids"].sum(), jnp.asarray(sums))
        return jnp.where(spoiled, jnp.nan, total), count

    plan = make_trainer()[0].batches
    sums = [int(b["input_ids"].sum()) for i, b in enumerate(plan.epoch(0), 1) if i in bad]
    settings = {"skip_nonfinite_steps": 1, "lr_scheduler_type": "constant"}
    trainer, events = make_trainer(loss_fn=loss_fn, train=settings)
    with pytest.raises(FloatingPointError, match=r"step 4: .* those before it.*\(1 allowed\)"):
        trainer.train()
    assert [e["step"] for e in steps_of(events)] == [1, 2, 3, 4]
    saved = read_checkpoint(trainer.checkpoints._folder(3))
    only = make_trainer(loss_fn=loss_fn, train=settings | {"max_steps": 3})[0]
    only.train()
    assert_same(saved.arrays, read_checkpoint(only.checkpoints._folder(3)).arrays)
    again = resumed(trainer, model, rows, loss_fn=loss_fn)
    with pytest.raises(FloatingPointError, match=r"step 4: .*\(1 allowed\)"):
        again.train()


def test_a_spike_is_logged_at_a_step_that_otherwise_is_not():
    event = {"step": 13, "total_steps": 20, "loss": 9.0, "grad_norm": 1.0}
    event |= {"learning_rate": 0.1, "tokens_per_s": 1.0}
    written = []
    recorder = Recorder(Console(quiet=True), 10, Phases())
    recorder.log = SimpleNamespace(write=lambda step, _: written.append(step))
    recorder(event)
    assert not written
    recorder(event | {"spike_rows": "3 4"})
    assert written == [13]


def test_a_step_that_is_not_finite_is_named_though_its_rows_cannot_be_written(tmp_path):
    numbers = {"step": 3, "loss": math.nan, "grad_norm": 1.0}
    found = report_rows(tmp_path / "gone", numbers, [0], [[7]], {7: 5})
    assert found.startswith("step 3: loss nan, gradient norm 1.0: micro-batch 0, dataset rows 7 (")
    assert re.search(
        r"\(not written: /\S+nonfinite-step-3.json: No such file or directory\)$", found
    )


def test_a_log_that_cannot_be_written_ends_the_run_or_warns():
    def refuse(*_):
        raise OSError(28, "No space left on device")

    event = {"step": 10, "total_steps": 20, "eval_loss": 2.0}
    for on_error in ("stop", "warn"):
        console = Console(file=io.StringIO(), width=200)
        recorder = Recorder(console, 10, Phases(), on_error)
        recorder.log = SimpleNamespace(write=refuse)
        with pytest.raises(OSError, match="No space") if on_error == "stop" else nullcontext():
            recorder(event)
    for step in (20, 30):
        recorder(event | {"step": step})
    logged = []
    recorder.log = SimpleNamespace(write=lambda step, _: logged.append(step))
    for step in (40, 50):
        recorder(event | {"step": step})
    said = console.file.getvalue()
    assert said.count("WARNING") == said.count("logged again") == 1
    assert (
        "WARNING: not logged from step 10 on: No space left on device (save.on_save_error" in said
    )
    assert "logged again from step 40 on; 3 lines were not" in said
    assert logged == [40, 50]
