"""Where a text begins and ends: BOS, stop tokens, and those that rows bring themselves."""

import pytest

from lorax.config.data import DataConfig
from lorax.data.preview import render_example
from lorax.data.reading.rows import DataError
from tests.chats import (
    CHATML,
    DROPS_THINKING,
    GENERATION,
    HEADER,
    LLAMA3,
    NO_STOP,
    PROMPT,
    STOP_OUTSIDE,
    TWO_TURNS,
    byte_tokenizer,
    changes,
    learned,
)
from tests.data.rows import ALWAYS_PROMPTS, ANSWER, TOOLS, USER, call, chat

DATED = CHATML.replace(
    "{% for m in messages %}",
    '{{ strftime_now("%d %b %Y") + "<|end|>" }}{% for m in messages %}',
    1,
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
    assert any(
        "differently from the chat template's own prompt" in what for what in changes(encoded)
    )
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


def test_the_date_is_that_of_the_setting(encode):
    encoded = encode([chat(*TWO_TURNS)], DATED, date="2026-11-30")
    assert render_example(encoded, 0, byte_tokenizer(DATED))[0][0].startswith("30 Nov 2026")
    assert encoded.report.date == "2026-11-30"
    assert encode([chat(*TWO_TURNS)]).report.date is None


def test_a_date_is_checked(encode):
    for wrong in ("30.11.2026", "2026-13-01", "today", ""):
        with pytest.raises(ValueError, match="needs a date as 2026-11-30"):
            DataConfig(train="a.jsonl", date=wrong)
