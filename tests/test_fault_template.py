"""Chat templates that take too much: an error within seconds, and the next one is rendered."""

import os
import resource
import signal
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lorax.data.renderer import Part, Renderer, Request
from lorax.data.rows import DataError

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Fine"}]
WHOLE = Part(2)
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DOUBLING = (
    "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}"
)
HOSTILE = {
    "a loop in a loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "more than 3 s",
    ),
    "one operation without end": ("{{ 10 ** (10 ** 9) }}", "more than 3 s|more time"),
    "a large text": ("{{ 'a' * 10 ** 9 }}", "more memory"),
    "a larger one by a filter": ("{{ 'a' | center(10 ** 12) }}", "more memory"),
    "a text that doubles": (DOUBLING, "more memory"),
    "an output of many characters": ("{{ 'a' * 20000000 }}", "renders 20,000,000 characters"),
    "a macro that calls itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "recursion|memory",
    ),
    "the class of a text": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "the globals of a function": ("{{ raise_exception.__globals__['os'].system('x') }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "its own error": ("{{ raise_exception('no system role') }}", "no system role"),
    "no syntax": ("{% for %}", "Expected|expected"),
}


@pytest.fixture(scope="module")
def renderer():
    found = Renderer()
    yield found
    found.close()


def render(renderer, template=CHATML, parts=(WHOLE,), **options):
    (found,) = renderer.render(template, [Request(MESSAGES, parts)], special_tokens={}, **options)
    return found


def test_it_renders_what_transformers_renders(renderer):
    prompt = Part(1, is_prompt=True)
    found = render(renderer, parts=(WHOLE, prompt), mark_generation=True)
    for part in (WHOLE, prompt):
        texts, blocks = render_jinja_template(
            [MESSAGES[: part.length]],
            chat_template=CHATML,
            return_assistant_tokens_mask=True,
            add_generation_prompt=part.is_prompt,
        )
        assert found[part] == (texts[0], [tuple(span) for span in blocks[0]])
    assert found[prompt][0].endswith("<|assistant|>")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(renderer, name):
    template, reason = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=f"fails on the messages .user, assistant.: .*({reason})"):
        render(renderer, template)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB
    assert render(renderer)[WHOLE][0] == "<|user|>Hello<|assistant|>Fine"


def test_a_part_that_fails_is_named(renderer):
    template = "{% if messages | length < 2 %}{{ raise_exception('alone') }}{% endif %}x"
    with pytest.raises(DataError, match=r"messages \(user\): alone"):
        render(renderer, template, parts=(WHOLE, Part(1)))


def say(text):
    return Request([{"role": "user", "content": text}], (Part(1),))


def test_long_and_many_conversations_are_no_attack(renderer):
    texts = ["word " * 1_000_000, *(f"number {i}" for i in range(2000)), "word " * 500_000]
    found = renderer.render(CHATML, [say(text) for text in texts], special_tokens={})
    assert [each[Part(1)][0] for each in found] == [f"<|user|>{text}" for text in texts]


def test_an_error_comes_in_its_turn(renderer):
    texts = ["1", "2", "1000000000", "4"]
    template = "{{ 10 ** (messages[0].content | int) }}"
    found = renderer.render(template, [say(text) for text in texts], special_tokens={})
    assert next(found) and next(found)
    with pytest.raises(DataError, match="more than 3 s"):
        next(found)


def test_what_ends_the_process_is_found_among_many(renderer, monkeypatch):
    ask = renderer._ask

    def ask_or_die(options, group):
        return None if any("bad" in text for _, text in group) else ask(options, group)

    monkeypatch.setattr(renderer, "_ask", ask_or_die)
    found = renderer.render(CHATML, [say(t) for t in ("1", "2", "bad", "4")], special_tokens={})
    assert next(found)[Part(1)][0] == "<|user|>1" and next(found)
    with pytest.raises(DataError, match="more time or memory"):
        next(found)


def test_what_json_does_not_hold_is_refused(renderer):
    found = renderer.render(CHATML, [say("x"), say(b"x")], special_tokens={})
    assert next(found)
    with pytest.raises(DataError, match="what JSON does not"):
        next(found)


def test_a_process_that_was_killed_is_replaced(renderer):
    render(renderer)
    os.kill(renderer._process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="more time or memory"):
        render(renderer)
    assert render(renderer)


def test_the_process_sees_no_token_and_ends_when_it_is_closed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-environment")
    renderer = Renderer()
    render(renderer)
    process = renderer._process
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert b"secret-of-the-environment" not in file.read()
    asked = time.monotonic()
    renderer.close()
    assert process.returncode == 0 and time.monotonic() - asked < 10
