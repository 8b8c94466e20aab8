"""Where a learned turn starts and ends under templates that change what is around it."""

import pytest

from tests.chats import MARKERS, TWO_TURNS, encode_rows, learned, pieces

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}"
)
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}"
CLOSED = TURNS + "{% endfor %}" + PROMPT + "{{ eos_token }}{% endif %}"
CLOSED_ON_A_LINE = CLOSED.replace("'<|im_end|>' }}", "'<|im_end|>\\n' }}")
UNASKED = TURNS + "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
# The instructions stand before the question that is being answered, and nowhere afterwards.
LATE = (
    "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ '<|start|>' }}"
    "{% if loop.last and rest != messages %}{{ messages[0]['content'] + '\\n' }}{% endif %}"
    "{{ m['content'] + '<|end|>' }}{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("settings", [{}, MARKERS, {"loss_on": "last_assistant"}])
@pytest.mark.parametrize("template", [CLOSED, CLOSED_ON_A_LINE, UNASKED])
def test_what_ends_the_conversation_or_opens_a_turn_is_no_part_of_the_last_one(
    tmp_path, template, settings
):
    turns = ["hello<|im_end|>", "ciao<|im_end|>"]
    expected = turns[-1:] if "loss_on" in settings else turns
    encoded = encode_rows(tmp_path, template, {"messages": TWO_TURNS}, **settings)
    assert learned(encoded, template) == [expected]


def test_a_row_has_before_its_turn_what_the_prompt_has_there(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    encoded = encode_rows(tmp_path, LATE, {"messages": [system, *TWO_TURNS]})
    assert pieces(encoded, LATE) == [
        [("<|start|>Be brief.\nhi<|end|>", False), ("hello</s>", True)],
        [
            ("<|start|>hi<|end|>hello</s><|start|>Be brief.\nbye<|end|>", False),
            ("ciao</s>", True),
        ],
    ]


def test_an_answer_that_repeats_the_question_starts_where_it_does(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    echo = [system, TWO_TURNS[0], {"role": "assistant", "content": "hi hi"}]
    assert learned(encode_rows(tmp_path, LATE, {"messages": echo}), LATE) == [["hi hi</s>"]]
