"""Plain, tokenized and unfitting rows: completions, BOS and EOS, lengths, lost rows."""

import json

import pytest
import tokenizers
import transformers

from lorax.data.chat.masks import encode_text
from lorax.data.chat.tokenizer import load_tokenizer
from lorax.data.preview import render_example
from tests.data.masked import pieces_with


def byte_tokenizer(*, merges=(), bos=True, **named):
    """A tokenizer with one token per byte, plus `merges`, ``<s>`` and ``</s>``."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    symbols += [left + right for left, right in merges]
    model = tokenizers.models.BPE({s: i for i, s in enumerate(symbols)}, list(merges))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", **named}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_completion_is_supervised_and_bos_and_eos_are_added(encode_with):
    tokenizer = byte_tokenizer()
    encoded = encode_with([{"prompt": "2+2=", "completion": "4"}], tokenizer)
    expected = [("<s>2+2=", False), ("4</s>", True)]
    assert render_example(encoded, 0, tokenizer) == expected
    assert encoded.report.mask_source == "completion"


def test_token_across_the_border_of_the_completion_is_supervised(encode_with):
    tokenizer = byte_tokenizer(merges=[("Ġ", "w"), ("a", "b")])
    row = {"prompt": "a ", "completion": "wa"}
    assert pieces_with(encode_with, row, tokenizer) == [("<s>a", False), (" wa</s>", True)]
    row = {"prompt": "xa", "completion": "b"}
    assert pieces_with(encode_with, row, tokenizer) == [("<s>x", False), ("ab</s>", True)]


def test_eos_is_appended_once_and_not_learned_if_so_said(encode_with):
    tokenizer = byte_tokenizer()
    row = {"prompt": "q", "completion": "a</s>"}
    assert pieces_with(encode_with, row, tokenizer) == [("<s>q", False), ("a</s>", True)]
    pieces = pieces_with(
        encode_with, {"prompt": "q", "completion": "a"}, tokenizer, train_on_eos="none"
    )
    assert pieces == [("<s>q", False), ("a", True), ("</s>", False)]


def test_tokenizer_that_adds_eos_itself_gets_no_second_one(encode_with):
    tokenizer = byte_tokenizer()
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    row = {"prompt": "q", "completion": "a"}
    assert pieces_with(encode_with, row, tokenizer) == [("<s>q", False), ("a</s>", True)]


ADDS = {"bos": "<s> $A", "bos and eos": "<s> $A </s>", "eos": "$A </s>", "nothing": "$A"}


@pytest.mark.parametrize("text", ["q", "<s>q", "q</s>", "q</s> ", " q\n", "</s>", "é"])
@pytest.mark.parametrize("adds", ADDS)
def test_a_text_that_is_continued_begins_as_the_rows_that_begin_with_it(encode_with, adds, text):
    tokenizer = byte_tokenizer()
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=ADDS[adds], special_tokens=ids
    )
    prompt = encode_text(tokenizer, text)
    rows = [{"prompt": text, "completion": "a"}, {"text": text + "a"}]
    for row in rows:
        tokens = encode_with([row], tokenizer, loss_on="all").row(0)[0].tolist()
        assert tokens == [*prompt, *tokenizer.encode("a</s>", add_special_tokens=False)]


CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
PLAIN = {"prompt": "q", "completion": "a"}
TALK = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
ALPACA = {"instruction": "q", "output": "a"}
LONG = {"prompt": "q" * 99, "completion": "a"}


@pytest.mark.parametrize(
    "rows, template, kinds",
    [
        ([PLAIN], True, ("text",)),
        ([PLAIN], False, ("text",)),
        ([CHAT], True, ("chat",)),
        ([TALK], True, ("chat",)),
        ([PLAIN, TALK, PLAIN], True, ("chat", "text")),
        ([ALPACA], True, ("chat",)),
        ([ALPACA], False, ("alpaca",)),
        ([{"input_ids": [5, 6], "labels": [-100, 6]}], True, ("tokens",)),
        ([TALK, LONG], True, ("chat",)),  # what is dropped is not trained on
    ],
)
def test_the_kinds_of_the_rows_that_are_kept_are_told(encode_with, rows, template, kinds):
    tokenizer = byte_tokenizer()
    if template:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
    settings = {"max_seq_length": 200 if ALPACA in rows else 90, "overlong": "drop"}
    assert encode_with(rows, tokenizer, **settings).report.kinds == kinds


def test_plain_text_without_an_eos_token_is_refused(encode_with):
    tokenizer = byte_tokenizer(eos_token=None)
    row = {"prompt": "q", "completion": "a"}
    with pytest.raises(ValueError, match="tokenizer has no eos_token"):
        encode_with([row], tokenizer)
    pieces = pieces_with(encode_with, row, tokenizer, train_on_eos="none")
    assert pieces == [("<s>q", False), ("a", True)]


def test_text_is_learned_whole(encode_with):
    tokenizer = byte_tokenizer()
    pieces = pieces_with(encode_with, {"text": "abc"}, tokenizer, loss_on="all")
    assert pieces == [("<s>", False), ("abc</s>", True)]


def test_first_token_is_never_supervised(encode_with):
    tokenizer = byte_tokenizer(bos=False)
    assert pieces_with(encode_with, {"text": "abc"}, tokenizer, loss_on="all")[0] == ("a", False)
    encoded = encode_with([{"input_ids": [5, 6], "labels": [5, 6]}], tokenizer)
    assert encoded.supervised.tolist() == [False, True]


@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant", "completion"])
def test_alpaca_becomes_prompt_and_completion_where_there_is_none(encode_with, loss_on):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (prompt, _), learned = pieces_with(encode_with, row, byte_tokenizer(), loss_on=loss_on)
    assert learned == ("3</s>", True)
    assert prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    (prompt, _), _ = pieces_with(
        encode_with, {**row, "input": ""}, byte_tokenizer(), loss_on=loss_on
    )
    assert "### Input" not in prompt


def test_slow_tokenizer_is_refused(encode_with):
    tokenizer = transformers.ByT5Tokenizer()
    assert not tokenizer.is_fast
    with pytest.raises(ValueError, match="ByT5Tokenizer is a slow tokenizer"):
        encode_with([{"prompt": "q", "completion": "a"}], tokenizer)


def test_text_and_unlabelled_tokens_need_loss_on_all(encode_with):
    for row in ({"text": "abc"}, {"input_ids": [1, 2, 3]}):
        with pytest.raises(ValueError, match=r"rows.jsonl:1: .* set data\.loss_on: all"):
            encode_with([row], byte_tokenizer())


def test_labels_of_tokenized_rows_decide(encode_with):
    rows = [{"input_ids": [7, 8, 9], "labels": [-100, -100, 9]}]
    encoded = encode_with(rows, byte_tokenizer())
    assert encoded.tokens.tolist() == [7, 8, 9]
    assert encoded.supervised.tolist() == [False, False, True]
    assert (encoded.report.format, encoded.report.mask_source) == ("tokenized", "labels")


def test_token_outside_of_the_vocabulary_is_refused(encode_with):
    tokenizer = byte_tokenizer()
    rows = [{"input_ids": [1, 2]}, {"input_ids": [1, 300]}]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: token id 300 is outside .* of 300"):
        encode_with(rows, tokenizer, vocab_size=300, loss_on="all")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: token id -1 is outside"):
        encode_with([{"input_ids": [3, -1]}], tokenizer, loss_on="all")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: token id 257 is outside"):
        encode_with([{"prompt": "q", "completion": "a"}], tokenizer, vocab_size=257)


def test_overlong_rows_are_refused_truncated_or_dropped(encode_with):
    rows = [{"prompt": "q", "completion": "a" * n} for n in (3, 20, 30)]
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"2 of 3 rows are longer .*: 10; .*rows.jsonl:2 has 23 t"):
        encode_with(rows, tokenizer, max_seq_length=10)
    cut = encode_with(rows, tokenizer, max_seq_length=10, overlong="truncate")
    assert cut.lengths.tolist() == [6, 10, 10]
    assert cut.report.rows_truncated == 2
    assert render_example(cut, 1, tokenizer) == [("<s>q", False), ("a" * 8, True)]
    kept = encode_with(rows, tokenizer, max_seq_length=10, overlong="drop")
    assert (kept.report.rows_read, kept.report.rows_kept) == (3, 1)
    assert kept.report.rows_dropped_overlong == 2


def test_row_as_long_as_allowed_fits(encode_with):
    rows = [{"prompt": "q", "completion": "a" * 7}]
    assert encode_with(rows, byte_tokenizer(), max_seq_length=10).lengths.tolist() == [10]


def test_label_of_the_first_token_does_not_count(encode_with):
    rows = [{"input_ids": [5, 6], "labels": [5, -100]}]
    with pytest.raises(ValueError, match="1 of 1 rows have no supervised token"):
        encode_with(rows, byte_tokenizer())


def test_rows_without_a_supervised_token_are_refused_or_dropped(encode_with):
    rows = [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q" * 20, "completion": "a"},
    ]
    tokenizer = byte_tokenizer()
    settings = {"max_seq_length": 10, "overlong": "truncate"}
    with pytest.raises(
        ValueError, match=r"1 of 2 rows have no supervised.*truncated.*rows.jsonl:2"
    ):
        encode_with(rows, tokenizer, **settings)
    kept = encode_with(rows, tokenizer, unsupervised="drop", **settings)
    assert kept.report.rows_dropped_unsupervised == 1
    assert kept.report.rows_truncated == 1
    assert len(kept) == 1


@pytest.mark.parametrize("settings", [{"overlong": "drop"}, {"overlong": "truncate"}])
def test_losing_every_row_is_refused(encode_with, settings):
    rows = [{"prompt": "q" * 20, "completion": "a"}] * 2
    with pytest.raises(ValueError, match=r"none of 2 rows is left.*rows.jsonl:1"):
        encode_with(rows, byte_tokenizer(), max_seq_length=10, unsupervised="drop", **settings)


def test_tokenizer_saved_in_a_directory_is_loaded(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("hi é").input_ids == tokenizer("hi é").input_ids
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "of_no_one", None])
@pytest.mark.parametrize("dtype", ["auto", "torch.float16", "float23", "float16", None, 3])
def test_a_tokenizer_does_not_depend_on_the_dtype_of_its_model(tmp_path, key, dtype, model_type):
    import torch  # noqa: F401 - which transformers asks for a dtype of this name

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = {key: dtype} | ({} if model_type is None else {"model_type": model_type})
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("hi é").input_ids == tokenizer("hi é").input_ids
    assert type(loaded) is transformers.TokenizersBackend


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="cannot load its tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match=r"gives no token for a text; needed is a tokenizer\.json"):
        load_tokenizer(str(tmp_path))
