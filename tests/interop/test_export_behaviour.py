"""What is exported behaves as what was scored: stop tokens, chat template, the base's revision."""

import io
import json
import shutil
from pathlib import Path

import gguf
import peft
import pytest
import torch
import transformers

from lorax.cli.main import main
from lorax.generation.generate import generate
from lorax.interop import folder as interop_folder
from lorax.interop.export_files import companion_files
from tests.tiny import edit_json, shallow_model

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "examples" / "tiny"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TEXT, END_OF_TURN, LONGEST = 0, 2, 32
PROMPT = "The basket is brown, made of stone, in aisle 2."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny model as a base of another kind: it ends texts, and has an old inline template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(shallow_model(), folder)
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|endoftext|>"))
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    edit_json(folder / "tokenizer_config.json", **named, chat_template="OLD{{ messages }}")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "OLDER"}))
    edit_json(folder / "config.json", eos_token_id=END_OF_TEXT)
    settings = {"eos_token_id": END_OF_TEXT, "pad_token_id": 0, "repetition_penalty": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run with a template of its own, whose turns end in what the base does not stop at."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "own.jinja").write_text(TEMPLATE)
    config = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 4, "target_modules": ["q_proj"]},
        "data": {
            "train": [{"path": str(TINY / "data" / "train.jsonl"), "rows": 8}],
            "eval": [{"path": str(TINY / "data" / "heldout.jsonl"), "rows": 4}],
            "max_seq_length": 128,
            "chat_template": str(folder / "own.jinja"),
        },
        "train": {"max_steps": 2, "learning_rate": 1e-5, "gradient_checkpointing": "none"},
        "eval": {"exact_match": True, "max_new_tokens": LONGEST},
        "save": {"output_dir": str(folder / "run"), "export": ["peft", "merged"]},
    }
    for source in (*config["data"]["train"], *config["data"]["eval"]):
        path, rows = Path(source["path"]), source.pop("rows")
        lines = path.read_text().splitlines(keepends=True)[:rows]
        (folder / path.name).write_text("".join(lines))
        source["path"] = str(folder / path.name)
    (folder / "run.yaml").write_text(json.dumps(config))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """Merged models, by how they came to be."""
    folder = tmp_path_factory.mktemp("exports")
    sources = {"run": run, "adapter": run / "adapter", "weights": run / "weights" / "step-000002"}
    for name, source in sources.items():
        out = ["--format", "merged", "--out", str(folder / name), "--dtype", "float32"]
        assert main(["export", str(source), *out]) == 0
    return {"train": run / "merged"} | {name: folder / name for name in sources}


KINDS = ["train", "run", "adapter", "weights"]


def answer_of(folder):
    """Returns what transformers writes with an export's own files, and its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**ids, max_new_tokens=LONGEST, do_sample=False)
    return written[0, ids["input_ids"].shape[1] :].tolist(), tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_stops_at_the_stop_token_that_was_trained(exports, kind):
    answer, _ = answer_of(exports[kind])
    assert answer[-1] == END_OF_TURN and len(answer) < LONGEST
    assert END_OF_TURN not in answer[:-1] and END_OF_TEXT not in answer


def test_generate_answers_as_transformers_does(run, capsys, monkeypatch):
    answer, tokenizer = answer_of(run / "merged")
    written = []
    keep = lambda *a, **k: written.extend(generate(*a, **k)) or written[-1:]
    monkeypatch.setattr("lorax.cli.generate.generate", keep)
    capsys.readouterr()
    for source in (run, run / "merged"):
        options = ["--prompt", PROMPT, "--dtype", "float32", "--max-new-tokens", str(LONGEST)]
        assert main(["generate", str(source), *options]) == 0
        captured = capsys.readouterr()
        assert captured.out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"
        assert not captured.err
    assert written == 2 * [answer[:-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_settings_name_the_trained_stop_token_and_keep_the_rest(base, exports, kind):
    before, after = (
        json.loads((folder / "generation_config.json").read_text())
        for folder in (base, exports[kind])
    )
    assert after == before | {"eos_token_id": [END_OF_TEXT, END_OF_TURN]}
    loaded = transformers.GenerationConfig.from_pretrained(exports[kind])
    assert loaded.eos_token_id == [END_OF_TEXT, END_OF_TURN] and loaded.pad_token_id == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_has_one_chat_template_wherever_it_is_looked_for(base, exports, kind):
    folder = exports[kind]
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert not (folder / "chat_template.json").exists()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings.pop("chat_template") == TEMPLATE
    before = json.loads((base / "tokenizer_config.json").read_text())
    assert before.pop("chat_template").startswith("OLD") and settings == before
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


INLINE, FILE = "inline: {{ messages }}", "file: {{ messages }}\r\n{# é #}"
NAMED = [{"name": "default", "template": INLINE}, {"name": "tool_use", "template": "tools"}]
TEMPLATES = {
    "an inline one and a file": (INLINE, FILE, None),
    "inline ones with names and a file": (NAMED, FILE, None),
    "a file and an old file": (None, FILE, "older"),
    "an inline one and an old file": (INLINE, None, "older"),
    "all three": (INLINE, FILE, "older"),
    "a file": (None, FILE, None),
    "an inline one": (INLINE, None, None),
    "inline ones with names": (NAMED, None, None),
    "an old file": (None, None, "older"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_of_a_bases_chat_templates_an_export_has_the_one_that_transformers_takes(tmp_path, kind):
    inline, file, old = TEMPLATES[kind]
    base, export = tmp_path / "base", tmp_path / "export"
    shutil.copytree(shallow_model(), base)
    (base / "chat_template.jinja").unlink()
    if inline is not None:
        edit_json(base / "tokenizer_config.json", chat_template=inline)
    if file is not None:
        (base / "chat_template.jinja").write_bytes(file.encode())
    if old is not None:
        (base / "chat_template.json").write_text(json.dumps({"chat_template": old}))
    taken = transformers.AutoTokenizer.from_pretrained(base)
    files = companion_files(base, chat_template=None, stop_ids=None, card=None, tokenizer=taken)
    interop_folder.write_checkpoint([], {}, export, source_directory=base, files=files)
    shutil.copy(base / "config.json", export)
    assert transformers.AutoTokenizer.from_pretrained(export).chat_template == taken.chat_template
    if taken.chat_template is not None:
        said = gguf.SpecialVocab(export).chat_template
        assert said == (NAMED if inline == NAMED and file is None else taken.chat_template)
    assert (export / "chat_template.json").exists() == (kind == "an old file")
    if kind in ("a file", "an inline one", "inline ones with names", "an old file"):
        for name in ("tokenizer_config.json", "chat_template.jinja", "chat_template.json"):
            before, after = base / name, export / name
            assert before.exists() == after.exists()
            assert not before.exists() or before.read_bytes() == after.read_bytes()


def test_weights_saved_by_a_full_run_come_with_the_same_files(run, tmp_path):
    overrides = ["lora=null", "train.method=full", "train.max_steps=1", "eval.exact_match=false"]
    output = [f"save.output_dir={tmp_path}/run", "save.export=[merged]"]
    assert main(["train", str(run.parent / "run.yaml"), *overrides, *output]) == 0
    for folder in (tmp_path / "run" / "merged", tmp_path / "run" / "weights" / "step-000001"):
        assert (folder / "chat_template.jinja").read_text() == TEMPLATE
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [END_OF_TEXT, END_OF_TURN]


def test_a_run_of_an_older_version_says_what_is_not_known(run, tmp_path, capsys, monkeypatch):
    stops = []
    answer = lambda _, tokens, *, stop_ids, **k: stops.append(stop_ids) or [[5]]
    monkeypatch.setattr("lorax.cli.generate.generate", answer)
    old = Path(shutil.copytree(run, tmp_path / "old"))
    (old / "stop_tokens.json").unlink()
    generate = ["generate", str(old), "--prompt", PROMPT, "--max-new-tokens", str(LONGEST)]
    out = ["--format", "merged", "--out"]
    assert main(generate) == main(["export", str(old), *out, str(tmp_path / "a")]) == 0
    captured = capsys.readouterr()
    assert "verified" in captured.out
    assert captured.err.count("old has no stop_tokens.json (an older version made it)") == 2
    assert captured.err.count('write its id into that file: {"eos_token_id": [ID]}') == 2
    (old / "stop_tokens.json").write_text(f'{{"eos_token_id": [{END_OF_TURN}]}}')
    assert main(generate) == main(["export", str(old), *out, str(tmp_path / "b")]) == 0
    mended = capsys.readouterr()
    assert not mended.err and stops == [(END_OF_TEXT,), (END_OF_TEXT, END_OF_TURN)]
    found = json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"]
    assert found == [END_OF_TEXT, END_OF_TURN]
    (old / "stop_tokens.json").write_text('{"eos_token_id": ["x"]}')
    assert main(generate) == 2
    assert "stop_tokens.json: eos_token_id must be a token id" in capsys.readouterr().err


@pytest.fixture
def hub(base, monkeypatch):
    """A hub that has one model, whatever is asked for; returns what was asked."""
    asked = []

    def snapshot(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr(interop_folder.huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_the_revision_goes_with_the_adapter_and_is_honoured(run, hub, tmp_path, capsys):
    here, name = tmp_path / "again", "owner/model"
    overrides = [f"model.name_or_path={name}", "model.revision=v2", f"save.output_dir={here}"]
    plain = ["train.max_steps=1", "eval.exact_match=false", "save.export=[peft]"]
    assert main(["train", str(run.parent / "run.yaml"), *overrides, *plain]) == 0
    for adapter in (here / "adapter", here / "weights" / "step-000001"):
        loaded = peft.PeftConfig.from_pretrained(str(adapter))
        assert (loaded.base_model_name_or_path, loaded.revision) == (name, "v2")
    moved = Path(shutil.copytree(here / "adapter", tmp_path / "moved"))
    capsys.readouterr()

    def asks(*words):
        hub.clear()
        assert main([str(word) for word in words]) == 0
        return set(hub), capsys.readouterr().err

    few = ("--prompt", "x", "--max-new-tokens", 1)
    merged = ("--format", "merged", "--out")
    assert asks("export", moved, *merged, tmp_path / "m") == ({(name, "v2")}, "")
    assert asks("generate", name, "--adapter", moved, *few) == ({(name, "v2")}, "")
    assert asks("generate", here, *few) == ({(name, "v2")}, "")
    found, said = asks("export", moved, *merged, tmp_path / "n", "--revision", "v3")
    assert found == {(name, "v3")} and f"the base is {name} at revision v3, as asked" in said
    assert f"adapter_config.json names {name} at revision v2" in said
    found, said = asks("export", moved, *merged, tmp_path / "o", "--base", "other/model")
    assert found == {("other/model", None)} and "the base is other/model, as asked" in said
    found, said = asks("generate", "other/model", "--adapter", moved, *few, "--revision", "v4")
    assert found == {("other/model", "v4")} and "other/model at revision v4, as asked" in said
    asks("export", moved, "--format", "peft", "--out", tmp_path / "p")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "p")).revision == "v2"
    # An adapter that trains on does so on the base that it was made for.
    on = [f"model.name_or_path={name}", f"model.adapter={moved}", "lora=null"]
    found, _ = asks("validate", run.parent / "run.yaml", *on)
    assert found == {(name, "v2")}
    found, _ = asks("validate", run.parent / "run.yaml", *on, "model.revision=v5")
    assert found == {(name, "v5")}


def test_a_folder_has_no_revisions(run, base, tmp_path, capsys):
    moved = Path(shutil.copytree(run / "adapter", tmp_path / "moved"))
    edit_json(moved / "adapter_config.json", revision="v2")
    assert main(["export", str(moved), "--format", "peft", "--out", str(tmp_path / "out")]) == 0
    assert f"names revision v2 of {base}, a folder, which has none" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["base_model_name_or_path", "revision"])
def test_a_base_that_is_no_text_is_refused(run, tmp_path, field, capsys):
    moved = Path(shutil.copytree(run / "adapter", tmp_path / "moved"))
    edit_json(moved / "adapter_config.json", **{field: ["x"]})
    assert main(["export", str(moved), "--format", "peft", "--out", str(tmp_path / "out")]) == 2
    assert f"{field} must be text or null, got ['x']" in capsys.readouterr().err


RAW = "a\tb\r:warning: [:100:] [bold]x[/bold] \x1b[31m ünï"


def test_answers_are_written_as_they_are(run, monkeypatch, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "merged")
    ids = tokenizer(RAW, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == RAW
    monkeypatch.setattr("lorax.cli.generate.generate", lambda _, tokens, **k: [ids] * len(tokens))
    assert main(["generate", str(run), "--prompt", "x"]) == 0
    assert capsys.readouterr().out == RAW + "\n"
    prompts = ["[1/1] x\ny", '"z"']
    assert main(["generate", str(run), *(w for p in prompts for w in ("--prompt", p))]) == 0
    heads = [f"[{i}/2] {json.dumps(p)}\n" for i, p in enumerate(prompts, start=1)]
    assert capsys.readouterr().out == f"{heads[0]}{RAW}\n\n{heads[1]}{RAW}\n"


def test_an_answer_that_ends_at_once_is_told(run, monkeypatch, capsys):
    said = "lorax generate: the answer to {} is empty: the model ended its answer at once\n"
    answers = [[], [5], []]
    monkeypatch.setattr("lorax.cli.generate.generate", lambda _, p, **k: answers[: len(p)])
    assert main(["generate", str(run), "--prompt", "x"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "\n" and captured.err == said.format("--prompt")
    assert main(["generate", str(run), *3 * ["--prompt", "x"]]) == 0
    captured = capsys.readouterr()
    assert captured.err == said.format("--prompt 1") + said.format("--prompt 3")
    monkeypatch.setattr("sys.stdin", io.StringIO("x"))
    assert main(["generate", str(run)]) == 0
    assert capsys.readouterr().err == said.format("standard input")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_answer_that_standard_output_cannot_hold_is_escaped(run, monkeypatch, capsys, encoding):
    text = "caf\u00e9 \u6f22 \U0001f44d"
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "merged")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("lorax.cli.generate.generate", lambda _, tokens, **k: [ids] * len(tokens))
    prompts = ["--prompt", "x", "--prompt", "\u6f22"]
    for words in (prompts[:2], prompts):
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["generate", str(run), *words]) == 0
        written = stream.buffer.getvalue().decode(encoding)
        escaped = text.encode(encoding, "backslashreplace").decode(encoding)
        assert written.count(escaped + "\n") == len(words) // 2 and "\\u6f22" in written
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"standard output is {encoding}, which lacks" in said
    for encoding, errors in (("utf-8", "strict"), ("ascii", "replace")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding, errors)
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["generate", str(run), "--prompt", "x"]) == 0
        assert stream.buffer.getvalue() == f"{text}\n".encode(encoding, errors)
        assert not capsys.readouterr().err
