"""Files of a tokenizer that are pointers, of another type or not whole are refused by name."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import lorax
from lorax.config.data import DataConfig
from lorax.data.chat.tokenizer import load_tokenizer, tokenize_texts
from lorax.data.encode import load_encoded_dataset
from lorax.data.reading.rows import DataError
from tests.data.llama_tokenizer import LLAMA, byte_level, write_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def test_a_pointer_beside_a_whole_tokenizer_json_does_not_matter(tmp_path):
    folder = write_folder(tmp_path, backend=byte_level(), tokenizer_class="GPT2Tokenizer")
    expected = load_tokenizer(folder).encode("in 12")
    for name in ("tokenizer.model", "tokenizer.model.v3", "vocab.json", "merges.txt"):
        (tmp_path / name).write_text(POINTER)
    (tmp_path / "tokenizer").mkdir()
    assert load_tokenizer(folder).encode("in 12") == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_pointer_in_the_place_of_a_file_that_is_read_is_refused(tmp_path, name):
    folder = write_folder(tmp_path, backend=byte_level(), tokenizer_class="GPT2Tokenizer")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt"])
def test_a_pointer_without_a_tokenizer_json_is_refused(tmp_path, name):
    folder = write_folder(tmp_path, **LLAMA)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(folder)


VALUES = {
    "text": "4096",
    "a number": 7,
    "a fraction": -1.5,
    "true": True,
    "null": None,
    "a list": [],
    "a list of text": ["a"],
    "a list of numbers": [1],
    "an object": {},
    "an object of a number": {"content": 7},
    "long": "x" * 20_000,
}


TOKEN = {"text", "null", "long"}


FIELDS = {
    "model_max_length": {"a number", "null"},
    "add_bos_token": {"true", "null"},
    "add_eos_token": {"true", "null"},
    "add_prefix_space": {"true", "null"},
    "clean_up_tokenization_spaces": {"true", "null"},
    "legacy": {"true", "null"},
    "split_special_tokens": {"true", "null"},
    "eos_token": TOKEN,
    "bos_token": TOKEN,
    "unk_token": TOKEN,
    "pad_token": TOKEN,
    "added_tokens_decoder": {"an object"},
    "additional_special_tokens": {"null", "a list", "a list of text", "an object"},
    "extra_special_tokens": {"null", "a list", "a list of text", "an object"},
    "chat_template": {"text", "null", "long", "a list"},
    "tokenizer_class": TOKEN,
    "padding_side": set(),
    "truncation_side": set(),
    "model_input_names": {"a list", "a list of text"},
    "auto_map": {
        "a list",
        "a list of text",
        "a list of numbers",
        "an object",
        "an object of a number",
    },
}


@pytest.mark.filterwarnings("ignore:.*AutoTokenizer of transformers gives others")
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_type_is_refused_by_name(tmp_path, field):
    backend = byte_level()
    for name, value in VALUES.items():
        settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", field: value}
        folder = write_folder(tmp_path, backend=backend, **settings)
        if name in FIELDS[field]:
            try:
                assert load_tokenizer(folder).encode("12")
            except ValueError as error:  # of transformers, which refuses some of these
                assert "cannot load its tokenizer" in str(error)
            continue
        with pytest.raises(ValueError) as refused:
            load_tokenizer(folder)
        said = str(refused.value)
        assert re.search(rf"tokenizer_config\.json: {field} must be .*, got ", said), said
        assert len(said) < 400 + len(folder)


def test_all_wrong_fields_are_named_at_once(tmp_path):
    settings = {"model_max_length": [4096], "eos_token": 7, "add_bos_token": "false"}
    folder = write_folder(tmp_path, backend=byte_level(), **settings)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": 3}')
    with pytest.raises(ValueError) as refused:
        load_tokenizer(folder)
    assert str(refused.value) == (
        f"{folder}/tokenizer_config.json: model_max_length must be a number above 0, got [4096]; "
        'add_bos_token must be true, false or null, got "false"; eos_token must be a token\'s '
        f"text, an object with its content, or null, got 7. {folder}/special_tokens_map.json: "
        "pad_token must be a token's text, an object with its content, or null, got 3"
    )


def test_a_token_id_beyond_32_bits_is_refused(tmp_path):
    folder = write_folder(tmp_path, backend=byte_level())
    path = tmp_path / "tokenizer.json"
    read = json.loads(path.read_text())
    read["model"]["vocab"]["a"] = 2**31
    path.write_text(json.dumps(read))
    loaded = load_tokenizer(folder)
    assert tokenize_texts(loaded, ["12"], add_special_tokens=False)[0].ids.dtype == np.int32
    with pytest.raises(ValueError, match="the token id 2147483648, more than any model's"):
        tokenize_texts(loaded, ["12", "a"], add_special_tokens=False)


def test_a_real_length_is_any_number(tmp_path):
    for length in (4096, 1e30, 10**30, 1.0, None):
        folder = write_folder(tmp_path, backend=byte_level(), model_max_length=length)
        assert lorax.load_tokenizer(folder).encode("12")


def test_a_tokenizer_that_drops_characters_is_refused(tmp_path):
    """Without byte-level steps and unk_token, unknown characters vanish and all places shift."""
    folder = Path(shutil.copytree("examples/tiny/model", tmp_path / "model"))
    settings = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(settings | {"pre_tokenizer": None}))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho ho"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    config = DataConfig.model_validate({"train": str(tmp_path / "rows.jsonl")})
    with pytest.raises(DataError, match=r"rows.jsonl:1.*gives no token for some characters"):
        load_encoded_dataset(config.train, config, load_tokenizer(str(folder)))
