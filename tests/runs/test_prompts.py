"""A prompt of a run becomes what the rows were made of that the run was trained on."""

import json
import shutil
from pathlib import Path

import pytest

from lorax.cli.main import main
from lorax.config.run import load_config
from lorax.data.chat.tokenizer import load_tokenizer
from lorax.data.encode import load_encoded_dataset
from tests.tiny import edit_json, shallow_model

pytestmark = pytest.mark.slow

ADDED = ("<|pad|>", "<|im_end|>")
CHATTED = "<|im_start|>user\nThe basket is brown.\n<|im_end|>\n<|im_start|>assistant\n"
NOTE, LABEL = "The basket is brown.\n", "brown basket"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny model with a tokenizer that puts BOS before a text and EOS behind it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(shallow_model(), folder)
    edit_json(folder / "tokenizer_config.json", bos_token="<|pad|>")
    ids = {name: load_tokenizer(str(folder)).convert_tokens_to_ids(name) for name in ADDED}
    single = [
        {"SpecialToken": {"id": "<|pad|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    single.append({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}})
    special = {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in ids.items()}
    adds = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": special,
    }
    edit_json(folder / "tokenizer.json", post_processor=adds)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run of one step on rows of a prompt and its completion."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "rows.jsonl").write_text(
        8 * (json.dumps({"prompt": NOTE, "completion": LABEL}) + "\n")
    )
    config = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(folder / "rows.jsonl"), "max_seq_length": 128},
        "train": {"max_steps": 1, "gradient_checkpointing": "none"},
        "save": {"output_dir": str(folder / "run"), "export": ["peft"]},
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def here(run, tmp_path):
    """A copy of the run."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def ask(here, monkeypatch, capsys):
    """Asks a run whose rows were of `kinds`; returns ids and what it says, or a refusal."""
    given = []
    monkeypatch.setattr(
        "lorax.cli.generate.generate", lambda _, tokens, **k: given.extend(tokens) or [[5]]
    )

    def asking(*options, kinds=None, name=None):
        given.clear()
        capsys.readouterr()
        if kinds is not None:
            (here / "row_kinds.json").write_text(json.dumps({"kinds": kinds}))
        code = main(["generate", *map(str, name or [here]), "--prompt", NOTE, *options])
        said = capsys.readouterr().err
        return (given[0], said.replace(str(here), "RUN")) if code == 0 else said

    return asking


@pytest.fixture
def texts(base):
    """Ids to text, special tokens too."""
    return lambda ids: load_tokenizer(str(base)).decode(ids)


def test_a_run_of_plain_rows_records_them_and_continues_its_prompts(run, ask, texts):
    assert json.loads((run / "row_kinds.json").read_text()) == {"kinds": ["text"]}
    config = load_config(run / "config.yaml")
    tokenizer = load_tokenizer(config.model.name_or_path)
    data = load_encoded_dataset(config.data.train, config.data, tokenizer)
    row, supervised = data.row(0)
    ids, said = ask()
    assert ids == row[~supervised].tolist() == row[: len(ids)].tolist()
    assert ids[0] == tokenizer.bos_token_id and texts(ids) == f"<|pad|>{NOTE}"
    assert said == (
        "lorax generate: RUN was trained on plain text, so the prompt is continued as it is, as "
        "with --raw; --chat puts it into the chat template\n"
    )
    assert ask("--raw") == (ids, "")


def test_a_folder_of_the_run_asks_as_the_run_does(ask, here, base):
    ids, said = ask()
    adapter = [base, "--adapter", here / "adapter"]
    assert ask(name=adapter) == (ids, said)


def test_a_chat_may_be_asked_of_any_run(ask, texts):
    ids, said = ask("--chat")
    assert texts(ids) == CHATTED and not said
    assert texts(ask("--chat", "--system", "S")[0]).startswith("<|im_start|>system\nS<|im_end|>")
    assert "--system needs a chat template and " in (refused := ask("--system", "S"))
    assert "was trained on plain text: leave it out, or pass --chat" in refused
    with pytest.raises(SystemExit):
        ask("--chat", "--raw")


@pytest.mark.parametrize(
    "kinds, trained",
    [
        (["tokens"], "token ids"),
        (["chat", "text"], "chats and plain text"),
        (["tokens", "chat"], "chats and token ids"),
    ],
)
def test_token_ids_and_mixed_rows_keep_the_chat_template_and_say_so(ask, texts, kinds, trained):
    ids, said = ask(kinds=kinds)
    assert texts(ids) == CHATTED
    assert said == (
        f"lorax generate: RUN was trained on {trained}, so the prompt is put into the chat "
        "template; --raw continues it as plain text\n"
    )
    assert texts(ask("--raw")[0]) == f"<|pad|>{NOTE}"


def test_a_run_of_chats_says_nothing(ask, texts):
    ids, said = ask(kinds=["chat"])
    assert texts(ids) == CHATTED and not said


def test_alpaca_rows_without_a_template_are_asked_in_their_prompt(ask, texts):
    ids, said = ask(kinds=["alpaca"])
    assert texts(ids).startswith("<|pad|>Read the instruction, then")
    assert texts(ids).endswith(f"### Instruction:\n{NOTE}\n\n### Response:\n")
    assert "Alpaca rows without a chat template, so the prompt is put into lorax's Alpaca" in said
    assert texts(ask("--system", "S")[0]).startswith("<|pad|>S\n\n### Instruction:")


def test_a_run_of_an_older_version_keeps_the_template_and_says_what_is_not_known(ask, here, texts):
    (here / "row_kinds.json").unlink()
    ids, said = ask()
    assert texts(ids) == CHATTED
    assert "RUN has no row_kinds.json (an older version made it), so the prompt is put" in said
    assert 'pass --raw, or write into that file: {"kinds": ["text"]}' in said
    assert texts(ask("--raw")[0]) == f"<|pad|>{NOTE}"
    assert texts(ask(kinds=["text"])[0]) == f"<|pad|>{NOTE}"


@pytest.mark.parametrize("kinds", [[], "text", ["poem"], ["text", "text"], None, [["text"]]])
def test_a_damaged_record_is_refused(ask, here, kinds):
    (here / "row_kinds.json").write_text(json.dumps({"kinds": kinds}))
    assert "row_kinds.json: kinds must be a list of chat, alpaca, text, tokens, each" in ask()


def test_a_tokenizer_without_a_template_names_the_remedy(ask, monkeypatch):
    load = lambda name: setattr(t := load_tokenizer(name), "chat_template", None) or t
    monkeypatch.setattr("lorax.interop.adapter_tokenizer.load_tokenizer", load)
    ids, said = ask()
    assert said.endswith("so the prompt is continued as it is, as with --raw\n")
    refused = ask(kinds=["tokens"])
    assert "the tokenizer has no chat template and " in refused
    assert "was trained on token ids; pass --raw to continue plain text" in refused
    assert ask("--raw") == (ids, "")
