"""Tokenizers: the ids are those of the folder's own files, and SentencePiece is the oracle."""

import contextlib
import io
import itertools
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

import lorax
from lorax.config.data import DataConfig
from lorax.data.chat.tokenizer import load_tokenizer, tokenize_texts
from lorax.data.encode import load_encoded_dataset
from lorax.data.reading.rows import DataError
from lorax.interop.export_files import companion_files
from lorax.interop.folder import write_checkpoint
from tests.real import asset

ROOT = Path(__file__).parents[2]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = {**NAMED, "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
SENTENCES = [
    "the cat sat on the mat and the dog ran to the tree",
    "a cat and a dog: one sat, the other ran   and   ran",
    "user assistant system the answer is 42, not 4711 or 12",
    "there the then them tree three  the  cat's mat, the dog's tree",
]
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


def write_folder(folder, *, backend=None, model=None, model_type="llama", **settings):
    """Writes a tokenizer's folder and returns its path."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    return str(folder)


def ids_of(tokenizer, texts):
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def warns():
    return pytest.warns(UserWarning, match="AutoTokenizer of transformers gives others")


# --- Llama 2's kind ----------------------------------------------------------------------------


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


# --- The real one ------------------------------------------------------------------------------


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


# --- Other classes that are built anew ---------------------------------------------------------


def byte_level(*before, **settings):
    """A byte-level tokenizer with a few merges and `before` in front of its pre-tokenizer."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a, b in itertools.product("0123456789", repeat=2)]
    vocab = {piece: i for i, piece in enumerate([*symbols, *map("".join, pairs), "<|end|>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, **settings)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return backend


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


# --- Files -------------------------------------------------------------------------------------


def test_a_pointer_beside_a_whole_tokenizer_json_does_not_matter(tmp_path):
    folder = write_folder(tmp_path, backend=byte_level(), tokenizer_class="GPT2Tokenizer")
    expected = load_tokenizer(folder).encode("in 12")
    for name in ("tokenizer.model", "tokenizer.model.v3", "vocab.json", "merges.txt"):
        (tmp_path / name).write_text(POINTER)
    (tmp_path / "tokenizer").mkdir()
    assert load_tokenizer(folder).encode("in 12") == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_pointer_in_the_place_of_a_file_that_is_read_is_refused(tmp_path, name):
    folder = write_folder(tmp_path, backend=byte_level(), tokenizer_class="GPT2Tokenizer")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt"])
def test_a_pointer_without_a_tokenizer_json_is_refused(tmp_path, name):
    folder = write_folder(tmp_path, **LLAMA)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(folder)


VALUES = {
    "text": "4096",
    "a number": 7,
    "a fraction": -1.5,
    "true": True,
    "null": None,
    "a list": [],
    "a list of text": ["a"],
    "a list of numbers": [1],
    "an object": {},
    "an object of a number": {"content": 7},
    "long": "x" * 20_000,
}
TOKEN = {"text", "null", "long"}
FIELDS = {
    "model_max_length": {"a number", "null"},
    "add_bos_token": {"true", "null"},
    "add_eos_token": {"true", "null"},
    "add_prefix_space": {"true", "null"},
    "clean_up_tokenization_spaces": {"true", "null"},
    "legacy": {"true", "null"},
    "split_special_tokens": {"true", "null"},
    "eos_token": TOKEN,
    "bos_token": TOKEN,
    "unk_token": TOKEN,
    "pad_token": TOKEN,
    "added_tokens_decoder": {"an object"},
    "additional_special_tokens": {"null", "a list", "a list of text", "an object"},
    "extra_special_tokens": {"null", "a list", "a list of text", "an object"},
    "chat_template": {"text", "null", "long", "a list"},
    "tokenizer_class": TOKEN,
    "padding_side": set(),
    "truncation_side": set(),
    "model_input_names": {"a list", "a list of text"},
    "auto_map": {
        "a list",
        "a list of text",
        "a list of numbers",
        "an object",
        "an object of a number",
    },
}


@pytest.mark.filterwarnings("ignore:.*AutoTokenizer of transformers gives others")
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_type_is_refused_by_name(tmp_path, field):
    backend = byte_level()
    for name, value in VALUES.items():
        settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", field: value}
        folder = write_folder(tmp_path, backend=backend, **settings)
        if name in FIELDS[field]:
            try:
                assert load_tokenizer(folder).encode("12")
            except ValueError as error:  # of transformers, which refuses some of these
                assert "cannot load its tokenizer" in str(error)
            continue
        with pytest.raises(ValueError) as refused:
            load_tokenizer(folder)
        said = str(refused.value)
        assert re.search(rf"tokenizer_config\.json: {field} must be .*, got ", said), said
        assert len(said) < 400 + len(folder)


def test_all_wrong_fields_are_named_at_once(tmp_path):
    settings = {"model_max_length": [4096], "eos_token": 7, "add_bos_token": "false"}
    folder = write_folder(tmp_path, backend=byte_level(), **settings)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": 3}')
    with pytest.raises(ValueError) as refused:
        load_tokenizer(folder)
    assert str(refused.value) == (
        f"{folder}/tokenizer_config.json: model_max_length must be a number above 0, got [4096]; "
        'add_bos_token must be true, false or null, got "false"; eos_token must be a token\'s '
        f"text, an object with its content, or null, got 7. {folder}/special_tokens_map.json: "
        "pad_token must be a token's text, an object with its content, or null, got 3"
    )


def test_a_token_id_beyond_32_bits_is_refused(tmp_path):
    folder = write_folder(tmp_path, backend=byte_level())
    path = tmp_path / "tokenizer.json"
    read = json.loads(path.read_text())
    read["model"]["vocab"]["a"] = 2**31
    path.write_text(json.dumps(read))
    loaded = load_tokenizer(folder)
    assert tokenize_texts(loaded, ["12"], add_special_tokens=False)[0].ids.dtype == np.int32
    with pytest.raises(ValueError, match="the token id 2147483648, more than any model's"):
        tokenize_texts(loaded, ["12", "a"], add_special_tokens=False)


def test_a_real_length_is_any_number(tmp_path):
    for length in (4096, 1e30, 10**30, 1.0, None):
        folder = write_folder(tmp_path, backend=byte_level(), model_max_length=length)
        assert lorax.load_tokenizer(folder).encode("12")


def test_a_tokenizer_that_drops_characters_is_refused(tmp_path):
    """Without byte-level steps and unk_token, unknown characters vanish and all places shift."""
    folder = Path(shutil.copytree("examples/tiny/model", tmp_path / "model"))
    settings = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(settings | {"pre_tokenizer": None}))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho ho"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    config = DataConfig.model_validate({"train": str(tmp_path / "rows.jsonl")})
    with pytest.raises(DataError, match=r"rows.jsonl:1.*makes no token of some characters"):
        load_encoded_dataset(config.train, config, load_tokenizer(str(folder)))
