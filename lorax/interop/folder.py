"""The files of a Hugging Face checkpoint: finding them, on disk or on the hub, and writing them."""

import contextlib
import difflib
import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np

from lorax.config.model import ModelConfig
from lorax.interop.safetensors import TensorEntry, read_headers, save_tensors
from lorax.system.files import (
    MAX_INDEX_BYTES,
    CheckpointError,
    read_json,
    refuse_nul,
    refuse_occupied,
    write_folder,
)
from lorax.system.hub import explain_hub
from lorax.system.wording import clip, describe, explain, kind_of, show

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHT_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that are copied with the weights, in addition to generation_config.json."""

_SETTINGS = (CONFIG_FILE, GENERATION_FILE, INDEX_FILE, *TOKENIZER_FILES)
"""Files that describe a model on the hub, without its weights."""


def expand(name: str | Path) -> Path:
    """Returns the path of a user's input, its ``~`` replaced.

    Raises:
        CheckpointError: If no path can have this name.
    """
    refuse_nul(name)
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or of no user
        raise CheckpointError(f"{clip(str(name))}: no such folder: {explain(error)}") from error
    return path


def resolve_base(model: ModelConfig, *, weights: bool = True) -> Path:
    """Returns the local folder of a run's base model; see `resolve_checkpoint`."""
    key = "model.name_or_path"
    return resolve_checkpoint(model.name_or_path, model.revision, weights=weights, key=key)


def fetch_weights(model: ModelConfig, folder: Path) -> Path:
    """Returns the folder of a run's base model with its weights, fetching them if needed.

    Args:
        model: The run's settings.
        folder: From `resolve_base` without weights. For a model on the hub it lists the files of
            the weights, and its name is their commit.

    Raises:
        CheckpointError: If they cannot be fetched.
    """
    if expand(model.name_or_path).exists():
        return folder
    commit = folder.name if folder.parent.name == "snapshots" else model.revision
    try:
        return _fetch(model.name_or_path, commit, (*_SETTINGS, *_weight_files(folder)))
    except CheckpointError as error:
        raise CheckpointError(f"model.name_or_path: {error}") from error


def resolve_checkpoint(
    path_or_id: str | Path, revision: str | None = None, *, weights: bool = True, key: str = ""
) -> Path:
    """Returns the local folder of a checkpoint, fetching it from the Hugging Face hub if needed.

    A path that exists is used as it is, without the network. Only the configuration, the tokenizer
    and the safetensors files that the model needs are fetched from the hub.

    Args:
        path_or_id: A folder, or a hub id such as ``Qwen/Qwen3-0.6B``.
        revision: Branch, tag or commit on the hub.
        weights: Whether the weights are needed too, or only configuration and tokenizer.
        key: The setting, option or file that names it, for errors.

    Raises:
        CheckpointError: If it is neither, or `revision` is given for a folder.
    """
    try:
        name = str(path_or_id)
        path = expand(path_or_id)
        if not path.exists():
            return _fetch_checkpoint(name, revision, weights)
        if not path.is_dir():
            raise CheckpointError(f"{path} is a file; give the folder that holds {CONFIG_FILE}")
        if revision is not None:
            raise CheckpointError(
                f"{path} is a folder: revision={show(revision)} is for hub ids only"
            )
        return path
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}" if key else str(error)) from error


def _fetch_checkpoint(name: str, revision: str | None, weights: bool) -> Path:
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or "\\" in name:
        raise CheckpointError(f"{clip(name)}: no such folder{_near(Path(name))}")
    folder = _fetch(name, revision, _SETTINGS)
    return _fetch(name, revision, (*_SETTINGS, *_weight_files(folder))) if weights else folder


def _weight_files(folder: Path) -> list[str]:
    """Returns the files with the weights of a model on the hub, by its settings alone."""
    index = folder / INDEX_FILE
    return sorted(set(_weight_map(index).values())) if index.exists() else [WEIGHT_FILE]


def _fetch(name: str, revision: str | None, files: Iterable[str]) -> Path:
    """Fetches files of a model by the hub's library, and returns their folder."""
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files))
        )
    except Exception as error:  # of its own, of the system's, or of the library below
        raise CheckpointError(
            f"{clip(name)}: no such folder{_near(Path(name))}, and not to be had from the Hugging "
            "Face hub: "
            f"{explain_hub(error, revision) or clip(describe(error), 300)}"
        ) from error


def _near(path: Path) -> str:
    """Returns where a missing folder was expected, and a suggestion, as a part of a sentence."""
    where = "" if path.is_absolute() or str(path).startswith("~") else f" in {Path.cwd()}"
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [entry.name for entry in path.expanduser().parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return where + (f" (did you mean {path.parent / near[0]}?)" if near else "")


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the contents of config.json.

    Raises:
        CheckpointError: If there is none, or `files.read_json` refuses it.
    """
    path = directory / CONFIG_FILE
    adapter = directory / "adapter_config.json"
    if not path.exists() and adapter.exists():
        named = read_json(adapter).get("base_model_name_or_path")
        base = shlex.quote(named) if isinstance(named, str) and named else "BASE"
        which = (
            base if base != "BASE" else f"that it was trained on (BASE; {adapter.name} names none)"
        )
        raise CheckpointError(
            f"{directory} holds a LoRA adapter, not a model; load the base model {which}, then "
            f"give it the adapter: `lorax generate {base} --adapter {shlex.quote(str(directory))}"
            "`, model.adapter in a config, or lorax.load_adapter"
        )
    return read_json(_inside(directory, path))


def find_tensors(directory: Path) -> dict[str, TensorEntry]:
    """Returns every tensor of a checkpoint with its file, checked against the index.

    Raises:
        CheckpointError: If there are no safetensors, both a single file and an index, an index
            naming a file outside the folder or an absent one, an index that disagrees with the
            files, or a file that `files.read_headers` refuses.
    """
    single = directory / WEIGHT_FILE
    index = directory / INDEX_FILE
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{directory} holds {WEIGHT_FILE} and {INDEX_FILE}; remove the one that is stale"
        )
    if index.exists():
        return _find_indexed(directory, index)
    if single.exists():
        return read_headers([_inside(directory, single)], packed=True)
    raise CheckpointError(f"{directory} holds no {WEIGHT_FILE}{_other_weights(directory)}")


def _find_indexed(directory: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = _weight_map(_inside(directory, index))
    shards = {name: directory / name for name in dict.fromkeys(weight_map.values())}
    for name, path in shards.items():
        if not path.exists():
            raise CheckpointError(f"{index} lists {clip(name)}, which does not exist; fetch it")
    entries = read_headers((_inside(directory, path) for path in shards.values()), packed=True)
    for tensor, shard in weight_map.items():
        if tensor not in entries or entries[tensor].file != shards[shard]:
            raise CheckpointError(f"{index} places {tensor} in {shard}, which lacks it")
    for tensor, entry in entries.items():
        if tensor not in weight_map:
            raise CheckpointError(f"{entry.file} holds {tensor}, which {index} does not list")
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        got = "an empty one" if weight_map == {} else kind_of(weight_map)
        raise CheckpointError(f"{index}: weight_map must be an object of tensor: file, got {got}")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
        if not plain or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map[{show(tensor)}] must be the bare name of a .safetensors file "
                f"in the same folder, got {show(name)}"
            )
    return weight_map


def _inside(directory: Path, path: Path) -> Path:
    """Returns `path`, unless it is a link that leaves the folder (or the hub's own cache)."""
    roots = [directory.resolve()]
    folder = directory.absolute()
    if folder.parent.name == "snapshots":
        # The hub's cache: snapshots/<commit>/<file> links to blobs/<hash>.
        roots.append((folder.parent.parent / "blobs").resolve())
    try:
        target = path.resolve()
    except RuntimeError:  # which Python raises for it
        raise CheckpointError(f"{path} is a link to itself; copy the file") from None
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{path} is a link to {target}, outside {directory}; copy the file")
    return path


def _other_weights(directory: Path) -> str:
    """Returns the remedy for weights of another kind."""
    for pattern in ("*.bin", "*.bin.index.json", "*.pth", "*.pt"):
        found = sorted(p.name for p in directory.glob(pattern))
        if found:
            return (
                f", only {found[0]}: pickles can run code and are never loaded. Convert it once "
                "with AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) of transformers"
            )
    found = sorted(p.name for p in directory.glob("*.gguf"))
    if found:
        return f", only {found[0]}: fetch the original safetensors instead of GGUF"
    return "; fetch the checkpoint's safetensors files"


def write_checkpoint(
    tensors: Iterable[tuple[str, np.ndarray]],
    config: Mapping[str, Any],
    directory: str | Path,
    *,
    max_shard_bytes: int = 5 * 2**30,
    source_directory: str | Path | None = None,
    files: Mapping[str, str | Path | None] | None = None,
) -> Path:
    """Writes named tensors and a config.json as a checkpoint, holding one shard at a time.

    Args:
        tensors: Names and contiguous arrays as in the files; consumed once.
        config: Contents of config.json.
        directory: A path that does not exist, or an empty folder.
        max_shard_bytes: Size above which a new file is begun; a larger tensor has its own.
        source_directory: See `save_model`.
        files: See `save_model`.

    Returns:
        The folder.

    Raises:
        ValueError: If `directory` holds something, or a name comes twice.
    """
    directory = Path(directory)
    files = files or {}
    refuse_occupied(directory)
    if source_directory is not None and not Path(source_directory).is_dir():
        raise CheckpointError(f"{source_directory} (source_directory) is no folder")
    with write_folder(directory) as folder:
        _write_shards(tensors, folder, max_shard_bytes)
        _write_json(folder / CONFIG_FILE, dict(config))
        for name in (GENERATION_FILE, *TOKENIZER_FILES) if source_directory else ():
            source = Path(source_directory or "") / name
            if source.is_file() and name not in files:
                shutil.copyfile(source, folder / name)
        for name, given in files.items():
            if isinstance(given, Path):
                shutil.copyfile(given, folder / name)
            elif given is not None:
                (folder / name).write_text(given, encoding="utf-8")
    return directory


def _write_shards(
    tensors: Iterable[tuple[str, np.ndarray]], folder: Path, max_shard_bytes: int
) -> None:
    shards: list[list[str]] = []
    total = 0
    for shard in _group(tensors, max_shard_bytes):
        twice = [name for names in shards for name in names if name in shard]
        if twice:
            raise ValueError(f"{twice[0]} is given twice")
        save_tensors(shard, folder / f"{len(shards)}.part")
        shards.append(list(shard))
        total += sum(value.nbytes for value in shard.values())
    # The number of shards is part of each one's name, and is known only now.
    if len(shards) == 1:
        (folder / "0.part").rename(folder / WEIGHT_FILE)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{index}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX_FILE, index)


def _group(
    tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, value in tensors:
        if shard and size + value.nbytes > max_bytes:
            yield shard
            shard = {}
            size = 0
        if name in shard:
            raise ValueError(f"{name} is given twice")
        shard[name] = np.ascontiguousarray(value)
        size += value.nbytes
    yield shard


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
