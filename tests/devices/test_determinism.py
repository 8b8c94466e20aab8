"""Steps that repeat bit by bit: what can be seen of them without a GPU."""

import threading

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from rich.console import Console

from lorax.config.run import load_config
from lorax.devices import determinism
from lorax.devices.determinism import compiler_options, repeatable_attention
from lorax.runs.run import run_training
from lorax.training import trainer
from lorax.training.evaluate import Evaluator
from lorax.training.step import make_train_step

BACKWARD = "fmhaSoftmaxBackward"


@pytest.fixture
def on_gpu(monkeypatch):
    """Lets programs be lowered for a GPU with cuDNN that is not there."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    before = cudnn.create_dot_product_attention_backend_config_base
    yield
    cudnn.create_dot_product_attention_backend_config_base = before
    determinism._mark_backward_passes.cache_clear()


class TwoLayers(nnx.Module):
    """Two equal attentions over queries that train."""

    def __init__(self):
        self.queries = nnx.Param(jnp.ones((2, 256, 4, 64)))

    def __call__(self, keys):
        attend = lambda q: jax.nn.dot_product_attention(
            q, keys, keys, is_causal=True, implementation="cudnn"
        )
        return attend(attend(self.queries[...].astype(jnp.bfloat16)))


def lowered(**options) -> str:
    def loss(model, batch):
        return model(batch["keys"]).astype(jnp.float32).sum(), jnp.ones(())

    step, state = make_train_step(TwoLayers(), optax.sgd(1.0), loss, **options)
    batch = {"keys": jnp.ones((1, 2, 256, 4, 64), jnp.bfloat16)}
    with step._settings():
        traced = step.compiled.trace(state, step.frozen, batch)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def marks(text: str) -> tuple[int, int]:
    """Returns backward passes, and those that are marked."""
    calls = [line for line in text.splitlines() if "custom_call" in line and BACKWARD in line]
    return len(calls), sum("force_deterministic" in line for line in calls)


def test_every_backward_pass_of_such_a_step_is_marked_and_no_other(on_gpu):
    text = lowered(full_determinism=True)
    assert marks(text) == (2, 2) and text.count("force_deterministic") == 2
    assert marks(lowered()) == (2, 0)
    assert marks(lowered(full_determinism=True)) == (2, 2)


def test_what_another_thread_lowers_meanwhile_is_not_marked(on_gpu):
    found = []
    with repeatable_attention():
        thread = threading.Thread(target=lambda: found.append(lowered()))
        thread.start()
        thread.join()
    assert marks(found[0]) == (2, 0)


def test_a_gpu_is_told_to_leave_out_what_does_not_repeat(on_gpu):
    usual, repeatable = compiler_options(False), compiler_options(True)
    assert usual is not None and repeatable is not None
    assert "xla_gpu_exclude_nondeterministic_ops" not in usual
    assert repeatable == usual | {
        "xla_gpu_exclude_nondeterministic_ops": True,
        "xla_gpu_autotune_level": 0,
    }


def test_elsewhere_there_is_nothing_to_tell():
    assert compiler_options(True) is None
    with repeatable_attention():
        pass


@pytest.mark.slow
def test_the_setting_reaches_the_step_and_the_evaluation(tmp_path, monkeypatch):
    seen = {}

    def note(where, name):
        original = getattr(where, name)

        def noting(*arguments, **options):
            seen[name] = options["full_determinism"]
            return original(*arguments, **options)

        monkeypatch.setattr(where, name, noting)

    note(trainer, "build_step")
    note(Evaluator, "__init__")
    overrides = [f"save.output_dir={tmp_path}", "train.max_steps=1", "train.full_determinism=true"]
    overrides += ["eval.exact_match=false", "save.export=[peft]"]
    run_training(load_config("configs/tiny_cpu.yaml", overrides), Console(quiet=True))
    assert seen == {"build_step": True, "__init__": True}
