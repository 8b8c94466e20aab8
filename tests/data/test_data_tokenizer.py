"""Tokenizers: the ids are those of the folder's own files, and SentencePiece is the oracle."""

import contextlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from lorax.data.chat.tokenizer import load_tokenizer
from lorax.interop.export_files import companion_files
from lorax.interop.folder import write_checkpoint
from tests.data.llama_tokenizer import LLAMA, NAMED, SENTENCES, byte_level, write_folder
from tests.real import asset

ROOT = Path(__file__).parents[2]


NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


WORDS = [*" ".join(SENTENCES).split()[:30], "é", "e\u0301", "漢字", "👍🏽", "▁", "\u00a0", "\x00"]


GAPS = ["", " ", " ", "  ", "   ", " " * 9, "\n", "\n\n", " \n ", "\t", "\r\n"]


def make_texts(specials=("<s>", "</s>"), count=200, *, led_by_a_word=False):
    """Texts of words, gaps and special tokens, most of which begin with a gap or a special."""
    draw, texts = random.Random(0), []
    parts = [*WORDS, *GAPS * 2, *specials * 6]
    while len(texts) < count:
        text = "".join(draw.choice(parts) for _ in range(draw.randint(1, 14)))
        texts.append(f"{draw.choice(WORDS[:30])}{text}" if led_by_a_word else text)
    fixed = (" a", "  a", "a  b", "</s>a", "</s> a", "</s>  a", "<s></s>", "<s> </s> <s>a", "\n a")
    return [*(() if led_by_a_word else fixed), *texts][:count]


def encode_by_stretches(model, texts, *, prefix="always"):
    """The reference: SentencePiece on each stretch between special tokens.

    SentencePiece knows no special tokens in a text. Llama's own code encodes each turn by itself,
    between the ids of <s> and </s>: each stretch has a dummy prefix. With ``prefix="first"`` only
    a stretch at the very beginning has one, as for the user-defined symbols of SentencePiece.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    whole = sentencepiece.SentencePieceProcessor(model_proto=model)
    proto.normalizer_spec.add_dummy_prefix = False
    bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in texts:
        ids = []
        for index, part in enumerate(re.split("(<s>|</s>|<unk>)", text)):
            if part in ("<s>", "</s>", "<unk>"):
                ids.append(whole.piece_to_id(part))
            else:
                ids += (whole if prefix == "always" or index == 0 else bare).encode(part)
        yield ids


@pytest.fixture(scope="module")
def model():
    """A tiny SentencePiece model with Llama 2's settings."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=written,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return written.getvalue()


def convert(model, prefix="always"):
    """Makes the tokenizer.json of a SentencePiece model, as transformers 4 wrote it.

    With ``prefix="always"`` as for ``legacy: true``, with ``"first"`` as for ``legacy: false``.
    """
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    scores = {p.piece: p.score for p in pieces if p.type == NORMAL}
    splits = [
        (-score, piece, piece[:i], piece[i:])
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {p.piece: i for i, p in enumerate(pieces)},
            [(left, right) for *_, left, right in sorted(splits)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if prefix == "always":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prefix, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return backend


def ids_of(tokenizer, texts):
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def warns():
    return pytest.warns(UserWarning, match="AutoTokenizer of transformers gives others")


@pytest.mark.parametrize("legacy", [True, False, None])
def test_ids_are_sentencepieces_whatever_transformers_makes_of_the_file(tmp_path, model, legacy):
    settings = LLAMA if legacy is None else {**LLAMA, "legacy": legacy}
    folder = write_folder(tmp_path, backend=convert(model), model=model, **settings)
    with warns():
        loaded = load_tokenizer(folder)
    texts = make_texts()
    expected = list(encode_by_stretches(model, texts))
    assert ids_of(loaded, texts) == expected
    rebuilt = transformers.AutoTokenizer.from_pretrained(folder)
    assert ids_of(rebuilt, texts) != expected  # else this test shows nothing


def test_a_prefix_at_the_beginning_only_is_kept_so(tmp_path, model):
    backend = convert(model, "first")
    folder = write_folder(tmp_path, backend=backend, model=model, **LLAMA, legacy=True)
    with warns():
        loaded = load_tokenizer(folder)
    texts = make_texts(led_by_a_word=True)
    expected = list(encode_by_stretches(model, texts, prefix="first"))
    assert ids_of(loaded, texts) == expected
    assert expected != list(encode_by_stretches(model, texts))
    texts = make_texts()  # of which the file folds the first space into the prefix
    assert ids_of(loaded, texts) == [backend.encode(t, add_special_tokens=False).ids for t in texts]


@pytest.mark.parametrize("legacy, prefix", [(True, "always"), (False, "first"), (None, "always")])
def test_a_sentencepiece_model_alone_gives_its_ids(tmp_path, model, legacy, prefix):
    settings = LLAMA if legacy is None else {**LLAMA, "legacy": legacy}
    with warns() if prefix == "always" else contextlib.nullcontext():
        loaded = load_tokenizer(write_folder(tmp_path, model=model, **settings))
    texts = make_texts(led_by_a_word=prefix == "first")
    assert ids_of(loaded, texts) == list(encode_by_stretches(model, texts, prefix=prefix))


def test_what_is_added_to_a_text_and_what_stands_for_it_stay(tmp_path, model):
    folder = write_folder(tmp_path, backend=convert(model), model=model, **LLAMA, legacy=True)
    with warns():
        loaded = load_tokenizer(folder)
    assert loaded.special_tokens_map == NAMED
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    text = "the  cat </s> é"
    assert loaded.encode(text) == [1, *ids_of(loaded, [text])[0]]
    assert loaded.decode(loaded.encode("the  cat\n é"), skip_special_tokens=True) == "the  cat\n é"


def test_named_tokens_that_only_the_class_knows_are_kept(tmp_path, model):
    folder = write_folder(tmp_path, backend=convert(model), tokenizer_class="LlamaTokenizer")
    with warns():
        assert load_tokenizer(folder).special_tokens_map == NAMED


def test_the_remedy_that_is_told_works(tmp_path, model):
    folder = write_folder(tmp_path, backend=convert(model), **LLAMA, legacy=True)
    with warns():
        loaded = load_tokenizer(folder)
    texts = make_texts()
    by_class = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ids_of(by_class, texts) == ids_of(loaded, texts)
    write_folder(tmp_path, **{**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast"})
    by_name = transformers.AutoTokenizer.from_pretrained(folder)
    assert ids_of(by_name, texts) == ids_of(loaded, texts)
    assert ids_of(load_tokenizer(folder), texts) == ids_of(loaded, texts)  # and nothing is told


def test_a_merged_model_carries_the_files_of_the_trained_ids(tmp_path, model):
    source = tmp_path / "base"
    write_folder(source, backend=convert(model), model=model, **LLAMA, legacy=False)
    tensors = [("weight", np.zeros(2, np.float32))]
    merged = write_checkpoint(tensors, {}, tmp_path / "merged", source_directory=source)
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (merged / name).read_bytes() == (source / name).read_bytes()
    shutil.copy(source / "config.json", merged)
    with warns():
        loaded = load_tokenizer(str(merged))
    texts = make_texts()
    assert ids_of(loaded, texts) == list(encode_by_stretches(model, texts))


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", None])
def test_a_merged_model_is_tokenized_by_transformers_as_it_was_trained(tmp_path, model, named):
    source = tmp_path / "base"
    settings = {**LLAMA, "legacy": False, "tokenizer_class": named}
    settings = {name: value for name, value in settings.items() if value is not None}
    write_folder(source, backend=convert(model), model=model, **settings)
    with warns() if named else contextlib.nullcontext():
        trained = load_tokenizer(str(source))
    files = companion_files(source, chat_template=None, stop_ids=None, card=None, tokenizer=trained)
    merged = write_checkpoint(
        [("weight", np.zeros(2, np.float32))],
        {},
        tmp_path / "merged",
        source_directory=source,
        files=files,
    )
    shutil.copy(source / "config.json", merged)
    texts = make_texts()
    served = transformers.AutoTokenizer.from_pretrained(merged)
    assert ids_of(served, texts) == ids_of(trained, texts)
    kept = json.loads((merged / "tokenizer_config.json").read_text())
    assert kept == settings | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_a_merged_model_keeps_the_named_tokens_that_only_the_class_knew(tmp_path, model):
    source, merged = tmp_path / "base", tmp_path / "merged"
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    write_folder(source, backend=convert(model), model=model, **settings)
    with warns():
        trained = load_tokenizer(str(source))
    assert trained.special_tokens_map == NAMED
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    files = companion_files(
        source, chat_template=template, stop_ids=None, card=None, tokenizer=trained
    )
    tensors = [("weight", np.zeros(2, np.float32))]
    write_checkpoint(tensors, {}, merged, source_directory=source, files=files)
    shutil.copy(source / "config.json", merged)
    served = transformers.AutoTokenizer.from_pretrained(merged)
    assert served.special_tokens_map == NAMED
    chat = [{"role": "user", "content": "a cat"}]
    assert served.apply_chat_template(chat, tokenize=False) == "<s>a cat</s>"
    kept = json.loads((merged / "tokenizer_config.json").read_text())
    assert kept == settings | NAMED | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_a_tokenizer_class_that_gives_the_trained_ids_is_kept(tmp_path):
    files = companion_files(
        ROOT / "examples" / "tiny" / "model",
        chat_template=None,
        stop_ids=None,
        card=None,
        tokenizer=load_tokenizer(str(ROOT / "examples" / "tiny" / "model")),
    )
    assert "tokenizer_config.json" not in files


@pytest.mark.slow
def test_a_tokenizer_in_the_hubs_cache_gives_its_files_ids_too(tmp_path, model):
    repository = tmp_path / "hub" / "models--owner--name"
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    write_folder(folder, backend=convert(model), **LLAMA, legacy=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    code = "import lorax; print(lorax.load_tokenizer('owner/name').encode('</s>  a'))"
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = next(encode_by_stretches(model, ["</s>  a"]))
    assert done.stdout.split("\n")[0] == str([1, *expected]), done.stderr


def rebuild_model(path):
    """Makes the SentencePiece model again from which a tokenizer.json of its kind was made.

    Pieces in the order of their ids, scores in the order of the merges, Llama 2's settings.
    """
    read = json.loads(path.read_text(encoding="utf-8"))["model"]
    pieces, merges = read["vocab"], read["merges"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    merged = [left + right for left, right in merges]
    rank = {piece: i for i, piece in enumerate(dict.fromkeys(merged))}
    # What the merges must be for a model to stand behind them: by score, every split of a piece.
    assert [rank[piece] for piece in merged] == sorted(rank[piece] for piece in merged)
    assert set(merges) == {
        (piece[:i], piece[i:])
        for piece in rank
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    }
    assert sorted(pieces.values()) == list(range(len(pieces)))
    proto = sentencepiece_model_pb2.ModelProto()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    for piece in sorted(pieces, key=pieces.__getitem__):
        score = -float(rank.get(piece, len(rank)))
        proto.pieces.add(piece=piece, score=score, type=kinds.get(piece, NORMAL))
    return proto.SerializeToString()


@pytest.mark.slow
def test_a_real_tokenizer_of_llama_2s_kind_gives_sentencepieces_ids():
    folder = asset("llama2")
    model = rebuild_model(folder / "tokenizer.json")
    with warns():
        loaded = load_tokenizer(str(folder))
    runs = [" " * count for count in range(1, 40)]
    texts = [*make_texts(), *runs, *(f"</s>{run}a" for run in runs)]
    expected = list(encode_by_stretches(model, texts))
    assert ids_of(loaded, texts) == expected
    rebuilt = ids_of(transformers.AutoTokenizer.from_pretrained(folder), texts)
    assert sum(a != b for a, b in zip(rebuilt, expected, strict=True)) > len(texts) / 4


def test_steps_that_another_class_replaces_are_the_files_too(tmp_path):
    # SmolLM2's tokenizer.json takes digits one by one; its class, GPT2Tokenizer, knows no such step
    backend = byte_level(pre_tokenizers.Digits(individual_digits=True))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}
    folder = write_folder(tmp_path, backend=backend, **settings)
    with warns():
        loaded = load_tokenizer(folder)
    texts = ["1234 56", "in 2024", *make_texts(("<|end|>",), 50)]
    assert ids_of(loaded, texts) == [backend.encode(text).ids for text in texts]
    assert ids_of(loaded, ["12"]) != ids_of(
        transformers.AutoTokenizer.from_pretrained(folder), ["12"]
    )


def test_a_class_that_follows_the_file_is_left_as_it_is_and_nothing_is_told(tmp_path):
    for trim in (True, False):  # which moves offsets alone
        backend = byte_level(trim_offsets=trim)
        settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}
        loaded = load_tokenizer(write_folder(tmp_path, backend=backend, **settings))
        assert type(loaded).__name__ == "GPT2Tokenizer"


def test_a_file_whose_model_comes_first_is_read_as_well(tmp_path, model):
    folder = write_folder(tmp_path, backend=convert(model), **LLAMA, legacy=True)
    path = tmp_path / "tokenizer.json"
    read = json.loads(path.read_text())
    path.write_text(json.dumps({"model": read.pop("model"), **read}))
    with warns():
        loaded = load_tokenizer(folder)
    texts = make_texts()
    assert ids_of(loaded, texts) == list(encode_by_stretches(model, texts))
