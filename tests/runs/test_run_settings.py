"""Settings that change what trains or what is written, through the commands, on the tiny model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from safetensors.numpy import load_file, save_file

import lorax
from lorax.cli.main import main
from lorax.config.data import DataConfig
from lorax.config.model import ModelConfig
from lorax.config.run import EvalConfig, RunConfig, SaveConfig, load_config
from lorax.config.train import TrainConfig
from lorax.data.dataset import EncodedDataset
from lorax.interop.load import load_model
from lorax.interop.peft import load_adapter, save_adapter
from lorax.models.stack.recompute import Recomputation
from lorax.recovery.store import CheckpointStore
from lorax.runs.memory import make_planner
from lorax.runs.model import Blueprint
from lorax.runs.run import run_training
from lorax.training.trainer import Trainer
from tests.tiny import shallow_model

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "examples" / "tiny"
TEMPLATE = (
    "{% for m in messages %}<<{{ m['role'] }}>>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<<assistant>>{% endif %}"
)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a command on a few rows of the example; returns its exit code and what it printed."""
    rows = (TINY / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:6]), encoding="utf-8")
    config = {
        "model": {"name_or_path": str(shallow_model(3)), "dtype": "float32"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_seq_length": 128},
        "train": {"max_steps": 1, "gradient_checkpointing": "none"},
        "save": {"output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")

    def call(command, *overrides):
        code = main([command, str(tmp_path / "run.yaml"), *overrides])
        return code, "".join(capsys.readouterr())

    return call


def test_modules_to_save_train_and_export_through_the_command(run, tmp_path):
    setting = "lora.modules_to_save=[norm, embed_tokens]"
    assert run("validate", setting)[0] == 0
    assert run("inspect", setting)[0] == 0
    code, printed = run("train", setting, "save.export=[peft, merged]")
    # The embedding, and seven norms: `norm` takes those of the layers too, as PEFT does.
    assert code == 0 and f"also trained: {512 * 128 + 7 * 128:,} parameters" in printed
    keys = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in keys
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()


def test_an_adapter_that_trains_more_can_be_trained_on(run, tmp_path):
    assert run("train", "lora.modules_to_save=[norm]")[0] == 0
    adapter = tmp_path / "run" / "adapter"
    again = (f"model.adapter={adapter}", f"save.output_dir={tmp_path}/again")
    assert run("validate", *again)[0] == 0
    assert run("train", *again)[0] == 0


def test_a_section_can_be_taken_away_on_the_command_line(run, tmp_path):
    settings = ("lora.r=4", "train.method=full")
    code, printed = run("validate", *settings)
    assert code == 2 and "lora=null" in printed
    assert run("validate", "lora=null", "train.method=full")[0] == 0


def test_portable_export_of_what_it_cannot_hold_is_refused_before_training(run, tmp_path):
    settings = ("lora.modules_to_save=[norm]", "save.export=[peft-portable]")
    for command in ("validate", "train"):
        code, printed = run(command, *settings)
        assert code == 2 and "peft-portable holds A and B only" in printed
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_does_not_fit_is_found_by_validate(run):
    settings = (
        "train.lr_scheduler_type=wsd",
        "train.lr_scheduler_kwargs={num_decay_steps: 50}",
    )
    code, printed = run("validate", *settings)
    assert code == 2 and "num_decay_steps" in printed


def test_more_devices_than_there_are_is_found_by_validate(run):
    code, printed = run("validate", "mesh.data=64")
    assert code == 2 and "mesh.data asks for 64 devices" in printed


def test_a_run_that_fails_while_it_exports_gives_its_lock_back(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr("lorax.runs.exports.export_model", refuse)
    config = load_config(tmp_path / "run.yaml")
    with pytest.raises(OSError, match="no room") as kept:  # and with it, the frames
        run_training(config, Console(quiet=True))
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.open()
    store.close()
    assert kept.value.__traceback__ is not None


def test_an_own_chat_template_goes_with_the_run_and_its_exports(run, tmp_path, capsys):
    (tmp_path / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    setting = f"data.chat_template={tmp_path}/own.jinja"
    code, printed = run("train", setting, "save.export=[peft, merged]")
    assert code == 0 and "<<assistant>>" not in printed  # no terminal: no training text
    assert "<<assistant>>" in run("inspect", setting)[1]
    folder = tmp_path / "run"
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    merged = (folder / "merged" / "chat_template.jinja").read_text(encoding="utf-8")
    assert merged == TEMPLATE
    later = ["export", str(folder), "--format", "merged", "--out", str(tmp_path / "later")]
    assert main(later) == 0
    assert (tmp_path / "later" / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def test_generate_uses_the_template_of_the_run(run, tmp_path, monkeypatch):
    (tmp_path / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert run("train", f"data.chat_template={tmp_path}/own.jinja")[0] == 0
    seen = []
    monkeypatch.setattr(
        "lorax.cli.generate.generate", lambda _, tokens, **k: seen.append(tokens) or [[5]]
    )
    assert main(["generate", str(tmp_path / "run"), "--prompt", "hello"]) == 0
    tokenizer = lorax.load_tokenizer(str(shallow_model(3)))
    assert tokenizer.decode(seen[0][0]) == "<<user>>hello<|im_end|><<assistant>>"


def test_generate_says_that_an_adapter_is_no_model(run, tmp_path, capsys):
    assert run("train")[0] == 0
    assert main(["generate", str(tmp_path / "run" / "adapter"), "--prompt", "x"]) == 2
    assert "holds a LoRA adapter, not a model" in capsys.readouterr().err


def test_a_head_and_embedding_trained_apart_are_refused_on_a_tied_base(tmp_path):
    base = load_model(shallow_model(3), dtype=jnp.float32)
    config = lorax.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    save_adapter(lorax.apply_lora(base, config, rngs=nnx.Rngs(0)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] = 2 * tensors["base_model.model.lm_head.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight must both be there and equal"):
        load_adapter(base, tmp_path / "adapter")


@pytest.fixture
def trainer_of(tmp_path):
    """Makes a trainer from Python, on random rows."""
    rows = [(np.arange(3, 12 + i), np.arange(9 + i) > 2) for i in range(4)]
    data = EncodedDataset.from_rows(rows)
    base = load_model(shallow_model(3), dtype=jnp.float32)
    model = lorax.apply_lora(base, lorax.LoraConfig(r=2), rngs=nnx.Rngs(0))

    def make(evaluation=None, held_out=None, **train):
        config = RunConfig(
            model=ModelConfig(name_or_path=str(shallow_model(3)), dtype="float32"),
            data=DataConfig(train="rows.jsonl", eval="rows.jsonl", max_seq_length=128),
            train=TrainConfig(max_steps=1, **train),
            eval=evaluation or EvalConfig(),
            save=SaveConfig(output_dir=str(tmp_path / "run")),
        )
        return Trainer(model, config, data, held_out)

    return make


def test_a_second_trainer_in_the_same_folder_is_refused_before_it_trains(trainer_of):
    trainer_of().train()
    with pytest.raises(ValueError, match="holds a run's checkpoints: resume it with resume=True"):
        trainer_of()


def test_asking_for_evaluation_without_rows_is_refused(trainer_of):
    with pytest.raises(ValueError, match="the Trainer got no eval_data"):
        trainer_of(EvalConfig(strategy="epoch"))
    unsupervised = EncodedDataset.from_rows([(np.arange(3, 9), np.zeros(6, bool))])
    with pytest.raises(ValueError, match="the held-out rows hold no supervised token"):
        trainer_of(EvalConfig(strategy="epoch"), unsupervised)


def test_a_run_that_goes_on_makes_again_what_it_did(run, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("lorax.runs.exports.export_model", stop)
        asked = ("train.gradient_checkpointing=full", "train.kept_layers=2")
        code, printed = run("train", *asked)
    assert code == 2 and "gradient checkpointing: full with 2 layers kept; as asked" in printed
    auto = "train.gradient_checkpointing=auto"
    code, printed = run("train", "--resume", auto, "train.memory_gib=0.0001")
    assert code == 2 and "train.memory_gib: 0.0001 is less than the run in" in printed
    config = load_config(tmp_path / "run.yaml", [auto, "train.memory_gib=100"])
    assert lorax.build_model(config).kept_layers == 2
    assert make_planner(Blueprint.of(config)).fastest(2, 128, 100.0) == Recomputation("none")
    code, printed = run("train", "--resume", "train.gradient_checkpointing=full")
    assert code == 2 and (
        "changed: full with 2 layers kept then, full now (go on with "
        "train.gradient_checkpointing=full train.kept_layers=2)" in printed
    )
    code, printed = run("train", "--resume", auto, "train.memory_gib=100")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["gradient_checkpointing"] == "full with 2 layers kept"
    assert code == 0 and "full with 2 layers kept; as before, about" in printed


def test_more_layers_than_there_are_cannot_be_kept(run, tmp_path):
    settings = ("train.gradient_checkpointing=full", "train.kept_layers=5")
    for command in ("validate", "plan", "train"):
        code, printed = run(command, *settings)
        assert code == 2 and "train.kept_layers: needs 0 to the model's 3 layers, got 5" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["lorax.runs.run.adapt_base", "lorax.runs.run.Trainer"])
def test_memory_that_runs_out_before_the_first_step_is_explained_too(run, monkeypatch, where):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(where, exhausted)
    code, printed = run("train")
    assert code == 1 and "out of memory" in printed.lower() and "Traceback" not in printed
    assert "`lorax plan`" in printed  # which on a CPU is all that can be told


def test_a_checkpoint_that_cannot_be_written_is_a_failure_and_no_bad_input(run, monkeypatch):
    full = SimpleNamespace(free=0)
    monkeypatch.setattr("lorax.recovery.store.shutil.disk_usage", lambda _: full)
    code, printed = run("train")
    assert code == 1 and "0 MiB are free" in printed


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["export", "--format", "peft"]])
def test_a_run_that_has_not_ended_says_how_it_ends(run, tmp_path, monkeypatch, capsys, command):
    def stop(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr("lorax.runs.exports.export_model", stop)
    assert run("train")[0] == 2
    name, *options = command
    more = ["--out", str(tmp_path / "out")] if name == "export" else []
    assert main([name, str(tmp_path / "run"), *options, *more]) == 2
    said = capsys.readouterr().err
    assert "the run has not ended. Finish it with `lorax train" in said
    assert "config.yaml --resume`, or take the adapter as it was at a save" in said
    assert "step-000001 --base " in said


def test_rows_longer_than_the_model_was_made_for_are_told(run, tmp_path):
    model = tmp_path / "short"
    shutil.copytree(shallow_model(3), model)
    settings = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 8}
    (model / "config.json").write_text(json.dumps(settings))
    for command in ("validate", "inspect"):
        code, printed = run(command, f"model.name_or_path={model}")
        assert code == 0 and "the model was made for 8:" in " ".join(printed.split())
        assert "was made for" not in run(command)[1]


def test_brackets_in_a_path_are_printed(run, tmp_path):
    code, printed = run("train", f"save.output_dir={tmp_path}/x[/b][red]", "save.export=[peft]")
    assert code == 0 and f"peft: {tmp_path}/x[/b][red]/adapter" in printed
