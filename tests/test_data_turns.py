"""Where a learned turn starts and ends under templates that change what is around it."""

import json

import pytest

from lorax.config import DataConfig, DataSource
from lorax.data import load_encoded_dataset, render_example
from tests.chats import MARKERS, TWO_TURNS, byte_tokenizer

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


def rows(tmp_path, template, messages, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    config = DataConfig(train=(DataSource(path=str(path)),), **settings)
    tokenizer = byte_tokenizer(template)
    encoded = load_encoded_dataset(config.train, config, tokenizer)
    return [render_example(encoded, i, tokenizer) for i in range(len(encoded))]


def learned(found):
    return [[text for text, is_learned in row if is_learned] for row in found]


@pytest.mark.parametrize("settings", [{}, MARKERS, {"loss_on": "last_assistant"}])
@pytest.mark.parametrize("template", [CLOSED, CLOSED_ON_A_LINE, UNASKED])
def test_what_ends_the_conversation_or_opens_a_turn_is_no_part_of_the_last_one(
    tmp_path, template, settings
):
    turns = ["hello<|im_end|>", "ciao<|im_end|>"]
    expected = turns[-1:] if "loss_on" in settings else turns
    assert learned(rows(tmp_path, template, TWO_TURNS, **settings)) == [expected]


def test_a_row_has_before_its_turn_what_the_prompt_has_there(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    assert rows(tmp_path, LATE, [system, *TWO_TURNS]) == [
        [("<|start|>Be brief.\nhi<|end|>", False), ("hello</s>", True)],
        [
            ("<|start|>hi<|end|>hello</s><|start|>Be brief.\nbye<|end|>", False),
            ("ciao</s>", True),
        ],
    ]


def test_an_answer_that_repeats_the_question_starts_where_it_does(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    echo = [system, TWO_TURNS[0], {"role": "assistant", "content": "hi hi"}]
    assert learned(rows(tmp_path, LATE, echo)) == [["hi hi</s>"]]
