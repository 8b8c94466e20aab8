"""Files and hub datasets: what is read stays what it was, and what is bad is named."""

import json
import os
import tempfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset
from lorax.data.preview import render_example
from lorax.data.reading.rows import DataError
from lorax.data.reading.sources import open_source
from tests.data.loaded import GOOD, _load


def _rows(path, split="train"):
    with open_source(DataSource(path=str(path), split=split)) as rows:
        return list(rows)


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
