"""An adapter's folder may hold the tokenizer it was trained with: that one is used, and told."""

import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
import transformers
from flax import nnx

from lorax.adapters.nnx.apply import apply_lora
from lorax.cli.main import main
from lorax.config.adapter import LoraConfig
from lorax.interop.load import load_model
from lorax.interop.peft import save_adapter
from tests.tiny import edit_json

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[2] / "examples" / "tiny" / "model"
TEMPLATE = (
    "{% for m in messages %}<|own|>{{ m['content'] }}<|own|>{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)
INLINE = "INLINE: {{ messages[0]['content'] }}"
TURN = [{"role": "user", "content": "Hi"}]
OWN = 0  # the id of the token that the adapter's tokenizer calls otherwise, and ends texts with


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = Path(shutil.copytree(MODEL, tmp_path_factory.mktemp("base") / "model"))
    (folder / "tokenizer.model").write_bytes(b"what no one reads beside a tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """A PEFT adapter, and nothing else, in its folder."""
    model = load_model(base, dtype=jnp.float32)
    model = apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"]), rngs=nnx.Rngs(0))
    return save_adapter(
        model, tmp_path_factory.mktemp("adapter") / "plain", base_model_name_or_path=str(base)
    )


@pytest.fixture
def adapter(plain, tmp_path):
    """The adapter, with a tokenizer of its own: another token, another end, another template."""
    folder = Path(shutil.copytree(plain, tmp_path / "own"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|own|>"))
    edit_json(folder / "tokenizer_config.json", eos_token="<|own|>", pad_token="<|own|>")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def ask(base, monkeypatch, capsys):
    """Asks the base with an adapter; returns the ids, the stop tokens, and what it says."""
    given = []

    def answer(_, tokens, *, stop_ids, **__):
        given[:] = tokens[0], stop_ids
        return [[5]]

    monkeypatch.setattr("lorax.cli.generate.generate", answer)

    def asking(folder):
        assert main(["generate", str(base), "--adapter", str(folder), "--prompt", "Hi"]) == 0
        return *given, capsys.readouterr().err

    return asking


@pytest.fixture
def merge(tmp_path, capsys):
    def merging(folder, format="merged"):
        out = tmp_path / "out"
        words = ["export", str(folder), "--format", format, "--out", str(out), "--dtype", "float32"]
        assert main(words) == 0
        return out, capsys.readouterr().err

    return merging


def ids_of(tokenizer):
    return tokenizer.apply_chat_template(TURN, add_generation_prompt=True)["input_ids"]


def test_generate_takes_the_adapters_own_tokenizer_and_says_so(adapter, ask):
    theirs = transformers.AutoTokenizer.from_pretrained(adapter)
    ids, stops, said = ask(adapter)
    assert ids == ids_of(theirs) and ids.count(OWN) == 2
    assert OWN in stops
    files = "tokenizer.json, tokenizer_config.json, chat_template.jinja"
    assert said == (
        "lorax generate: the tokenizer and chat template are the adapter's own, of "
        f"{adapter} ({files})\n"
    )


def test_a_merged_export_holds_the_adapters_own_tokenizer_and_no_other(adapter, merge, base):
    out, said = merge(adapter)
    assert said.count("\n") == 1 and "chat template are the adapter's own, of" in said
    exported, theirs = map(transformers.AutoTokenizer.from_pretrained, (out, adapter))
    assert ids_of(exported) == ids_of(theirs)
    assert exported.chat_template == TEMPLATE and exported.eos_token == "<|own|>"
    assert (out / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert (base / "tokenizer.model").exists() and not (out / "tokenizer.model").exists()
    assert OWN in json.loads((out / "generation_config.json").read_text())["eos_token_id"]


def test_a_template_alone_goes_with_the_tokenizer_of_the_base(plain, tmp_path, base, ask, merge):
    folder = Path(shutil.copytree(plain, tmp_path / "own"))
    (folder / "chat_template.jinja").write_text(INLINE)
    expected = transformers.AutoTokenizer.from_pretrained(base)
    expected.chat_template = INLINE
    ids, _, said = ask(folder)
    assert ids == ids_of(expected)
    assert f"the chat template is the adapter's own, of {folder}; the tokenizer is the" in said
    out, again = merge(folder)
    assert again.partition(": ")[2] == said.partition(": ")[2]
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == INLINE
    # As transformers reads it, where it stands in the settings instead.
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": INLINE}))
    assert ask(folder) == (ids, *ask(folder)[1:2], said)


def test_a_tokenizer_without_a_template_is_given_that_of_the_base(adapter, base, ask, merge):
    (adapter / "chat_template.jinja").unlink()
    expected = transformers.AutoTokenizer.from_pretrained(adapter)
    expected.chat_template = transformers.AutoTokenizer.from_pretrained(base).chat_template
    ids, _, said = ask(adapter)
    assert ids == ids_of(expected)
    assert "the tokenizer is the adapter's own" in said
    assert said.endswith("; the chat template is the base's, since it has none\n")
    out, _ = merge(adapter)
    assert ids_of(transformers.AutoTokenizer.from_pretrained(out)) == ids


def test_files_that_hold_neither_are_told(plain, tmp_path, base, ask):
    folder = Path(shutil.copytree(plain, tmp_path / "own"))
    (folder / "special_tokens_map.json").write_text("{}")
    ids, _, said = ask(folder)
    assert ids == ids_of(transformers.AutoTokenizer.from_pretrained(base))
    assert (
        "holds special_tokens_map.json, but no tokenizer and no chat template: the base's" in said
    )


def test_an_adapter_alone_says_nothing_and_takes_the_tokenizer_of_the_base(plain, base, ask, merge):
    ids, _, said = ask(plain)
    assert ids == ids_of(transformers.AutoTokenizer.from_pretrained(base)) and not said
    out, said = merge(plain)
    assert not said and (out / "tokenizer.model").exists()


def test_an_adapter_that_is_exported_as_one_tells_what_is_not_copied(adapter, merge):
    out, said = merge(adapter, "peft-portable")
    assert not (out / "tokenizer.json").exists()
    assert "tokenizer.json, tokenizer_config.json, chat_template.jinja of" in said
    assert "are not copied: an adapter is exported without them" in said


def test_a_run_on_an_adapter_tells_that_its_tokenizer_is_not_read(adapter, base, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(4 * (json.dumps({"prompt": "a", "completion": "b"}) + "\n"))
    config = {
        "model": {"name_or_path": str(base), "adapter": str(adapter), "dtype": "float32"},
        "data": {"train": str(rows), "max_seq_length": 64},
        "save": {"output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main(["validate", str(tmp_path / "run.yaml")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "own holds tokenizer.json, tokenizer_config.json, chat_template.jinja, which are" in said
    assert "which are not read: a run takes the base's" in said


def test_a_template_that_cannot_be_read_is_named(adapter, base, capsys):
    (adapter / "tokenizer.json").unlink()
    path = adapter / "chat_template.jinja"
    ask = ["generate", str(base), "--adapter", str(adapter), "--prompt", "Hi"]
    path.write_bytes(b"\xff")
    assert main(ask) == 2 and f"{path}: byte 0 is not UTF-8" in capsys.readouterr().err
    path.unlink()
    os.mkfifo(path)
    assert main(ask) == 2 and f"{path}: " in capsys.readouterr().err
