"""Chat templates that take too much: an error within seconds, and the next one is rendered."""

import datetime
import os
import re
import resource
import signal
import subprocess
import threading
from types import SimpleNamespace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lorax.data.chat.renderer import LimitError, Part, Rendered, Renderer, Request
from lorax.data.reading.rows import DataError, RowError

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
    "an error that repeats the words": (
        "{{ raise_exception('cannot ' ~ messages[0].content) }}",
        "too long or may repeat",
    ),
    "an error with a word of them": (
        "{{ raise_exception('cannot ' ~ messages[1].content[:4] | upper) }}",
        "too long or may repeat",
    ),
    "an error of a method on them": (
        "{{ ('{' ~ messages[0].content ~ '}').format() }}",
        "KeyError, whose text is too long or may repeat",
    ),
    "an error without end": ("{{ raise_exception('a' * 5000000) }}", "too long or may repeat"),
    "its own error": ("{{ raise_exception('no system role') }}", "no system role"),
    "no syntax": ("{% for %}", "Expected|expected"),
}


@pytest.fixture(scope="module")
def renderer():
    found = Renderer()
    yield found
    found.close()


def render(renderer, template=CHATML, parts=(WHOLE,), **options):
    return render_one(renderer, template, Request(MESSAGES, parts), **options)


def render_one(renderer, template, request, **options):
    """Returns what is rendered; raises what is wrong with it."""
    (found,) = renderer.render(template, [request], special_tokens={}, **options)
    if isinstance(found, RowError):
        raise found
    return found


def test_it_renders_what_transformers_renders(renderer):
    whole, prompt, first = Part(2), Part(1, is_prompt=True), Part(1)
    found = render(renderer, parts=(whole, prompt, first), mark_generation=True)
    texts, blocks = render_jinja_template(
        [MESSAGES], chat_template=CHATML, return_assistant_tokens_mask=True
    )
    assert (found.text, found.blocks) == (texts[0], [tuple(span) for span in blocks[0]])
    before = "<|user|>Hello"
    assert found.prefixes == {
        whole: len(found.text),
        prompt: len(before + "<|assistant|>"),
        first: len(before),
    }


def test_a_part_that_does_not_begin_the_whole_is_told(renderer):
    template = "{{ messages | length }}: {{ messages[0].content }}"
    assert render(renderer, template, parts=(Part(2), Part(1))).prefixes == {
        Part(2): 8,
        Part(1): None,
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(renderer, name):
    template, reason = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    where = r"fails on the messages .user, assistant.: |line \d+: "  # where it cannot be parsed
    with pytest.raises(DataError, match=f"({where}).*({reason})"):
        render(renderer, template)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB
    assert render(renderer).text == "<|user|>Hello<|assistant|>Fine"


def test_a_part_that_fails_is_named(renderer):
    template = "{% if messages | length < 2 %}{{ raise_exception('alone') }}{% endif %}x"
    with pytest.raises(DataError, match=r"messages \(user\): alone"):
        render(renderer, template, parts=(WHOLE, Part(1)))


def say(text):
    return Request([{"role": "user", "content": text}], (Part(1),))


def test_long_and_many_conversations_are_no_attack(renderer):
    texts = ["word " * 1_000_000, *(f"number {i}" for i in range(2000)), "word " * 500_000]
    found = renderer.render(CHATML, [say(text) for text in texts], special_tokens={})
    assert [each.text for each in found] == [f"<|user|>{text}" for text in texts]


def test_an_error_comes_in_its_turn(renderer):
    texts = ["1", "2", "1000000000", "4"]
    template = "{{ 10 ** (messages[0].content | int) }}"
    found = list(renderer.render(template, [say(text) for text in texts], special_tokens={}))
    assert [getattr(each, "text", None) for each in found] == ["10", "100", None, "10000"]
    assert re.search("more than 3 s|more time", str(found[2]))


def test_a_template_that_takes_too_much_is_tried_three_times(renderer):
    texts = ["1", *["1000000000"] * 6, "2"]
    template = "{{ 10 ** (messages[0].content | int) }}"
    found = list(renderer.render(template, [say(text) for text in texts], special_tokens={}))
    assert [type(each) for each in found] == [Rendered, *[LimitError] * 7]


def test_other_errors_leave_the_rest_of_the_rows_alone(renderer):
    render(renderer)
    process = renderer._process
    template = "{{ 6 // (messages[0].content | int) }}"
    found = list(renderer.render(template, [say(text) for text in "1020"], special_tokens={}))
    assert [getattr(each, "text", None) for each in found] == ["6", None, "3", None]
    assert "division" in str(found[1]) and renderer._process is process


@pytest.mark.parametrize("date", ["2026-11-30", "1999-01-02"])
def test_a_template_is_told_the_date_it_is_given(renderer, date):
    template = '{{ strftime_now("%d %b %Y") }} {{ strftime_now("%H:%M") }}'
    expected = datetime.date.fromisoformat(date).strftime("%d %b %Y")
    assert render(renderer, template, date=date).text == f"{expected} 00:00"


def test_a_template_is_told_today_where_no_date_is_given(renderer):
    before = datetime.date.today()
    found = render(renderer, '{{ strftime_now("%Y-%m-%d") }}').text
    assert found in (before.isoformat(), datetime.date.today().isoformat())


def test_long_conversations_are_no_attack(renderer):
    turns = [
        {"role": r, "content": "word " * 160} for _ in range(300) for r in ("user", "assistant")
    ]
    parts = (Part(600), *(Part(i, is_prompt=True) for i in range(1, 600, 2)))
    parts += tuple(Part(i + 1) for i in range(1, 600, 2))
    (found,) = renderer.render(CHATML, [Request(turns, parts)], special_tokens={})
    assert None not in found.prefixes.values() and len(found.prefixes) == 600


def test_what_json_does_not_hold_is_given_as_text(renderer):
    moment = datetime.datetime(2026, 1, 2)
    request = Request([{"role": "user", "content": "x", "created": moment}], (Part(1),))
    (found,) = renderer.render("{{ messages[0].created }}", [request], special_tokens={})
    assert found.text == "2026-01-02 00:00:00"


def test_an_interrupted_rendering_leaves_no_answer_behind(renderer, monkeypatch):
    class Interrupted:
        def __getattr__(self, name):
            return getattr(real, name)

        def readline(self):
            raise KeyboardInterrupt

    render(renderer)
    real = renderer._process.stdout
    monkeypatch.setattr(renderer._process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        render(renderer, "stale")
    assert render(renderer).text == "<|user|>Hello<|assistant|>Fine"


def test_a_process_that_cannot_start_is_no_fault_of_the_template(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import absent_module")
    monkeypatch.setattr("lorax.data.chat.renderer._WORKER", worker)
    with pytest.raises(RuntimeError, match=r"worker\.py, which renders chat templates, cannot be"):
        render(Renderer())


def test_a_process_that_was_killed_is_replaced(renderer):
    render(renderer)
    os.kill(renderer._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, renderer._process.pid, os.WEXITED | os.WNOWAIT)
    assert render(renderer)


def test_a_process_that_ends_while_it_renders_is_told(renderer):
    render(renderer)
    os.kill(renderer._process.pid, signal.SIGSTOP)
    killer = threading.Timer(0.3, os.kill, (renderer._process.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(DataError, match="more time or memory"):
        render(renderer)
    killer.join()
    assert render(renderer)


def test_the_process_sees_no_token_and_ends_when_it_is_closed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-environment")
    renderer = Renderer()
    render(renderer)
    process = renderer._process
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert b"secret-of-the-environment" not in file.read()
    renderer.close()
    assert process.returncode is not None


def test_the_words_of_tools_are_kept_too(renderer):
    tools = [{"name": "look", "description": "secret words"}]
    request = Request(MESSAGES, (WHOLE,), tools)
    template = "{{ raise_exception(tools[0].description) }}"
    with pytest.raises(DataError, match="TemplateError, whose text is too long or may repeat"):
        render_one(renderer, template, request)


def test_a_start_that_is_interrupted_leaves_nothing_for_the_next_one(monkeypatch):
    renderer, popen, interrupted = Renderer(), subprocess.Popen, []

    def start(*arguments, **options):
        process = popen(*arguments, **options)
        if not interrupted:
            interrupted.append(process)

            def readline():
                raise KeyboardInterrupt

            process.stdout = SimpleNamespace(readline=readline, close=process.stdout.close)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        render(renderer)
    assert render(renderer).text == "<|user|>Hello<|assistant|>Fine"
    assert interrupted[0].wait(10) == -signal.SIGKILL
    renderer.close()
