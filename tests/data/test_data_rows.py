"""Nothing of a row vanishes: every text and key is learned from, read, or refused by name."""

import json
import re
import shlex

import pytest
import yaml
from transformers.utils import chat_template_utils

from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset
from lorax.data.preview import render_example
from lorax.data.reading.rows import DataError
from tests.chats import (
    CHATML,
    DROPS_THINKING,
    GENERATION,
    HEADER,
    LLAMA3,
    MARKERS,
    NO_STOP,
    PROMPT,
    STOP_OUTSIDE,
    TWO_TURNS,
    byte_tokenizer,
    changes,
    learned,
)

TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] if 'function' in c else c %}"
    '{"name": "{{ f[\'name\'] }}", "arguments": {{ f[\'arguments\'] | tojson }}}{% endfor %}'
    "{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)
CONCATENATES = TOOLS.replace("f['arguments'] | tojson", "f['name'] ~ ':' + f['arguments']")
ROLES = (
    "{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'].split('</think>')[-1] }}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}" + PROMPT
)
DATED = CHATML.replace(
    "{% for m in messages %}",
    '{{ strftime_now("%d %b %Y") + "<|end|>" }}{% for m in messages %}',
    1,
)
ALWAYS_PROMPTS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' }}"
    "{{ m['content'] | trim + '<|eot|>' }}{% endfor %}{{ '<|start|>assistant<|end|>\\n\\n' }}"
)
OPENS_A_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|start|>' + m['content'] }}{% else %}"
    "{{ '<|end|>' + m['content'].split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|end|><think>\\n' }}{% endif %}"
)
# The thought of a turn is a block of its own.
TWO_BLOCKS = (
    "{% for m in messages %}"
    + HEADER
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ '(' }}{% endgeneration %}{{ '\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
USER, ANSWER = TWO_TURNS[0], TWO_TURNS[1]


@pytest.fixture
def encode(tmp_path):
    """Encodes rows under given settings; returns the dataset."""

    def run(rows, template=CHATML, *, name="rows.jsonl", source=None, tokenizer=None, **settings):
        path = tmp_path / name
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text)
        config = DataConfig(train=(DataSource(path=str(path), **(source or {})),), **settings)
        tokenizer = tokenizer or byte_tokenizer(template)
        return load_encoded_dataset(config.train, config, tokenizer)

    return run


def chat(*messages, **columns):
    return {"messages": list(messages), **columns}


def call(arguments, **more):
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a1", "type": "function", "function": function}],
        **more,
    }


# Tool calls.


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
@pytest.mark.parametrize("nested", [True, False])
def test_arguments_are_encoded_once(encode, arguments, nested):
    message = call(arguments)
    if not nested:
        message["tool_calls"] = [message["tool_calls"][0]["function"]]
    encoded = encode([chat(USER, message)], TOOLS)
    expected = '{"name": "get_weather", "arguments": {"city": "Oslo"}}<|im_end|>'
    assert learned(encoded) == [[expected]]


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
def test_a_template_that_joins_arguments_to_text_is_given_text(encode, arguments):
    encoded = encode([chat(USER, call(arguments))], CONCATENATES)
    expected = '{"name": "get_weather", "arguments": get_weather:{"city": "Oslo"}}<|im_end|>'
    assert learned(encoded) == [[expected]]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("city: Oslo", "got text that is no JSON: Expecting value"),
        ('{"city": "Oslo"', "got text that is no JSON"),
        ('{"a": 1, "a": 2}', "got text that is no JSON: cannot be parsed"),
        ('"Oslo"', "got text of 4 characters"),
        ("[1]", "got a list of 1"),
        ([1], "got a list of 1"),
        (False, "got bool False"),
        (" ", "got text that is no JSON"),
        (7, "got int 7"),
        ("[" * 100_000, "got text that is no JSON"),
    ],
)
def test_arguments_that_are_no_object_are_refused_by_row_and_call(encode, arguments, problem):
    with pytest.raises(DataError) as caught:
        encode([chat(*TWO_TURNS), chat(USER, call(arguments))], TOOLS)
    assert "rows.jsonl:2: messages[1].tool_calls[0].function.arguments must be" in str(caught.value)
    assert problem in str(caught.value) and "Oslo" not in str(caught.value)


def test_an_argument_that_the_template_cuts_is_refused(encode):
    template = TOOLS.replace("f['arguments'] | tojson", "f['arguments']['city'][:2] | tojson")
    with pytest.raises(DataError, match=r"leaves out the assistant's tool calls of messages\[1\]"):
        encode([chat(USER, call({"city": "Oslo"}))], template)


@pytest.mark.parametrize("text", ['a "quoted" word', "two\nlines", "ünï 🙂", "back\\slash"])
def test_texts_that_a_template_writes_as_json_are_found(encode, text):
    encoded = encode([chat(USER, call({"city": text}))], TOOLS)
    assert (
        json.loads(learned(encoded)[0][0].removesuffix("<|im_end|>"))["arguments"]["city"] == text
    )


# Texts that the template leaves out, and keys that it does not read.


def test_each_lost_text_and_unread_key_is_named_and_the_remedy_works(encode):
    row = chat(
        {"role": "developer", "content": "Answer in French."},
        {"role": "user", "content": "colour?"},
        {
            "role": "assistant",
            "content": "<think>grass</think>vert",
            "reasoning_content": "hidden steps",
            "loss_mask": 0,
        },
        {"role": "tool", "content": "TOOL RESULT"},
        {"role": "assistant", "content": "ok"},
    )
    with pytest.raises(DataError) as caught:
        encode([row], ROLES)
    said = str(caught.value)
    for what in (
        "developer's content of messages[0]",
        "assistant's thinking of messages[2]",
        "tool's content of messages[3]",
        "the key reasoning_content",
    ):
        assert what in said
    names = said.split("data.ignore: [")[1].split("]")[0].split(", ")
    assert not any(word in said for word in ("French", "grass", "hidden", "TOOL RESULT"))
    assert learned(encode([row], ROLES, ignore=names)) == [["ok<|im_end|>"]]


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
@pytest.mark.parametrize("content", ["hi", "a longer text of several words"])
def test_a_message_that_vanishes_is_refused(encode, role, content):
    template = CHATML.replace(
        "{% for m in messages %}", f"{{% for m in messages if m['role'] != '{role}' %}}", 1
    )
    row = chat(USER, ANSWER, {"role": role, "content": content}, *TWO_TURNS)
    with pytest.raises(DataError, match=rf"leaves out the {role}'s content of messages\[2\]"):
        encode([row], template)
    found = encode([row], template, ignore=[f"{role}.content"])
    assert learned(found) == [["hello<|im_end|>", "hello<|im_end|>", "ciao<|im_end|>"]]


def test_a_text_that_another_message_holds_too_is_missed(encode):
    # "hi" stands in the user's turn, so it is found; but not as often as the row has it.
    template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}", 1
    )
    with pytest.raises(DataError, match="leaves out the system's content"):
        encode([chat({"role": "system", "content": "hi"}, *TWO_TURNS)], template)


def test_texts_that_a_template_reorders_are_found(encode):
    template = (
        "{% for m in messages if m['role'] != 'system' %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}" + PROMPT
    )
    row = chat({"role": "system", "content": "be kind"}, *TWO_TURNS)
    with pytest.raises(DataError, match="so the turn's tokens cannot be told for certain"):
        encode([row], template)
    assert encode([row], template, loss_on="all", train_on_eos="none").report.rows_kept == 1


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_under_any_name_are_learned_where_the_template_reads_them(encode, key):
    template = CHATML.replace(
        "{{ m['content']",
        "{{ ('<think>' + m['reasoning_content'] + '</think>') if m['reasoning_content'] else '' }}"
        "{{ m['content']",
    )
    answer = {**ANSWER, key: "step by step"}
    encoded = encode([chat(USER, answer)], template)
    assert learned(encoded) == [["<think>step by step</think>hello<|im_end|>"]]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "Ann"),
        ("reasoning_content", "steps"),
        ("thinking", "steps"),
        ("timestamp", 1700000000),
        ("citations", ["a.html"]),
        ("metadata", {"source": "web"}),
        ("is_error", False),
    ],
)
def test_a_key_of_a_message_that_nothing_reads_is_refused(encode, key, value):
    row = chat(USER, {**ANSWER, key: value})
    with pytest.raises(
        DataError, match=rf"does not read the key {key}.*data.ignore: \[message.{key}\]"
    ):
        encode([row])
    found = encode([row], ignore=[f"message.{key}"])
    assert learned(found) == [["hello<|im_end|>"]]
    assert changes(found) == {f"hold message.{key}, which is not learned from (data.ignore)": 1}


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_keys_that_hold_nothing_are_no_loss(encode, value):
    row = chat(USER, {**ANSWER, "refusal": value}, images=value, audio=value)
    assert learned(encode([row])) == [["hello<|im_end|>"]]


# Columns.


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


# Flags.


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
    with pytest.raises(DataError, match="train and weight say different things"):
        encode([chat(USER, {**ANSWER, "weight": 1, "train": False})])


def test_flags_that_the_loss_cannot_follow_are_refused(encode):
    with pytest.raises(DataError, match=r"messages\[1\] \(assistant\) says that it is not learned"):
        encode([chat(USER, {**ANSWER, "train": 0})], loss_on="all")
    with pytest.raises(DataError, match=r"messages\[0\] \(user\) says that it is learned"):
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


# Rows that cannot be read, and those that an answer begins.

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


# Files of one object.

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


# Content in parts.


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


# BOS and stop tokens once.


@pytest.mark.parametrize("end", ["<|im_end|>\n", "<|im_end|>", "</s>", "</s>\n"])
@pytest.mark.parametrize("begin", ["<s>", ""])
def test_a_rendered_text_gets_no_second_bos_or_stop(encode, begin, end):
    text = f"{begin}<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\nfour{end}"
    tokenizer = byte_tokenizer()
    encoded = encode([{"text": text}], tokenizer=tokenizer, loss_on="all")
    tokens, supervised = encoded.row(0)
    assert tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert not supervised[0] and tokens[0] == tokenizer.bos_token_id
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert sum(int(token) in stops for token in tokens) == 2  # the user's and the assistant's
    assert tokenizer.decode(tokens) == f"<s>{text.removeprefix('<s>')}"


def test_a_text_without_a_stop_gets_eos(encode):
    tokenizer = byte_tokenizer()
    tokens, supervised = encode([{"text": "abc"}], tokenizer=tokenizer, loss_on="all").row(0)
    assert tokens[-1] == tokenizer.eos_token_id and supervised[-1]


@pytest.mark.parametrize(("template", "stop"), [(CHATML, "<|im_end|>"), (GENERATION, "<|im_end|>")])
@pytest.mark.parametrize("space", ["", "\n"])
def test_an_answer_that_brings_its_own_stop_token_is_refused(encode, template, stop, space):
    answer = {"role": "assistant", "content": f"hello{stop}{space}"}
    with pytest.raises(DataError, match="ends with its stop token twice"):
        encode([chat(USER, answer)], template)


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "all"])
@pytest.mark.parametrize("stop", ["<|im_end|>", "</s>"])
@pytest.mark.parametrize("template", [CHATML, GENERATION, DROPS_THINKING])
def test_an_answer_in_whose_midst_a_stop_token_stands_is_refused(encode, template, stop, loss_on):
    answers = [{"role": "assistant", "content": f"hel{stop}lo {word}"} for word in ("one", "two")]
    if template is DROPS_THINKING:  # each turn is a row of its own
        answers[0]["content"] = "<think>\nmm\n</think>" + answers[0]["content"]
    row = chat(USER, answers[0], TWO_TURNS[2], answers[1])
    settings = {"ignore": ["assistant.thinking"]} if loss_on != "assistant" else {}
    with pytest.raises(DataError, match=r"the text of messages\[.*holds a stop token") as caught:
        encode([row], template, loss_on=loss_on, **settings)
    assert ("messages[1]" in str(caught.value)) == (loss_on != "last_assistant")
    assert "hel" not in str(caught.value)


def test_a_stop_token_inside_a_thought_a_call_or_a_block_is_refused(encode):
    thought = {"role": "assistant", "content": "<think>\nm</s>\n</think>\nhello"}
    called = call({"city": "Os<|im_end|>lo"}, content="")
    words = {"role": "assistant", "content": "hel<|im_end|>lo"}
    for answer, template in ((thought, TOOLS), (called, TOOLS), (words, TWO_BLOCKS)):
        with pytest.raises(DataError, match=r"the text of messages\[1\] .* holds a stop token"):
            encode([chat(USER, answer)], template)


@pytest.mark.parametrize("end", ["<|im_start|>", "<|im_start|>\n"])
def test_a_special_token_that_ends_an_answers_words_is_not_its_stop(encode, end):
    answer = {"role": "assistant", "content": f"hello{end}"}
    with pytest.raises(DataError, match="ends without a special token"):
        encode([chat(USER, answer)], NO_STOP)
    found = encode([chat(USER, answer)], STOP_OUTSIDE)
    assert learned(found, STOP_OUTSIDE) == [[f"hello{end}<|im_end|>"]]


def test_stop_tokens_that_are_not_learned_or_end_the_words_are_no_matter(encode):
    asked = {"role": "user", "content": "what is </s> or <|im_end|> for?"}
    other = {"role": "assistant", "content": "<|start|>hello<|end|> you"}
    assert learned(encode([chat(asked, other)])) == [["<|start|>hello<|end|> you<|im_end|>"]]
    earlier = {"role": "assistant", "content": "hel</s>lo"}
    row = chat(USER, earlier, TWO_TURNS[2], TWO_TURNS[3])
    assert learned(encode([row], loss_on="last_assistant")) == [["ciao<|im_end|>"]]
    own = [{**message, "content": message["content"] + "</s>"} for message in TWO_TURNS]
    assert learned(encode([chat(*own)], NO_STOP)) == [["hello</s>", "ciao</s>"]]


BARE = CHATML.replace(HEADER, "")


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("template", [LLAMA3, "{{ bos_token }}" + BARE, CHATML, GENERATION])
@pytest.mark.parametrize("place", range(4))
def test_a_message_that_brings_its_own_bos_is_refused(encode, template, place, loss_on):
    messages = [dict(message) for message in TWO_TURNS]
    messages[place]["content"] = f" <s>{messages[place]['content']}"
    with pytest.raises(DataError, match=rf"the text of messages\[{place}\] holds '<s>'"):
        encode([chat(*messages)], template, loss_on=loss_on)


def test_a_bos_that_begins_a_conversation_or_that_a_template_writes_is_taken(encode):
    brought = {"role": "user", "content": "<s>hi"}
    encoded = encode([chat(brought, ANSWER)], BARE, loss_on="all")
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encoded.row(0)[0]) == "<s>hi<|im_end|>\nhello<|im_end|>\n"
    each = CHATML.replace(HEADER, "{{ bos_token if m['role'] == 'user' }}" + HEADER)
    tokens, _ = encode([chat(*TWO_TURNS)], each).row(0)
    assert tokens.tolist().count(tokenizer.bos_token_id) == 2
    named = byte_tokenizer(CHATML, bos_token="</s>")  # begins and ends, as GPT-2's does
    asked = {"role": "user", "content": "what is </s>?"}
    assert len(encode([chat(asked, ANSWER)], tokenizer=named)) == 1


def test_a_template_that_writes_bos_twice_is_refused(encode):
    with pytest.raises(DataError, match="BOS twice, and no message brings one along"):
        encode([chat(*TWO_TURNS)], "<s>{{ bos_token }}" + CHATML)


@pytest.mark.parametrize("before", ["", " ", "\n "])
def test_a_bos_behind_white_space_is_not_added_again(encode, before):
    tokenizer = byte_tokenizer()
    for row, loss_on in (
        ({"text": f"{before}<s>hi"}, "all"),
        ({"prompt": f"{before}<s>h", "completion": "i"}, "completion"),
        ({"prompt": before, "completion": "<s>hi"}, "completion"),
    ):
        if row.get("prompt") != "":
            encoded = encode([row], tokenizer=tokenizer, loss_on=loss_on)
            assert tokenizer.decode(encoded.row(0)[0]) == f"{before}<s>hi</s>"


@pytest.mark.parametrize("completion", ["<s>i", "i<s> there", " <s>"])
def test_a_bos_inside_a_completion_is_refused(encode, completion):
    for prompt in ("h", "<s>h"):
        row = {"prompt": prompt, "completion": completion}
        with pytest.raises(DataError, match="the completion holds the tokenizer's BOS"):
            encode([row], tokenizer=byte_tokenizer())
    texts = [{"text": "<s>one</s><s>two"}]
    assert len(encode(texts, tokenizer=byte_tokenizer(), loss_on="all")) == 1


@pytest.mark.parametrize("completion", ["i</s> there", "i</s></s>", "</s>\ni", "i</s>there</s>"])
def test_an_eos_in_the_midst_of_a_completion_is_refused(encode, completion):
    for settings in ({}, {"train_on_eos": "none"}):
        row = {"prompt": "h</s>", "completion": completion}
        with pytest.raises(DataError, match="the completion holds EOS before it ends"):
            encode([row], tokenizer=byte_tokenizer(), **settings)
    whole = {"prompt": "h</s>", "completion": "i</s>\n"}
    assert learned(encode([whole], tokenizer=byte_tokenizer())) == [["i</s>"]]


# Templates of other kinds.


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant"])
def test_a_template_that_always_opens_the_next_turn_ends_turns_at_their_stop(encode, loss_on):
    encoded = encode([chat(*TWO_TURNS)], ALWAYS_PROMPTS, loss_on=loss_on)
    expected = ["hello<|eot|>", "ciao<|eot|>"]
    assert learned(encoded, ALWAYS_PROMPTS) == [
        expected if loss_on == "assistant" else expected[1:]
    ]
    plain = encode([chat(*TWO_TURNS)], LLAMA3, loss_on=loss_on)
    assert learned(plain, LLAMA3) == learned(encoded, ALWAYS_PROMPTS)


def test_all_of_such_a_template_ends_at_the_last_stop(encode):
    (pieces,) = learned(encode([chat(*TWO_TURNS)], ALWAYS_PROMPTS, loss_on="all"), ALWAYS_PROMPTS)
    assert pieces[-1].endswith("ciao<|eot|>")


def test_a_prompt_that_opens_a_thought_is_told(encode):
    encoded = encode([chat(*TWO_TURNS)], OPENS_A_THOUGHT)
    assert learned(encoded, OPENS_A_THOUGHT) == [["hello</s>"], ["ciao</s>"]]
    assert any("otherwise than the chat template's own prompt" in what for what in changes(encoded))
    thinking = {"role": "assistant", "content": "<think>\nmm\n</think>hello"}
    with pytest.raises(DataError, match=r"leaves out the assistant's thinking of messages\[1\]"):
        encode([chat(USER, thinking)], OPENS_A_THOUGHT)
    found = encode([chat(USER, thinking)], OPENS_A_THOUGHT, ignore=["assistant.thinking"])
    assert learned(found, OPENS_A_THOUGHT) == [["hello</s>"]]


@pytest.mark.parametrize(
    "body",
    ["m['content'] | truncate(20)", "m['content'][:3]", "m['text']", "m['content'] | upper"],
)
@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_an_answer_that_is_not_whole_in_what_is_learned_is_refused(encode, template, body):
    template = template.replace("m['content']", f"({body} | string)")
    row = chat(USER, {"role": "assistant", "content": "a long answer of more than twenty letters"})
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template leaves out the"):
        encode([row], template)


# Dates.


def test_the_date_is_that_of_the_setting(encode):
    encoded = encode([chat(*TWO_TURNS)], DATED, date="2026-11-30")
    assert render_example(encoded, 0, byte_tokenizer(DATED))[0][0].startswith("30 Nov 2026")
    assert encoded.report.date == "2026-11-30"
    assert encode([chat(*TWO_TURNS)]).report.date is None


def test_a_date_is_checked(encode):
    for wrong in ("30.11.2026", "2026-13-01", "today", ""):
        with pytest.raises(ValueError, match="needs a date as 2026-11-30"):
            DataConfig(train="a.jsonl", date=wrong)


# Texts that stand in the rendering by chance.

NO_TOOLS = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages if m['role'] not in ['tool', 'developer'] %}",
    1,
)
NEVER_PROMPTS = CHATML.replace(PROMPT, "")


@pytest.mark.parametrize(
    ("messages", "lost"),
    [
        (
            [USER, {"role": "tool", "content": "4 C"}, {**ANSWER, "content": "It is 4 C there."}],
            "tool's content of messages[1]",
        ),
        (
            [
                {"role": "developer", "content": "Be brief"},
                {"role": "user", "content": "Be brief please: hi"},
                ANSWER,
            ],
            "developer's content of messages[0]",
        ),
    ],
)
def test_a_lost_text_that_a_later_one_holds_is_missed(encode, messages, lost):
    with pytest.raises(DataError) as caught:
        encode([chat(*messages)], NO_TOOLS)
    assert f"leaves out the {lost}" in str(caught.value)


def test_an_answer_is_not_found_in_a_special_token(encode):
    template = CHATML.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')")
    with pytest.raises(DataError, match="leaves out the assistant's content"):
        encode([chat(USER, {**ANSWER, "content": "im"})], template)


def test_no_setting_lets_an_answer_be_lost(encode):
    template = CHATML.replace("m['content']", "(m['text'] | string)")
    with pytest.raises(DataError, match="leaves out the"):
        encode([chat(USER, ANSWER)], template, ignore=["assistant.content", "user.content"])


@pytest.mark.parametrize("answer", ["fine", "a", "assistant", "im"])
def test_a_template_without_a_prompt_has_the_turns_opening_learned_and_told(encode, answer):
    encoded = encode([chat(USER, {**ANSWER, "content": answer})], NEVER_PROMPTS)
    assert learned(encoded, NEVER_PROMPTS) == [[f"<|im_start|>assistant\n{answer}<|im_end|>"]]
    assert any("has no prompt for it" in what for what in changes(encoded))
    assert encoded.report.stop_ids == (
        byte_tokenizer(NEVER_PROMPTS).convert_tokens_to_ids("<|im_end|>"),
    )


@pytest.mark.parametrize("first", ["ok", "say ok now"])
def test_all_of_a_conversation_ends_with_its_last_turn(encode, first):
    messages = [{"role": "user", "content": first}, {**ANSWER, "content": "sure"}]
    messages += [{"role": "user", "content": "more"}, {**ANSWER, "content": "ok"}]
    encoded = encode([chat(*messages)], ALWAYS_PROMPTS, loss_on="all")
    (pieces,) = learned(encoded, ALWAYS_PROMPTS)
    assert pieces[-1].endswith("<|start|>assistant<|end|>\n\nok<|eot|>")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"content": "something else"}, "value and {0}.content"),
        ({"content": 0}, "value and {0}.content"),
        ({"role": "system"}, "from and {0}.role"),
        ({"role": "tool", "content": "something else"}, "from and {0}.role"),
        ({"role": ["user"]}, "from and {0}.role"),
    ],
)
def test_a_sharegpt_turn_that_says_two_things_is_refused_by_name(encode, place, more, said):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    turns[place] |= more
    where = f"conversations[{place}]"
    with pytest.raises(DataError) as caught:
        encode([{"conversations": turns}])
    assert f"{where}.{said.format(where)} say different things; keep one" in str(caught.value)


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_sharegpt_turn_may_say_the_same_twice_or_nothing_in_one_of_them(encode, nothing):
    human, gpt = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
    for more in (
        {"role": "user", "content": "hi"},
        {"role": "human"},
        {"role": nothing, "content": nothing},
        {"value": nothing, "content": "hi"},
    ):
        encoded = encode([{"conversations": [human | more, gpt]}])
        assert learned(encoded) == [["hello<|im_end|>"]]
        row = render_example(encoded, 0, byte_tokenizer(CHATML))
        assert row[0][0] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_calls_of_sharegpt_turns_are_read_as_those_of_messages(encode):
    function = {"name": "f", "arguments": '{"city": "Oslo"}'}
    turn = {"from": "gpt", "value": None, "tool_calls": [{"function": function}]}
    row = {"conversations": [{"from": "human", "value": "hi"}, turn]}
    expected = '{"name": "f", "arguments": {"city": "Oslo"}}<|im_end|>'
    assert learned(encode([row], TOOLS)) == [[expected]]
    turn["tool_calls"] = ["x"]
    with pytest.raises(
        DataError, match=r"conversations\[1\].tool_calls\[0\] needs a function's name"
    ):
        encode([row], TOOLS)


def test_numbers_and_names_of_arguments_are_looked_for(encode):
    template = TOOLS.replace("{{ f['arguments'] | tojson }}", "")
    with pytest.raises(DataError, match=r"leaves out the assistant's tool calls of messages\[1\]"):
        encode([chat(USER, call({"n": 57}))], template)


def test_markers_end_a_turn_at_its_stop_token(encode):
    parts = {"instruction_part": "user\n", "response_part": "assistant\n"}
    encoded = encode([chat(*TWO_TURNS)], **parts)
    assert learned(encoded) == [["hello<|im_end|>", "ciao<|im_end|>"]]
    stop = byte_tokenizer(CHATML).convert_tokens_to_ids("<|im_end|>")
    assert encoded.report.stop_ids == (stop,)


@pytest.mark.parametrize("key", ["instruction_part", "response_part"])
def test_a_line_break_that_was_typed_as_two_characters_is_told_with_its_remedy(encode, key):
    typed = MARKERS | {key: MARKERS[key].replace("\n", "\\n")}
    with pytest.raises(DataError, match=rf"data.{key} .* stands nowhere in the") as caught:
        encode([chat(*TWO_TURNS)], **typed)
    said = str(caught.value)
    in_file = re.search(rf'data\.{key}: (".*") in a file', said)[1]
    override = shlex.split(re.search(r"in a file, ('.*') on a command line", said)[1])[0]
    assert yaml.safe_load(in_file) == MARKERS[key]
    assert override == f"data.{key}={in_file}"  # which is YAML where it is in quotes
    mended = typed | {key: yaml.safe_load(in_file)}
    assert learned(encode([chat(*TWO_TURNS)], **mended)) == [["hello<|im_end|>", "ciao<|im_end|>"]]


def test_a_marker_that_no_escape_mends_is_not_told_of_escapes(encode):
    with pytest.raises(DataError, match="stands nowhere in the") as caught:
        encode([chat(*TWO_TURNS)], **MARKERS | {"response_part": "### No:\\n"})
    assert "double quotes" not in str(caught.value)


def test_words_between_generation_blocks_are_not_learned_and_so_refused(encode):
    template = GENERATION.replace(
        "{% generation %}{{ m['content'] + '<|im_end|>' }}",
        "{% set p = m['content'].split(';') %}{% generation %}{{ p[0] }}{% endgeneration %}"
        "{{ ';' ~ p[1] ~ ';' }}{% generation %}{{ p[2] + '<|im_end|>' }}",
    )
    with pytest.raises(DataError, match="leaves out the assistant's content"):
        encode([chat(USER, {**ANSWER, "content": "aa;MIDDLE;cc"})], template)


def test_a_flag_that_the_settings_overrule_is_told(encode):
    row = chat(USER, {**ANSWER, "train": True}, *TWO_TURNS[2:])
    encoded = encode([row], loss_on="last_assistant")
    assert learned(encoded) == [["ciao<|im_end|>"]]
    assert any("a flag says are learned and that are not" in what for what in changes(encoded))


def test_the_completion_of_a_cut_conversation_stays_where_it_is(encode):
    row = {"prompt": [ANSWER, USER, ANSWER, TWO_TURNS[2]], "completion": [TWO_TURNS[3]]}
    assert learned(encode([row], leading_answer="trim")) == [["ciao<|im_end|>"]]


def test_all_lost_texts_of_one_wording_are_named(encode):
    tool = {"role": "tool", "content": "same words"}
    with pytest.raises(DataError) as caught:
        encode([chat(USER, ANSWER, tool, ANSWER, tool, *TWO_TURNS)], NO_TOOLS)
    assert "messages[2]" in str(caught.value) and "messages[4]" in str(caught.value)


def test_names_that_no_row_holds_are_told(encode):
    row = chat(*TWO_TURNS, id=7)
    report = encode([row], ignore=["id", "source", "tool.content", "message.name"]).report
    assert report.unmet == ("source", "tool.content", "message.name")
