"""What a template leaves out of tools, of calls, and of conversations that are split."""

import copy
import json

import pytest

from lorax.data.chat.template import encode_prompt
from lorax.data.reading.rows import DataError
from tests.chats import (
    CHATML,
    DROPS_THINKING,
    HEADER,
    PROMPT,
    TWO_TURNS,
    byte_tokenizer,
    changes,
    encode_rows,
    learned,
    pieces,
)

USER = {"role": "user", "content": "Which city?"}
MESSAGES = (
    "{% for m in messages %}" + HEADER + "{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}{{ (c['function'] or c) | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)
AS_JSON = "{% for t in tools or [] %}{{ t | tojson + '\\n' }}{% endfor %}" + MESSAGES
INSIDE_THE_SYSTEM = MESSAGES.replace(
    "{{ m['content'] or '' }}",
    "{{ m['content'] or '' }}{% if loop.first %}{{ tools | tojson }}{% endif %}",
)
# As a signature: names what it does not write as JSON, and says types in words of its own.
AS_SIGNATURE = (
    "{% for t in tools or [] %}{% set f = t['function'] %}{{ '// ' + f['description'] + '\\n' }}"
    "{{ f['name'] + '({' }}{% for name, p in f['parameters']['properties'].items() %}"
    "{{ '// ' + p['description'] + '\\n' + name }}{{ ':' if name in f['parameters']['required'] "
    "else '?:' }}{{ {'string': 'text'}[p['type']] }}{% if p['enum'] %}"
    "{{ '|' + p['enum'] | join('|') }}{% endif %}{% endfor %}{{ '})\\n' }}{% endfor %}" + MESSAGES
)
TOOL = {
    "type": "function",
    "function": {
        "name": "find_town",
        "description": 'Finds a "town"\nby its name.',
        "parameters": {
            "type": "object",
            "properties": {
                "type": {
                    "type": "string",
                    "description": "The kind of town.",
                    "enum": ["harbour", "market"],
                }
            },
            "required": ["type"],
        },
    },
}
NO_TEXT = "town", "harbour", "market", "kind"


def row(*messages, **columns):
    return {"messages": [USER, *messages], **columns}


def refusal(folder, template, *rows, **settings):
    with pytest.raises(DataError) as caught:
        encode_rows(folder, template, *rows, **settings)
    return str(caught.value)


def remedy(said):
    return said.split("data.ignore: [")[1].split("]")[0].split(", ")


def with_parameter(**keys):
    tool = copy.deepcopy(TOOL)
    tool["function"]["parameters"]["properties"]["type"] |= keys
    return tool


ANSWER = {"role": "assistant", "content": "That one."}


# Tools.


@pytest.mark.parametrize("template", [AS_JSON, INSIDE_THE_SYSTEM, AS_SIGNATURE])
@pytest.mark.parametrize("messages", [[ANSWER], [ANSWER, USER, ANSWER]])
def test_tools_that_a_template_writes_in_its_own_way_are_found(tmp_path, template, messages):
    encoded = encode_rows(tmp_path, template, row(*messages, tools=[TOOL, TOOL]))
    answers = ["That one.<|im_end|>"] * sum(m["role"] == "assistant" for m in messages)
    assert learned(encoded, template) == [answers]


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("f['description']", "''", "description of tools[0]"),
        ("f['description']", "f['description'][:5]", "description of tools[0]"),
        ("p['description']", "''", "description of tools[0]"),
        ("p['enum'] | join('|')", "p['enum'][0]", "enum of tools[0]"),
        ("'\\n' + name }}", "'\\n' }}", "properties of tools[0]"),
    ],
)
def test_a_text_of_a_tool_that_is_left_out_is_refused_and_allowed_by_name(tmp_path, old, new, lost):
    template = AS_SIGNATURE.replace(old, new)
    assert template != AS_SIGNATURE
    said = refusal(tmp_path, template, row(ANSWER, tools=[TOOL]))
    assert f"leaves out the {lost}: " in said and not any(word in said for word in NO_TEXT)
    (name,) = remedy(said)
    assert name == f"tools.{lost.split()[0]}"
    encoded = encode_rows(tmp_path, template, row(ANSWER, tools=[TOOL]), ignore=[name])
    assert learned(encoded, template) == [["That one.<|im_end|>"]]
    assert changes(encoded) == {f"hold {name}, which is not learned from (data.ignore)": 1}
    assert encoded.report.unmet == ()


@pytest.mark.parametrize(
    ("key", "value"), [("strict", True), ("minLength", 3), ("nullable", False), ("$comment", "so")]
)
def test_a_key_of_a_tool_that_is_not_read_is_refused_and_allowed_by_name(tmp_path, key, value):
    tool = with_parameter(**{key: value})
    encode_rows(tmp_path, AS_JSON, row(ANSWER, tools=[tool]))
    said = refusal(tmp_path, AS_SIGNATURE, row(ANSWER, tools=[tool]))
    assert f"the key tools.{key}" in said
    names = remedy(said)
    assert names[-1] == f"tools.{key}"
    encoded = encode_rows(tmp_path, AS_SIGNATURE, row(ANSWER, tools=[tool]), ignore=names)
    assert f"hold tools.{key}, which is not learned from (data.ignore)" in changes(encoded)


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_a_key_of_a_tool_that_holds_nothing_is_no_loss(tmp_path, empty):
    tool = with_parameter(pattern=empty)
    encode_rows(tmp_path, AS_SIGNATURE, row(ANSWER, tools=[tool]))


def test_tools_that_a_template_leaves_out_whole_are_one_loss(tmp_path):
    said = refusal(tmp_path, MESSAGES, row(ANSWER, tools=[TOOL, TOOL]))
    assert "the chat template leaves out the tools: " in said and remedy(said) == ["tools"]
    encoded = encode_rows(tmp_path, MESSAGES, row(ANSWER, tools=[TOOL]), ignore=["tools"])
    assert changes(encoded) == {"hold tools, which is not learned from (data.ignore)": 1}


def test_a_text_of_a_tool_is_not_found_in_what_somebody_says(tmp_path):
    template = AS_SIGNATURE.replace("p['description']", "''")
    asked = {"role": "user", "content": "What is The kind of town.?"}
    rows = {"messages": [asked, ANSWER], "tools": [TOOL]}
    assert "description of tools[0]" in refusal(tmp_path, template, rows)


def test_the_second_tool_is_missed_where_the_first_is_written(tmp_path):
    other = json.loads(json.dumps(TOOL).replace("find_town", "leave_town"))
    template = AS_JSON.replace("tools or []", "tools[:1]")
    said = refusal(tmp_path, template, row(ANSWER, tools=[TOOL, other]))
    assert "name of tools[1]" in said


# Calls.


def call(arguments, **more):
    function = {"name": "find_town", "arguments": arguments}
    called = {"id": "c1", "type": "function", "function": function, **more}
    return {"role": "assistant", "content": "", "tool_calls": [called]}


@pytest.mark.parametrize(
    "arguments",
    [
        {"where": {"near": "sea"}},
        {"where": [{"near": {"far": 2.5}}]},
        {"where": {"near": True}},
        {"near": -3},
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_names_and_numbers_deep_in_arguments_are_looked_for(tmp_path, arguments, as_text):
    given = json.dumps(arguments) if as_text else arguments
    encode_rows(tmp_path, MESSAGES, row(call(given)))
    for old, new in [("near", "n"), ("2.5", "2"), ("-3", "3")]:
        if old in json.dumps(arguments):
            cuts = f"(c['function'] or c) | tojson | replace('{old}', '{new}')"
            template = MESSAGES.replace("(c['function'] or c) | tojson", cuts)
            said = refusal(tmp_path, template, row(call(given)))
            assert "leaves out the assistant's tool calls of messages[1]" in said


def test_what_a_call_holds_besides_is_looked_for(tmp_path):
    more = {"reason": "It is near."}
    said = refusal(tmp_path, MESSAGES, row(call({}, **more)))
    assert "leaves out the assistant's tool calls of messages[1]" in said
    whole = MESSAGES.replace("(c['function'] or c) | tojson", "c | tojson")
    encode_rows(tmp_path, whole, row(call({}, **more)))


# Conversations that become one row per learned turn.

DROPS_ANSWERS = DROPS_THINKING.replace(
    "m['content'].split", "(m['content'] if m['role'] == 'user' else '').split"
)
THOUGHT = {"role": "assistant", "content": "<think>by the sea</think>hello"}
CUT = "were cut after their last learned turn: no learned turn sees what follows it"
SPLIT = "became one row per learned turn: the chat template rewrites earlier turns"


@pytest.mark.parametrize(
    "tail",
    [
        [{"role": "user", "content": "Thanks."}],
        [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "No.", "train": 0}],
        [{"role": "user", "content": "So?"}, THOUGHT | {"train": False}, USER],
    ],
)
def test_what_follows_the_last_learned_turn_of_a_split_conversation_is_told(tmp_path, tail):
    rows = row(THOUGHT, *TWO_TURNS, *tail), row(THOUGHT, *TWO_TURNS)
    encoded = encode_rows(tmp_path, DROPS_THINKING, *rows)
    once = [[f"{THOUGHT['content']}<|im_end|>"], ["hello<|im_end|>"], ["ciao<|im_end|>"]]
    assert learned(encoded, DROPS_THINKING) == once * 2
    assert changes(encoded)[CUT] == 1 and changes(encoded)[SPLIT] == 2


def test_what_follows_the_last_learned_turn_of_a_whole_conversation_stays(tmp_path):
    thanks = {"role": "user", "content": "Thanks."}
    encoded = encode_rows(tmp_path, CHATML, row(ANSWER, thanks))
    assert "Thanks." in pieces(encoded, CHATML)[0][-1][0] and changes(encoded) == {}


@pytest.mark.parametrize(
    ("left_out", "template", "name"),
    [
        ("<think>by the sea</think>hello", DROPS_THINKING, "assistant.thinking"),
        ("gone", DROPS_ANSWERS, "assistant.content"),
    ],
)
def test_an_answer_that_is_learned_in_no_row_must_be_whole_where_it_stands(
    tmp_path, left_out, template, name
):
    flagged = {"role": "assistant", "content": left_out, "weight": 0}
    rows = row(flagged, USER, THOUGHT, USER, ANSWER)
    said = refusal(tmp_path, template, rows)
    assert f"leaves out the assistant's {name.split('.')[1]} of messages[1]" in said
    if name == "assistant.thinking":
        assert remedy(said) == [name]
        encoded = encode_rows(tmp_path, template, rows, ignore=[name])
        assert changes(encoded)[f"hold {name}, which is not learned from (data.ignore)"] == 2


def test_a_thought_that_is_learned_in_its_own_row_may_be_left_out_of_later_ones(tmp_path):
    encoded = encode_rows(tmp_path, DROPS_THINKING, row(THOUGHT, USER, THOUGHT))
    whole = f"{THOUGHT['content']}<|im_end|>"
    assert learned(encoded, DROPS_THINKING) == [[whole], [whole]]
    assert "<think>" not in pieces(encoded, DROPS_THINKING)[1][0][0]


# What is named is what is lost, and nothing else.

SAID = MESSAGES.replace("m['content'] or ''", "m['content'].split('</think>')[-1] or ''")
TOOL_RESULT = {"role": "tool", "name": "find_town", "tool_call_id": "c1", "content": "none"}


@pytest.mark.parametrize(
    ("template", "messages", "names"),
    [
        (
            MESSAGES,
            [{"role": "assistant", "content": "4", "reasoning_content": "2+2 is 4"}],
            ["message.reasoning_content"],
        ),
        (
            MESSAGES,
            [call({"city": "Oslo"}) | {"reasoning_content": "I find_town Oslo by its city."}],
            ["message.reasoning_content"],
        ),
        (
            SAID,
            [{"role": "assistant", "content": "<think>So it is 4.</think>\n\n4"}],
            ["assistant.thinking"],
        ),
        (
            CHATML.replace("m in messages", "m in messages if m['role'] != 'developer'"),
            [
                {"role": "system", "content": "Yes or No"},
                {"role": "developer", "content": "Say Yes or No."},
                USER,
                {"role": "assistant", "content": "Yes"},
            ],
            ["developer.content"],
        ),
        (
            CHATML.replace("m['content'] +", "m['content'] + (m['name'] if 0 else '') +"),
            [
                {"role": "system", "content": "Bob"},
                {"role": "user", "content": "Who?", "name": "Bob"},
                {"role": "assistant", "content": "Bob"},
            ],
            ["message.name"],
        ),
    ],
)
@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant"])
def test_a_lost_text_blames_no_text_inside_it_or_equal_to_it(
    tmp_path, template, messages, names, loss_on
):
    rows = {"messages": messages if messages[0]["role"] == "system" else [USER, *messages]}
    said = refusal(tmp_path, template, rows, loss_on=loss_on)
    assert remedy(said) == names
    encoded = encode_rows(tmp_path, template, rows, loss_on=loss_on, ignore=names)
    assert len(learned(encoded, template)[0]) == 1


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant"])
def test_a_tools_result_that_names_its_call_is_no_other_text(tmp_path, loss_on):
    messages = [call({"city": "Oslo"}), TOOL_RESULT, ANSWER]
    encoded = encode_rows(tmp_path, AS_JSON, row(*messages, tools=[TOOL]), loss_on=loss_on)
    assert len(encoded) == 1
    other = [messages[0], TOOL_RESULT | {"name": "weather"}, ANSWER]
    said = refusal(tmp_path, AS_JSON, row(*other, tools=[TOOL]), loss_on=loss_on)
    assert remedy(said) == ["message.name"]


@pytest.mark.parametrize("short", ["assist", "user", "20", "tool", "us"])
def test_a_short_text_is_not_found_inside_a_word(tmp_path, short):
    template = (
        "on 2026-11-30: useful tools for users and assistants{% for m in messages %}"
        "{% if m['role'] != 'tool' %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endif %}"
        "{% endfor %}"
    )
    first = {"role": "assistant", "content": "Of 120?"}
    rows = row(first, {"role": "tool", "content": short}, ANSWER)
    assert "tool's content of messages[2]" in refusal(tmp_path, template, rows, loss_on="all")


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_without_arguments_has_none(tmp_path, arguments):
    encoded = encode_rows(tmp_path, MESSAGES, row(call(arguments)))
    expected = '{"name": "find_town", "arguments": {}}<|im_end|>'
    assert learned(encoded, MESSAGES) == [[expected]]
    absent = call(arguments)
    del absent["tool_calls"][0]["function"]["arguments"]
    assert learned(encode_rows(tmp_path, MESSAGES, row(absent)), MESSAGES) == [[expected]]


@pytest.mark.parametrize("tools", [json.dumps([TOOL]), [json.dumps(TOOL)], [TOOL]])
def test_tools_may_be_json_text(tmp_path, tools):
    found = pieces(encode_rows(tmp_path, AS_JSON, row(ANSWER, tools=tools)), AS_JSON)
    assert found == pieces(encode_rows(tmp_path, AS_JSON, row(ANSWER, tools=[TOOL])), AS_JSON)


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("weather", "tools must be a list of objects, or JSON text that is one, got text that is"),
        (["weather"], r"tools[0] must be a list of objects, or JSON"),
        ('"weather"', "tools must be a list of objects, got text of 7 characters"),
        ("[7]", "tools[0] must be an object, got int 7"),
    ],
)
def test_tools_that_are_other_text_are_refused(tmp_path, tools, said):
    assert said in refusal(tmp_path, AS_JSON, row(ANSWER, tools=tools))


@pytest.mark.parametrize("key", ["loop", "m", "c", "SECRET", "role"])
def test_a_rows_setting_is_read_only_if_the_template_takes_it_from_outside(tmp_path, key):
    said = refusal(tmp_path, MESSAGES, row(ANSWER, chat_template_kwargs={key: "x"}))
    assert "does not read" in said and "of chat_template_kwargs" in said
    reads = "{% if not level is defined %}{% set level = 1 %}{% endif %}{{ level }}" + MESSAGES
    encode_rows(tmp_path, reads, row(ANSWER, chat_template_kwargs={"level": 3}))


def test_a_number_of_a_message_is_looked_for(tmp_path):
    template = MESSAGES.replace("c['function'] or c", "c['function'] or c['id'] or c")
    said = refusal(tmp_path, template, {"messages": [USER | {"id": 77}, ANSWER]})
    assert remedy(said) == ["message.id"]


@pytest.mark.parametrize("empty", ["", [], {}, None])
def test_flags_that_hold_nothing_say_nothing(tmp_path, empty):
    rows = row(ANSWER | {"train": empty}, weight=empty)
    assert learned(encode_rows(tmp_path, CHATML, rows), CHATML) == [["That one.<|im_end|>"]]


def test_a_thought_whose_opening_tag_stood_in_the_prompt_is_a_thought(tmp_path):
    answer = {"role": "assistant", "content": "by the sea</think>\n\nhello"}
    template = MESSAGES.replace("m['content'] or ''", "m['content'].split('</think>')[-1]")
    assert remedy(refusal(tmp_path, template, row(answer))) == ["assistant.thinking"]


def test_a_prompt_of_which_the_template_leaves_something_out_is_refused():
    system = {"role": "system", "content": "Be brief."}
    skips = CHATML.replace("m in messages", "m in messages if m['role'] != 'system'")
    cuts = CHATML.replace("m['content']", "m['content'][:3]")
    for template, lost in ((skips, "system's content,"), (cuts, "user's content,")):
        with pytest.raises(DataError, match=f"leaves out the .*{lost}"):
            encode_prompt(byte_tokenizer(template), [system, USER])
    assert encode_prompt(byte_tokenizer(skips), [USER])
    assert encode_prompt(byte_tokenizer(CHATML), [system, USER])
