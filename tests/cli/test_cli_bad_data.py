"""Bad rows and data settings: one readable message, exit code 2, and nothing written or changed."""

import re

import pytest

from tests.cli.damage import GOOD_ROW, GOOD_ROWS, LFS_POINTER, conversation, lines

pytestmark = pytest.mark.slow


DATA = {
    "bad JSON": (
        GOOD_ROWS + '{"messages": [}\n',
        [],
        r"rows.jsonl:5: invalid JSON: .*column",
    ),
    "row that is no object": (
        GOOD_ROWS + "[1, 2]\n",
        [],
        r"rows.jsonl:5: a row must be a JSON object, got list",
    ),
    "key twice": (
        '{"messages": [], "messages": []}\n',
        [],
        r"rows.jsonl:1: .*key 'messages' appears twice",
    ),
    "empty file": ("", [], r"rows.jsonl: the file is empty"),
    "blank lines": ("\n \n\n", [], r"rows.jsonl: the file (is empty|holds no rows)"),
    "Git LFS pointer": (LFS_POINTER, [], r"rows.jsonl: this is a Git LFS pointer.*git lfs pull"),
    "web page": ("<!DOCTYPE html><html>", [], r"rows.jsonl: this is an HTML page, not data"),
    "invalid UTF-8": (
        GOOD_ROWS.encode() + b'{"text": "caf\xe9"}\n',
        [],
        r"rows.jsonl:5: invalid UTF-8",
    ),
    "wrong columns": (
        lines({"question": "Hi", "answer": "Ho"}),
        [],
        r"rows.jsonl:1: the columns \['answer', 'question'\] fit no format; rename them",
    ),
    "columns of the second row": (
        lines(GOOD_ROW, {"text": "Hi"}),
        [],
        r"rows.jsonl:2: a row of format 'messages' needs the columns messages, got text",
    ),
    "unknown role": (
        lines(conversation(("human", "Hi"), ("assistant", "Ho"))),
        [],
        r"rows.jsonl:1: messages\[0\].role must be one of system, .*got 'human'",
    ),
    "no assistant turn": (
        lines(GOOD_ROW, conversation(("user", "Hi"))),
        [],
        r"rows.jsonl:2: the conversation has no assistant turn to learn from, only user",
    ),
    "empty answer": (
        lines(conversation(("user", "Hi"), ("assistant", " "))),
        [],
        r"rows.jsonl:1: messages\[1\].content is empty",
    ),
    "content that is no text": (
        lines({"messages": [{"role": "user", "content": 7}]}),
        [],
        r"rows.jsonl:1: messages\[0\].content must be text, got int 7",
    ),
    "overlong row": (
        lines(GOOD_ROW, conversation(("user", "Hi " * 200), ("assistant", "Ho"))),
        ["data.max_seq_length=64"],
        r"1 of 2 rows are longer than data.max_seq_length: 64; the first, rows.jsonl:2 has \d+ "
        r"tokens. Raise max_seq_length, or set data.overlong",
    ),
    "nothing left after dropping": (
        GOOD_ROWS,
        ["data.max_seq_length=2", "data.overlong=drop"],
        r"none of 4 rows is left: 4 are longer than data.max_seq_length: 2",
    ),
    "row without a supervised token": (
        lines({"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [5], "labels": [5]}),
        [],
        r"1 of 2 rows have no supervised token; the first is rows.jsonl:2. .*unsupervised: drop",
    ),
    "token id out of the vocabulary": (
        lines({"input_ids": [1, 512], "labels": [-100, 512]}),
        [],
        r"rows.jsonl:1: token id 512 is outside of a vocabulary of 512; use the tokenizer",
    ),
    "labels of another length": (
        lines({"input_ids": [1, 2, 3], "labels": [1, 2]}),
        [],
        r"rows.jsonl:1: labels has 2 entries and input_ids has 3",
    ),
    "labels shifted already": (
        lines({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}),
        [],
        r"rows.jsonl:1: labels\[0\] is 2 and input_ids\[0\] is 1: .*not the next one",
    ),
    "text with a part to learn": (
        lines({"text": "Once upon a time"}),
        [],
        r"rows.jsonl:1: .*data.loss_on: assistant cannot apply; set data.loss_on: all",
    ),
    "split that is not there": (
        GOOD_ROWS,
        ["data.train=[{path: rows.jsonl, split: validation}]"],
        r"rows.jsonl: split 'validation': .*A file has one split, 'train'",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_rows_are_refused_with_their_line(here, refused, name):
    content, overrides, pattern = DATA[name]
    content = content if isinstance(content, bytes) else content.encode()
    (here / "rows.jsonl").write_bytes(content)
    refused(pattern, "validate", "run.yaml", *overrides)


SOURCES = {
    "absent file": (
        ["data.train=absent.jsonl"],
        r"absent.jsonl: no such file \(looked for /.*absent.jsonl\)",
    ),
    "absent held-out file": (["data.eval=absent.jsonl"], r"absent.jsonl: no such file"),
    "file of another kind": (
        ["data.train=./run.yaml"],
        r"run.yaml: a file of another kind; needed is a .jsonl, .json, .parquet, .csv file",
    ),
    "no source": (["data.train=[]"], r"data.train: needs at least 1 entry, got a list of 0"),
    "absent chat template": (
        ["data.chat_template=absent.jinja"],
        r"absent.jinja",
    ),
    "markers that never match": (
        ["data.instruction_part='[U]'", "data.response_part='[A]'"],
        r"rows.jsonl:1, .*\[A\]",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_bad_data_settings_are_refused(refused, name):
    overrides, pattern = SOURCES[name]
    refused(pattern, "validate", "run.yaml", *overrides)


ABSENT = {"a file": "absent.jsonl", "another kind": "absent.txt", "a folder": "absent.parquet"}


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
@pytest.mark.parametrize("kind", ABSENT)
def test_a_source_that_is_not_there_is_told_with_its_key(here, refused, key, kind):
    if kind == "a folder":
        (here / ABSENT[kind]).mkdir()
    path = f"./{ABSENT[kind]}"
    settings = ("eval.strategy=steps",) * (key == "data.eval")
    for override in (f"{key}={path}", f"{key}=[rows.jsonl, {{path: {path}}}]"):
        refused(rf"error: {key}: {re.escape(path)}: ", "validate", "run.yaml", override, *settings)
