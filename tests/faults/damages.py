"""Hostile and broken files: how each is made, and what must be said of it."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

Q0 = "model.layers.0.self_attn.q_proj.weight"
LAST = "model.norm.weight"
A0, B0 = (f"base_model.model.{Q0.removesuffix('.weight')}.lora_{m}.weight" for m in "AB")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
PICKLE = b"cposix\nsystem\n(S'touch ran'\ntR."
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
GOOD = json.dumps(ROW) + "\n"

type Damage = Callable[[Path], object]


def edit_bytes(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Damage:
    """Returns what changes the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def put(content: bytes | str, name: str = "model.safetensors") -> Damage:
    """Returns what puts something else in the place of a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def edit_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Returns what changes the header of a safetensors file and leaves its data."""

    def work(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return edit_bytes(work)


def edit_tensors(change: Callable[[dict[str, Any]], object], name="model.safetensors") -> Damage:
    """Returns what changes the tensors of a file."""

    def work(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)

    return work


def edit_json(name: str = "config.json", **changes: Any) -> Damage:
    """Returns what changes fields of a JSON file."""

    def work(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return work


def set_last(value: float, name: str = LAST) -> Damage:
    """Returns what plants a number at the end of a tensor."""

    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-1] = value

    return edit_tensors(change)


def split(change: Callable[[dict[str, str]], object], extra: str | None = None) -> Damage:
    """Returns what makes two shards and an index of a file, and changes the index."""

    def work(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        first = {k: v for k, v in tensors.items() if k != Q0}
        second = {k: tensors[k] for k in (Q0, extra) if k}
        save_file(first, folder / "a.safetensors")
        save_file(second, folder / "b.safetensors")
        names = {k: "a.safetensors" for k in first} | {Q0: "b.safetensors"}
        index: Any = {"weight_map": names}
        change(names)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return work


def link_out(folder: Path) -> None:
    """Moves the weights out of the folder and leaves a link."""
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def rename(old: str, new: str) -> Damage:
    """Returns what gives a file another name."""
    return lambda folder: (folder / old).rename(folder / new)


def first_tensor(header: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry of a tensor in a header."""
    return header[Q0]


def many_tensors(header: dict[str, Any]) -> None:
    """Adds 300,000 empty tensors to a header."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header.update({f"t{i}": empty for i in range(300_000)})


def overlap(header: dict[str, Any]) -> None:
    """Lets two tensors have the same bytes."""
    entry = header["model.layers.1.self_attn.q_proj.weight"]
    entry["data_offsets"] = header[Q0]["data_offsets"]


NO_FILE = r"model\.safetensors is not a (whole )?safetensors file"
MODELS: dict[str, tuple[Damage, str]] = {
    "empty": (put(b""), NO_FILE),
    "cut in its length": (edit_bytes(lambda b: b[:4]), NO_FILE),
    "cut after its length": (edit_bytes(lambda b: b[:8]), NO_FILE),
    "cut in its header": (edit_bytes(lambda b: b[:200]), NO_FILE),
    "cut by a byte": (edit_bytes(lambda b: b[:-1]), NO_FILE),
    "a byte too many": (edit_bytes(lambda b: b + b"\0"), NO_FILE),
    "header of 2^63 bytes": (edit_bytes(lambda b: struct.pack("<Q", 2**63) + b[8:]), NO_FILE),
    "header of 2^62 bytes in 16": (put(struct.pack("<QQ", 2**62, 0)), NO_FILE),
    "header of 50 MB": (
        edit_header(lambda h: h.update(__metadata__={"x": "y" * 50 * 10**6})),
        NO_FILE,
    ),
    "300,000 tensors": (edit_header(many_tensors), NO_FILE),
    "header that is no JSON": (edit_bytes(lambda b: b[:8] + b"{nothing" + b[16:]), NO_FILE),
    "header that is deep": (put(struct.pack("<Q", 10**5) + b"[" * 10**5), NO_FILE),
    "unknown dtype": (edit_header(lambda h: first_tensor(h).update(dtype="F99")), NO_FILE),
    "dtype of codes": (
        edit_tensors(lambda t: t.update({Q0: np.ones((384, 384), np.int8)})),
        "dtype I8",
    ),
    "8-bit floats": (
        edit_tensors(lambda t: t.update({Q0: np.ones((384, 384), ml_dtypes.float8_e4m3fn)})),
        "dtype F8_E4M3",
    ),
    "shape that overflows": (
        edit_header(lambda h: first_tensor(h).update(shape=[2**40, 2**40])),
        NO_FILE,
    ),
    "negative shape": (edit_header(lambda h: first_tensor(h).update(shape=[-1, 384])), NO_FILE),
    "offsets that overlap": (edit_header(overlap), NO_FILE),
    "offsets reversed": (edit_header(lambda h: first_tensor(h)["data_offsets"].reverse()), NO_FILE),
    "offsets past the end": (
        edit_header(lambda h: first_tensor(h).update(data_offsets=[0, 2**40])),
        NO_FILE,
    ),
    "a pickle": (put(PICKLE + b"\0" * 64), NO_FILE),
    "a zip file": (put(b"PK\x03\x04" + b"\0" * 64), NO_FILE),
    "a web page": (put("<!DOCTYPE html><title>404"), "is a web page"),
    "a Git LFS pointer": (put(LFS), "Git LFS pointer.*git lfs pull"),
    "only a pickle": (rename("model.safetensors", "pytorch_model.bin"), "pickles can run code"),
    "tensor renamed": (edit_tensors(lambda t: t.update({Q0 + "s": t.pop(Q0)})), Q0),
    "tensor missing": (edit_tensors(lambda t: t.pop(LAST)), f"lacks {LAST}"),
    "tensor too many": (
        edit_tensors(lambda t: t.update(extra=np.ones(2, np.float32))),
        "holds extra",
    ),
    "tensor transposed": (
        edit_tensors(lambda t: t.update({Q0: np.ones((384, 383), np.float32)})),
        rf"{Q0} has shape \(384, 383\)",
    ),
    "NaN": (set_last(np.nan), f"{LAST} holds values that are not finite"),
    "infinity": (set_last(-np.inf), f"{LAST} holds values that are not finite"),
    "index that climbs": (split(lambda n: n.update({Q0: "../b.safetensors"})), "bare name"),
    "index that is absolute": (split(lambda n: n.update({Q0: "/tmp/b.safetensors"})), "bare name"),
    "index that names a pickle": (split(lambda n: n.update({Q0: "b.bin"})), "bare name"),
    "index without a shard": (split(lambda n: n.update({Q0: "c.safetensors"})), "does not exist"),
    "index without a tensor": (split(lambda n: n.pop(LAST)), f"holds {LAST}"),
    "index without names": (split(lambda n: n.clear()), "weight_map must be"),
    "tensor in two shards": (split(lambda n: None, extra=LAST), f"{LAST} is in"),
    "index cut off": (put('{"weight_map": {', "model.safetensors.index.json"), "remove the one"),
    "link out of the folder": (link_out, "is a link to"),
    "config: no heads": (edit_json(num_attention_heads=0), "config.json.*num_attention_heads"),
    "config: negative vocabulary": (edit_json(vocab_size=-1), "config.json.*vocab_size"),
    "config: width 0": (edit_json(hidden_size=0), "config.json.*hidden_size"),
    "config: a million layers": (edit_json(num_hidden_layers=10**6), "num_hidden_layers must be"),
    "config: more layers": (edit_json(num_hidden_layers=8), "lacks"),
    "config: unknown rope": (
        edit_json(rope_scaling={"rope_type": "wat", "factor": 2.0}),
        "config.json.*rope",
    ),
    "config: unknown model": (edit_json(model_type="mamba"), "config.json.*model_type"),
    "config: code of its own": (edit_json(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "config: deep": (put("[" * 10**6, "config.json"), "config.json is not JSON"),
    "config: a number of a million digits": (put("1" * 10**6, "config.json"), "is not JSON"),
    "config: a web page": (put("<html>", "config.json"), "config.json is a web page"),
    "config: a key twice": (put('{"a": 1, "a": 2}', "config.json"), "given twice"),
}
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS: dict[str, tuple[Damage, str]] = {
    "rank of another config": (edit_json(SETTINGS, r=8), r"needed \(8, 384\)"),
    "rank of B alone": (
        edit_tensors(lambda t: t.update({B0: np.ones((384, 3), np.float32)}), WEIGHTS),
        r"lora_B.weight has shape",
    ),
    "rank 0": (edit_json(SETTINGS, r=0), "adapter_config.json: r"),
    "rank in quotes": (edit_json(SETTINGS, r="8"), "adapter_config.json: r"),
    "alpha that is no number": (edit_json(SETTINGS, lora_alpha=float("nan")), "lora_alpha"),
    "alpha without end": (edit_json(SETTINGS, lora_alpha=1e308), "lora_alpha|finite"),
    "dropout 2": (edit_json(SETTINGS, lora_dropout=2.0), "lora_dropout"),
    "unknown field": (edit_json(SETTINGS, secret_sauce=1), "secret_sauce"),
    "unknown method": (edit_json(SETTINGS, peft_type="EVIL"), "peft_type must be LORA"),
    "DoRA": (edit_json(SETTINGS, use_dora=True), "lora_magnitude_vector"),
    "targets that never end matching": (
        edit_json(SETTINGS, target_modules=r"((a|[a-z_.0-9]+)+)+!"),
        "more than 2 s",
    ),
    "targets of another model": (edit_json(SETTINGS, target_modules=["wat"]), "'wat' matches no"),
    "NaN": (
        edit_tensors(lambda t: t.update({A0: np.full_like(t[A0], np.nan)}), WEIGHTS),
        "not finite",
    ),
    "tensor missing": (edit_tensors(lambda t: t.pop(A0), WEIGHTS), "lacks 1 tensors"),
    "only a pickle": (rename(WEIGHTS, "adapter_model.bin"), "is a pickle and is never loaded"),
}
UNREADABLE = "cannot load its tokenizer; needed is a tokenizer.json"
TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "a list": (put(b"[]", "tokenizer.json"), UNREADABLE),
    "nested deeply": (put(b"[" * 100_000, "tokenizer.json"), UNREADABLE),
    "Git LFS pointer": (
        put(b"version https://git-lfs.github.com/spec/v1\n", "tokenizer.json"),
        "tokenizer.json is a Git LFS pointer",
    ),
    "web page": (put(b"<!doctype html><p>", "tokenizer_config.json"), "is a web page"),
    "settings in a list": (put(b"[1]", "tokenizer_config.json"), "must hold an object, got list"),
    "no such model": (edit_json("tokenizer.json", model={"type": "EVIL"}), UNREADABLE),
    "vocabulary in a list": (
        edit_json("tokenizer.json", model={"type": "BPE", "vocab": [1], "merges": []}),
        UNREADABLE,
    ),
    "end token is a number": (
        edit_json("tokenizer_config.json", eos_token=7),
        "tokenizer_config.json: eos_token must be a token's text",
    ),
    "code of its own": (
        edit_json(
            "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["evil.T", None]},
            tokenizer_class="T",
        ),
        UNREADABLE,
    ),
}
TEMPLATES: dict[str, tuple[Damage, str]] = {
    name: (put(text, "chat.jinja"), pattern)
    for name, (text, pattern) in {
        "the class of a text": ("{{ ''.__class__.__mro__ }}", "rows.jsonl:1: .*unsafe"),
        "a system call": ("{{ cycler.__init__.__globals__.os.system('touch ran') }}", "unsafe"),
        "a loop in a loop": (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 3 s",
        ),
        "a text of 10^9": ("{{ 'a' * 10 ** 9 }}", "more memory"),
        "no syntax": ("{% for %}", "rows.jsonl:1: the chat template fails"),
        "an error of its own": ("{{ raise_exception('no') }}", "rows.jsonl:1: .*no"),
    }.items()
}


def line(text: str | bytes, pattern: str, **settings: Any):
    """Returns a broken file of rows: what it holds, what must be said, and the settings."""
    data = text if isinstance(text, bytes) else text.encode()
    return put(data, "rows.jsonl"), pattern, settings


def row(**changes: Any) -> str:
    """Returns a conversation whose first message is changed."""
    first = {"role": "user", "content": "a"} | changes
    return json.dumps({"messages": [first, ROW["messages"][1]]}) + "\n"


def tokens(ids: list[Any], **more: Any) -> str:
    """Returns a row of token ids."""
    return json.dumps({"input_ids": ids} | more) + "\n"


ALL = {"loss_on": "all"}
ROWS = {
    "broken line": line(GOOD + '{"messages": \n', r"rows.jsonl:2: invalid JSON"),
    "last line cut": line(GOOD * 2 + GOOD[:-9], r"rows.jsonl:3: invalid JSON"),
    "empty file": line("", "rows.jsonl: the file is empty"),
    "blank lines": line("\n \n", r"rows.jsonl: the file (is empty|holds no rows)"),
    "invalid UTF-8": line(GOOD.encode() + b'{"text": "\xff"}\n', "rows.jsonl:2: invalid UTF-8"),
    "half a surrogate": line(row(content="\ud800"), "rows.jsonl:1: .*surrogate"),
    "key twice": line('{"text": "a", "text": "b"}\n', "rows.jsonl:1: .*appears twice"),
    "wrong type": line(GOOD + row(content=3), "rows.jsonl:2: .*must be text"),
    "null": line('{"messages": null}\n', "rows.jsonl:1: .*null"),
    "missing field": line(row(content=None), "rows.jsonl:1: .*content is missing"),
    "a list": line("[1, 2]\n", "rows.jsonl:1: a row must be a JSON object"),
    "a number": line("7\n", "rows.jsonl:1: a row must be a JSON object"),
    "depth": line('{"a": ' + "[" * 10**5 + "\n", "rows.jsonl:1: invalid JSON"),
    "a Git LFS pointer": line(LFS, "rows.jsonl: .*git lfs pull"),
    "a web page": line("<!DOCTYPE html>", "rows.jsonl: this is an HTML page"),
    "a column of another kind": line('{"question": "a"}\n', "rows.jsonl:1: .*fit no format"),
    "mixed formats": line(GOOD + '{"text": "a"}\n', "rows.jsonl:2: "),
    "unknown role": line(row(role="bot"), "rows.jsonl:1: .*'bot'"),
    "empty answer": line(GOOD.replace('"b"', '" "'), "rows.jsonl:1: .*content is empty"),
    "only a prompt": line(GOOD.replace("assistant", "user"), "rows.jsonl:1: .*no assistant turn"),
    "no messages": line('{"messages": []}\n', "rows.jsonl:1: .*empty list"),
    "all rows masked": line(tokens([1, 2], labels=[-100, -100]) * 3, "3 of 3 rows have no superv"),
    "one token": line(tokens([1], labels=[1]), "rows.jsonl:1"),
    "a hundred times too long": line(row(content="word " * 6400), "rows.jsonl:1 has [0-9]+ tokens"),
    "id beyond the vocabulary": line(tokens([1, 512]), "rows.jsonl:1: token id 512", **ALL),
    "id below 0": line(tokens([1, -1]), "rows.jsonl:1: token id -1", **ALL),
    "id of 12 digits": line(tokens([1, 10**11]), "rows.jsonl:1: .*no token id", **ALL),
    "id with a fraction": line(tokens([1, 2.5]), r"rows.jsonl:1: input_ids\[1\]", **ALL),
    "labels of another length": line(tokens([1, 2], labels=[1]), "rows.jsonl:1: labels has 1"),
    "padding": line(tokens([1, 0], attention_mask=[1, 0]), "rows.jsonl:1: attention_mask", **ALL),
}
