"""A run with new tokens, from its setting to the files that PEFT and transformers load."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorax
from lorax.cli.main import main
from lorax.interop.load import load_model
from lorax.interop.new_tokens import NewTokens
from tests.bounds import distance
from tests.tiny import edit_json, write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # of PEFT
]

TOOLS = ["<tool>", "</tool>"]
TEXT = "call <tool>x</tool> now"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models by their rows: of as many as there are tokens, and of some that are free."""
    home = tmp_path_factory.mktemp("bases")
    full = write_model(home / "full")
    tokens = len(AutoTokenizer.from_pretrained(full))
    padded = write_model(home / "padded")
    for folder, rows in ((full, tokens), (padded, tokens + 3)):
        weights = folder / "model.safetensors"
        tensors = load_file(weights)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            table = tensors[name]
            tensors[name] = np.resize(table, (rows, table.shape[1]))
            tensors[name][tokens:] = 9  # what no token reads
        save_file(tensors, weights, metadata={"format": "pt"})
        edit_json(folder / "config.json", vocab_size=rows)
    tied = write_model(home / "tied")
    tensors = load_file(padded / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    edit_json(tied / "config.json", vocab_size=tokens + 3, tie_word_embeddings=True)
    return {"full": full, "padded": padded, "tied": tied, "tokens": tokens}


def settings(home, base, *, export=("merged",), **lora):
    rows = home / "rows.jsonl"
    rows.write_text(4 * (json.dumps({"prompt": "a", "completion": TEXT}) + "\n"))
    config = {
        "model": {"name_or_path": str(base), "dtype": "float32", "new_tokens": TOOLS},
        "lora": {"r": 2, "target_modules": ["q_proj"], **lora},
        "data": {"train": str(rows), "max_seq_length": 32},
        "train": {"max_steps": 2, "learning_rate": 0.05},
        "save": {"output_dir": str(home / "run"), "export": list(export)},
    }
    (home / "run.yaml").write_text(json.dumps(config))
    return str(home / "run.yaml")


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.numpy()


def in_peft(base, adapter, rows):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows > model.config.vocab_size:
        model.resize_token_embeddings(rows)
    return peft.PeftModel.from_pretrained(model, str(adapter))


@pytest.mark.parametrize(
    "kind, lora",
    [
        ("full", {}),
        ("padded", {"trainable_token_indices": [5]}),
        ("tied", {}),
        ("full", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
    ids=["full", "padded", "tied", "whole"],
)
def test_peft_and_transformers_load_what_was_trained(kind, lora, bases, tmp_path):
    base, first = bases[kind], bases["tokens"]
    assert main(["train", settings(tmp_path, base, **lora)]) == 0
    adapter, merged = (tmp_path / "run" / name for name in ("adapter", "merged"))
    ids = []
    for folder in (adapter, merged, tmp_path / "run" / "weights" / "step-000002"):
        if folder == merged or folder == adapter or folder.exists():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            assert tokenizer.convert_tokens_to_ids(TOOLS) == [first, first + 1]
            ids = tokenizer.encode(TEXT)
            assert ids.count(first) == ids.count(first + 1) == 1
            assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    rows = max(first + 2, json.loads((base / "config.json").read_text())["vocab_size"])
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert whole.config.vocab_size == rows
    got = logits(in_peft(base, adapter, rows), ids)
    assert distance(logits(whole, ids), got) <= 1e-4
    model = NewTokens.read(adapter).resize(load_model(base, dtype=jnp.float32))
    begun = np.asarray(model.model.embed_tokens.embedding[...])
    np.testing.assert_allclose(begun[first], begun[:first].mean(0), atol=1e-6)
    ours = lorax.load_adapter(model, adapter)(jnp.asarray([ids], jnp.int32))
    assert distance(ours, got) <= 1e-4
    # They were trained, and so were the tokens that were named beside them.
    trained = whole.get_input_embeddings().weight.detach().numpy()
    moved = np.flatnonzero(np.abs(trained - begun).max(1) > 1e-4).tolist()
    assert {first, first + 1} <= set(moved)
    card = (adapter / "README.md").read_text()
    assert (f"model.resize_token_embeddings({rows})" in card) == (kind == "full")
    # It answers, and becomes another format, by itself.
    words = ["--prompt", TEXT, "--raw", "--max-new-tokens", "2"]
    assert main(["generate", str(tmp_path / "run"), *words]) == 0
    assert main(["generate", str(base), "--adapter", str(adapter), *words]) == 0
    for form in ("merged", "peft"):
        out = tmp_path / form
        words = ["--format", form, "--out", str(out), "--dtype", "float32"]
        assert main(["export", str(adapter), *words]) == 0
        assert AutoTokenizer.from_pretrained(out).encode(TEXT) == ids
    assert (tmp_path / "peft" / "new_tokens.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert distance(logits(again, ids), got) <= 1e-4


def test_an_adapter_trains_on_with_its_tokens_and_a_run_goes_on(bases, tmp_path, capsys):
    path = settings(tmp_path, bases["full"], export=("peft",))
    assert main(["train", path, "save.save_steps=1"]) == 0
    adapter = tmp_path / "run" / "adapter"
    before = load_file(adapter / "adapter_model.safetensors")
    for name in ("adapter", "checkpoints/step-000000002", "weights/step-000002"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "summary.json").unlink()
    assert main(["train", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0
    after = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    on = ["lora=null", f"model.adapter={adapter}", f"save.output_dir={tmp_path / 'more'}"]
    assert main(["train", path, *on, "model.new_tokens=null"]) == 0
    assert (tmp_path / "more" / "adapter" / "new_tokens.json").read_text() == (
        (adapter / "new_tokens.json").read_text()
    )
    ids = [[bases["tokens"], 3, bases["tokens"] + 1]]
    model = in_peft(bases["full"], tmp_path / "more" / "adapter", bases["tokens"] + 2)
    assert np.isfinite(logits(model, ids[0])).all()
    capsys.readouterr()
    assert main(["train", path, "--resume", "model.new_tokens=[<other>]"]) == 2
    assert "model.new_tokens" in capsys.readouterr().err
    other = ["model.new_tokens=[<other>]", f"save.output_dir={tmp_path / 'x'}"]
    assert main(["train", path, *on, *other]) == 2
    assert "keeps the tokens that it was trained with" in capsys.readouterr().err


def test_every_row_of_a_model_that_trains_whole_is_there(bases, tmp_path):
    path = settings(tmp_path, bases["full"])
    assert main(["train", path, "lora=null", "train.method=full"]) == 0
    merged = tmp_path / "run" / "merged"
    ids = AutoTokenizer.from_pretrained(merged).encode(TEXT)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ours = load_model(merged, dtype=jnp.float32)(jnp.asarray([ids], jnp.int32))
    assert bases["tokens"] in ids
    assert distance(ours, logits(model, ids)) <= 1e-4


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.new_tokens=[a]", "'a' is in the vocabulary of .* already, as token 67"),
        ("model.new_tokens=[<x>, <x>]", "names .*<x>.* twice"),
        ("model.new_tokens=['']", "new_tokens"),
        ("model.offload_embedding=true", "must be false with new_tokens, whose rows train"),
        ("lora.target_modules=[embed_tokens]", "model.new_tokens trains rows of the embedding"),
    ],
)
def test_what_cannot_be_is_refused_before_training(override, message, bases, tmp_path, capsys):
    assert main(["train", settings(tmp_path, bases["full"]), override]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
