"""Columns, settings and flags of a row: read, or refused by name."""

import pytest
import yaml
from transformers.utils import chat_template_utils

from lorax.data.preview import render_example
from lorax.data.reading.rows import DataError
from tests.chats import (
    CHATML,
    GENERATION,
    TWO_TURNS,
    byte_tokenizer,
    changes,
    learned,
)
from tests.data.rows import ANSWER, USER, chat


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("functions", [{"name": "f"}], "functions: write the functions as tools"),
        ("function_call", {"name": "f"}, "function_call: write the call as tool_calls"),
        ("images", ["a.png"], "images: lorax learns from text alone"),
        ("id", "row-1", "remove them, or allow them by name"),
        ("source", "web", "remove them, or allow them by name"),
        ("score", 0.5, "remove them, or allow them by name"),
        ("documents", [{"text": "d"}], "remove them, or allow them by name"),
        ("parallel_tool_calls", False, "remove them, or allow them by name"),
    ],
)
def test_a_column_that_nothing_reads_is_refused_by_name(encode, column, value, said):
    row = chat(*TWO_TURNS, **{column: value})
    with pytest.raises(DataError, match=rf"nothing reads the columns '{column}'") as caught:
        encode([row])
    assert said in str(caught.value) and f"data.ignore: [{column}]" in str(caught.value)
    assert learned(encode([row], ignore=[column])) == [["hello<|im_end|>", "ciao<|im_end|>"]]


@pytest.mark.parametrize("column", ["Unnamed: 0", "Sub Category", 'a "b"', "größe", "#", "yes, no"])
def test_a_column_whose_name_is_no_word_is_allowed_by_what_the_error_says(encode, column):
    row = chat(*TWO_TURNS, **{column: 1})
    with pytest.raises(DataError) as caught:
        encode([row])
    assert f"nothing reads the columns {column!r} of a row" in str(caught.value)
    names = yaml.safe_load("[" + str(caught.value).split("data.ignore: [")[1])
    assert names == [column]
    assert learned(encode([row], ignore=names)) == [["hello<|im_end|>", "ciao<|im_end|>"]]


def test_a_columns_name_that_is_a_text_is_not_shown(encode):
    words = "the first row of a table is sometimes no header, and then it is all text"
    with pytest.raises(DataError) as caught:
        encode([chat(*TWO_TURNS, **{words: "more"})])
    assert "first row" not in str(caught.value) and "text of 72 characters" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "q", "completion": "a"}, {}),
        ({"instruction": "q", "output": "a"}, {}),
        ({"text": "abc"}, {"loss_on": "all"}),
        ({"input_ids": [5, 6]}, {"loss_on": "all"}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}),
    ],
)
def test_unread_columns_are_refused_in_every_format(encode, row, settings):
    with pytest.raises(DataError, match=r"nothing reads the columns 'category'"):
        encode([{**row, "category": "x"}], **settings)
    assert encode([{**row, "category": "x"}], ignore=["category"], **settings).report.rows_kept == 1


OPTIONAL = {
    "system": (lambda value: chat(*TWO_TURNS, system=value), "must be text"),
    "tools": (lambda value: chat(*TWO_TURNS, tools=value), "must be a list of objects"),
    "chat_template_kwargs": (
        lambda value: chat(*TWO_TURNS, chat_template_kwargs=value),
        "must be an object",
    ),
    "input": (lambda value: {"instruction": "q", "output": "a", "input": value}, "must be text"),
    "history": (lambda value: {"instruction": "q", "output": "a", "history": value}, "is not read"),
}


@pytest.mark.parametrize("column", OPTIONAL)
def test_an_optional_column_that_holds_nothing_is_absent_and_zero_is_not_nothing(encode, column):
    row_with, said = OPTIONAL[column]
    for nothing in (None, "", [], {}):
        assert encode([row_with(nothing)]).report.rows_kept == 1
    for value in (0, 0.0, False, True, 7):
        with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{column} {said}"):
            encode([row_with(value)])


def test_the_columns_of_an_alpaca_row_are_read_by_their_type_without_a_template_too(encode):
    row = {"instruction": "q", "output": "a"}
    for column in ("input", "system"):
        with pytest.raises(DataError, match=f"{column} must be text, got bool False"):
            encode([row | {column: False}], tokenizer=byte_tokenizer())
        assert encode([row | {column: ""}], tokenizer=byte_tokenizer()).report.rows_kept == 1
    with pytest.raises(DataError, match="tools must be a list of objects, got int 0"):
        encode([{"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:2], "tools": 0}])


def test_tools_of_a_plain_completion_are_not_read(encode):
    with pytest.raises(DataError, match="nothing reads the columns 'tools'"):
        encode([{"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}])


def test_a_rows_settings_reach_the_template_or_are_refused(encode):
    template = CHATML.replace(
        "{% for m in messages %}",
        "{{ '/fast' if enable_speed else '/slow' }}{% for m in messages %}",
        1,
    )
    row = chat(*TWO_TURNS, chat_template_kwargs={"enable_speed": True})
    encoded = encode([row], template)
    assert render_example(encoded, 0, byte_tokenizer(template))[0][0].startswith("/fast")
    with pytest.raises(DataError, match=r"does not read 'enable_speed' of chat_template_kwargs"):
        encode([row])


GIVEN = {
    "messages": [[], [{"role": "user", "content": "other"}]],
    "chat_template": ["{{ messages }}", None],
    "tools": [None, []],
    "add_generation_prompt": [True],
    "continue_final_message": [True, "content"],
    "return_assistant_tokens_mask": [True],
    "tokenize": [False],
    "conversations": [[]],
    "compiled_template": [""],
    "self": [1],
    "bos_token": ["<|im_end|>", ""],
    "eos_token": ["<|im_end|>"],
    "pad_token": ["x"],
    "image_token": ["x"],
}


@pytest.mark.parametrize("template", [CHATML, GENERATION])
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in GIVEN.items() for value in values]
)
def test_a_rows_settings_cannot_replace_what_lorax_renders_with(encode, name, value, template):
    template += f"{{# {name} #}}{{{{ speed }}}}"  # it reads them
    tokenizer = byte_tokenizer(template, extra_special_tokens={"image_token": "<|eot|>"})
    assert "image_token" in tokenizer.special_tokens_map
    rows = [chat(*TWO_TURNS), chat(*TWO_TURNS, chat_template_kwargs={"speed": "", name: value})]
    with pytest.raises(DataError, match=rf"rows.jsonl:2: chat_template_kwargs .* '{name}'") as said:
        encode(rows, template, tokenizer=tokenizer)
    assert "data.ignore: [chat_template_kwargs]" in str(said.value)
    encoded = encode(rows, template, tokenizer=tokenizer, ignore=["chat_template_kwargs"])
    assert learned(encoded) == [["hello<|im_end|>", "ciao<|im_end|>"]] * 2


def test_a_rows_settings_cannot_replace_what_transformers_gives_every_template(encode):
    template = CHATML + "{# KEY #}"
    found = chat_template_utils._compile_jinja_template(template).environment.globals
    assert {"raise_exception", "strftime_now", "range"} <= found.keys()
    for name in found:
        row = chat(*TWO_TURNS, chat_template_kwargs={name: "x"})
        with pytest.raises(DataError, match=rf"chat_template_kwargs of the row names '{name}'"):
            encode([row], template.replace("KEY", name))


def test_documents_of_a_row_are_for_its_template(encode):
    template = "{% for d in documents %}{{ d['text'] }}{% endfor %}" + CHATML
    row = chat(*TWO_TURNS, chat_template_kwargs={"documents": [{"text": "a source"}]})
    encoded = encode([row], template)
    assert render_example(encoded, 0, byte_tokenizer(template))[0][0].startswith("a source")


@pytest.mark.parametrize(
    "flag",
    ["train", "training", "trainable", "train_on_turn", "weight", "loss", "loss_mask", "mask"],
)
@pytest.mark.parametrize("value", [0, False, 0.0, "false"])
def test_a_turn_whose_flag_says_so_is_not_learned(encode, flag, value):
    row = chat(USER, {**ANSWER, flag: value}, *TWO_TURNS[2:])
    encoded = encode([row])
    assert learned(encoded) == [["ciao<|im_end|>"]]
    assert changes(encoded) == {"hold assistant turns that a flag leaves out of what is learned": 1}


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_flags_of_sharegpt_turns_are_followed(encode, template):
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello", "weight": 1},
        {"from": "human", "value": "bye", "weight": 0},
        {"from": "gpt", "value": "ciao", "weight": 0},
    ]
    assert learned(encode([{"conversations": turns}], template)) == [["hello<|im_end|>"]]


@pytest.mark.parametrize("value", [0.5, 2, -1, "yes", [1], {"a": 1}])
def test_a_flag_that_is_no_flag_is_refused(encode, value):
    with pytest.raises(DataError, match=r"messages\[1\].weight must be 0, 1, true or false"):
        encode([chat(USER, {**ANSWER, "weight": value})])


def test_flags_that_differ_are_refused(encode):
    with pytest.raises(DataError, match="train and weight contradict each other"):
        encode([chat(USER, {**ANSWER, "weight": 1, "train": False})])


def test_flags_that_the_loss_cannot_follow_are_refused(encode):
    with pytest.raises(DataError, match=r"messages\[1\] \(assistant\) has a flag against learning"):
        encode([chat(USER, {**ANSWER, "train": 0})], loss_on="all")
    with pytest.raises(DataError, match=r"messages\[0\] \(user\) has a flag for learning"):
        encode([chat({**USER, "train": 1}, ANSWER)])
    assert encode([chat({**USER, "train": 1}, ANSWER)], loss_on="all").report.rows_kept == 1


@pytest.mark.parametrize("flag", ["weight", "loss_mask", "train"])
def test_a_row_whose_flag_says_so_is_left_out(encode, flag):
    encoded = encode([chat(*TWO_TURNS, **{flag: 0}), chat(USER, ANSWER, **{flag: 1})])
    assert learned(encoded) == [["hello<|im_end|>"]]
    assert changes(encoded) == {"left out by a flag of the row": 1}
    with pytest.raises(DataError, match=rf"rows.jsonl:1: {flag} must be 0, 1, true or false"):
        encode([chat(*TWO_TURNS, **{flag: 0.3})])


def test_rows_without_a_learned_turn_are_left_out_and_counted(encode):
    encoded = encode([chat(USER, {**ANSWER, "train": False}), chat(USER, ANSWER)])
    assert learned(encoded) == [["hello<|im_end|>"]]
    assert changes(encoded)["left out, since flags leave nothing of them to learn"] == 1
