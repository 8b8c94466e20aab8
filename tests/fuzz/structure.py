"""Documents with keys, kept as they are written: keys may stand twice, numbers need not be ones."""

import json
import re
import struct
from typing import Any


class Pairs(list):
    """An object: a list of [key, value], in order; a key may stand twice."""

    def get(self, key: str) -> Any:
        return next((value for name, value in self if name == key), None)


class Raw(str):
    """Text that stands in the place of a value, as it is."""


def plain(document: Any) -> Any:
    """Returns objects as dicts."""
    if isinstance(document, Pairs):
        return {key: plain(value) for key, value in document}
    return [plain(item) for item in document] if isinstance(document, list) else document


def keyed(value: Any) -> Any:
    """Returns dicts as `Pairs`, and ``{"raw": text}`` as what it stands for."""
    if isinstance(value, dict):
        if value.keys() == {"raw"}:
            return Raw(value["raw"])
        return Pairs([key, keyed(item)] for key, item in value.items())
    return [keyed(item) for item in value] if isinstance(value, list) else value


def parse(text: str) -> Any:
    """Returns a JSON document."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def dump(document: Any) -> str:
    """Returns JSON, on one line."""
    if isinstance(document, Raw):
        return str(document)
    if isinstance(document, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {dump(v)}" for k, v in document) + "}"
    if isinstance(document, list):
        return "[" + ", ".join(map(dump, document)) + "]"
    return json.dumps(document)


def dump_yaml(document: Any, indent: str = "") -> str:
    """Returns YAML: sections as lines, and JSON within them."""
    if not isinstance(document, Pairs) or not document or len(indent) > 2:
        return f" {dump(document)}\n"
    lines = (f"{indent}{_yaml_key(k)}:{dump_yaml(v, indent + '  ')}" for k, v in document)
    return "\n" * bool(indent) + "".join(lines)


def _yaml_key(key: str) -> str:
    return key if key.isidentifier() else json.dumps(key)


def split_tensors(data: bytes) -> tuple[Any, bytes]:
    """Returns the header of a safetensors file, and its data."""
    size = struct.unpack("<Q", data[:8])[0]
    return parse(data[8 : 8 + size].decode()), data[8 + size :]


def join_tensors(header: Any, data: bytes) -> bytes:
    """Returns a safetensors file."""
    text = dump(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def read(name: str, data: bytes) -> Any:
    """Returns what is in a file with keys, told by its name."""
    if name.endswith(".safetensors"):
        return split_tensors(data)[0]
    text = data.decode()
    if name.endswith(".jsonl"):
        return [parse(line) for line in text.splitlines()]
    if name.endswith(".yaml"):
        return _read_yaml(text)
    return parse(text)


def write(name: str, document: Any, before: bytes) -> bytes:
    """Returns the bytes of a file with keys; of tensors, the data stay what they were."""
    if name.endswith(".safetensors"):
        return join_tensors(document, split_tensors(before)[1])
    if name.endswith(".jsonl") and isinstance(document, list):
        text = "".join(dump(row) + "\n" for row in document)
    elif name.endswith(".yaml"):
        text = dump_yaml(document).lstrip(" ")
    else:
        text = dump(document)
    return text.encode("utf-8", "surrogatepass")


def _read_yaml(text: str) -> Any:
    from ruamel.yaml import YAML

    return keyed(YAML(typ="safe", pure=True).load(text))


_RUN = re.compile(r"(.{1,12}?)\1{30,}", re.DOTALL)


def fold(value: Any) -> Any:
    """Returns JSON in which long repetitions are told by what is repeated, and how often."""
    if isinstance(value, dict):
        return {key: fold(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [fold(item) for item in value]
    if not isinstance(value, str) or not (run := _RUN.search(value)):
        return value
    count = len(run[0]) // len(run[1])
    return {"folded": [value[: run.start()], run[1], count, fold(value[run.end() :])]}


def unfold(value: Any) -> Any:
    """Returns what `fold` was given."""
    if isinstance(value, dict) and value.keys() == {"folded"}:
        before, repeated, count, after = value["folded"]
        return before + repeated * count + unfold(after)
    if isinstance(value, dict):
        return {key: unfold(item) for key, item in value.items()}
    return [unfold(item) for item in value] if isinstance(value, list) else value
