"""Noise on embeddings in a step and a run: which steps are equal, and where there is none."""

import functools
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import lorax
from lorax.config.run import RunConfig
from lorax.data.dataset import EncodedDataset
from lorax.devices.mesh import make_mesh
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.models.noise import EmbeddingNoise
from lorax.training.course import Course
from lorax.training.trainer import Trainer
from tests.faults.runs import last_arrays, losses, make_trainer
from tests.tiny import LLAMA

pytestmark = pytest.mark.slow


def make_model(alpha: float | None = 5.0, policy: Any = "none"):
    base = CausalLM(
        read_architecture(LLAMA, "test"), gradient_checkpointing=policy, rngs=nnx.Rngs(0)
    )
    model = lorax.apply_lora(base, lorax.LoraConfig(r=2, target_modules=("q_proj",)), rngs=1)
    model.noise = None if alpha is None else EmbeddingNoise(alpha)
    return model


def make_batch(micro_batches=1, rows=4):
    ids = np.random.default_rng(0).integers(1, 64, (1, rows, 17), np.int32)
    return {
        name: np.repeat(part, micro_batches, axis=0)
        for name, part in (("input_ids", ids[..., :-1]), ("labels", ids[..., 1:]))
    }


def take_steps(model, batch, seed=0, mesh=None, count=2):
    """Returns (loss, norm of the gradient) of each step."""
    step, state = lorax.make_train_step(model, optax.sgd(0.0), seed=seed, mesh=mesh)
    if mesh is not None:
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
    found = []
    for _ in range(count):
        state, metrics = step(state, batch)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return found


@functools.cache
def usual():
    return take_steps(make_model(), make_batch())


def test_every_step_and_every_seed_has_its_own_noise():
    again = take_steps(make_model(), make_batch())
    assert again == usual()
    each = {loss for loss, _ in usual() + take_steps(make_model(), make_batch(), seed=1)}
    plain = take_steps(make_model(None), make_batch())
    assert plain[0] == plain[1]  # nothing is learned at a rate of 0
    assert len(each | {plain[0][0]}) == 5


def test_every_micro_batch_has_its_own_noise():
    twice = take_steps(make_model(), make_batch(2), count=1)
    assert twice[0][0] != pytest.approx(usual()[0][0], rel=1e-5)
    plain = [take_steps(make_model(None), make_batch(count), count=1)[0][0] for count in (1, 2)]
    assert plain[0] == pytest.approx(plain[1], rel=1e-6)


def test_four_devices_make_the_steps_of_one():
    np.testing.assert_allclose(
        take_steps(make_model(), make_batch(), mesh=make_mesh(4)), usual(), rtol=1e-5
    )


@pytest.mark.parametrize("policy", ["full", "offload"])
def test_recomputing_layers_does_not_change_it(policy):
    np.testing.assert_allclose(
        take_steps(make_model(policy=policy), make_batch()), usual(), rtol=1e-5
    )


@pytest.fixture
def config(tmp_path):
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": "unnamed", "dtype": "float32"},
            "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
            "train": {"max_steps": 2, "neftune_noise_alpha": 5.0},
            "save": {"output_dir": str(tmp_path / "run")},
        }
    )


ROWS = EncodedDataset.from_rows([(np.arange(1, 9), np.arange(8) > 1)] * 4)


def test_a_run_has_it_as_set_and_not_in_evaluation(config, tmp_path):
    def run(alpha, name):
        train = config.train.model_copy(update={"neftune_noise_alpha": alpha})
        save = config.save.model_copy(update={"output_dir": str(tmp_path / name)})
        changed = config.model_copy(update={"train": train, "save": save})
        events: list[dict[str, Any]] = []
        # What a model brings is not read.
        trainer = Trainer(make_model(3.0), changed, ROWS, ROWS, listeners=(events.append,))
        result = trainer.train()
        return result.eval_loss_before, [e["loss"] for e in events if "loss" in e], trainer.model

    before, noisy_losses, trained = run(5.0, "noisy")
    plain_before, plain_losses, plain = run(None, "plain")
    assert before == plain_before and noisy_losses[0] != plain_losses[0]
    assert trained.noise.alpha == 5.0 and plain.noise is None
    trained.eval()
    prompts = {"max_new_tokens": 3, "stop_ids": ()}
    assert len(lorax.generate(trained, [[1, 2, 3]], **prompts)[0]) == 3


def test_a_resumed_run_has_the_noise_of_one_that_never_stopped(tmp_path):
    options: dict[str, Any] = {"train__neftune_noise_alpha": 5.0, "train__max_steps": 4}
    options["train__gradient_accumulation_steps"] = 2
    straight, events = make_trainer(tmp_path / "straight", **options)
    straight.train()
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:09d}")
    changed = options | {"train__neftune_noise_alpha": 6.0}
    with pytest.raises(ValueError, match=r"train\.neftune_noise_alpha was 5\.0 and is 6\.0"):
        make_trainer(tmp_path / "run", resume=True, **changed)
    resumed, found = make_trainer(tmp_path / "run", resume=True, **options)
    resumed.train()
    assert losses(found) == {step: loss for step, loss in losses(events).items() if step > 2}
    assert last_arrays(tmp_path / "run", 4) == last_arrays(tmp_path / "straight", 4)


def test_a_model_that_cannot_have_it_is_refused(config):
    class Other(nnx.Module):
        pass

    course = Course.of(config, ROWS)
    with pytest.raises(ValueError, match=r"^train\.neftune_noise_alpha needs lorax's CausalLM, go"):
        course.prepare_model(Other())


def test_a_step_of_any_model_gives_noise_its_keys():
    class Own(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(64, 8, rngs=nnx.Rngs(0))
            self.noise = EmbeddingNoise(5.0)
            self.head = nnx.Linear(8, 1, rngs=nnx.Rngs(1))

        def __call__(self, ids):
            return self.head(self.noise(self.embed(ids)))

    step, state = lorax.make_train_step(
        Own(),
        optax.sgd(0.0),
        lambda model, batch: (jnp.square(model(batch["input_ids"])).sum(), jnp.float32(1)),
    )
    state, first = step(state, make_batch())
    _, second = step(state, make_batch())
    assert first["loss"] != second["loss"]
