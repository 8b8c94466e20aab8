"""The README's Python runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def blocks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(8, 16, rngs=rngs)
        self.fc2 = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.relu(self.fc1(x)))


def test_the_own_model_example_trains_and_is_short():
    code = blocks()[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    my_model = Model(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))
    batches = 20 * [{"x": x, "y": jnp.argmax(x[..., :3], axis=-1)}]
    names = {"my_model": my_model, "batches": batches}
    code = code.replace("for batch in batches:", "losses = []\nfor batch in batches:")
    code = code.replace("# {", "; losses.append(float(metrics['loss']))  # {")
    code = code.replace("LoraConfig(r=8", "LoraConfig(r=3")
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        exec(compile(code, "README.md", "exec"), names)
    assert names["losses"][-1] < names["losses"][0]
    assert isinstance(names["model"].fc1, nnx.Linear)
    assert not np.array_equal(names["model"].fc1.kernel[...], my_model.fc1.kernel[...])


def test_the_stock_model_example_trains_and_saves(tmp_path, monkeypatch):
    code = blocks()[1]
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    monkeypatch.chdir(ROOT)
    code = code.replace("outputs/mine", f"{tmp_path}/run").replace("outputs/", f"{tmp_path}/")
    code = code.replace('run"]', 'run", "train.max_steps=2"]')
    exec(compile(code, "README.md", "exec"), {"lorax": lorax, "jnp": jnp, "nnx": nnx})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


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
