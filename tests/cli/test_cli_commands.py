"""The commands on the shipped tiny model: what each prints, and what it leaves on disk."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax.interop.export
from lorax.adapters.nnx.apply import set_kernels
from lorax.adapters.nnx.tree import adapted_layers
from lorax.cli.main import main
from lorax.config.run import load_config
from lorax.data.chat.tokenizer import load_tokenizer
from lorax.interop.export import LOGIT_BOUNDS, ExportError, logit_distance, verify_adapter
from lorax.interop.load import load_model
from lorax.interop.peft import load_adapter
from tests.cli.runs import CONFIG, MODEL, PROMPT, prepare

pytestmark = pytest.mark.slow


TENSORS = "adapter_model.safetensors"


@pytest.fixture
def here(tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def lorax_refuses(capsys):
    def run(*arguments):
        assert main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err

    return run


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def distance_to_trained(trained, model, dtype=jnp.float32):
    base = load_model(MODEL, dtype=dtype)
    return logit_distance(load_adapter(base, trained / "adapter"), model)


def test_validate_counts_rows_modules_and_steps(here, lorax_prints):
    printed = lorax_prints("validate", "run.yaml", "train.gradient_accumulation_steps=2")
    assert "train: 8 of 8 rows" in printed and "eval: 4 of 4 rows" in printed
    parameters = 2 * (4 * (128 + 128) + 2 * (384 + 128))
    assert f"lora: 4 modules, {parameters:,} parameters in adapters" in printed
    assert "batches: 2 optimizer steps per epoch" in printed
    assert printed.endswith("run.yaml: valid\n")
    assert not (here / "run").exists()


def test_validate_of_a_full_run_names_no_adapter(here, lorax_prints):
    text = (here / "run.yaml").read_text()
    (here / "run.yaml").write_text(text[: text.index("lora:")] + text[text.index("data:") :])
    printed = lorax_prints("validate", "run.yaml", "train.method=full")
    assert "lora:" not in printed and printed.endswith("run.yaml: valid\n")


@pytest.mark.parametrize("rows", [1, 3])
def test_inspect_shows_settings_rows_with_their_mask_and_modules(here, lorax_prints, rows):
    printed = lorax_prints("inspect", "run.yaml", "--rows", rows)
    assert "learning_rate: 0.03" in printed and "warmup_steps" not in printed
    assert printed.count("⟦{") == rows  # each answer is JSON, and nothing before it is a target
    assert printed.count("<|im_end|>⟧") == rows
    assert "mlp.down_proj" in printed and "self_attn.q_proj" in printed
    assert "v_proj" not in printed.split("Modules")[1]
    assert "warmup_steps: 0" in lorax_prints("inspect", "run.yaml", "--verbose")
    assert not (here / "run").exists()


@pytest.mark.parametrize("verbose", [True, False])
def test_train_shows_all_settings_when_asked(here, monkeypatch, verbose):
    asked = []
    monkeypatch.setattr(
        "lorax.cli.train.run_training", lambda *_, verbose, **__: asked.append(verbose)
    )
    assert main(["train", "run.yaml", *(["--verbose"] if verbose else [])]) == 0
    assert asked == [verbose]


def test_a_run_leaves_its_config_versions_and_card(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "adapter", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "stop_tokens.json",
        "row_kinds.json", "summary.json", "tensorboard", "versions.json", "weights",
    }  # fmt: skip
    assert load_config(trained / "config.yaml") == load_config(trained.parent / "run.yaml")
    versions = json.loads((trained / "versions.json").read_text())
    assert {"lorax", "jax", "flax", "python", "device"} <= versions.keys()
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    card = (trained / "adapter" / "README.md").read_text()
    header = card.split("---")[1]
    assert "library_name: peft" in header and f"base_model: {MODEL}" in header
    assert "- optimizer steps: 3" in card and "- held-out loss: " in card
    assert "- exact match: " in card and "learning_rate: 0.03" in card
    (events,) = (trained / "tensorboard").iterdir()
    assert events.stat().st_size > 500


def test_metrics_hold_every_step_and_evaluation_in_order(trained):
    found = records(trained)
    evaluated = [r["step"] for r in found if "eval_loss" in r]
    stepped = [r["step"] for r in found if "loss" in r]
    assert (evaluated, stepped) == ([0, 2, 3], [1, 2, 3])
    assert [r["step"] for r in found] == sorted(r["step"] for r in found)
    assert all(r["learning_rate"] == pytest.approx(3e-2) for r in found if "loss" in r)
    assert not any("nonfinite" in r for r in found)


def test_the_weights_of_the_last_step_are_the_exported_ones(trained):
    best = json.loads((trained / "weights" / "best.json").read_text())
    folders = {p.name for p in (trained / "weights").glob("step-*")}
    assert folders == {"step-000003", best["path"]}
    exported = load_file(trained / "adapter" / "adapter_model.safetensors")
    saved = load_file(trained / "weights" / "step-000003" / "adapter_model.safetensors")
    assert exported.keys() == saved.keys() and len(exported) == 8
    for name, value in saved.items():
        np.testing.assert_array_equal(exported[name], value)
        assert value.any()  # B was zero before the run


def test_a_second_run_into_the_same_folder_is_refused(trained, monkeypatch, lorax_refuses):
    monkeypatch.chdir(trained.parent)
    before = (trained / "metrics.jsonl").read_bytes()
    message = lorax_refuses("train", "run.yaml")
    assert "run holds a run: go on with --resume, or choose another save.output_dir" in message
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_full_run_exports_a_model_that_generates(here, lorax_prints):
    text = (here / "run.yaml").read_text()
    (here / "run.yaml").write_text(text[: text.index("lora:")] + text[text.index("data:") :])
    printed = lorax_prints(
        "train", "run.yaml", "train.method=full", "train.max_steps=1", "eval.exact_match=false"
    )
    assert "merged: run/merged" in printed
    assert sorted(p.name for p in Path("run").iterdir() if p.is_dir()) == [
        "checkpoints",
        "merged",
        "tensorboard",
        "weights",
    ]
    load_tokenizer("run/merged")
    step, merged = (
        load_file(f"run/{name}/model.safetensors") for name in ("weights/step-000001", "merged")
    )
    assert step.keys() == merged.keys()
    assert all(np.array_equal(step[name], merged[name]) for name in step)
    prompt = ("--prompt", PROMPT, "--max-new-tokens", "4")
    assert lorax_prints("generate", "run", *prompt) == lorax_prints(
        "generate", "run/merged", "--dtype", "float32", *prompt
    )
    assert "config.yaml" in {p.name for p in Path("run").iterdir()}


def test_export_of_a_full_run_points_to_its_checkpoint(trained, tmp_path, lorax_refuses):
    run = tmp_path / "full"
    run.mkdir()
    text = CONFIG[: CONFIG.index("lora:")] + CONFIG[CONFIG.index("data:") :]
    (run / "config.yaml").write_text(text.replace("train:\n  max", "train:\n  method: full\n  max"))
    message = lorax_refuses("export", run, "--format", "peft", "--out", tmp_path / "out")
    assert "full trained the whole model" in message and "merged is its checkpoint" in message


def test_fewer_lines_are_logged_when_asked_but_always_the_edges(here, lorax_prints):
    lorax_prints(
        "train", "run.yaml", "train.max_steps=5", "log.logging_steps=3", "log.report_to=[jsonl]",
        "eval.exact_match=false", "eval.strategy=no", "save.export=[peft-portable]",
    )  # fmt: skip
    found = records(Path("run"))
    assert [r["step"] for r in found if "loss" in r] == [1, 3, 5]
    assert [r["step"] for r in found if "eval_loss" in r] == [0, 5]
    assert not Path("run/tensorboard").exists()
    # Other formats are made from the adapter, which is therefore always there.
    assert Path("run/adapter").is_dir() and Path("run/adapter-portable").is_dir()


def test_an_exported_adapter_trains_on(trained, here, lorax_prints):
    text = CONFIG[: CONFIG.index("lora:")] + CONFIG[CONFIG.index("data:") :]
    (here / "on.yaml").write_text(text)
    printed = lorax_prints(
        "train", "on.yaml", f"model.adapter={trained / 'adapter'}", "save.output_dir=on",
        "train.max_steps=2", "eval.exact_match=false",
    )  # fmt: skip
    assert "self_attn.q_proj" in printed
    first, last = records(trained)[-1], records(Path("on"))[0]
    assert last["step"] == 0
    assert last["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    before, after = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (trained / "adapter", Path("on/adapter"))
    )
    assert before == after
    moved = load_file("on/adapter/adapter_model.safetensors")
    start = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert all(not np.array_equal(moved[name], start[name]) for name in start)
    assert "lora" not in load_config("on/config.yaml").model_fields_set


@pytest.mark.parametrize("source", [".", "adapter"], ids=["from a run", "from an adapter"])
@pytest.mark.parametrize("format", ["peft", "peft-portable", "merged"])
def test_every_format_is_exported_and_loads_again(trained, here, lorax_prints, format, source):
    printed = lorax_prints(
        "export", trained / source, "--format", format, "--out", "out", "--dtype", "float32"
    )
    assert f"{format}: out (base in float32)\n" in printed
    assert "tensors read back bit-equal, logits differ by" in printed
    if format == "merged":
        load_tokenizer("out")
        model = load_model("out", dtype=jnp.float32)
    else:
        model = load_adapter(load_model(MODEL, dtype=jnp.float32), "out")
    bound = 0.0 if format == "peft" else LOGIT_BOUNDS["float32"]
    assert distance_to_trained(trained, model) <= bound
    assert distance_to_trained(trained, load_model(MODEL, dtype=jnp.float32)) > 1e-3
    assert Path("out/README.md").exists() == (source == ".")


def test_an_adapter_is_exported_onto_the_base_that_is_given(trained, here, lorax_prints):
    moved = Path(shutil.copytree(trained / "adapter", here / "moved"))
    settings = json.loads((moved / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    lorax_prints("export", moved, "--format", "peft", "--out", "out", "--base", MODEL)
    named = json.loads(Path("out/adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(MODEL)


def test_an_export_that_was_damaged_on_its_way_is_caught(trained, here, monkeypatch, lorax_refuses):
    intact = lorax.interop.export.save_adapter

    def damaged(model, directory, **settings):
        folder = intact(model, directory, **settings)
        tensors = load_file(folder / "adapter_model.safetensors")
        name = sorted(tensors)[0]
        save_file(tensors | {name: tensors[name] * np.float32(1.0001)}, folder / TENSORS)
        return folder

    monkeypatch.setattr(lorax.interop.export, "save_adapter", damaged)
    message = lorax_refuses("export", trained, "--format", "peft", "--out", "out")
    assert message.startswith("lorax export: error: out/adapter_model.safetensors: base_model.")
    assert "differs from the trained model after the export" in message
    message = lorax_refuses("train", "run.yaml", "train.max_steps=1", "eval.exact_match=false")
    assert "differs from the trained model after the export" in message


def test_verification_sees_a_missing_tensor_and_another_scale(trained, tmp_path):
    model = load_adapter(load_model(MODEL, dtype=jnp.float32), trained / "adapter")
    assert verify_adapter(model, trained / "adapter").tensors == 8
    folder = Path(shutil.copytree(trained / "adapter", tmp_path / "scale"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["lora_alpha"] *= 2
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ExportError, match=r"logits differ .*do not use this export"):
        verify_adapter(model, folder)
    tensors = load_file(folder / TENSORS)
    name = sorted(tensors)[-1]
    del tensors[name]
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ExportError, match=rf"lacks {name}"):
        verify_adapter(model, folder)


def test_verification_does_not_depend_on_what_computed_the_training(trained):
    model = load_adapter(load_model(MODEL, dtype=jnp.float32), trained / "adapter")
    set_kernels(model, "pallas")  # which no CPU can run
    assert verify_adapter(model, trained / "adapter").logit_error == 0.0
    assert {layer.kernels for layer in adapted_layers(model).values()} == {"pallas"}


def test_plan_shows_every_policy_and_needs_no_data(here, lorax_prints):
    printed = lorax_prints("plan", "run.yaml", "data.train=absent.jsonl", "--gpu", "l40s")
    lines = [line.split() for line in printed.splitlines()]
    first = {line[0]: line for line in lines[4:8]}
    peaks = {policy: float(first[policy][5]) for policy in ("none", "selective", "full")}
    assert peaks["none"] >= peaks["selective"] >= peaks["full"]
    assert "auto takes none: 0.0 of 42.8 GiB" in printed and "rows of 128 tokens" in printed
    others = printed.partition("what auto takes on other GPUs")[2]
    assert "h200" in others and "4090" in others and "l40s" not in others
    assert "kept" not in printed.partition("auto takes")[0]
    kept = ("train.gradient_checkpointing=full", "train.kept_layers=2")
    assert "full, 2 kept" in lorax_prints("plan", "run.yaml", *kept)
