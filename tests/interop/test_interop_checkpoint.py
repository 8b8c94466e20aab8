"""Nothing doubtful is loaded: every bad checkpoint is refused by file, tensor and reason."""

import os
import shutil
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lorax.interop.load import load_model
from lorax.interop.safetensors import read_ahead, read_headers, read_tensors
from lorax.system.files import CheckpointError
from tests.interop.shards import split_into_shards, write_index
from tests.tiny import edit_json

Q0 = "model.layers.0.self_attn.q_proj.weight"


def edit_tensors(folder, change):
    """Rewrites model.safetensors after `change` has had its tensors."""
    path = folder / "model.safetensors"
    tensors = {name: value for _, name, value in read_tensors([path])}
    change(tensors)
    save_file(tensors, path)


def edit_config(folder, **settings):
    edit_json(folder / "config.json", **settings)


def test_sharded_and_single_files_load_the_same(original, folder):
    split_into_shards(folder)
    ours, single = load_model(folder), load_model(original)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(single))


def test_rotary_buffers_are_ignored(folder):
    extra = np.ones(4, np.float32)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: extra}))
    load_model(folder)


def test_a_head_equal_to_tied_embeddings_is_accepted(folder):
    edit_config(folder, tie_word_embeddings=True)

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(folder, copy)
    model = load_model(folder)
    assert ("lm_head",) not in {path[:1] for path, _ in nnx.to_flat_state(nnx.state(model))}


def set_value(name, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-1] = value

    return lambda folder: edit_tensors(folder, change)


def replace(name, value):
    return lambda folder: edit_tensors(folder, lambda t: t.update({name: value}))


def write_bytes(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_gguf(folder):
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")


def index_naming(file):
    def damage(folder):
        index = split_into_shards(folder)
        index["weight_map"][Q0] = file
        write_index(folder, index)

    return damage


def shard_missing(folder):
    split_into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_disagrees(folder):
    index = split_into_shards(folder)
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    write_index(folder, index)


def index_lists_too_little(folder):
    index = split_into_shards(folder)
    del index["weight_map"]["lm_head.weight"]
    write_index(folder, index)


def twice(folder):
    split_into_shards(folder)
    path = folder / "model-00002-of-00002.safetensors"
    tensors = {name: value for _, name, value in read_tensors([path])}
    save_file(tensors | {"lm_head.weight": np.ones((61, 32), np.float32)}, path)


def single_and_index(folder):
    shutil.copy(folder / "model.safetensors", folder / "kept")
    split_into_shards(folder)
    (folder / "kept").rename(folder / "model.safetensors")


def link_out(folder):
    path = folder / "model.safetensors"
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


GARBAGE = b"\x08\0\0\0\0\0\0\0notjson!" + b"\0" * 64


BAD = {
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop(Q0)),
        rf"model lacks {Q0}$",
    ),
    "many missing tensors": (
        lambda f: edit_config(f, num_hidden_layers=3),
        r"lacks model\.layers\.2\..* and 6 more tensors",
    ),
    "missing head": (
        lambda f: edit_tensors(f, lambda t: t.pop("lm_head.weight")),
        r"lacks lm_head\.weight; config\.json has tie_word_embeddings: false",
    ),
    "unexpected tensor": (
        replace("model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32)),
        r"model\.safetensors holds model\.layers\.0\.self_attn\.q_proj\.bias, which a llama model",
    ),
    "shape": (
        replace(Q0, np.ones((32, 31), np.float32)),
        rf"model\.safetensors: {Q0} has shape \(32, 31\); config\.json needs \(32, 32\)",
    ),
    "nan": (
        set_value(Q0, np.nan),
        rf"model\.safetensors: {Q0} holds values that are not finite",
    ),
    "infinity": (set_value("model.norm.weight", np.inf), r"model\.norm\.weight holds values that"),
    "integers": (
        replace(Q0, np.ones((32, 32), np.int8)),
        rf"{Q0} has dtype I8; lorax reads BF16, F16, F32: convert or dequantise",
    ),
    "float8": (
        replace(Q0, np.ones((32, 32), ml_dtypes.float8_e4m3fn)),
        rf"{Q0} has dtype F8_E4M3; lorax reads",
    ),
    "float64": (replace(Q0, np.ones((32, 32))), rf"{Q0} has dtype F64; lorax reads"),
    "truncated": (truncate, r"model\.safetensors is not a whole safetensors file .*truncated"),
    "empty file": (write_bytes("model.safetensors", b""), "is not a whole safetensors file"),
    "garbage header": (
        write_bytes("model.safetensors", GARBAGE),
        r"model\.safetensors is not a whole safetensors file",
    ),
    "header of 64 MiB": (
        write_bytes("model.safetensors", (2**26).to_bytes(8, "little") + b"{}"),
        r"its header would have 67,108,864 bytes, more than 16,777,216",
    ),
    "config that is deep": (write_bytes("config.json", b"[" * 10**5), r"config\.json is not JSON"),
    "config of many digits": (write_bytes("config.json", b"1" * 10**4), r"json is not JSON"),
    "config of 40 MB": (
        write_bytes("config.json", b" " * 40 * 10**6),
        r"config\.json .*it has 38 MiB",
    ),
    "more layers than there are": (
        lambda f: edit_config(f, num_hidden_layers=10**6),
        r"num_hidden_layers must be at most 1,000, got 1000000",
    ),
    "lfs pointer": (write_bytes("model.safetensors", LFS), "is a Git LFS pointer.*git lfs pull"),
    "lfs pointer as config": (
        write_bytes("config.json", LFS),
        r"config\.json is a Git LFS pointer",
    ),
    "web page": (write_bytes("model.safetensors", b"\n<!DOCTYPE html>"), "is a web page"),
    "web page as config": (write_bytes("config.json", b"<html>"), r"config\.json is a web page"),
    "config is no json": (write_bytes("config.json", b'{"a": '), r"config\.json is not JSON"),
    "config is no text": (write_bytes("config.json", b"\xff\xfe{}"), r"config\.json is not JSON"),
    "config is a list": (write_bytes("config.json", b"[]"), "must hold an object, got list"),
    "config key twice": (
        write_bytes("config.json", b'{"hidden_size": 1, "hidden_size": 2}'),
        "the key 'hidden_size' is given twice",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
    "adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "holds a LoRA adapter, not a model",
    ),
    "only a pickle": (only_pickle, r"no model\.safetensors, only pytorch_model\.bin: pickles"),
    "only gguf": (only_gguf, r"no model\.safetensors, only model-q4\.gguf"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "fetch the checkpoint's safe"),
    "single and index": (single_and_index, "remove the one that is stale"),
    "shard missing": (shard_missing, r"lists model-00002-of-00002\.safetensors, which does not"),
    "index disagrees": (index_disagrees, r"places lm_head\.weight in .*, which lacks it"),
    "index lists too little": (index_lists_too_little, r"holds lm_head\.weight, which .* not list"),
    "tensor twice": (twice, r"lm_head\.weight is in .*00001.* and in .*00002"),
    "index climbs": (index_naming("../x.safetensors"), "must be the bare name"),
    "index descends": (index_naming("a/x.safetensors"), "must be the bare name"),
    "index is absolute": (index_naming("/etc/x.safetensors"), "must be the bare name"),
    "index uses backslashes": (index_naming("..\\x.safetensors"), "must be the bare name"),
    "index names a pickle": (index_naming("pytorch_model.bin"), "must be the bare name"),
    "index names a number": (index_naming(3), "must be the bare name"),
    "index without map": (
        lambda f: (split_into_shards(f), write_index(f, {"metadata": {}})),
        "weight_map must be an object",
    ),
    "link out of the folder": (link_out, r"is a link to .*elsewhere\.safetensors, outside"),
    "tied head differs": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        r"lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "field": (
        lambda f: edit_config(f, hidden_akt="silu"),
        r"config\.json: hidden_akt='silu' is not",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused(case, folder):
    damage, message = BAD[case]
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)


def test_values_too_large_for_float16_are_refused(folder):
    set_value(Q0, 1e6)(folder)
    load_model(folder, dtype=jnp.bfloat16)
    with pytest.raises(CheckpointError, match=f"{Q0} overflows float16; load it as bfloat16"):
        load_model(folder, dtype=jnp.float16)


def test_a_header_that_begins_like_a_page_is_read(folder):
    # Its length, 15,392 bytes, is written as a blank and "<".
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].ljust(0x3C20)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    load_model(folder)


@pytest.fixture
def three_files(tmp_path):
    """Tensors of every dtype and odd shapes, over files; and the library's own reading of them."""
    draw = np.random.default_rng(0)
    dtypes, shapes = (np.float32, np.float16, ml_dtypes.bfloat16), ((), (0, 3), (7,), (129, 257))
    expected = {}
    for file in range(3):
        tensors = {
            f"{file}.{i}": np.asarray(draw.normal(size=shape)).astype(dtype)
            for i, (dtype, shape) in enumerate((d, s) for d in dtypes for s in shapes)
        }
        save_file(tensors, tmp_path / f"{file}.safetensors", metadata={"format": "pt"})
        expected |= load_file(tmp_path / f"{file}.safetensors")
    return sorted(tmp_path.glob("*.safetensors")), expected


def test_tensors_read_ahead_are_those_that_the_library_reads(three_files):
    files, expected = three_files
    entries = read_headers(files)
    found = [(name, value) for name, (value,) in read_ahead(entries, {})]
    order = [(entries[name].file, entries[name].offset) for name, _ in found]
    assert order == sorted(order)
    for values in (dict(found), {name: value for _, name, value in read_tensors(files)}):
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape)
            assert value.tobytes() == expected[name].tobytes()


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(three_files):
    files, _ = three_files
    entries = read_headers(files)
    os.truncate(files[1], files[1].stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{files[1]} was cut off while it was read"):
        list(read_ahead(entries, {}))
    assert not [t for t in threading.enumerate() if t.name.startswith("lorax-read")]
