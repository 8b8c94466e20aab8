"""What is wrong with rows is told together, with remedies that work."""

import json
import re
import shlex

import pytest
import yaml

from lorax.config.data import DataConfig
from lorax.data.encode import load_encoded_dataset
from lorax.data.preview import render_example
from lorax.data.reading.rows import DataError
from tests.chats import (
    CHATML,
    TWO_TURNS,
    byte_tokenizer,
    changes,
    learned,
)
from tests.data.rows import ANSWER, USER, chat

DROPPED = "dropped, malformed (data.malformed: drop)"


SHAREGPT = [
    {"conversations": []},
    {
        "conversations": [
            {"from": "gpt", "value": "Hello, what can I do?"},
            {"from": "human", "value": "add two and two"},
            {"from": "gpt", "value": "four"},
        ]
    },
    {"conversations": [{"from": "human", "value": "nobody answers this"}]},
]


def test_all_problems_come_together_with_their_remedies(encode):
    with pytest.raises(DataError) as caught:
        encode(SHAREGPT * 5)
    said = str(caught.value)
    assert "15 of 15 rows cannot be used" in said
    assert "rows.jsonl:1," in said and "and 2 more rows: conversations must be a list" in said
    assert "no assistant turn to learn from" in said
    assert "data.malformed: drop" in said and "data.leading_answer to trim or drop" in said
    settings = {"malformed": "drop", "leading_answer": "trim"}
    encoded = encode(SHAREGPT * 5, **settings)
    assert learned(encoded) == [["four<|im_end|>"]] * 5
    assert changes(encoded) == {
        f"{DROPPED}: conversations must be a list of objects, got an empty list": 5,
        f"{DROPPED}: the conversation has no assistant turn to learn from, only user": 5,
        "cut to their first user turn, begun by an answer (data.leading_answer: trim)": 5,
    }


@pytest.mark.parametrize(
    "line", ["{", "[1]", "7", '{"messages": 3}', '{"messages": [{"role": "bot"}]}', "\udcff"]
)
def test_rows_of_every_malformed_kind_can_be_dropped(encode, tmp_path, line):
    good = json.dumps(chat(*TWO_TURNS))
    text = f"{good}\n{line}\n{good}\n".encode("utf-8", "surrogateescape")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text)
    config = DataConfig(train=str(path))
    with pytest.raises(DataError, match=r"rows.jsonl:2: "):
        load_encoded_dataset(config.train, config, byte_tokenizer(CHATML))
    config = DataConfig(train=str(path), malformed="drop")
    report = load_encoded_dataset(config.train, config, byte_tokenizer(CHATML)).report
    assert (report.rows_read, report.rows_kept) == (3, 2)
    assert report.changes[0].first.endswith("rows.jsonl:2")


def test_a_leading_answer_is_dropped_or_cut_off(encode):
    system = {"role": "system", "content": "be kind"}
    row = chat(system, ANSWER, *TWO_TURNS)
    cut = encode([row], leading_answer="trim")
    text = render_example(cut, 0, byte_tokenizer(CHATML))[0][0]
    assert "be kind" in text and text.count("hello") == 0
    assert learned(cut) == [["hello<|im_end|>", "ciao<|im_end|>"]]
    with pytest.raises(DataError, match=r"none of 1 rows is left.*rows.jsonl:1"):
        encode([row], leading_answer="drop")
    assert learned(encode([row, chat(*TWO_TURNS)], leading_answer="drop")) == [
        ["hello<|im_end|>", "ciao<|im_end|>"]
    ]


def test_the_flags_of_a_cut_conversation_stay_with_their_turns(encode):
    row = chat({**ANSWER, "train": 1}, USER, {**ANSWER, "train": 0}, *TWO_TURNS[2:])
    assert learned(encode([row], leading_answer="trim")) == [["ciao<|im_end|>"]]


def test_reading_stops_where_nothing_can_be_used(encode):
    rows = "".join("{\n" for _ in range(5000))
    with pytest.raises(DataError, match=r"1,024 of 1,024 rows cannot be used; reading stopped"):
        encode(rows)


def test_a_setting_that_is_wrong_is_told_at_once(encode):
    with pytest.raises(DataError, match=r"rows.jsonl:2: .* set data\.loss_on: all"):
        encode("{\n" + json.dumps({"text": "a"}) + "\n", format="text")


def test_one_error_holds_all_kinds_of_problems(encode):
    rows = [
        {"messages": []},
        {"prompt": "q", "completion": "a" * 50},
        {"prompt": "q" * 20, "completion": "a"},
        {"prompt": "q", "completion": 5},
    ]
    rows[0] = {"prompt": "q", "completion": ""}
    with pytest.raises(DataError) as caught:
        encode(rows, max_seq_length=10)
    said = str(caught.value)
    assert said.startswith("4 of 4 rows cannot be used")
    assert "rows.jsonl:1: completion is empty" in said
    assert "2 of 4 rows are longer than data.max_seq_length: 10" in said
    assert "set data.overlong to" in said and "data.malformed: drop" in said
    with pytest.raises(DataError) as caught:
        encode([*rows, {"input_ids": [1, 2], "labels": [-100, -100]}][2:3], max_seq_length=10)
    assert str(caught.value).startswith("1 of 1 rows are longer")


def test_overlong_and_unsupervised_rows_are_told_together(encode):
    rows = [{"input_ids": [5] * 20, "labels": [5] * 20}, {"input_ids": [5], "labels": [-100]}]
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used(.|\n)*longer(.|\n)*no super"):
        encode(rows, max_seq_length=10)


def test_an_unread_column_does_not_hide_what_is_wrong_besides(encode):
    with pytest.raises(DataError) as caught:
        encode([{"messages": [], "id": "x"}, chat(*TWO_TURNS)])
    said = str(caught.value)
    assert said.startswith("1 of 2 rows cannot be used")
    assert "nothing reads the columns 'id'" in said and "got an empty list" in said


@pytest.mark.parametrize("odd", [{}, {"foo": 1}])
def test_the_first_row_that_fits_a_format_tells_it(encode, odd):
    rows = [odd, chat(*TWO_TURNS), {"messages": []}]
    with pytest.raises(DataError) as caught:
        encode(rows)
    assert "2 of 3 rows cannot be used" in str(caught.value)
    assert "rows.jsonl:1: a row of format 'messages' needs" in str(caught.value)
    assert encode(rows, malformed="drop").report.rows_kept == 1
    with pytest.raises(DataError, match=r"rows.jsonl:1: the columns .* fit no format"):
        encode([odd, odd], malformed="drop")


def test_every_kind_of_problem_is_told_or_its_first_place(encode):
    rows = [chat({"role": f"r{chr(97 + i)}", "content": "a"}) for i in range(23)]
    with pytest.raises(DataError) as caught:
        encode(rows)
    said = str(caught.value)
    assert all(f"rows.jsonl:{i}" in said for i in range(1, 24))
    assert said.count("role must be") == 20 and "3 rows with 3 other problems" in said


@pytest.mark.parametrize("own", [True, False])
def test_a_template_that_is_no_jinja_is_told_once(encode, tmp_path, own):
    broken = "{% for m in messages %}\n{{ m['content' }}\n{% endfor %}"
    path = tmp_path / "own.jinja"
    path.write_text(broken)
    settings = {"chat_template": str(path)} if own else {}
    with pytest.raises(DataError) as caught:
        encode([chat(*TWO_TURNS)] * 3, CHATML if own else broken, **settings)
    said = str(caught.value)
    assert said.startswith(str(path) if own else "the tokenizer's chat template")
    assert "line 2" in said and "rows.jsonl" not in said


PRETTY = json.dumps(
    {"meta": {"language": "en"}, "rows": [{"instruction": "two and two", "output": "four"}]},
    indent=2,
)


def test_an_object_that_holds_the_rows_is_refused_with_what_it_holds(encode):
    with pytest.raises(DataError) as caught:
        encode(PRETTY, name="pretty.json")
    said = str(caught.value)
    assert "'meta' (an object of 1 keys), 'rows' (a list of 1)" in said and "field: rows" in said
    encoded = encode(PRETTY, name="pretty.json", source={"field": "rows"})
    assert learned(encoded) == [["four<|im_end|>"]]


def test_one_row_over_several_lines_is_a_row(encode):
    assert learned(encode(json.dumps(chat(USER, ANSWER), indent=1), name="a.json")) == [
        ["hello<|im_end|>"]
    ]


@pytest.mark.parametrize(
    ("text", "name", "field", "said"),
    [
        (PRETTY, "a.json", "meta", "must name a list of rows"),
        (PRETTY, "a.json", "none", "must name a list of rows"),
        ("[]", "a.json", "rows", "a list of rows, without a key 'rows'"),
        ('{"text": "a"}\n', "a.jsonl", "rows", "one JSON object per line"),
        ("text\na\n", "a.csv", "rows", "this is a table"),
    ],
)
def test_a_field_that_cannot_be_read_is_refused(encode, text, name, field, said):
    with pytest.raises(DataError, match=said):
        encode(text, name=name, source={"field": field}, loss_on="all")


@pytest.mark.parametrize("inside", [{"rows": [chat(USER, ANSWER)]}, {"a": {"rows": [1]}}, {}])
def test_an_object_that_holds_rows_deeper_is_refused_with_what_it_holds(encode, inside):
    text = json.dumps({"version": 1, "data": inside})
    for source in ({}, {"field": "data"}):
        with pytest.raises(DataError, match=r"a\.json: .*'version' \(int 1\), 'data' ") as caught:
            encode(text, name="a.json", source=source)
        assert "only a key of the top level" in str(caught.value)


@pytest.mark.parametrize("name", ["pretty.json", "a, b.json"])
def test_the_remedy_of_a_field_works_on_a_command_line(encode, name):
    with pytest.raises(DataError) as caught:
        encode(PRETTY, name=name)
    (override,) = shlex.split(re.findall(r"'data\.train=.*'", str(caught.value))[0])
    sources = yaml.safe_load(override.removeprefix("data.train="))
    config = DataConfig(train=sources)
    found = load_encoded_dataset(config.train, config, byte_tokenizer(CHATML))
    assert learned(found) == [["four<|im_end|>"]]


@pytest.mark.parametrize("texts", [["hello"], ["hel", "lo"]])
def test_parts_of_text_are_joined(encode, texts):
    answer = {**ANSWER, "content": [{"type": "text", "text": text} for text in texts]}
    assert learned(encode([chat(USER, answer)])) == [["hello<|im_end|>"]]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, r"content\[1\].type .*'image_url'"),
        ({"type": "text", "text": "b", "cache": {"a": 1}}, r"nothing reads: 'cache'"),
        ({"type": "text", "text": 5}, r"content must be text, got a list of 2"),
        ("b", r"content must be text, got a list of 2"),
    ],
)
def test_parts_of_another_kind_are_refused(encode, part, said):
    answer = {**ANSWER, "content": [{"type": "text", "text": "a"}, part]}
    with pytest.raises(DataError, match=said):
        encode([chat(USER, answer)])
