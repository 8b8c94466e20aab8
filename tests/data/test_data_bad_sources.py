"""Sources with a line, a file or a split that cannot be read are refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset
from lorax.data.reading.sources import open_source
from tests.data.loaded import GOOD, _load


def _message(role="user", **more):
    reply = {"role": "assistant", "content": "b"}
    return json.dumps({"messages": [{"role": role, "content": "a", **more}, reply]}) + "\n"


BAD_LINES = {
    "broken": (GOOD + "\n" + '{"messages": \n', r":3: invalid JSON: Expecting value at column"),
    "cut off": (GOOD * 2 + GOOD[:-9], r":3: invalid JSON: .* at column \d+"),
    "array": (GOOD + "[1, 2]\n", r":2: a row must be a JSON object, got list"),
    "repeated key": ('{"text": "a", "text": "b"}\n', r":1: invalid JSON: key 'text' appears twice"),
    "repeated words": (
        '{"my own words": 1, "my own words": 2}\n',
        r":1: .* key of 12 characters a",
    ),
    "cut short": ('{"messages": [{"role"', r":1: invalid JSON: .* at column 22"),
    "nested": (
        '{"text": "a", "more": ' + "[" * 500 + "]" * 500 + "}\n",
        r":1: the row is nested more than 100 deep",
    ),
    "a mask that is none": (
        '{"input_ids": [1], "attention_mask": 3}\n',
        r":1: attention_mask must",
    ),
    "a mask of text": ('{"input_ids": [1], "attention_mask": "1"}\n', r":1: attention_mask must"),
    "long number": (_message(content=4179123456789), r":1: .* must be text, got int of 13 digits"),
    "calls that are none": (
        _message("assistant", tool_calls="f"),
        r":1: messages\[0\].tool_calls must be a list of objects, got text",
    ),
    "a call without a name": (
        _message("assistant", tool_calls=[{"function": {}}]),
        r":1: messages\[0\].tool_calls\[0\] needs a function's name",
    ),
    "pretty-printed": ('{\n "text": "a"\n}\n', r":1: invalid JSON"),
    "not utf-8": (GOOD.encode() + b'{"text": "\xff"}\n', r":2: invalid UTF-8"),
    "surrogate": (_message(content="\ud800"), r":1: messages\[0\].content holds half a surrogate"),
    "other type": (GOOD + '{"messages": "hi"}\n', r":2: messages must be a list .*, got text of 2"),
    "mixed format": (GOOD + '{"text": "a"}\n', r":2: a row of format 'messages' needs the column"),
    "null": (
        GOOD + '{"messages": null}\n',
        r":2: .* needs the columns messages, got messages \(null\)",
    ),
    "empty list": ('{"messages": []}\n', r":1: messages must be .*, got an empty list"),
    "list of text": ('{"messages": ["hi"]}\n', r":1: messages\[0\] must be an object, got text"),
    "role": (_message("bot"), r":1: messages\[0\].role must be one of system, .*, got 'bot'"),
    "no content": (_message(content=None), r":1: messages\[0\].content is missing or null"),
    "parts": (
        _message(content=[{"type": "text"}]),
        r":1: messages\[0\].content must be text, got a list of 1",
    ),
    "number": (_message(content=3), r":1: messages\[0\].content must be text, got int 3"),
    "weight": (_message(weight=0.5), r":1: messages\[0\].weight must be 0, 1, true or false"),
    "silent": (GOOD.replace('"b"', '" "'), r":1: messages\[1\].content is empty, and it is the"),
    "no assistant": (GOOD.replace("assistant", "user"), r":1: .* no assistant turn .* user, user"),
    "sharegpt role": (
        '{"conversations": [{"from": "ai", "value": "a"}]}\n',
        r":1: conversations\[0\].from must be one of human, gpt, .*, got 'ai'",
    ),
    "two systems": (
        _message("system").replace("{", '{"system": "s", ', 1),
        r":1: the row has a system column and a system message",
    ),
    "empty output": ('{"instruction": "a", "output": ""}\n', r":1: output is empty"),
    "history": (
        '{"instruction": "a", "output": "b", "history": [["c", "d"]]}\n',
        r":1: the column history is not read",
    ),
    "half a chat": (
        '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}\n',
        r":1: prompt and completion must both be text or both be lists",
    ),
    "no reply": (
        '{"prompt": [{"role": "user", "content": "a"}], '
        '"completion": [{"role": "user", "content": "a"}]}\n',
        r":1: completion has no assistant turn",
    ),
    "labels": ('{"input_ids": [1, 2], "labels": [2, -100]}\n', r":1: labels\[0\] is 2 and input_"),
    "label count": ('{"input_ids": [1, 2], "labels": [1]}\n', r":1: labels has 1 entries and inp"),
    "token type": ('{"input_ids": [1, 2.5]}\n', r":1: input_ids\[1\] must be an integer, got flo"),
    "huge token": ('{"input_ids": [1, 99999999999]}\n', r":1: input_ids holds a number that is no"),
    "padding": ('{"input_ids": [1, 0], "attention_mask": [1, 0]}\n', r":1: attention_mask holds z"),
    "unknown": ('{"question": "a", "answer": "b"}\n', r":1: the columns \['answer', 'question'\] "),
    "ambiguous": (
        '{"text": "a", "instruction": "b", "output": "c"}\n',
        r":1: the columns .* fit several formats \(alpaca, text\); set data\.format",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named(tmp_path, tokenizer, case):
    content, message = BAD_LINES[case]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    loss_on = "all" if "input_ids" in str(content) else "assistant"
    with pytest.raises(ValueError, match=r"/data\.jsonl" + message) as caught:
        _load(path, tokenizer, loss_on=loss_on)
    assert len(str(caught.value)) < 700 + len(str(path))


def test_message_lists_the_accepted_formats(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match="fit no format") as caught:
        _load(path, tokenizer)
    for text in ("messages: messages", "alpaca: instruction, output", "tokenized: input_ids"):
        assert text in str(caught.value)


def test_bad_row_behind_the_first_batch_is_named(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD * 1500 + "\n\n" + GOOD.replace('"b"', "5"))
    with pytest.raises(ValueError, match=r"data\.jsonl:1503: messages\[1\].content must be text"):
        _load(path, tokenizer)
    with pytest.raises(ValueError, match=r"data\.jsonl:1503: messages\[1\].content must be text"):
        _load(path, tokenizer, split="train[-1:]")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"none\.jsonl: no such file \(looked for /"),
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.csv", b" \n\n", r"a\.csv: the file is empty"),
        ("a.jsonl", b"\xef\xbb\xbf\n", r"a\.jsonl: the file holds no rows"),
        ("a.json", b"[]", r"a\.json: the file holds no rows"),
        ("a.json", b'[{"text": "a"},\n 3]', r"a\.json: row 1 \(counted from 0\): a row must be a"),
        ("a.json", b'[{"text": "a"},\n', r"a\.json:2: invalid JSON"),
        ("a.json", b'[{"text":\n "\xff"}]', r"a\.json:2: invalid UTF-8"),
        ("a.csv", b"text\n", r"a\.csv: the file holds no rows"),
        ("a.csv", b"prompt;completion\nb;c\n", r"a\.csv:1: the header has semicolons .*commas"),
        ("a.csv", b"prompt\tcompletion\nb\tc\n", r"a\.csv:1: the header has tabs .*commas"),
        ("a.csv", b"text,text\nb,c\n", r"a\.csv:1: a column name appears twice .*: 'text'$"),
        ("a.csv", b"My own,My own\nb,c\n", r"a\.csv:1: a column .*: text of 6 characters$"),
        ("a.csv", b"text,b\nb,c,d\ne,f\n", r"a\.csv:2: the record has 3 fields and the header 2"),
        ("a.csv", b'text,b\n"b\n",c\nd\n', r"a\.csv:4: the record has 1 fields and the header 2"),
        ("a.csv", b'text\n"b\nc\n', r"a\.csv:3: invalid CSV: unexpected end of data"),
        ("a.csv", b"text\nb\n\xff\n", r"a\.csv:3: invalid UTF-8"),
        ("a.csv", b"messages\nb\n", r"a\.csv: row 0 \(counted from 0\): messages must be a list"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: cannot be read: .*not a parquet file"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            r"a\.parquet: this is a Git LFS pointer, .*git lfs pull",
        ),
        ("a.jsonl", b"\n<!DOCTYPE html><html>", r"a\.jsonl: this is an HTML page"),
        ("a.txt", b"text", r"a\.txt: a file of another kind; needed is a \.jsonl, \.json, "),
        ("a b", None, r"a b: no such file, and no hub id"),
    ],
)
def test_bad_file_is_named(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _load(path, tokenizer, loss_on="all" if name == "a.json" else "assistant")


def test_damaged_table_is_named(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i} " * 99 for i in range(300)]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(500) + content[600:])
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read: Corrupt"):
        _load(path, tokenizer)


def test_empty_table_is_named(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: the file holds no rows"):
        _load(path, tokenizer)


def test_text_that_a_reader_took_for_dates_is_explained(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    column = pa.array(["2024-01-02"]).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(ValueError, match=r"row 0 .*: text must be text, got a timestamp \(the"):
        _load(path, tokenizer, loss_on="all")


def test_directory_and_hub_settings_on_a_file_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="a directory; needed is a"):
        _load(tmp_path, tokenizer)
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    with pytest.raises(ValueError, match="name 'x' is a hub dataset's configuration"):
        with open_source(DataSource(path=str(path), name="x")):
            pass


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", r"split 'test': Unknown split .* A file has one split, 'train'"),
        ("train[x]", r"split 'train\[x\]': Unrecognized instruction"),
        ("train[1:]", r"split 'train\[1:\]' keeps none of 1 rows"),
    ],
)
def test_split_that_is_not_there_is_named(tmp_path, tokenizer, split, message):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD)
    with pytest.raises(ValueError, match=r"a\.jsonl: " + message):
        _load(path, tokenizer, split=split)


def test_no_source_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no source of rows"):
        load_encoded_dataset((), DataConfig(train=(DataSource(path="a.jsonl"),)), tokenizer)
