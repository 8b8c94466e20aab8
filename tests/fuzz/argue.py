"""Why it is right that a changed input was accepted: each reason is looked up, not assumed."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import seeds, structure
from tests.fuzz.compare import differences, leaves, numbers, put, second_reading
from tests.fuzz.edits import WORDS
from tests.fuzz.kinds import Case

type Argument = Callable[[Case, Path], str | None]


def argue(case: Case, folder: Path, out: str) -> str | None:
    """Returns why it is right that a case was accepted; None if nothing says so."""
    words = case.changed_words
    if {"--help", "-h", "--version"} & set(words):
        return "help was asked for"
    os.chdir(folder)
    try:
        return ARGUMENTS[case.kind](case, folder)
    finally:
        os.chdir("/")


# --- Configs ------------------------------------------------------------------------------------


def _of_config(case: Case, folder: Path) -> str | None:
    """A second YAML reader finds the same settings, with what overrides say in their place."""
    from lorax.config.run import load_config

    words = _overrides(case)
    taken = load_config("run.yaml", words).model_dump(mode="json")
    given = second_reading((folder / "run.yaml").read_text("utf-8-sig"))
    for word in words:
        key, _, value = word.partition("=")
        put(given, key.strip().split("."), second_reading(value))
    if next(differences(given, taken), None):
        return None
    if not all(math.isfinite(number) for number in numbers(taken)):
        return None
    return "the settings in force are those that a second YAML reader finds"


def _overrides(case: Case) -> list[str]:
    return [word for word in case.changed_words[2:] if "=" in word and word[0] != "-"]


# --- Rows, templates, tokenizers ----------------------------------------------------------------


def _of_rows(case: Case, folder: Path) -> str | None:
    """Every text of every row is found again, and the assistant's in what is learned."""
    rows = list(_read_rows(folder, case))
    rows = [row for row in rows if all(row[key] for key in _FLAGS & row.keys())]
    dataset, tokenizer = _encode(folder, case)
    if case.variant == "rows-ids":
        same = all(dataset.row(i)[0].tolist() == row["input_ids"] for i, row in enumerate(rows))
        return "the ids are those of the rows" if same else None
    if not _learns(dataset, tokenizer, rows, last_only=False):
        return None
    return "every text of the rows is found again, and the answers in what is learned"


def _learns(dataset: Any, tokenizer: Any, rows: list[dict[str, Any]], *, last_only: bool) -> bool:
    """Says whether every text of the rows stands in the dataset, and every answer is learned.

    A row may have become several, one for each of its turns.
    """
    if len(dataset) < len(rows):
        return False
    whole, learned = [], []
    for index in range(len(dataset)):
        ids, supervised = dataset.row(index)
        whole.append(tokenizer.decode(ids, skip_special_tokens=False))
        learned.append(tokenizer.decode(ids[supervised], skip_special_tokens=False))
    answers = [list(_answers(row))[-1 if last_only else 0 :] for row in rows]
    texts = (text for row in rows for text in _texts(row))
    is_in = lambda text, shown: any(text in each for each in shown)
    return all(is_in(text, whole) for text in texts) and all(
        is_in(text, learned) for of_row in answers for text in of_row
    )


def _read_rows(folder: Path, case: Case) -> Iterator[dict[str, Any]]:
    if (folder / "rows.parquet").exists() and _says(case, "rows.parquet"):
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(folder / "rows.parquet").to_pylist()
    elif (folder / "rows.csv").exists() and _says(case, "rows.csv"):
        import csv

        with (folder / "rows.csv").open(newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)
    elif (folder / "rows.json").exists() and _says(case, "rows.json"):
        yield from json.loads((folder / "rows.json").read_text("utf-8-sig"))
    else:
        lines = (folder / "rows.jsonl").read_text("utf-8-sig").split("\n")
        yield from (json.loads(line) for line in lines if line.strip())


def _says(case: Case, name: str) -> bool:
    return any(word.endswith(name) for word in case.changed_words)


def _encode(folder: Path, case: Case) -> tuple[Any, Any]:
    import lorax
    from lorax.config.run import load_config

    words = _overrides(case)
    config = load_config("run.yaml", words)
    tokenizer = lorax.load_tokenizer(config.model.name_or_path)
    return lorax.load_encoded_dataset(config.data.train, config.data, tokenizer), tokenizer


_FLAGS = {"weight", "train", "training", "mask", "loss_mask", "trainable", "train_on_turn"}
"""Of a row, or of a message: whether it is learned."""

_NO_TEXT = {"role", "from", "type", "id", *_FLAGS}


def _texts(value: Any, key: str = "") -> Iterator[str]:
    """Yields every text of a row, but for names of roles."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str) and key not in _NO_TEXT and value.strip():
        yield value.strip()


def _answers(row: dict[str, Any]) -> Iterator[str]:
    """Yields what the assistant says in a row."""
    for key in ("messages", "conversations", "completion"):
        for message in row.get(key) or () if isinstance(row.get(key), list) else ():
            role = message.get("role") or message.get("from")
            text = message.get("content") or message.get("value") or ""
            flags = [message[key] for key in _FLAGS & message.keys()]
            if role in ("assistant", "gpt") and all(flags):
                yield text.strip()
    for key in ("completion", "output"):  # the first token of a text has nothing before it
        if isinstance(row.get(key), str):
            yield row[key].strip()


def _of_template(case: Case, folder: Path) -> str | None:
    """As of rows: the template shows every text, and the answers are learned whole."""
    dataset, tokenizer = _encode(folder, case)
    rows, last_only = list(_read_rows(folder, case)), case.variant == "template-inst"
    if not _learns(dataset, tokenizer, rows, last_only=last_only):
        return None
    return "the template shows every text of the rows, and the answers are learned whole"


def _of_tokenizer(case: Case, folder: Path) -> str | None:
    """As of rows, for what its ids stand for; what it says otherwise is another tokenizer."""
    if case.changed_words[0] == "generate":
        import lorax

        tokenizer = lorax.load_tokenizer("model")
        ids = tokenizer("zqhello", add_special_tokens=False)["input_ids"]
        return "its ids stand for the prompt" if "zqhello" in tokenizer.decode(ids) else None
    return (
        _of_template(case, folder) and "its ids stand for every text of the rows, and the answers"
    )


# --- Models -------------------------------------------------------------------------------------


def _of_model_config(case: Case, folder: Path) -> str | None:
    """The same is computed, or what is computed differs as the changed fields say."""
    from lorax.interop.load import load_hf_config
    from lorax.interop.stop_tokens import stop_token_ids

    config = json.loads((folder / "model/config.json").read_text())
    garden = Path(os.environ["FUZZ_GARDEN"])
    sound, now = (load_hf_config(place / "model") for place in (garden / "plain", folder))
    reason = "the same is computed"
    if sound != now:
        if dict(leaves(config)) == dict(leaves(seeds.CONFIG)):
            return None
        reason = "another model of the same shapes, as its fields say"
    if case.changed_words[0] == "generate":
        if not _named_stops(folder) <= set(stop_token_ids(folder / "model")):
            return None
        reason += ", and it stops at every token that the files name"
    return reason


def _named_stops(folder: Path) -> set[Any]:
    found: set[Any] = set()
    for name in ("config.json", "generation_config.json"):
        path = folder / "model" / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        found |= set(value if isinstance(value, list) else [value]) - {None}
    return found


def _of_weights(case: Case, folder: Path) -> str | None:
    """The tensors are those of the model, finite; `validate` reads names and shapes alone."""
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        found |= load_file(path)
    sound = seeds.weights()
    if found.keys() != sound.keys():
        return None
    if any(found[name].shape != sound[name].shape for name in sound):
        return None
    if all(np.array_equal(found[name], sound[name]) for name in sound):
        return "the weights are the same, bit for bit"
    if case.changed_words[0] == "validate":
        return "names, shapes and dtypes are right; values are read by what uses them"
    finite = all(np.isfinite(np.asarray(value, np.float32)).all() for value in found.values())
    return (
        "other finite weights of the same names and shapes: the format has no digest" * finite
        or None
    )


def _of_adapter(case: Case, folder: Path) -> str | None:
    """The tensors are those of the adapter, finite, of the ranks and modules that it names."""
    from safetensors.numpy import load_file

    if not (folder / "adapter").is_dir():
        return None
    sound = Path(os.environ["FUZZ_GARDEN"]) / "adapter/adapter"
    now, before = (
        json.loads((place / "adapter_config.json").read_text())
        for place in (folder / "adapter", sound)
    )
    found, known = (load_file(p / "adapter_model.safetensors") for p in (folder / "adapter", sound))
    if {n: v.shape for n, v in found.items()} != {n: v.shape for n, v in known.items()}:
        return None
    finite = all(np.isfinite(np.asarray(v, np.float32)).all() for v in found.values())
    if not finite and case.changed_words[0] != "validate":
        return None
    # What is empty or false stands for what is not given.
    differing = {
        k for k in now.keys() | before.keys() if (now.get(k) or None) != (before.get(k) or None)
    }
    if differing <= ADAPTER_FREE.keys():
        return "; ".join(["names and shapes are right", *(ADAPTER_FREE[key] for key in differing)])
    return None


ADAPTER_FREE = {
    "alpha_pattern": "a scale is what it says",
    "lora_alpha": "a scale is what it says",
    "use_rslora": "a scale is what it says",
    "lora_dropout": "dropout is what it says",
    "bias": "no layer has a bias",
    "fan_in_fan_out": "PEFT sets it back where a layer is linear",
    "init_lora_weights": "how A and B began does not matter once they are loaded",
    "inference_mode": "it is about PEFT's loading",
    "peft_version": "it is about PEFT",
    "auto_mapping": "it is about PEFT's loading",
    "revision": "it names the commit of the base on the hub",
    "base_model_name_or_path": "validate has the base from the config",
    "task_type": "one of PEFT's kinds for a decoder, or none",
    "eva_config": "how A and B began does not matter once they are loaded",
    "loftq_config": "how A and B began does not matter once they are loaded",
    "corda_config": "how A and B began does not matter once they are loaded",
    "target_modules": "they are the modules that the tensors are of",
    "rank_pattern": "the ranks are those of the tensors",
    "r": "the ranks are those of the tensors",
    "exclude_modules": "the modules left are those that the tensors are of",
    "layers_to_transform": "the layers are those that the tensors are of",
    "layers_pattern": "the layers are those that the tensors are of",
}
"""Fields in which an adapter may differ and be right, and why."""


# --- Commands and runs --------------------------------------------------------------------------


def _of_words(case: Case, folder: Path) -> str | None:
    """Every option has a value that means something, and did what it says."""
    words = case.changed_words
    given = dict(_options(words))
    if words[0] == "generate":
        # However small, it divides what the logits are below the largest: the most likely stays.
        if not 0 <= float(given.get("--temperature", 0)) < math.inf:
            return None
        if not 0 < float(given.get("--top-p", 1)) <= 1 or int(given.get("--top-k", 1)) < 1:
            return None
        if not 1 <= int(given.get("--max-new-tokens", 1)) <= 256:
            return None
        if not 0 <= int(given.get("--seed", 0)) < 2**32:
            return None
        return "every option is within its range"
    if words[0] == "export":
        return _of_export(folder / given["--out"], folder / "run/adapter")
    if words[0] == "train":
        return _of_run(case, folder)
    return _of_config(case, folder)


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, joint, value = word.partition("=")
            yield name, value if joint else after


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _updates(folder: Path) -> dict[str, np.ndarray]:
    """Returns what an adapter adds to the weights of each module."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), _tensors(folder)
    found: dict[str, np.ndarray] = {}
    for name, a in tensors.items():
        module, _, kind = name.partition(".lora_A.")
        if kind:
            patterns = (config.get("alpha_pattern") or {}).items()
            matching = (v for p, v in patterns if re.match(rf"(.*\.)?({p})$", module))
            rank = a.shape[0] ** (0.5 if config.get("use_rslora") else 1)
            scale = next(matching, config["lora_alpha"]) / rank
            b = tensors[f"{module}.lora_B.{kind}"]
            found[module] = scale * np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    return found


def _of_export(out: Path, adapter: Path) -> str | None:
    """An exported adapter adds what the adapter does; a merged model has all tensors, finite.

    That a merged model computes what its parts do, `export` itself compares.
    """
    if (out / "adapter_config.json").exists():
        now, before = _updates(out), _updates(adapter)
        same = now.keys() == before.keys() and all(
            np.allclose(now[name], before[name], rtol=1e-5, atol=1e-7) for name in before
        )
        return "the exported adapter adds what the adapter does" if before and same else None
    found = _tensors(out)
    finite = all(np.isfinite(np.asarray(value, np.float32)).all() for value in found.values())
    whole = found.keys() == seeds.weights().keys() and finite
    return "the export has all tensors of the model, finite" if whole else None


def _of_run(case: Case, folder: Path) -> str | None:
    """The adapter, of a run that ended, has the bits of the one that nothing was done to."""
    words = case.changed_words
    if words[0] == "export":
        return _of_export(folder / "out", folder / "run/adapter")
    garden = Path(os.environ["FUZZ_GARDEN"])
    sound = garden / "run/run/adapter/adapter_model.safetensors"
    now = folder / "run/adapter/adapter_model.safetensors"
    if not now.exists() or now.read_bytes() != sound.read_bytes():
        return None
    if words[0] == "generate":
        return "the adapter that answers has the bits of the run that nothing was done to"
    if not (folder / "run/summary.json").exists():
        return None
    return "the adapter has the bits of the run that nothing was done to"


ARGUMENTS: dict[str, Argument] = {
    "config": _of_config,
    "rows": _of_rows,
    "template": _of_template,
    "tokenizer": _of_tokenizer,
    "model config": _of_model_config,
    "weights": _of_weights,
    "adapter": _of_adapter,
    "command line": _of_words,
    "run folder": _of_run,
}

__all__ = ["WORDS", "argue", "structure"]
