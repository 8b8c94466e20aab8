"""Arguments, thoughts and texts of a row: encoded whole, or refused by name."""

import json

import pytest

from lorax.data.reading.rows import DataError
from tests.chats import (
    CHATML,
    PROMPT,
    TWO_TURNS,
    changes,
    learned,
)
from tests.data.rows import ANSWER, TOOLS, USER, call, chat

CONCATENATES = TOOLS.replace("f['arguments'] | tojson", "f['name'] ~ ':' + f['arguments']")


ROLES = (
    "{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'].split('</think>')[-1] }}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}" + PROMPT
)


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
    with pytest.raises(DataError, match="so the turn's tokens cannot be determined"):
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
