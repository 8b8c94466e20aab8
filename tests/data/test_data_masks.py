"""Which tokens of a conversation are supervised: prefixes, generation blocks, markers."""

import json
from typing import Any

import numpy as np
import pytest

from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset
from lorax.data.preview import render_example
from tests.chats import (
    CHATML,
    DROPS_THINKING,
    GENERATION,
    HEADER,
    LLAMA3,
    MARKERS,
    NO_STOP,
    PROMPT,
    STOP_OUTSIDE,
    TWO_TURNS,
    byte_tokenizer,
)

OPENING = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
BETWEEN = "\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def encode(tmp_path):
    """Encodes rows under given settings; returns the dataset."""

    def run(rows, tokenizer, vocab_size=None, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(train=(DataSource(path=str(path)),), **settings)
        return load_encoded_dataset(config.train, config, tokenizer, vocab_size=vocab_size)

    return run


def _pieces(encode, row, tokenizer, **settings):
    return render_example(encode([row], tokenizer, **settings), 0, tokenizer)


def _supervised_text(encode, row, tokenizer, **settings):
    return [text for text, flag in _pieces(encode, row, tokenizer, **settings) if flag]


def test_assistant_turns_are_supervised_up_to_their_stop_token(encode):
    assert _pieces(encode, {"messages": TWO_TURNS}, byte_tokenizer(CHATML)) == [
        (OPENING, False),
        ("hello<|im_end|>", True),
        (BETWEEN, False),
        ("ciao<|im_end|>", True),
        ("\n", False),
    ]


def test_mask_counted_by_hand(encode):
    encoded = encode([{"messages": TWO_TURNS[:2]}], byte_tokenizer(CHATML))
    # im_start user \n hi im_end \n = 1+4+1+2+1+1; im_start assistant \n = 1+9+1; hello im_end; \n
    assert encoded.supervised.tolist() == [False] * 21 + [True] * 6 + [False]
    assert encoded.report.supervised_tokens == 6
    assert encoded.report.tokens == 28
    assert encoded.report.format == "messages"
    assert encoded.report.mask_source == "prefix"


@pytest.mark.parametrize("loss_on", ["last_assistant", "completion"])
@pytest.mark.parametrize("template", [CHATML, GENERATION, STOP_OUTSIDE])
def test_only_the_last_turn_is_supervised_if_asked(encode, loss_on, template):
    tokenizer = byte_tokenizer(template)
    found = _supervised_text(encode, {"messages": TWO_TURNS}, tokenizer, loss_on=loss_on)
    assert found == ["ciao<|im_end|>"]


def test_loss_on_all_supervises_all_but_the_first_token(encode):
    tokenizer = byte_tokenizer(CHATML)
    encoded = encode([{"messages": TWO_TURNS}], tokenizer, loss_on="all")
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
def test_stop_tokens_are_supervised_as_train_on_eos_says(encode, template, train_on_eos, expected):
    row, tokenizer = {"messages": TWO_TURNS}, byte_tokenizer(template)
    assert _supervised_text(encode, row, tokenizer, train_on_eos=train_on_eos) == expected


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("train_on_eos", ["turn", "last", "none", "all"])
@pytest.mark.parametrize(
    ("template", "stop"),
    [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot|>"), (STOP_OUTSIDE, "<|im_end|>")],
)
def test_the_stop_tokens_that_are_learned_are_told(encode, template, stop, loss_on, train_on_eos):
    tokenizer = byte_tokenizer(template)
    settings = {"loss_on": loss_on, "train_on_eos": train_on_eos}
    report = encode([{"messages": TWO_TURNS}], tokenizer, **settings).report
    learned = () if train_on_eos == "none" else (tokenizer.convert_tokens_to_ids(stop),)
    assert report.stop_ids == learned


def test_stop_tokens_of_plain_and_of_tokenized_rows_are_told(encode):
    tokenizer = byte_tokenizer()
    end, other = map(tokenizer.convert_tokens_to_ids, ("</s>", "<|eot|>"))
    assert encode([{"prompt": "a", "completion": "b"}], tokenizer).report.stop_ids == (end,)
    none = encode([{"prompt": "a", "completion": "b"}], tokenizer, train_on_eos="none")
    assert none.report.stop_ids == ()
    tokens = [5, 6, other, 7, end, 8]  # one ends what is supervised, one does not, one is no target
    row = {"input_ids": tokens, "labels": [-100, 6, other, -100, -100, 8]}
    assert encode([row], tokenizer).report.stop_ids == (other,)


def test_template_that_writes_bos_gets_no_second_one(encode):
    tokenizer = byte_tokenizer(LLAMA3)
    encoded = encode([{"messages": TWO_TURNS}], tokenizer)
    assert (encoded.tokens == tokenizer.bos_token_id).sum() == 1
    assert encoded.tokens[0] == tokenizer.bos_token_id
    assert [t for t, flag in render_example(encoded, 0, tokenizer) if flag] == [
        "hello<|eot|>",
        "ciao<|eot|>",
    ]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GENERATION, STOP_OUTSIDE, DROPS_THINKING])
def test_tokens_before_the_last_turn_are_the_prompt_of_inference(encode, template):
    tokenizer = byte_tokenizer(template)
    encoded = encode([{"messages": TWO_TURNS}], tokenizer, loss_on="last_assistant")
    prompt: Any = tokenizer.apply_chat_template(TWO_TURNS[:-1], add_generation_prompt=True)
    first = int(np.argmax(encoded.supervised))
    assert encoded.tokens[:first].tolist() == prompt["input_ids"]


def test_generation_mask_is_that_of_transformers(encode):
    tokenizer = byte_tokenizer(GENERATION)
    encoded = encode([{"messages": TWO_TURNS}], tokenizer)
    theirs: Any = tokenizer.apply_chat_template(TWO_TURNS, return_assistant_tokens_mask=True)
    assert encoded.tokens.tolist() == theirs["input_ids"]
    assert encoded.supervised.tolist() == [bool(flag) for flag in theirs["assistant_masks"]]
    assert encoded.report.mask_source == "generation"


def test_stop_token_behind_the_generation_block_is_added(encode):
    tokenizer = byte_tokenizer(STOP_OUTSIDE)
    encoded = encode([{"messages": TWO_TURNS}], tokenizer)
    theirs: Any = tokenizer.apply_chat_template(TWO_TURNS, return_assistant_tokens_mask=True)
    mask = np.asarray(theirs["assistant_masks"], bool)
    ends = np.flatnonzero(mask[:-1] & ~mask[1:]) + 1
    mask[ends] = True
    assert encoded.supervised.tolist() == mask.tolist()


def test_two_blocks_in_one_turn_need_one_stop_token(encode):
    split = GENERATION.replace(
        "{% generation %}{{ m['content'] + '<|im_end|>' }}",
        "{% generation %}{{ m['reasoning_content'] }}{% endgeneration %}{{ '|' }}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}",
    )
    turns = [dict(message) for message in TWO_TURNS]
    turns[1]["reasoning_content"], turns[3]["reasoning_content"] = "he", "ci"
    row, tokenizer = {"messages": turns}, byte_tokenizer(split)
    expected = ["he", "hello<|im_end|>", "ci", "ciao<|im_end|>"]
    assert _supervised_text(encode, row, tokenizer) == expected
    with pytest.raises(ValueError, match=r"4 \{% generation %\} blocks for 2 assistant turns"):
        encode([row], tokenizer, loss_on="last_assistant")


def test_neighbouring_blocks_are_one_turn(encode):
    split = GENERATION.replace(
        "{% generation %}{{ m['content'] + '<|im_end|>' }}",
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% generation %}{{ '<|im_end|>' }}",
    )
    row, tokenizer = {"messages": TWO_TURNS}, byte_tokenizer(split)
    assert _supervised_text(encode, row, tokenizer, loss_on="last_assistant") == ["ciao<|im_end|>"]


def test_generation_blocks_that_mark_nothing_are_refused(encode):
    template = GENERATION.replace("m['role'] == 'assistant'", "m['role'] == 'model'")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* blocks mark nothing"):
        encode([{"messages": TWO_TURNS}], byte_tokenizer(template))


def _thinking():
    turns = [dict(message) for message in TWO_TURNS]
    turns[1]["content"] = "<think>mm</think>hello"
    return {"messages": turns}


def _all_supervised(encoded, tokenizer):
    rows = [render_example(encoded, i, tokenizer) for i in range(len(encoded))]
    return [[text for text, flag in row if flag] for row in rows]


@pytest.mark.parametrize("settings", [{}, MARKERS])
def test_turns_that_a_template_rewrites_become_rows_of_their_own(encode, settings):
    tokenizer = byte_tokenizer(DROPS_THINKING)
    encoded = encode([_thinking(), {"messages": TWO_TURNS}], tokenizer, **settings)
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
def test_each_row_of_a_rewritten_turn_is_what_inference_sees(encode, turn):
    tokenizer = byte_tokenizer(DROPS_THINKING)
    encoded = encode([_thinking()], tokenizer)
    messages = _thinking()["messages"][:turn]
    prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    tokens, supervised = encoded.row(turn // 2)
    assert tokens[: int(np.argmax(supervised))].tolist() == prompt["input_ids"]


def test_a_thought_that_is_not_learned_and_left_out_is_named(encode):
    row, tokenizer = _thinking(), byte_tokenizer(DROPS_THINKING)
    with pytest.raises(ValueError, match=r"leaves out the assistant's thinking of messages\[1\]"):
        encode([row], tokenizer, loss_on="last_assistant")
    settings = {"loss_on": "last_assistant", "ignore": ["assistant.thinking"]}
    assert _supervised_text(encode, row, tokenizer, **settings) == ["ciao<|im_end|>"]


def test_markers_give_the_mask_of_the_prefixes(encode):
    tokenizer = byte_tokenizer(CHATML)
    by_prefix = encode([{"messages": TWO_TURNS}], tokenizer)
    by_marker = encode([{"messages": TWO_TURNS}], tokenizer, **MARKERS)
    np.testing.assert_array_equal(by_marker.supervised, by_prefix.supervised)
    assert by_marker.report.mask_source == "markers"


def test_marker_of_the_next_assistant_turn_ends_a_turn(encode):
    row = {"messages": [TWO_TURNS[0], TWO_TURNS[1], TWO_TURNS[3]]}
    found = _supervised_text(encode, row, byte_tokenizer(CHATML), **MARKERS)
    assert found == ["hello<|im_end|>", "ciao<|im_end|>"]


@pytest.mark.parametrize("key", ["instruction_part", "response_part"])
def test_marker_that_matches_nothing_is_named(encode, key):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: data.{key} '### No:' stands nowhere"):
        encode([{"messages": TWO_TURNS}], byte_tokenizer(CHATML), **{**MARKERS, key: "### No:"})


def test_marker_inside_a_message_is_refused(encode):
    messages = [{"role": "user", "content": "say <|im_start|>assistant\n!"}, TWO_TURNS[1]]
    with pytest.raises(ValueError, match=r"response_part stands 2 times .* 1 assistant turns"):
        encode([{"messages": messages}], byte_tokenizer(CHATML), **MARKERS)


def test_markers_cannot_bound_a_tool_turn(encode):
    messages = [*TWO_TURNS[:2], {"role": "tool", "content": "42"}, TWO_TURNS[3]]
    with pytest.raises(ValueError, match="a tool turn after an assistant turn"):
        encode([{"messages": messages}], byte_tokenizer(CHATML), **MARKERS)


def test_markers_with_loss_on_all_are_refused(encode):
    with pytest.raises(ValueError, match=r"no effect with data\.loss_on: all"):
        encode([{"messages": TWO_TURNS}], byte_tokenizer(CHATML), loss_on="all", **MARKERS)


def test_turn_without_stop_token_is_refused(encode):
    row, tokenizer = {"messages": TWO_TURNS}, byte_tokenizer(NO_STOP)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: learned turn 1 of 2 ends without") as info:
        encode([row], tokenizer)
    assert "never learn to stop" in str(info.value)
    assert "train_on_eos: none" in str(info.value)
    found = _supervised_text(encode, row, tokenizer, train_on_eos="none")
    assert found == ["hello\n", "ciao\n"]


def test_assistant_first_is_refused_by_prefixes_only(encode):
    row = {"messages": TWO_TURNS[1:]}
    with pytest.raises(ValueError, match=r"messages\[0\] is an assistant turn"):
        encode([row], byte_tokenizer(CHATML))
    found = _supervised_text(encode, row, byte_tokenizer(GENERATION))
    assert found == ["hello<|im_end|>", "ciao<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_eos_is_learned_although_it_is_the_pad_token(encode, template):
    stop = "<|im_end|>" if template is CHATML else "<|eot|>"
    tokenizer = byte_tokenizer(template, eos_token=stop, pad_token=stop)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = encode([{"messages": TWO_TURNS}], tokenizer)
    assert encoded.tokens[encoded.supervised].tolist().count(tokenizer.pad_token_id) == 2


def test_characters_of_several_bytes_stay_whole(encode):
    messages = [{"role": "user", "content": "ñ"}, {"role": "assistant", "content": "né 🙂 日本"}]
    tokenizer = byte_tokenizer(CHATML)
    encoded = encode([{"messages": messages}], tokenizer)
    assert render_example(encoded, 0, tokenizer)[1] == ("né 🙂 日本<|im_end|>", True)
    assert encoded.report.supervised_tokens == len("né 🙂 日本".encode()) + 1


@pytest.mark.parametrize("template", [CHATML, STOP_OUTSIDE])
def test_white_space_tokens_are_supervised_where_offsets_are_trimmed(encode, template):
    tokenizer = byte_tokenizer(template, trim_offsets=True)
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "x\n  y "}]
    found = _supervised_text(encode, {"messages": messages}, tokenizer)
    assert found == ["x\n  y <|im_end|>"]


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "completion"])
@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_assistant_turns_of_the_prompt_are_not_learned(encode, loss_on, template):
    row = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}
    found = _supervised_text(encode, row, byte_tokenizer(template), loss_on=loss_on)
    assert found == ["ciao<|im_end|>"]


def test_tools_and_tool_calls_reach_the_template(encode):
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
    pieces = _pieces(encode, row, tokenizer)
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
def test_tools_and_calls_that_the_template_leaves_out_are_refused(encode, row):
    row["messages"].insert(0, {"role": "user", "content": "hi"})
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .* leaves out .*(the tools|tool calls)"):
        encode([row], byte_tokenizer(CHATML))


def test_half_a_character_from_a_template_is_refused(encode):
    messages = [{"role": "user", "content": "hi", "name": "\ud800"}, TWO_TURNS[1]]
    template = CHATML.replace("m['content']", "(m['name'] or '') + m['content']")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the rendered conversation holds half"):
        encode([{"messages": messages}], byte_tokenizer(template))


def test_template_of_a_file_is_used(encode, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    row = {"messages": TWO_TURNS}
    found = _pieces(encode, row, byte_tokenizer(NO_STOP), chat_template=str(path))
    assert found == _pieces(encode, row, byte_tokenizer(CHATML))


def test_template_file_that_is_missing_or_empty_is_named(encode, tmp_path):
    row, path = {"messages": TWO_TURNS}, tmp_path / "none.jinja"
    with pytest.raises(ValueError, match=r"data.chat_template: .*none.jinja: No such file"):
        encode([row], byte_tokenizer(), chat_template=str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"none.jinja.*the file is empty"):
        encode([row], byte_tokenizer(), chat_template=str(path))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[9]['content'] }}", "has no element 9"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
    ],
)
def test_template_that_fails_says_on_which_row(encode, template, reason):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: the chat template fails .*{reason}"):
        encode([{"messages": TWO_TURNS}], byte_tokenizer(template))


def test_conversation_without_a_template_is_refused(encode):
    with pytest.raises(ValueError, match=r"tokenizer has no chat template; set data\.chat_templ"):
        encode([{"messages": TWO_TURNS}], byte_tokenizer())


@pytest.mark.parametrize("setting", ["chat_template", "markers"])
def test_chat_settings_on_plain_rows_are_refused(encode, tmp_path, setting):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    settings = MARKERS if setting == "markers" else {"chat_template": str(path)}
    with pytest.raises(ValueError, match="is for conversations, and this row"):
        encode([{"prompt": "q", "completion": "a"}], byte_tokenizer(), **settings)
