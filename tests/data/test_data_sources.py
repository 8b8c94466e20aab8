"""Files and hub datasets: what is read stays what it was, and what is bad is named."""

import json
import os
import tempfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers

from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset
from lorax.data.preview import render_example
from lorax.data.reading.rows import DataError
from lorax.data.reading.sources import open_source

CHAT = (
    "{% for m in messages %}{{ m['role'] + ('@' + m['name'] if 'name' in m else '') + ':' }}"
    "{{ m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(scope="module")
def tokenizer():
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({s: i for i, s in enumerate(symbols)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    found.chat_template = CHAT
    return found


def _rows(path, split="train"):
    with open_source(DataSource(path=str(path), split=split)) as rows:
        return list(rows)


def _load(path, tokenizer, split="train", **settings):
    config = DataConfig(train=(DataSource(path=str(path), split=split),), **settings)
    return load_encoded_dataset(config.train, config, tokenizer)


def _text(encoded, tokenizer, index=0):
    return "".join(piece for piece, _ in render_example(encoded, index, tokenizer))


DATES = [{"prompt": "2024-01-02", "completion": "2024-01-02T03:04:05Z"}] * 2
NUMBERS = [{"prompt": "007", "completion": "1e3"}, {"prompt": "NA", "completion": "null"}]


@pytest.mark.parametrize("rows", [DATES, NUMBERS])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_text_stays_the_text_it_is(tmp_path, rows, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif suffix == "csv":
        lines = [f"{row['prompt']},{row['completion']}\n" for row in rows]
        path.write_text("prompt,completion\n" + "".join(lines))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert _rows(path) == rows


def test_keys_that_parquet_filled_with_none_are_dropped(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b"},
    ]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), path)
    assert pq.read_table(path).to_pylist()[0]["messages"][1]["name"] is None
    assert _rows(path) == [{"messages": messages}]
    assert _text(_load(path, tokenizer), tokenizer) == "user@Ann:a</s>assistant:b</s>"


def test_bom_line_ends_of_windows_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \r\n{"text": "\xc3\xa9"}')
    assert _rows(path) == [{"text": "a"}, {"text": "é"}]
    path = tmp_path / "data.csv"
    path.write_bytes(b'\xef\xbb\xbftext,id\r\n"a\r\nb",1\r\n\r\nc,2\r\n')
    assert _rows(path) == [{"text": "a\r\nb", "id": "1"}, {"text": "c", "id": "2"}]


def test_json_file_may_hold_an_array_or_lines(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('\n [{"text": "a"},\n {"text": "b", "more": null}]')
    assert _rows(path) == [{"text": "a"}, {"text": "b", "more": None}]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert _rows(path) == [{"text": "a"}, {"text": "b"}]


def test_path_with_pattern_characters_is_a_plain_path(tmp_path):
    path = tmp_path / "run [1]*" / "data?.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "a"}\n')
    assert _rows(path) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[:40%]", "ab"), ("train[-2:]", "de"), ("train[1:2]+train[3:4]", "bd")],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_split_is_sliced_by_rows(tmp_path, split, expected, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "csv":
        path.write_text("text\n" + "".join(f"{c}\n" for c in "abcde"))
    else:
        path.write_text("\n\n".join(json.dumps({"text": c}) for c in "abcde"))
    assert _rows(path, split) == [{"text": c} for c in expected]


def test_changed_file_is_read_anew(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "old"}\n')
    before = path.stat()
    assert _text(_load(path, tokenizer, loss_on="all"), tokenizer) == "old</s>"
    path.write_text('{"text": "new"}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert _text(_load(path, tokenizer, loss_on="all"), tokenizer) == "new</s>"


def test_nothing_is_left_behind_or_printed(tmp_path, tokenizer, monkeypatch, capfd):
    path, scratch = tmp_path / "data.jsonl", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path.write_text(GOOD)
    datasets.enable_progress_bars()
    _load(path, tokenizer)
    path.write_text("{\n")
    with pytest.raises(ValueError, match="invalid JSON"):
        _load(path, tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "scratch"]
    assert list(scratch.iterdir()) == []
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_named(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD)

    def open_full(**_):
        return open("/dev/full", "wb")

    monkeypatch.setattr(tempfile, "TemporaryFile", open_full)
    with pytest.raises(DataError, match=r"cannot hold the encoded rows: No space left.* TMPDIR"):
        _load(path, tokenizer)


def test_sources_are_joined_in_order_and_may_differ_in_format(tmp_path, tokenizer):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(GOOD)
    second.write_text('{"prompt": "q", "completion": "r", "id": null}\n')
    sources = (DataSource(path=str(first)), DataSource(path=str(second)))
    encoded = load_encoded_dataset(sources, DataConfig(train=sources), tokenizer)
    assert _text(encoded, tokenizer, 1) == "qr</s>"
    report = encoded.report
    assert report.format == "messages, prompt_completion"
    assert report.mask_source == "completion, prefix"
    assert report.sources == (str(first), str(second))
    assert (report.rows_read, report.rows_kept) == (2, 2)


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q\n\nr"},
                {"from": "gpt", "value": "a"},
            ]
        },
        {"instruction": "q", "input": "r", "output": "a", "system": "s"},
    ],
)
def test_sharegpt_and_alpaca_become_messages(tmp_path, tokenizer, row):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    pieces = render_example(_load(path, tokenizer), 0, tokenizer)
    assert pieces == [("system:s</s>user:q\n\nr</s>assistant:", False), ("a</s>", True)]


def test_hub_dataset_is_loaded_by_id_configuration_and_split(tokenizer, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = DataSource(path="owner/name", name="main", split="test[:2]")
    with pytest.raises(ValueError, match=r"owner/name \(test\[:2\]\): row 1 \(counted from 0\): "):
        load_encoded_dataset(
            (source,), DataConfig(train=(source,), loss_on="all", format="text"), tokenizer
        )
    assert asked == [(("owner/name", "main"), {"split": "test[:2]"})]


def test_hub_dataset_out_of_reach_is_named():
    with pytest.raises(ValueError, match=r"no/such: cannot load this hub dataset \(split 'train'"):
        _rows("no/such")


def _message(role="user", **more):
    reply = {"role": "assistant", "content": "b"}
    return json.dumps({"messages": [{"role": role, "content": "a", **more}, reply]}) + "\n"


BAD_LINES = {
    "broken": (GOOD + "\n" + '{"messages": \n', r":3: invalid JSON: Expecting value at column"),
    "cut off": (GOOD * 2 + GOOD[:-9], r":3: invalid JSON: .* at column \d+"),
    "array": (GOOD + "[1, 2]\n", r":2: a row must be a JSON object, got list"),
    "repeated key": ('{"text": "a", "text": "b"}\n', r":1: invalid JSON: key 'text' stands twice"),
    "repeated words": (
        '{"my own words": 1, "my own words": 2}\n',
        r":1: .* key of 12 characters s",
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
    "silent": (GOOD.replace('"b"', '" "'), r":1: messages\[1\].content is empty, and it is what"),
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
        ("a.csv", b"text,text\nb,c\n", r"a\.csv:1: a column name stands twice .*: 'text'$"),
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
    with pytest.raises(ValueError, match="at least one source"):
        load_encoded_dataset((), DataConfig(train=(DataSource(path="a.jsonl"),)), tokenizer)
