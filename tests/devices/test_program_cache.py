"""A compiled step that is kept is the one that would be compiled, or it is not used."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax.data.dataset import EncodedDataset
from lorax.devices import step_cache
from lorax.devices.step_cache import ProgramCache, open_program_cache
from lorax.layers.documents import DocumentLayout
from lorax.models.stack.recompute import Recomputation
from lorax.runs.model import Blueprint
from lorax.runs.setup import Setup
from lorax.system.threads import finish_in_background
from lorax.training import course as training_course
from lorax.training.ahead import compile_ahead
from lorax.training.course import Course
from lorax.training.step import TrainStep
from tests.tiny import write_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "base")


def read_inputs(base, *overrides):
    """Returns the config and the inputs of a run on a small model and few rows."""
    settings = [f"model.name_or_path={base}", "lora.target_modules=[q_proj, down_proj]"]
    settings += [
        "data.eval=[]",
        "data.train=[{path: examples/tiny/data/train.jsonl, split: 'train[:40]'}]",
    ]
    settings += ["train.max_steps=2", "eval.strategy=no", "eval.exact_match=false"]
    config = lorax.load_config("configs/tiny_cpu.yaml", [*settings, *overrides])
    return config, Setup.of(Blueprint.of(config))


@pytest.fixture
def prepared(base, tmp_path, monkeypatch):
    """Returns a function, settings → (config, inputs), and the folder of the programs."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "programs"
    folder.mkdir()
    return functools.partial(read_inputs, base), folder


def compile_step(config, inputs, folder, said=None):
    cache = ProgramCache(folder, (said if said is not None else []).append)
    course = Course.of(config, inputs.train, inputs.eval)
    compiled = compile_ahead(inputs.blueprint.shapes, course, programs=cache)
    finish_in_background("compile")
    cache.keep_waiting()
    finish_in_background("keep")
    return compiled


@pytest.fixture(scope="module")
def any_program(base):
    with contextlib.chdir(ROOT):
        config, inputs = read_inputs(base)
        ahead = compile_ahead(inputs.blueprint.shapes, Course.of(config, inputs.train))
    (step,) = ahead.result().values()
    return step.executable


@pytest.fixture
def compiles_at_once(any_program, monkeypatch):
    """Where it matters what becomes of a program, not which one it is."""
    compiled = lambda step, *_: dataclasses.replace(step, compiled=any_program)
    monkeypatch.setattr(TrainStep, "compile", compiled)


def train(config, inputs, compiled, folder):
    losses = []
    trainer = lorax.Trainer(
        lorax.build_model(config),
        config.model_copy(update={"save": config.save.model_copy(update={"output_dir": folder})}),
        inputs.train,
        inputs.eval,
        listeners=(lambda event: losses.append(event.get("loss")),),
        compiled=compiled,
    )
    trainer.train()
    return losses, jax.device_get(jax.tree.leaves(nnx.state(trainer.model, nnx.Param)))


@pytest.mark.parametrize("overrides", [["lora.lora_dropout=0.1"], ["data.packing=false"]])
def test_a_kept_step_trains_to_the_same_bits_untraced(prepared, tmp_path, monkeypatch, overrides):
    prepare, folder = prepared
    config, inputs = prepare(*overrides)
    said = []
    first = compile_step(config, inputs, folder, said)
    losses, weights = train(config, inputs, first, f"{tmp_path}/first")
    assert not any(step.found for step in first.result().values())

    def refuse(*_):
        raise AssertionError("traced again")

    monkeypatch.setattr(TrainStep, "compile", refuse)
    second = compile_step(config, inputs, folder, said)
    assert all(step.found for step in second.result().values())
    again, same = train(config, inputs, second, f"{tmp_path}/second")
    assert again == losses and not said
    for ours, theirs in zip(same, weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


NONE = Recomputation("none")


class Recorder(ProgramCache):
    """Notes where a step would be kept, and looks no further."""

    def find(self, facts, arguments, results):
        self._tell(self._path(facts, arguments))
        raise InterruptedError


def place_of(config, inputs, folder, recomputation=NONE):
    said = []
    shapes, course = Blueprint.of(config).shapes, Course.of(config, inputs.train)
    recomputation.put_on(shapes)
    ahead = compile_ahead(shapes, course, programs=Recorder(folder, said.append))
    assert isinstance(ahead.exception(), InterruptedError)
    return said[0]


PLACES = Path("programs")
"""Where steps would be kept, if any were."""


@pytest.fixture(scope="module")
def usual(base):
    """Where the step of the usual settings would be kept."""
    with contextlib.chdir(ROOT):
        return place_of(*read_inputs(base), PLACES)


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=1e-5",
        "train.seed=7",
        "train.max_steps=3",
        "train.gradient_accumulation_steps=3",
        "train.per_device_train_batch_size=3",
        "train.skip_nonfinite_steps=1",
        "train.weight_decay=0.5",
        "lora.r=4",
        "lora.lora_alpha=3",
        "lora.lora_dropout=0.25",
        "data.max_seq_length=150",
        "data.packing=false",
        "model.dtype=bfloat16",
    ],
)
def test_another_setting_is_another_step(base, usual, monkeypatch, override):
    monkeypatch.chdir(ROOT)
    assert place_of(*read_inputs(base, override), PLACES) != usual


def test_the_same_settings_are_the_same_step(base, usual, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert place_of(*read_inputs(base), PLACES) == usual


def test_settings_that_decide_nothing_of_a_step_find_it_again(prepared, base, usual, tmp_path):
    prepare, _ = prepared
    shutil.copytree(base, tmp_path / "base")
    for overrides in (
        ["train.memory_gib=99", "train.gradient_checkpointing=auto"],
        ["train.gradient_checkpointing=full", "train.kept_layers=2"],  # it is given what that is
        ["train.stuck_after_seconds=7", f"model.name_or_path={tmp_path}/base"],
    ):
        assert place_of(*prepare(*overrides), PLACES) == usual


def test_what_the_settings_do_not_say_counts_too(prepared, monkeypatch):
    prepare, folder = prepared
    config, inputs = prepare("train.max_steps=-1")
    usual = place_of(config, inputs, folder)
    full = place_of(config, inputs, folder, Recomputation("full"))  # as `auto` picks it
    kept = place_of(config, inputs, folder, Recomputation("full", 2))
    assert len({usual, full, kept}) == 3
    rows = [inputs.train.row(i) for i in range(20)]  # fewer steps, so another schedule
    fewer = dataclasses.replace(inputs, train=EncodedDataset.from_rows(rows))
    monkeypatch.setattr(training_course, "_common_layout", lambda _: DocumentLayout(256, 64))
    same_layout = place_of(config, inputs, folder)
    assert same_layout != usual
    assert place_of(config, fewer, folder) != same_layout


def test_another_model_or_adapter_in_the_same_folder_is_another_step(prepared, base, tmp_path):
    prepare, folder = prepared
    base, adapter = shutil.copytree(base, tmp_path / "base"), tmp_path / "adapter"
    config, inputs = prepare(f"model.name_or_path={base}")
    before = place_of(config, inputs, folder)
    lorax.save_adapter(lorax.build_model(config), adapter, base_model_name_or_path=str(base))
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 0.01}))
    assert place_of(config, inputs, folder) != before
    config, inputs = prepare(f"model.name_or_path={base}", f"model.adapter={adapter}", "lora=null")
    before = place_of(config, inputs, folder)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 77}))
    assert place_of(config, inputs, folder) != before


@pytest.mark.parametrize(
    "what", ["code", "libraries", "versions", "runtime", "target", "environment"]
)
def test_other_surroundings_are_another_step(base, usual, monkeypatch, what):
    monkeypatch.chdir(ROOT)
    surroundings = step_cache._surroundings()
    assert what in surroundings
    monkeypatch.setattr(step_cache, "_surroundings", lambda: surroundings | {what: "other"})
    assert place_of(*read_inputs(base), PLACES) != usual


def test_surroundings_are_those_of_the_moment(monkeypatch):
    usual = step_cache._surroundings()
    assert step_cache._surroundings() == usual
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_math")
        assert step_cache._surroundings() != usual
    with monkeypatch.context() as patch:
        newer = [SimpleNamespace(name="nvidia-cudnn-cu13", version="99")]
        patch.setattr("importlib.metadata.distributions", lambda: newer)
        assert step_cache._surroundings() != usual
    precision = jax.config.jax_default_matmul_precision
    try:
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
        assert step_cache._surroundings() != usual
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    devices = [SimpleNamespace(client=SimpleNamespace(platform_version="cuda 99"), device_kind="x")]
    monkeypatch.setattr(step_cache.jax, "devices", lambda: devices)
    assert step_cache._surroundings()["runtime"] == "cuda 99"


def test_steps_of_another_cpu_are_not_taken():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_max_isa=SSE4_2"
    older = "from lorax.devices import step_cache as c; print(c._surroundings()['target'])"
    done = subprocess.run(
        [sys.executable, "-c", older],
        cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | {"XLA_FLAGS": flags},
    )  # fmt: skip
    same = "max_isa=SSE4_2" in os.environ.get("XLA_FLAGS", "")
    assert (done.stdout.strip() == step_cache._surroundings()["target"]) == same


def test_the_cache_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = []
    cache = open_program_cache(said.append)
    assert cache is not None and cache.folder == tmp_path / "lorax" / "steps" and not said
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    cache.folder.chmod(0o777)
    assert open_program_cache(said.append) is None
    assert "compiled steps are not kept: others can write to" in said[0]


def test_the_code_of_both_packages_counts(tmp_path):
    for name, text in (("a.py", "x = 1"), ("b.py", "y = 2")):
        (tmp_path / name).write_text(text)
    before = step_cache._fingerprint([tmp_path])
    (tmp_path / "a.py").write_text("x = 2")
    assert step_cache._fingerprint([tmp_path]) != before
    described = json.dumps(step_cache._surroundings())
    assert jax.__version__ in described and "jax_default_matmul_precision" in described


def test_the_code_is_the_same_wherever_it_lies(tmp_path):
    here, there = tmp_path / "z" / "package", tmp_path / "a" / "elsewhere" / "package"
    for package in (here, there):
        (package / "inner").mkdir(parents=True)
        (package / "x.py").write_text("x = 1")
        (package / "inner" / "y.py").write_text("y = 2")
    before = step_cache._fingerprint([here])
    assert step_cache._fingerprint([there]) == before
    (there / "inner" / "y.py").rename(there / "y.py")
    assert step_cache._fingerprint([there]) != before


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], lambda b: b""],
    ids=["cut", "flipped", "empty"],
)
def test_a_damaged_program_is_told_and_compiled_anew(prepared, compiles_at_once, damage):
    prepare, folder = prepared
    compile_step(*prepare(), folder).result()
    (path,) = folder.glob("*.program")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    said = []
    found = compile_step(*prepare(), folder, said).result()
    assert not any(step.found for step in found.values())
    assert len(said) == 1 and str(path) in said[0] and "damaged" in said[0]
    found = compile_step(*prepare(), folder, said).result()
    assert all(step.found for step in found.values()) and len(said) == 1  # it is whole again


def test_a_step_is_written_once_when_it_is_time(prepared, compiles_at_once):
    prepare, folder = prepared
    config, inputs = prepare()
    cache = ProgramCache(folder, pytest.fail)
    course = Course.of(config, inputs.train)
    compile_ahead(inputs.blueprint.shapes, course, programs=cache).result(60)
    assert not list(folder.iterdir())
    cache.keep_waiting()
    finish_in_background("keep")
    (program,) = folder.glob("*.program")
    program.rename(folder / "moved")
    cache.keep_waiting()
    finish_in_background("keep")
    assert [path.name for path in folder.iterdir()] == ["moved"]


def test_a_folder_that_takes_nothing_is_told(prepared, compiles_at_once):
    prepare, folder = prepared
    said = []
    compile_step(*prepare(), folder / "absent", said).result()
    assert len(said) == 1 and "not kept" in said[0] and "absent" in said[0]


def test_the_programs_not_used_for_longest_go_first(prepared, compiles_at_once, monkeypatch):
    monkeypatch.setattr(step_cache, "_MOST", 2)
    prepare, folder = prepared
    for age, name in enumerate(["step-a.program", "step-b.program"]):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (1000 - age, 1000 - age))
    for age, name in ((9000, ".step-old.program.1.1"), (0, ".step-new.program.1.1")):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - age, time.time() - age))
    compile_step(*prepare(), folder).result()
    left = sorted(path.name for path in folder.iterdir())
    assert len(left) == 3 and left[0] == ".step-new.program.1.1" and "step-a.program" in left


PROGRAM = """
import sys
sys.path[:0] = [".", "kernels", "tests/devices"]
from pathlib import Path
from lorax.data.chat.tokenizer import WITHOUT_TORCH
from test_program_cache import compile_step, read_inputs
WITHOUT_TORCH.set()
said = []
folder, base = sys.argv[1:]
(step,) = compile_step(*read_inputs(base), Path(folder), said).result().values()
print(step.found, said)
"""


def test_another_process_finds_it(base, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(base)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    said = [
        subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert said == [["False", "[]"], ["True", "[]"]]


def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    said = []
    cache = ProgramCache(tmp_path, said.append)
    monkeypatch.setattr("lorax.devices.step_cache.serialize", lambda _: (b"", *structures))
    structures = [jax.tree.structure(((), {})), jax.tree.structure(())]
    monkeypatch.setattr(ProgramCache, "_path", lambda *_: tmp_path / "step-0.program")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    cache.keep(None, {}, (), ())
    (told,) = said
    assert told.startswith(f"the compiled step is not kept in {tmp_path}: {tmp_path}/.step-0")
    assert told.endswith(": No space left on device")
