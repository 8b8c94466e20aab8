"""The contract of objectives, over every objective, and one that a single file adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax.adapters.nnx.tree import adapted_layers, split_trainable
from lorax.objectives.objective import RESERVED, Objective, Terms
from lorax.objectives.objectives import OBJECTIVES, as_objective, objective_of
from lorax.objectives.sft import SFT, Supervised, causal_lm_loss
from lorax.runs.model import Blueprint
from lorax.runs.setup import Setup
from lorax.training.accumulate import accumulate_terms
from lorax.training.course import Course
from lorax.training.evaluate import Evaluator
from lorax.training.step import make_train_step
from tests.tiny import shallow_model

SEED = 77


class Counting(Supervised):
    """The next token's loss, and how many of the supervised tokens are guessed."""

    def claims(self, config):
        return config.train.seed == SEED

    def terms(self, model, batch):
        total, count, _ = super().terms(model, batch)
        guesses = model(batch["input_ids"], batch["positions"], batch.get("segment_ids"))
        right = (guesses.argmax(-1) == batch["labels"]).sum()
        return Terms(total, count, {"accuracy": right})


COUNTING: Objective = Counting("counting", causal_lm_loss, figures=("accuracy",))


@pytest.fixture(params=[*OBJECTIVES, COUNTING], ids=lambda objective: objective.name)
def objective(request, monkeypatch):
    """An objective of the list; a new one is in it by its one entry."""
    known = [*([] if request.param in OBJECTIVES else [request.param]), *OBJECTIVES]
    for place in ("objectives.objectives", "training.ahead"):
        monkeypatch.setattr(f"lorax.{place}.OBJECTIVES", known)
    return request.param


@pytest.fixture
def config(objective, tmp_path):
    seed = SEED if objective is COUNTING else 3
    settings = {
        "model.name_or_path": shallow_model(),
        "train.seed": seed,
        "train.max_steps": 2,
        "eval.exact_match": "false",
        "save.output_dir": tmp_path / "run",
        "log.logging_steps": 1,
    }
    settings = [f"{key}={value}" for key, value in settings.items()]
    return lorax.load_config("configs/tiny_cpu.yaml", settings)


@pytest.fixture
def setup(config):
    return Setup.of(Blueprint.of(config))


@pytest.fixture
def model(setup):
    """A model whose adapters have left their start."""
    model = setup.course.prepare_model(lorax.build_model(setup.config))
    for index, layer in enumerate(adapted_layers(model).values()):
        b = layer.adapter.lora_b
        b.set_value(0.05 * jax.random.normal(jax.random.key(index), b.shape))
    return model


def test_the_settings_choose_it_and_the_run_is_planned_by_it(objective, setup):
    assert objective_of(setup.config) is objective
    assert setup.course.objective is objective
    plan = setup.course.batches
    batch = next(iter(plan.epoch(0)))
    assert batch["input_ids"].shape[:2] == (2, 4)
    assert plan.steps_per_epoch > 2 and setup.course.evaluation is not None


def test_micro_batches_add_up_to_the_large_batch(objective, setup, model):
    graph, trainable, frozen = split_trainable(model)
    terms_of = lambda t, batch: objective.terms(nnx.merge(graph, t, frozen), batch)
    batch = next(iter(setup.course.batches.epoch(0)))
    together = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)
    run = jax.jit(accumulate_terms(terms_of))
    loss, count, figures, gradients = run(trainable, batch)
    at_once = run(trainable, together)
    assert set(figures) == set(objective.figures)
    assert float(count) == float(at_once[1])
    np.testing.assert_allclose(loss, at_once[0], rtol=1e-6)
    for name, value in figures.items():
        np.testing.assert_allclose(value, at_once[2][name], rtol=1e-6)
        assert 0 < float(value) < 1
    norm = lambda tree: float(jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree))))
    difference = jax.tree.map(jnp.subtract, gradients, at_once[3])
    assert 0 < norm(gradients) and norm(difference) < 1e-5 * norm(gradients)


def test_a_step_and_an_evaluation_tell_its_figures(objective, setup, model):
    course = setup.course
    step, state = make_train_step(model, course.optimizer, objective)
    assert step.metrics == (*RESERVED, *objective.figures)
    _, frozen = state.trainable, step.frozen
    evaluator = Evaluator.of(course, model)
    assert evaluator is not None
    found = evaluator(state.trainable, frozen)
    assert set(found) == {"loss", *objective.figures}
    batch = jax.tree.map(lambda *x: np.concatenate(x, 1), *evaluator.batches.epoch(0))
    terms = objective.terms(
        nnx.merge(*nnx.split(model)), jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    )
    assert found["loss"] == pytest.approx(float(terms.total) / int(terms.divisor), rel=1e-5)
    for name in objective.figures:
        assert found[name] == pytest.approx(float(terms.figures[name]) / int(terms.divisor))
    _, metrics = step(state, next(iter(course.batches.epoch(0))))
    assert set(metrics) == set(step.metrics)


def test_a_run_reports_its_figures(objective, setup):
    told = []
    trainer = lorax.Trainer(
        lorax.build_model(setup.config),
        setup.config,
        setup.train,
        setup.eval,
        course=setup.course,
        listeners=(told.append,),
    )
    trainer.train()
    steps = [event for event in told if "grad_norm" in event]
    evaluations = [event for event in told if "eval_loss" in event]
    assert len(steps) == 2 and evaluations
    for name in objective.figures:
        assert all(0 <= event[name] <= 1 for event in steps)
        assert all(0 <= event[f"eval_{name}"] <= 1 for event in evaluations)


def test_a_loss_function_is_an_objective_of_its_own():
    assert as_objective(causal_lm_loss) is SFT and as_objective(COUNTING) is COUNTING
    given = as_objective(lambda model, batch: (jnp.zeros(()), jnp.ones(())))
    assert given not in OBJECTIVES and given.figures == () and given.name == ""
    with pytest.raises(ValueError, match="must return \\(sum of losses, count\\)"):
        as_objective(lambda model, batch: jnp.zeros(())).terms(None, {})


def test_a_course_takes_the_objective_that_it_is_given(setup):
    assert Course.of(setup.config, setup.train, None, COUNTING).objective is COUNTING
