"""The demo's model and data: what scripts/make/ writes, and what the base can know of numbers."""

import collections
import json

from lorax.data.chat.tokenizer import load_tokenizer
from scripts.make import tiny_data
from tests.tiny import TINY

DATA = TINY / "data"
DIGITS = "0123456789"


def test_the_data_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tiny_data", str(tmp_path)])
    tiny_data.main()
    for name in ("pretrain.jsonl", "train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_every_digit_is_a_token_of_its_own_that_the_base_has_often_written():
    tokenizer = load_tokenizer(str(TINY / "model"))
    for text in ("2026-11-30", " 7", "aisle 12", "1234567890", "9.99,"):
        found = [token for token in tokenizer.tokenize(text) if set(token) & set(DIGITS)]
        assert found == [letter for letter in text if letter in DIGITS]
    lines = (DATA / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["messages"][-1]["content"] for line in lines]
    written = collections.Counter("".join(answers))
    assert min(written[digit] for digit in DIGITS) > 1000
