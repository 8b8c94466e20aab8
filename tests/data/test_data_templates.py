"""What a chat template gets of a row, and templates that are missing, fail or lose something."""

import pytest

from tests.chats import (
    CHATML,
    HEADER,
    MARKERS,
    NO_STOP,
    PROMPT,
    TWO_TURNS,
    byte_tokenizer,
)
from tests.data.masked import pieces_with


def test_tools_and_tool_calls_reach_the_template(encode_with):
    template = (
        "{% for tool in tools or [] %}{{ tool['name'] + ';' }}{% endfor %}"
        "{% for m in messages %}" + HEADER + "{{ m['content'] or m['tool_calls'][0]['name'] }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
    )
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    row, tokenizer = {"messages": messages, "tools": [{"name": "look"}]}, byte_tokenizer(template)
    pieces = pieces_with(encode_with, row, tokenizer)
    assert pieces[0][0].startswith("look;<|im_start|>user")
    assert [text for text, flag in pieces if flag] == ["look<|im_end|>", "It is 42.<|im_end|>"]


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
            ]
        },
        {"messages": [{"role": "assistant", "content": "b"}], "tools": [{"name": "look"}]},
    ],
)
def test_tools_and_calls_that_the_template_leaves_out_are_refused(encode_with, row):
    row["messages"].insert(0, {"role": "user", "content": "hi"})
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* leaves out .*(the tools|tool calls)"):
        encode_with([row], byte_tokenizer(CHATML))


def test_half_a_character_from_a_template_is_refused(encode_with):
    messages = [{"role": "user", "content": "hi", "name": "\ud800"}, TWO_TURNS[1]]
    template = CHATML.replace("m['content']", "(m['name'] or '') + m['content']")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the rendered conversation holds half"):
        encode_with([{"messages": messages}], byte_tokenizer(template))


def test_template_of_a_file_is_used(encode_with, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    row = {"messages": TWO_TURNS}
    found = pieces_with(encode_with, row, byte_tokenizer(NO_STOP), chat_template=str(path))
    assert found == pieces_with(encode_with, row, byte_tokenizer(CHATML))


def test_template_file_that_is_missing_or_empty_is_named(encode_with, tmp_path):
    row, path = {"messages": TWO_TURNS}, tmp_path / "none.jinja"
    with pytest.raises(ValueError, match=r"data.chat_template: .*none.jinja: No such file"):
        encode_with([row], byte_tokenizer(), chat_template=str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"none.jinja.*the file is empty"):
        encode_with([row], byte_tokenizer(), chat_template=str(path))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[9]['content'] }}", "has no element 9"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
    ],
)
def test_template_that_fails_says_on_which_row(encode_with, template, reason):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: the chat template fails .*{reason}"):
        encode_with([{"messages": TWO_TURNS}], byte_tokenizer(template))


def test_conversation_without_a_template_is_refused(encode_with):
    with pytest.raises(ValueError, match=r"tokenizer has no chat template; set data\.chat_templ"):
        encode_with([{"messages": TWO_TURNS}], byte_tokenizer())


@pytest.mark.parametrize("setting", ["chat_template", "markers"])
def test_chat_settings_on_plain_rows_are_refused(encode_with, tmp_path, setting):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    settings = MARKERS if setting == "markers" else {"chat_template": str(path)}
    with pytest.raises(ValueError, match="is for conversations, and this row"):
        encode_with([{"prompt": "q", "completion": "a"}], byte_tokenizer(), **settings)
