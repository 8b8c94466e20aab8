"""Which texts of a row count as found, in every format."""

import re
import shlex

import pytest
import yaml

from lorax.data.preview import render_example
from lorax.data.reading.rows import DataError
from tests.chats import (
    CHATML,
    GENERATION,
    MARKERS,
    PROMPT,
    TWO_TURNS,
    byte_tokenizer,
    changes,
    learned,
)
from tests.data.rows import ALWAYS_PROMPTS, ANSWER, TOOLS, USER, call, chat

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
    assert f"{where}.{said.format(where)} contradict each other; keep one" in str(caught.value)


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
    with pytest.raises(DataError, match=rf"data.{key} .* is not in the") as caught:
        encode([chat(*TWO_TURNS)], **typed)
    said = str(caught.value)
    in_file = re.search(rf'data\.{key}: (".*") in a file', said)[1]
    override = shlex.split(re.search(r"in a file, ('.*') on a command line", said)[1])[0]
    assert yaml.safe_load(in_file) == MARKERS[key]
    assert override == f"data.{key}={in_file}"  # which is YAML where it is in quotes
    mended = typed | {key: yaml.safe_load(in_file)}
    assert learned(encode([chat(*TWO_TURNS)], **mended)) == [["hello<|im_end|>", "ciao<|im_end|>"]]


def test_a_marker_that_no_escape_mends_is_not_told_of_escapes(encode):
    with pytest.raises(DataError, match="is not in the") as caught:
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
    assert any("with a flag for learning that are not learned" in what for what in changes(encoded))


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
