"""Chat templates of thirteen real families: what is learned is the answer and its stop token.

Each family meets each kind of row. Either the row is learned from: before each learned turn stands
what a model is shown when it answers, as transformers renders it, and the turn is the text that is
written down here for the family. Or there is an error, and each remedy that it names is applied:
then the same holds.
"""

import dataclasses
import functools
import json
import re
import warnings
from typing import Any

import numpy as np
import pytest

import lorax
from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset
from lorax.data.preview import render_example
from lorax.data.reading.rows import DataError
from tests.chats import byte_tokenizer
from tests.data.families import ANY, FAMILIES, HEADERS, LLAMA2, Family
from tests.real import asset

pytestmark = pytest.mark.slow

DATE = "2026-11-30"


USER, AGAIN = {"role": "user", "content": "What is it?"}, {"role": "user", "content": "And then?"}
SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Be rude."}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": '{"sky": "grey"}'}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}},
                "required": ["city"],
            },
        },
    }
]
ARGUMENTS = '{"city": "Oslo"}'


def say(content, **others) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


def call(content, arguments: Any = ARGUMENTS, **others):
    inner = {"name": "weather", "arguments": arguments}
    return say(content, tool_calls=[{"id": "call00001", "type": "function", "function": inner}])


def tagged(thought, words):
    return say(f"<think>\n{thought}\n</think>\n\n{words}")


OBJECT = json.loads(ARGUMENTS)
REASONED = {"reasoning_content": "A thought."}
KINDS = {
    "multi-turn": [USER, say("It is so."), AGAIN, say("Then rain.")],
    "the same question twice": [USER, say("It is so."), USER, say("Then rain.")],
    "system": [SYSTEM, USER, say("It is so.")],
    "system, multi-turn": [SYSTEM, USER, say("It is so."), AGAIN, say("Then rain.")],
    "developer": [DEVELOPER, USER, say("It is so."), AGAIN, say("Then rain.")],
    "call, arguments as text": [USER, call(None), RESULT, say("Grey.")],
    "call, arguments as object": [USER, call("", OBJECT), RESULT, say("Grey.")],
    "call without content": [
        USER,
        {key: value for key, value in call(None).items() if key != "content"},
        RESULT,
        say("Grey."),
    ],
    "call with words": [USER, call("I look."), RESULT, say("Grey.")],
    "call with a thought": [USER, call("") | REASONED, RESULT, say("Grey.", **REASONED)],
    "call of an earlier turn": [USER, call(""), RESULT, say("Grey."), AGAIN, say("Then rain.")],
    "thinking in tags": [USER, tagged("A thought.", "It is so.")],
    "reasoning_content": [USER, say("It is so.", **REASONED)],
    "two turns with thinking in tags": [
        USER,
        tagged("A thought.", "It is so."),
        AGAIN,
        tagged("Another.", "Then rain."),
    ],
    "two turns with reasoning_content": [
        USER,
        say("It is so.", **REASONED),
        AGAIN,
        say("Then rain.", reasoning_content="Another."),
    ],
    "begun by an answer": [say("Welcome."), USER, say("It is so.")],
    "keys of a table": [
        USER | {"tool_calls": [], "reasoning_content": ""},
        say("It is so.", tool_calls=[], reasoning_content="", name=None),
    ],
    "words that begin as a tag": [USER, say("<b>So.</b>")],
}


def text_of(path: str) -> str:
    return asset(path.split("/")[0]).joinpath(path.split("/")[1]).read_text(encoding="utf-8")


@functools.cache
def tokenizer_of(name) -> Any:
    """The family's own where there is one, with the template; else one of bytes."""
    family = FAMILIES[name]
    if family.tokenizer is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Llama 2's, of which transformers makes another one
            tokenizer = lorax.load_tokenizer(str(asset(family.tokenizer)))
    else:
        eos, bos = family.names
        tokenizer = byte_tokenizer(eos_token=eos, bos_token=bos)
        tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    if name == "llama2":
        tokenizer.chat_template = LLAMA2
    elif family.template is not None:
        tokenizer.chat_template = text_of(family.template)
    return tokenizer


def written(family: Family, message, *, inner=False) -> str:
    """What the model should write for a message."""
    words, thought = message.get("content") or "", message.get("reasoning_content")
    if inner and family.inner:
        return family.inner.format(words)
    if "</think>" in words and "<think>" in family.answer:
        text = words  # which is the template's own way
    elif message.get("tool_calls"):
        form = family.thought_call if thought else family.both if words else family.call
        assert form is not None
        text = form.format(ARGUMENTS, words=words, thought=thought)
        return text if text.endswith("<|call|>") else text + family.stop
    elif thought:
        assert family.thought is not None
        text = family.thought.format(words=words, thought=thought)
    else:
        text = family.answer.format(words)
    return text + family.stop


def written_by_any(message, eos: str) -> str:
    thought, words = message.get("reasoning_content"), message.get("content") or ""
    calls = "weather " + ARGUMENTS if message.get("tool_calls") else ""
    return f"({thought})" * bool(thought) + words + calls + eos


@dataclasses.dataclass
class Case:
    """A row, the settings under which it is encoded, and what is then expected.

    Attributes:
        name: Of the family.
        messages: As they are under the settings.
        settings: Of `data`.
        learned: What is learned; else all answers are, as the family writes them.
        whole: The messages as they are in the file, if they are others.
        also: Whether `messages` are there too, as a row of their own.
    """

    name: str
    messages: list[Any]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    learned: list[str] | None = None
    whole: list[Any] | None = None
    also: bool = False

    def check(self, folder) -> None:
        """Encodes the row and compares; the error of the row is let through."""
        tokenizer, family = tokenizer_of(self.name), FAMILIES[self.name]
        encoded = self.encode(folder)
        rows = [render_example(encoded, i, tokenizer) for i in range(len(encoded))]
        replies = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        expected = self.learned or [written(family, self.messages[i]) for i in replies]
        assert [text for row in rows for text, is_learned in row if is_learned] == expected
        starts = np.flatnonzero(encoded.supervised & ~np.append(False, encoded.supervised[:-1]))
        for i, start in zip(replies[-len(starts) :], starts, strict=True):
            if i > 0:
                shown = self._prompt(tokenizer, i).removesuffix(family.cut)
                begin = max(offset for offset in encoded.offsets if offset <= start)
                before = encoded.tokens[begin:start].tolist()
                assert before == tokenizer(shown, add_special_tokens=False)["input_ids"]
        for row in rows:
            tail = row[-1][0] if not row[-1][1] else ""
            assert tail.strip() in ("", HEADERS[1].strip())
        special = {t for t, token in tokenizer.added_tokens_decoder.items() if token.special}
        ends = encoded.supervised & ~np.append(encoded.supervised[1:], False)
        assert set(encoded.tokens[ends].tolist()) <= special

    def encode(self, folder) -> Any:
        """Encodes the row."""
        path = folder / "rows.jsonl"
        rows: list[Any] = [{"messages": self.whole or self.messages}]
        if any(message.get("tool_calls") for message in self.messages):
            rows[0]["tools"] = TOOLS
        rows += [{"messages": self.messages}] * self.also
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings: dict[str, Any] = {"date": DATE, "max_seq_length": 8192} | self.settings
        config = DataConfig(train=(DataSource(path=str(path)),), **settings)
        return load_encoded_dataset(config.train, config, tokenizer_of(self.name))

    def _prompt(self, tokenizer, index: int) -> str:
        """What transformers shows a model that should write the message."""
        messages = json.loads(json.dumps(self.messages[:index]))
        for message in messages:
            for made in message.get("tool_calls") or []:
                if isinstance(made["function"]["arguments"], str):
                    made["function"]["arguments"] = json.loads(made["function"]["arguments"])
            if message.get("tool_calls"):
                message["content"] = message.get("content") or ""
            for key in [key for key in message if key != "content" and not message[key]]:
                del message[key]
        uses_tools = any(message.get("tool_calls") for message in self.messages)
        text = tokenizer.apply_chat_template(
            messages,
            tools=TOOLS if uses_tools else None,
            chat_template=ANY if "chat_template" in self.settings else None,
            add_generation_prompt=True,
            tokenize=False,
        )
        return re.sub(r"(Current date: )\d{4}-\d\d-\d\d", rf"\g<1>{DATE}", text)


def without(messages, names):
    """The messages as they are where `data.ignore` has these names."""
    kept = [message for message in messages if f"{message['role']}.content" not in names]
    keys = {name.removeprefix("message.") for name in names}
    kept = [{k: v for k, v in message.items() if k not in keys} for message in kept]
    if "assistant.thinking" in names:
        for message in kept:  # the line breaks behind a thought stay
            message["content"] = message["content"].split("</think>")[-1]
    return kept


def remedies(case: Case, error: str, folder) -> dict[str, Case]:
    """The cases that an error proposes, by what each of them sets."""
    name, messages, family = case.name, case.messages, FAMILIES[case.name]
    found: dict[str, Case] = {}
    if match := re.search(r"data\.ignore: \[(.+?)\]", error):
        names = tuple(match[1].split(", "))
        found["ignore"] = Case(name, without(messages, names), {"ignore": names}, whole=messages)
    if "data.leading_answer" in error:
        settings = {"leading_answer": "trim"}
        found["trim"] = Case(name, messages[1:], settings, whole=messages)
    if "trim or drop" in error:
        settings = {"leading_answer": "drop"}
        found["drop"] = Case(name, KINDS["system"], settings, whole=messages, also=True)
    if "data.chat_template" in error:
        path = folder / "any.jinja"
        path.write_text(ANY)
        eos = tokenizer_of(name).eos_token
        replies = [message for message in messages if message["role"] == "assistant"]
        found["chat_template"] = Case(
            name,
            messages,
            {"chat_template": str(path)},
            [written_by_any(message, eos) for message in replies],
        )
    if "data.response_part" in error:
        replies = [message for message in messages if message["role"] == "assistant"]
        found["markers"] = Case(
            name,
            messages,
            dict(zip(("instruction_part", "response_part"), family.markers, strict=True)),
            [written(family, message, inner=True) for message in replies[:-1]]
            + [written(family, replies[-1])],
        )
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_and_its_stop_token_are_learned_or_a_remedy_works(name, kind, tmp_path):
    case = Case(name, KINDS[kind])
    try:
        case.check(tmp_path)
        return
    except DataError as error:
        said = str(error)
    proposed = remedies(case, said, tmp_path)
    assert proposed, said
    for what, proposal in proposed.items():
        try:
            proposal.check(tmp_path)
        except DataError as error:
            pytest.fail(f"{said}\n{what} does not help: {error}")


TOLD = {
    ("qwen3", "multi-turn"): ["one row per learned turn"],
    ("gpt_oss", "multi-turn"): ["one row per learned turn"],
    ("mistral_v3", "system"): ["what the chat template's prompt has there"],
    ("mistral_nemo", "system, multi-turn"): ["one row per learned", "prompt has there"],
    ("gpt_oss", "call with a thought"): ["one row per learned turn", "prompt has there"],
    ("r1", "multi-turn"): ["one row per learned turn", "differently from the chat template's own"],
    ("phi3", "multi-turn"): [],
    ("llama3", "multi-turn"): [],
}


@pytest.mark.parametrize("name, kind", TOLD)
def test_what_is_not_as_the_whole_conversation_has_it_is_told(name, kind, tmp_path):
    encoded = Case(name, KINDS[kind]).encode(tmp_path)
    changes = [change.what for change in encoded.report.changes]
    assert len(changes) == len(TOLD[name, kind])
    for words in TOLD[name, kind]:
        assert any(words in change for change in changes)


@pytest.mark.parametrize("kind", ["multi-turn", "system, multi-turn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_answer_alone_is_learned_behind_its_prompt(name, kind, tmp_path):
    *_, last = KINDS[kind]
    learned = [written(FAMILIES[name], last)]
    Case(name, KINDS[kind], {"loss_on": "last_assistant"}, learned).check(tmp_path)


def test_what_is_left_out_by_name_is_counted(tmp_path):
    settings = {"ignore": ("developer.content", "message.reasoning_content")}
    messages = [DEVELOPER, USER, say("It is so.", **REASONED)]
    for name in ("gemma3", "qwen2_5"):
        report = Case(name, messages, settings).encode(tmp_path).report
        assert sorted(change.what.split(",")[0] for change in report.changes) == [
            "hold developer.content",
            "hold message.reasoning_content",
        ]
