"""Which tokens of a conversation are supervised: prefixes, generation blocks, markers."""

from typing import Any

import numpy as np
import pytest

from lorax.data.preview import render_example
from tests.chats import (
    CHATML,
    DROPS_THINKING,
    GENERATION,
    LLAMA3,
    MARKERS,
    NO_STOP,
    STOP_OUTSIDE,
    TWO_TURNS,
    byte_tokenizer,
)
from tests.data.masked import pieces_with

OPENING = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


BETWEEN = "\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"


def _supervised_text(encode_with, row, tokenizer, **settings):
    return [text for text, flag in pieces_with(encode_with, row, tokenizer, **settings) if flag]


def test_assistant_turns_are_supervised_up_to_their_stop_token(encode_with):
    assert pieces_with(encode_with, {"messages": TWO_TURNS}, byte_tokenizer(CHATML)) == [
        (OPENING, False),
        ("hello<|im_end|>", True),
        (BETWEEN, False),
        ("ciao<|im_end|>", True),
        ("\n", False),
    ]


def test_mask_counted_by_hand(encode_with):
    encoded = encode_with([{"messages": TWO_TURNS[:2]}], byte_tokenizer(CHATML))
    # im_start user \n hi im_end \n = 1+4+1+2+1+1; im_start assistant \n = 1+9+1; hello im_end; \n
    assert encoded.supervised.tolist() == [False] * 21 + [True] * 6 + [False]
    assert encoded.report.supervised_tokens == 6
    assert encoded.report.tokens == 28
    assert encoded.report.format == "messages"
    assert encoded.report.mask_source == "prefix"


@pytest.mark.parametrize("loss_on", ["last_assistant", "completion"])
@pytest.mark.parametrize("template", [CHATML, GENERATION, STOP_OUTSIDE])
def test_only_the_last_turn_is_supervised_if_asked(encode_with, loss_on, template):
    tokenizer = byte_tokenizer(template)
    found = _supervised_text(encode_with, {"messages": TWO_TURNS}, tokenizer, loss_on=loss_on)
    assert found == ["ciao<|im_end|>"]


def test_loss_on_all_supervises_all_but_the_first_token(encode_with):
    tokenizer = byte_tokenizer(CHATML)
    encoded = encode_with([{"messages": TWO_TURNS}], tokenizer, loss_on="all")
    assert encoded.supervised.tolist() == [False] + [True] * (len(encoded.tokens) - 1)
    assert encoded.report.mask_source == "all"


@pytest.mark.parametrize("template", [CHATML, GENERATION, STOP_OUTSIDE])
@pytest.mark.parametrize(
    ("train_on_eos", "expected"),
    [
        ("turn", ["hello<|im_end|>", "ciao<|im_end|>"]),
        ("last", ["hello", "ciao<|im_end|>"]),
        ("none", ["hello", "ciao"]),
        ("all", ["<|im_end|>", "hello<|im_end|>", "<|im_end|>", "ciao<|im_end|>"]),
    ],
)
def test_stop_tokens_are_supervised_as_train_on_eos_says(
    encode_with, template, train_on_eos, expected
):
    row, tokenizer = {"messages": TWO_TURNS}, byte_tokenizer(template)
    assert _supervised_text(encode_with, row, tokenizer, train_on_eos=train_on_eos) == expected


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("train_on_eos", ["turn", "last", "none", "all"])
@pytest.mark.parametrize(
    ("template", "stop"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>"), (STOP_OUTSIDE, "<|im_end|>")],
)
def test_the_stop_tokens_that_are_learned_are_told(
    encode_with, template, stop, loss_on, train_on_eos
):
    tokenizer = byte_tokenizer(template)
    settings = {"loss_on": loss_on, "train_on_eos": train_on_eos}
    report = encode_with([{"messages": TWO_TURNS}], tokenizer, **settings).report
    learned = () if train_on_eos == "none" else (tokenizer.convert_tokens_to_ids(stop),)
    assert report.stop_ids == learned


def test_stop_tokens_of_plain_and_of_tokenized_rows_are_told(encode_with):
    tokenizer = byte_tokenizer()
    end, other = map(tokenizer.convert_tokens_to_ids, ("</s>", "<|eot|>"))
    assert encode_with([{"prompt": "a", "completion": "b"}], tokenizer).report.stop_ids == (end,)
    none = encode_with([{"prompt": "a", "completion": "b"}], tokenizer, train_on_eos="none")
    assert none.report.stop_ids == ()
    tokens = [5, 6, other, 7, end, 8]  # one ends what is supervised, one does not, one is no target
    row = {"input_ids": tokens, "labels": [-100, 6, other, -100, -100, 8]}
    assert encode_with([row], tokenizer).report.stop_ids == (other,)


def test_template_that_writes_bos_gets_no_second_one(encode_with):
    tokenizer = byte_tokenizer(LLAMA3)
    encoded = encode_with([{"messages": TWO_TURNS}], tokenizer)
    assert (encoded.tokens == tokenizer.bos_token_id).sum() == 1
    assert encoded.tokens[0] == tokenizer.bos_token_id
    assert [t for t, flag in render_example(encoded, 0, tokenizer) if flag] == [
        "hello<|eot|>",
        "ciao<|eot|>",
    ]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GENERATION, STOP_OUTSIDE, DROPS_THINKING])
def test_tokens_before_the_last_turn_are_the_prompt_of_inference(encode_with, template):
    tokenizer = byte_tokenizer(template)
    encoded = encode_with([{"messages": TWO_TURNS}], tokenizer, loss_on="last_assistant")
    prompt: Any = tokenizer.apply_chat_template(TWO_TURNS[:-1], add_generation_prompt=True)
    first = int(np.argmax(encoded.supervised))
    assert encoded.tokens[:first].tolist() == prompt["input_ids"]


def test_generation_mask_is_that_of_transformers(encode_with):
    tokenizer = byte_tokenizer(GENERATION)
    encoded = encode_with([{"messages": TWO_TURNS}], tokenizer)
    theirs: Any = tokenizer.apply_chat_template(TWO_TURNS, return_assistant_tokens_mask=True)
    assert encoded.tokens.tolist() == theirs["input_ids"]
    assert encoded.supervised.tolist() == [bool(flag) for flag in theirs["assistant_masks"]]
    assert encoded.report.mask_source == "generation"


def test_stop_token_behind_the_generation_block_is_added(encode_with):
    tokenizer = byte_tokenizer(STOP_OUTSIDE)
    encoded = encode_with([{"messages": TWO_TURNS}], tokenizer)
    theirs: Any = tokenizer.apply_chat_template(TWO_TURNS, return_assistant_tokens_mask=True)
    mask = np.asarray(theirs["assistant_masks"], bool)
    ends = np.flatnonzero(mask[:-1] & ~mask[1:]) + 1
    mask[ends] = True
    assert encoded.supervised.tolist() == mask.tolist()


def test_two_blocks_in_one_turn_need_one_stop_token(encode_with):
    split = GENERATION.replace(
        "{% generation %}{{ m['content'] + '<|im_end|>' }}",
        "{% generation %}{{ m['reasoning_content'] }}{% endgeneration %}{{ '|' }}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}",
    )
    turns = [dict(message) for message in TWO_TURNS]
    turns[1]["reasoning_content"], turns[3]["reasoning_content"] = "he", "ci"
    row, tokenizer = {"messages": turns}, byte_tokenizer(split)
    expected = ["he", "hello<|im_end|>", "ci", "ciao<|im_end|>"]
    assert _supervised_text(encode_with, row, tokenizer) == expected
    with pytest.raises(ValueError, match=r"4 \{% generation %\} blocks for 2 assistant turns"):
        encode_with([row], tokenizer, loss_on="last_assistant")


def test_neighbouring_blocks_are_one_turn(encode_with):
    split = GENERATION.replace(
        "{% generation %}{{ m['content'] + '<|im_end|>' }}",
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% generation %}{{ '<|im_end|>' }}",
    )
    row, tokenizer = {"messages": TWO_TURNS}, byte_tokenizer(split)
    assert _supervised_text(encode_with, row, tokenizer, loss_on="last_assistant") == [
        "ciao<|im_end|>"
    ]


def test_generation_blocks_that_mark_nothing_are_refused(encode_with):
    template = GENERATION.replace("m['role'] == 'assistant'", "m['role'] == 'model'")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* blocks mark nothing"):
        encode_with([{"messages": TWO_TURNS}], byte_tokenizer(template))


def _thinking():
    turns = [dict(message) for message in TWO_TURNS]
    turns[1]["content"] = "<think>mm</think>hello"
    return {"messages": turns}


def _all_supervised(encoded, tokenizer):
    rows = [render_example(encoded, i, tokenizer) for i in range(len(encoded))]
    return [[text for text, flag in row if flag] for row in rows]


@pytest.mark.parametrize("settings", [{}, MARKERS])
def test_turns_that_a_template_rewrites_become_rows_of_their_own(encode_with, settings):
    tokenizer = byte_tokenizer(DROPS_THINKING)
    encoded = encode_with([_thinking(), {"messages": TWO_TURNS}], tokenizer, **settings)
    assert _all_supervised(encoded, tokenizer) == [
        ["<think>mm</think>hello<|im_end|>"],
        ["ciao<|im_end|>"],
        ["hello<|im_end|>", "ciao<|im_end|>"],
    ]
    assert render_example(encoded, 1, tokenizer)[0] == (
        f"{OPENING}hello<|im_end|>{BETWEEN}",
        False,
    )
    report = encoded.report
    assert (report.rows_read, report.rows_kept) == (2, 3)
    (change,) = report.changes
    assert change.rows == 1 and "one row per learned turn" in change.what
    assert change.first.endswith("rows.jsonl:1")


@pytest.mark.parametrize("turn", [1, 3])
def test_each_row_of_a_rewritten_turn_is_what_inference_sees(encode_with, turn):
    tokenizer = byte_tokenizer(DROPS_THINKING)
    encoded = encode_with([_thinking()], tokenizer)
    messages = _thinking()["messages"][:turn]
    prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    tokens, supervised = encoded.row(turn // 2)
    assert tokens[: int(np.argmax(supervised))].tolist() == prompt["input_ids"]


def test_a_thought_that_is_not_learned_and_left_out_is_named(encode_with):
    row, tokenizer = _thinking(), byte_tokenizer(DROPS_THINKING)
    with pytest.raises(ValueError, match=r"leaves out the assistant's thinking of messages\[1\]"):
        encode_with([row], tokenizer, loss_on="last_assistant")
    settings = {"loss_on": "last_assistant", "ignore": ["assistant.thinking"]}
    assert _supervised_text(encode_with, row, tokenizer, **settings) == ["ciao<|im_end|>"]


def test_markers_give_the_mask_of_the_prefixes(encode_with):
    tokenizer = byte_tokenizer(CHATML)
    by_prefix = encode_with([{"messages": TWO_TURNS}], tokenizer)
    by_marker = encode_with([{"messages": TWO_TURNS}], tokenizer, **MARKERS)
    np.testing.assert_array_equal(by_marker.supervised, by_prefix.supervised)
    assert by_marker.report.mask_source == "markers"


def test_marker_of_the_next_assistant_turn_ends_a_turn(encode_with):
    row = {"messages": [TWO_TURNS[0], TWO_TURNS[1], TWO_TURNS[3]]}
    found = _supervised_text(encode_with, row, byte_tokenizer(CHATML), **MARKERS)
    assert found == ["hello<|im_end|>", "ciao<|im_end|>"]


@pytest.mark.parametrize("key", ["instruction_part", "response_part"])
def test_marker_that_matches_nothing_is_named(encode_with, key):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: data.{key} '### No:' is not in"):
        encode_with(
            [{"messages": TWO_TURNS}], byte_tokenizer(CHATML), **{**MARKERS, key: "### No:"}
        )


def test_marker_inside_a_message_is_refused(encode_with):
    messages = [{"role": "user", "content": "say <|im_start|>assistant\n!"}, TWO_TURNS[1]]
    with pytest.raises(ValueError, match=r"response_part occurs 2 times .* 1 assistant turns"):
        encode_with([{"messages": messages}], byte_tokenizer(CHATML), **MARKERS)


def test_markers_cannot_bound_a_tool_turn(encode_with):
    messages = [*TWO_TURNS[:2], {"role": "tool", "content": "42"}, TWO_TURNS[3]]
    with pytest.raises(ValueError, match="a tool turn after an assistant turn"):
        encode_with([{"messages": messages}], byte_tokenizer(CHATML), **MARKERS)


def test_markers_with_loss_on_all_are_refused(encode_with):
    with pytest.raises(ValueError, match=r"no effect with data\.loss_on: all"):
        encode_with([{"messages": TWO_TURNS}], byte_tokenizer(CHATML), loss_on="all", **MARKERS)


def test_turn_without_stop_token_is_refused(encode_with):
    row, tokenizer = {"messages": TWO_TURNS}, byte_tokenizer(NO_STOP)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: learned turn 1 of 2 ends without") as info:
        encode_with([row], tokenizer)
    assert "never learn to stop" in str(info.value)
    assert "train_on_eos: none" in str(info.value)
    found = _supervised_text(encode_with, row, tokenizer, train_on_eos="none")
    assert found == ["hello\n", "ciao\n"]


def test_assistant_first_is_refused_by_prefixes_only(encode_with):
    row = {"messages": TWO_TURNS[1:]}
    with pytest.raises(ValueError, match=r"messages\[0\] is an assistant turn"):
        encode_with([row], byte_tokenizer(CHATML))
    found = _supervised_text(encode_with, row, byte_tokenizer(GENERATION))
    assert found == ["hello<|im_end|>", "ciao<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_eos_is_learned_although_it_is_the_pad_token(encode_with, template):
    stop = "<|im_end|>" if template is CHATML else "<|eot|>"
    tokenizer = byte_tokenizer(template, eos_token=stop, pad_token=stop)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = encode_with([{"messages": TWO_TURNS}], tokenizer)
    assert encoded.tokens[encoded.supervised].tolist().count(tokenizer.pad_token_id) == 2


def test_characters_of_several_bytes_stay_whole(encode_with):
    messages = [{"role": "user", "content": "ñ"}, {"role": "assistant", "content": "né 🙂 日本"}]
    tokenizer = byte_tokenizer(CHATML)
    encoded = encode_with([{"messages": messages}], tokenizer)
    assert render_example(encoded, 0, tokenizer)[1] == ("né 🙂 日本<|im_end|>", True)
    assert encoded.report.supervised_tokens == len("né 🙂 日本".encode()) + 1


@pytest.mark.parametrize("template", [CHATML, STOP_OUTSIDE])
def test_white_space_tokens_are_supervised_where_offsets_are_trimmed(encode_with, template):
    tokenizer = byte_tokenizer(template, trim_offsets=True)
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "x\n  y "}]
    found = _supervised_text(encode_with, {"messages": messages}, tokenizer)
    assert found == ["x\n  y <|im_end|>"]


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "completion"])
@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_assistant_turns_of_the_prompt_are_not_learned(encode_with, loss_on, template):
    row = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}
    found = _supervised_text(encode_with, row, byte_tokenizer(template), loss_on=loss_on)
    assert found == ["ciao<|im_end|>"]
