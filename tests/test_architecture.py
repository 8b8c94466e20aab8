"""The dependency rule, enforced: arrows point one way only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Module or package -> what it may import of this repository. Longer names go first.
ALLOWED = {
    "lorax_kernels": {"lorax_kernels"},
    "lorax.config": {
        "lorax.config_data",
        "lorax.config_file",
        "lorax.config_lora",
        "lorax.config_model",
        "lorax.config_types",
    },
    "lorax.config_data": {"lorax.config_types"},
    "lorax.config_model": {"lorax.config_types"},
    "lorax.config_lora": {"lorax.config_types"},
    "lorax.config_types": {"lorax.wording"},
    "lorax.config_file": {"lorax.config_schema", "lorax.small_files", "lorax.wording"},
    "lorax.config_schema": set(),
    "lorax.small_files": {"lorax.wording"},
    "lorax.wording": set(),
    "lorax.hub": {"lorax.wording"},
    "lorax.targets": {"lorax.config", "lorax.patterns", "lorax.wording"},
    "lorax.patterns": set(),
    "lorax.linear": {"lorax.sharding", "lorax.targets", "lorax_kernels"},
    "lorax.lora": {"lorax.config", "lorax.linear", "lorax.targets", "lorax_kernels"},
    "lorax.kernel_choice": {"lorax.config", "lorax.lora", "lorax_kernels"},
    "lorax.merge": {"lorax.lora"},
    "lorax.loss": {"lorax.sharding", "lorax_kernels"},
    "lorax.sharding": set(),
    "lorax.optimizer": {"lorax.config", "lorax.stacking"},
    "lorax.metrics": set(),
    "lorax.report": {"lorax.config", "lorax.metrics"},
    "lorax.loss_curve": {"lorax.metrics"},
    "lorax.outlet": set(),
    "lorax.card": {"lorax.config"},
    "lorax.checkpoint": {
        "lorax.checkpoint_files",
        "lorax.interop",
        "lorax.special_files",
        "lorax.wording",
    },
    "lorax.checkpoint_files": {"lorax.interop"},
    "lorax.weights": {"lorax.interop"},
    "lorax.stopping": set(),
    "lorax.long_steps": {"lorax.step", "lorax.stopping"},
    "lorax.step_events": {"lorax.data", "lorax.metrics"},
    "lorax.state_tree": {"lorax.interop"},
    "lorax.model_size": {"lorax.lora", "lorax.metrics"},
    "lorax.nonfinite": {"lorax.loss", "lorax.wording"},
    "lorax.resume": {"lorax.config", "lorax.data", "lorax.models"},
    "lorax.saving": {
        "lorax.checkpoint",
        "lorax.config",
        "lorax.interop",
        "lorax.metrics",
        "lorax.resume",
        "lorax.state_tree",
        "lorax.step",
        "lorax.weights",
        "lorax.wording",
    },
    "lorax.run_inputs": {"lorax"},
    "lorax.compilation_cache": set(),
    "lorax.program_cache": {
        "lorax.beside",
        "lorax.compilation_cache",
        "lorax.metrics",
        "lorax.wording",
        "lorax_kernels",
    },
    "lorax.beside": set(),
    "lorax.data": {
        "lorax.config",
        "lorax.data",
        "lorax.hub",
        "lorax.interop.files",
        "lorax.small_files",
        "lorax.wording",
    },
    "lorax.data.render_worker": set(),
    "lorax.models": {"lorax.models", "lorax.sharding", "lorax.wording", "lorax_kernels"},
    "lorax.interop": {
        "lorax.config",
        "lorax.config_file",
        "lorax.hub",
        "lorax.interop",
        "lorax.lora",
        "lorax.models",
        "lorax.sharding",
        "lorax.small_files",
        "lorax.targets",
        "lorax.wording",
    },
    "lorax.generate": {"lorax.models"},
    "lorax.stop_tokens": {"lorax.interop"},
    "lorax.special_files": {"lorax.interop.files", "lorax.small_files"},
    "lorax.adapter_tokenizer": {"lorax.data", "lorax.interop"},
    "lorax.adapter_base": {"lorax.config", "lorax.interop"},
    "lorax.prompts": {"lorax.data", "lorax.run_folder"},
    "lorax.run_folder": {
        "lorax.checkpoint",
        "lorax.config",
        "lorax.data",
        "lorax.interop",
        "lorax.special_files",
        "lorax.stop_tokens",
        "lorax.wording",
    },
    "lorax.phases": set(),
    "lorax.preparation": {
        "lorax.beside",
        "lorax.compilation_cache",
        "lorax.config",
        "lorax.data",
        "lorax.lora",
        "lorax.loss",
        "lorax.models",
        "lorax.optimizer",
        "lorax.program_cache",
        "lorax.sharding",
        "lorax.step",
    },
    "lorax.recorder": {
        "lorax.metrics",
        "lorax.phases",
        "lorax.report",
        "lorax.train",
        "lorax.wording",
    },
    "lorax.stacking": set(),
    "lorax.determinism": {"lorax_kernels"},
    "lorax.step": {
        "lorax.beside",
        "lorax.determinism",
        "lorax.lora",
        "lorax.loss",
        "lorax.sharding",
        "lorax.stacking",
        "lorax.wording",
        "lorax_kernels",
    },
    "lorax.evaluate": {
        "lorax.data",
        "lorax.determinism",
        "lorax.generate",
        "lorax.loss",
        "lorax.sharding",
    },
    "lorax.export": {"lorax.export_files", "lorax.interop", "lorax.lora", "lorax.merge"},
    "lorax.export_files": {"lorax.data", "lorax.interop", "lorax.stop_tokens"},
    "lorax.train": {
        "lorax.checkpoint",
        "lorax.model_size",
        "lorax.nonfinite",
        "lorax.resume",
        "lorax.saving",
        "lorax.step_events",
        "lorax.stopping",
        "lorax.long_steps",
        "lorax.weights",
        "lorax.config",
        "lorax.data",
        "lorax.evaluate",
        "lorax.interop",
        "lorax.lora",
        "lorax.loss",
        "lorax.metrics",
        "lorax.models",
        "lorax.optimizer",
        "lorax.preparation",
        "lorax.sharding",
        "lorax.step",
    },
    "lorax.overview": {
        "lorax.config",
        "lorax.data",
        "lorax.kernel_choice",
        "lorax.lora",
        "lorax.models",
        "lorax.plan",
        "lorax.report",
    },
    "lorax.plan": {
        "lorax.config",
        "lorax.kernel_choice",
        "lorax.lora",
        "lorax.loss",
        "lorax.models",
        "lorax.optimizer",
        "lorax.sharding",
        "lorax_kernels",
    },
    "lorax.run": {"lorax"},
    "lorax.cli": {"lorax"},
    "lorax.cli_common": {"lorax.interop"},
    "lorax.cli_export": {"lorax"},
    "lorax.cli_generate": {"lorax"},
    "lorax": {"lorax"},  # the public names
}
# Who may import what of other people's.
FORBIDDEN = {
    "lorax_kernels": {"flax", "optax", "transformers", "numpy"},
    "lorax.config": {"jax", "flax", "numpy"},
    "lorax.data": {"jax", "flax"},
}
EVERYWHERE_FORBIDDEN = {"torch", "peft", "pickle", "yaml"}


def sources():
    for root in (ROOT / "lorax", ROOT / "kernels" / "lorax_kernels"):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def is_inside(name, package):
    return name == package or name.startswith(package + ".")


def rule_of(module):
    return max((rule for rule in ALLOWED if is_inside(module, rule)), key=len)


@pytest.mark.parametrize("path, module", [pytest.param(p, m, id=m) for p, m in sources()])
def test_imports_follow_the_dependency_rule(path, module):
    rule = rule_of(module)
    assert rule != "lorax" or module == "lorax", f"{module} has no rule: add it to ALLOWED"
    for name in imports(path):
        top = name.split(".")[0]
        if top in ("lorax", "lorax_kernels"):
            allowed = any(is_inside(name, a) for a in ALLOWED[rule])
            assert allowed, f"{module} may not import {name}"
        assert top not in EVERYWHERE_FORBIDDEN, f"{module} may not import {name}"
        assert top not in FORBIDDEN.get(rule, ()), f"{module} may not import {name}"
        if top == "transformers":
            where = ("lorax.data.tokenizer", "lorax.data.render_worker")
            assert module in where, "transformers is for tokenizers and chat templates only"


def test_kernels_folder_is_not_a_package():
    # With an __init__.py it would shadow Hugging Face's `kernels` and break transformers.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_stay_short_enough_to_read():
    for path, module in sources():
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{module} has {lines} lines: there are two ideas in it"


@pytest.mark.parametrize("word", ["eval(", "exec(", "trust_remote_code=True", "shell=True"])
def test_nothing_runs_foreign_code(word):
    for path, module in sources():
        for line in path.read_text(encoding="utf-8").splitlines():
            found = line.replace(".eval(", "").replace("_eval(", "")
            assert word not in found, f"{module}: {line.strip()}"


def test_a_start_imports_nothing_slow_that_it_may_not_need():
    code = "import sys, lorax.cli; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "lorax.run" in loaded
    assert not loaded & {"datasets", "pandas", "pyarrow", "matplotlib", "torch", "orbax"}


def test_a_command_does_without_torch(tmp_path):
    # transformers would import it where it is installed, which takes seconds.
    code = """
import sys, lorax.cli
try:
    lorax.cli.run(["validate", "configs/tiny_cpu.yaml", "data.train=" + sys.argv[1]])
finally:
    print("torch" in sys.modules, "transformers" in sys.modules, "datasets" in sys.modules)
"""
    table = tmp_path / "rows.csv"  # datasets, which reads it, looks for torch itself
    table.write_text("prompt,completion\n" + 40 * "name a fruit,apple\n")
    environment = os.environ | {"PYTHONPATH": "kernels", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(table)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False True True"
