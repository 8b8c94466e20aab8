"""The import rule, enforced: a package imports only packages below it."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package imports only packages below it.
ORDER = (
    "cli",
    "runs",
    "report",
    "planning",
    "training",
    "objectives",
    "generation",
    "interop",
    "adapters",
    "models",
    "layers",
    "weights",
    "devices",
    "recovery",
    "data",
    "config",
    "system",
    "lorax_kernels",
)
# Modules that only give public names, which none of lorax's own imports.
PUBLIC = {"lorax", "lorax.linen"}
# They stand side by side: each imports layers, neither the other.
APART = {"adapters", "models"}
# Which package, or module, may not import what of other people's.
FORBIDDEN = {
    "lorax_kernels": {"flax", "optax", "transformers", "numpy"},
    "lorax.config": {"jax", "flax", "numpy"},
    "lorax.data": {"jax", "flax"},
    "lorax.system": {"flax"},
    "lorax.data.chat.render_worker": {"lorax", "lorax_kernels"},  # it runs alone
}
# Functions of more than 50 lines, docstring aside, and why; none may grow beyond what stands here.
_KERNEL = "one kernel: its steps share the registers and buffers that it opens with"
_ROAD = "a road from one end to the other, whose steps follow each other once"
LONG_FUNCTIONS = {
    "lorax_kernels.lora_linear.gradient.gradient": (163, _KERNEL),
    "lorax_kernels.lora_linear.gradient.gradient.body": (116, _KERNEL),
    "lorax_kernels.lora_linear.gradient.gradient.body.multiply": (61, _KERNEL),
    "lorax_kernels.lora_linear.project.project": (128, _KERNEL),
    "lorax_kernels.lora_linear.project.project.body": (91, _KERNEL),
    "lorax_kernels.lora_linear.inline.inline_matmul": (57, _KERNEL),
    "lorax_kernels.cross_entropy._kernel": (58, _KERNEL),
    "lorax.objectives.linear_loss.linear_cross_entropy": (84, "loss and gradient in one pass"),
    "lorax.models.stack.offload.run_in_order": (60, "both passes of one custom_vjp"),
    "lorax.runs.run._run": (60, _ROAD),
    "scripts.bench.step.main": (89, _ROAD),
    "tests.faults.runs.poison": (55, "one run's story, told in its order"),
    "tests.faults.signals.terminate": (57, "one run's story, told in its order"),
    "tests.kernels.test_kernel_compiled.matmul_cases": (112, "a table of cases"),
}
# Files of more than 400 lines, and why; none may grow beyond what stands here.
LONG_FILES = {
    "tests/adapters/test_lora_layers.py": (433, "a layer of each kind meets each check"),
    "tests/kernels/test_kernel_compiled.py": (420, "a table of cases of every kernel"),
    "tests/training/test_train_trainer.py": (698, "all of it compares runs with one plain run"),
}
EVERYWHERE_FORBIDDEN = {"torch", "peft", "pickle", "yaml"}
WITH_TRANSFORMERS = {"lorax.data.chat.tokenizer", "lorax.data.chat.render_worker"}


def sources():
    for root in (ROOT / "lorax", ROOT / "kernels" / "lorax_kernels"):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module: path for path, module in sources()}


def imports(path):
    """Yields the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from {name if name in MODULES else node.module for name in names}


def is_inside(name, package):
    return name == package or name.startswith(package + ".")


def package_of(module):
    if module in PUBLIC:
        return None
    parts = module.split(".")
    return parts[0] if parts[0] == "lorax_kernels" else parts[1]


@pytest.mark.parametrize("module", MODULES)
def test_a_package_imports_only_packages_below_it(module):
    package = package_of(module)
    if package is None:
        return  # the public names
    assert package in ORDER, f"{module} is in no package: put it into one of {', '.join(ORDER)}"
    for name in imports(MODULES[module]):
        if name.split(".")[0] in ("lorax", "lorax_kernels"):
            other = package_of(name)
            assert other, f"{module} imports {name}: name the true home"
            assert ORDER.index(other) >= ORDER.index(package), f"{module} may not import {name}"
            assert {package, other} != APART, f"{module} may not import {name}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_nothing_that_is_forbidden_to_it(module):
    forbidden = EVERYWHERE_FORBIDDEN.union(
        *(names for rule, names in FORBIDDEN.items() if is_inside(module, rule))
    )
    if module not in WITH_TRANSFORMERS:  # it is for tokenizers and chat templates only
        forbidden |= {"transformers"}
    for name in imports(MODULES[module]):
        assert name.split(".")[0] not in forbidden, f"{module} may not import {name}"


def test_no_module_imports_itself_through_others():
    ours = {module: set(imports(path)) & set(MODULES) for module, path in MODULES.items()}
    graphlib.TopologicalSorter(ours).prepare()  # raises CycleError, which names the modules


def test_packages_hold_a_docstring_and_nothing_else():
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module.startswith("lorax."):
            (node,) = ast.parse(path.read_text(encoding="utf-8")).body
            text = ast.get_docstring(ast.Module([node], []), clean=False)
            assert text and "\n" not in text, f"{module}: one line"


def test_public_modules_give_names_and_define_none():
    for module in PUBLIC:
        _, *lines = ast.parse(MODULES[module].read_text(encoding="utf-8")).body
        assert lines and all(isinstance(line, ast.ImportFrom) for line in lines)


def test_the_readme_has_a_line_for_each_package_in_this_order():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("- `lorax/`")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^  - `(\w+)/`: ", tree, re.M)) == ORDER[:-1]
    folders = {path.name for path in (ROOT / "lorax").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ORDER[:-1])


def test_kernels_folder_is_not_a_package():
    # With an __init__.py it would shadow Hugging Face's `kernels` and break transformers.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_stay_short_enough_to_read():
    others = (path for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py"))
    found = {}
    for path in (*MODULES.values(), *others):
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > 400:
            found[path.relative_to(ROOT).as_posix()] = lines
    assert found.keys() == LONG_FILES.keys()
    for name, lines in found.items():
        assert lines <= LONG_FILES[name][0], f"{name} has {lines} lines: there are two ideas in it"


def functions(node, name):
    """Yields each function with its full name and its lines, docstring aside."""
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            inner = f"{name}.{child.name}"
        if isinstance(child, ast.FunctionDef):
            first = child.body[0]
            text = ast.get_docstring(child, clean=False) is not None
            lines = (child.end_lineno or 0) - child.lineno + 1
            yield inner, lines - text * ((first.end_lineno or 0) - first.lineno + 1)
        yield from functions(child, inner)


def test_functions_stay_short_enough_to_read():
    others = [path for root in ("scripts", "tests") for path in (ROOT / root).rglob("*.py")]
    files = MODULES | {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in others
    }
    found = {
        name: lines
        for module, path in files.items()
        for name, lines in functions(ast.parse(path.read_text(encoding="utf-8")), module)
        if lines > 50
    }
    assert found.keys() == LONG_FUNCTIONS.keys()
    for name, lines in found.items():
        assert lines <= LONG_FUNCTIONS[name][0], f"{name} has {lines} lines: there are two in it"


def reads(value):
    """Returns what a value is made of: names, attributes and elements, as they are written."""
    kinds = ast.Name | ast.Attribute | ast.Subscript
    return {ast.unparse(node) for node in ast.walk(value) if isinstance(node, kinds)}


def pairs(tree):
    """Yields each statement that gives several values, none of which reads what it gives before."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        names = node.targets[-1]
        if not isinstance(names, ast.Tuple) or len(names.elts) != len(node.value.elts):
            continue
        given: set[str] = set()
        entangled = any(isinstance(each, ast.Starred) for each in (*names.elts, *node.value.elts))
        for name, value in zip(names.elts, node.value.elts, strict=True):
            calls = any(isinstance(part, ast.Call) for part in ast.walk(value))
            owners = {each.partition(".")[0].partition("[")[0] for each in given}
            entangled |= bool(given & reads(value) or (calls and owners & reads(value)))
            given |= reads(name)
        if not entangled:
            yield node


def test_a_statement_gives_one_value():
    found = []
    for path in (*MODULES.values(), *(ROOT / "scripts").rglob("*.py")):
        for node in pairs(ast.parse(path.read_text(encoding="utf-8"))):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "a statement for each value:\n" + "\n".join(found)


@pytest.mark.parametrize("word", ["eval(", "exec(", "trust_remote_code=True", "shell=True"])
def test_nothing_runs_foreign_code(word):
    for module, path in MODULES.items():
        for line in path.read_text(encoding="utf-8").splitlines():
            found = line.replace(".eval(", "").replace("_eval(", "")
            assert word not in found, f"{module}: {line.strip()}"


def test_a_start_imports_nothing_slow_that_it_may_not_need():
    code = "import sys, lorax.cli.main; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "lorax.runs.run" in loaded
    assert not loaded & {"datasets", "pandas", "pyarrow", "matplotlib", "torch", "orbax"}


def test_a_command_does_without_torch(tmp_path):
    # transformers would import it where it is installed, which takes seconds.
    code = """
import sys, lorax.cli.main
try:
    lorax.cli.main.run(["validate", "configs/tiny_cpu.yaml", "data.train=" + sys.argv[1]])
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
