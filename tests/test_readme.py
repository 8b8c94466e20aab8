"""The Python of the README and of the guides runs as it stands."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def blocks(page="README.md"):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(8, 16, rngs=rngs)
        self.fc2 = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(self.fc1(x)))


def run_with_losses(code, **names):
    """Runs an example; returns the loss of each of its steps."""
    losses = []

    def record(result):
        losses.append(float(result[1]["loss"]))
        return result

    assert "= step(state, batch)" in code
    code = code.replace("= step(state, batch)", "= record(step(state, batch))")
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        exec(compile(code, "README.md", "exec"), names | {"record": record})
    return losses


def test_the_first_example_adapts_a_stock_model_in_five_statements(tmp_path, monkeypatch):
    code = blocks()[0]
    assert len(ast.parse(code).body) == 6  # the imports, and five more
    ids = jax.random.randint(jax.random.key(0), (2, 2, 17), 10, 60)
    batches = 8 * [{"input_ids": ids[..., :-1], "labels": ids[..., 1:]}]
    code = code.replace("Qwen/Qwen3-0.6B", f"{ROOT}/examples/tiny/model").replace("r=16", "r=2")
    code = code.replace("2e-4", "1e-2")
    monkeypatch.chdir(tmp_path)
    losses = run_with_losses(code, batches=batches)
    assert losses[-1] < losses[0]
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_the_own_model_example_trains_and_is_short():
    code = blocks()[1]
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    my_model = Model(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))
    batches = 20 * [{"x": x, "y": jnp.argmax(x[..., :3], axis=-1)}]
    code = code.replace("LoraConfig(r=8", "LoraConfig(r=3") + "\nkeep.append(model)"
    keep = []
    losses = run_with_losses(code, my_model=my_model, batches=batches, keep=keep)
    assert losses[-1] < losses[0]
    (model,) = keep
    assert isinstance(model.fc1, nnx.Linear)
    assert not np.array_equal(model.fc1.kernel[...], my_model.fc1.kernel[...])


def test_the_stock_model_example_trains_and_saves(tmp_path, monkeypatch):
    code = blocks()[2]
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    monkeypatch.chdir(ROOT)
    code = code.replace("outputs/mine", f"{tmp_path}/run").replace("outputs/", f"{tmp_path}/")
    code = code.replace('run"]', 'run", "train.max_steps=2"]')
    exec(compile(code, "README.md", "exec"), {"lorax": lorax, "jnp": jnp, "nnx": nnx})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


def test_the_guide_to_one_s_own_model_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    page = "docs/your_own_model.md"
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        exec(compile("\n".join(blocks(page)), page, "exec"), names)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(r"```\n(adapted .*?)```", text, re.DOTALL)[0].splitlines()
    assert printed[: len(shown)] == shown
    assert names["metrics"]["applied"] and names["loss"] < 0.1
    assert {p.name for p in (tmp_path / "outputs").iterdir()} == {
        "classifier-adapter",
        "classifier-state",
    }


def test_the_guide_to_linen_models_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    page = "docs/linen.md"
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        exec(compile("\n".join(blocks(page)), page, "exec"), names)
    first, *rest = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    text = (ROOT / page).read_text(encoding="utf-8")
    assert f"# {first}\n" in text
    shown = re.findall(r"```\n(adapted .*?)```", text, re.DOTALL)[0].splitlines()
    assert rest[: len(shown)] == shown
    assert names["metrics"]["applied"] and names["loss"] < 0.85 * np.log(64)  # of a guess
    assert {p.name for p in (tmp_path / "outputs").iterdir()} == {"decoder-adapter"}


def test_a_layer_of_one_s_own_takes_part(monkeypatch):
    monkeypatch.setattr("lorax.adapters.sites.SITES", sites := [*lorax.SITES])
    monkeypatch.setattr(lorax, "SITES", sites)
    page = "docs/adapters.md"
    names = {}
    exec(compile("\n".join(blocks(page)), page, "exec"), names)
    assert len(names["model"].layers) == 3 and names["Product"] is not None


def test_the_guide_names_the_layers_that_are_trained_whole(tmp_path):
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed = nnx.Embed(16, 8, rngs=rngs)
            self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.fc = nnx.Linear(8, 8, rngs=rngs)
            self.precise = nnx.Linear(8, 8, precision="highest", rngs=rngs)

        def __call__(self, tokens):
            x = self.attention(self.conv(self.embed(tokens)))
            return self.precise(self.fc(self.norm(x)))

    whole = ("embed", "conv", "attention", "norm", "precise")
    config = lorax.LoraConfig(r=2, target_modules=("fc",), modules_to_save=whole)
    model = lorax.apply_lora(Model(), config, rngs=0)
    step, state = lorax.make_train_step(
        model, optax.sgd(0.1), lambda m, b: ((m(b) ** 2).sum(), jnp.float32(b.size))
    )
    tokens = jnp.arange(16).reshape(1, 2, 8)
    trained = lorax.merge_state(model, step(state, tokens)[0])
    for name in whole:
        before, after = (nnx.state(getattr(m, name), nnx.Param) for m in (model, trained))
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert not np.array_equal(old, new) or not np.any(old)
    lorax.save_adapter(trained, tmp_path / "adapter")
    again = lorax.load_adapter(Model(), tmp_path / "adapter")
    np.testing.assert_array_equal(again(tokens[0]), trained(tokens[0]))


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_every_link_leads_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), f"{page}: {target}"


def test_the_list_of_settings_is_up_to_date():
    command = [sys.executable, "scripts/make/settings_doc.py", "--check"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
