"""What adapters of NNX and of Linen models share in PEFT's format: fields, tensors, both files."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lorax.adapters.lora import LORA
from lorax.adapters.method import Params, Spec
from lorax.adapters.targets import match_targets
from lorax.config.adapter import LoraConfig
from lorax.interop.peft_config import CONFIG_FILE, AdapterError
from lorax.interop.peft_layout import PREFIX, file_key, to_file
from lorax.interop.safetensors import TensorEntry, save_tensors
from lorax.layers.maps import Map
from lorax.system.files import write_folder
from lorax.system.wording import clip

TENSOR_FILE = "adapter_model.safetensors"

_TRAINED_COPY = r"\.modules_to_save\."

type AdapterFormat = Literal["peft", "peft-portable"]
type Trained = tuple[str, str]
"""(module, parameter) of a base parameter that trains."""


def config_fields(specs: Mapping[str, Spec], *, portable: bool) -> dict[str, Any]:
    """Returns the fields of adapter_config.json that the adapters of some layers decide.

    Where ranks or alphas differ, the patterns name each module in full, because PEFT sorts patterns
    on saving and takes the first that matches.

    Args:
        specs: The adapters by the name of their layer, as they are saved.
        portable: One rank, ``lora_alpha = r``, for engines that read only ``alpha / r``.
    """
    ranks = {n: spec.r for n, spec in specs.items()}
    alphas = {n: spec.lora_alpha for n, spec in specs.items()}
    r, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    if portable:
        r = alpha = max(ranks.values())
        ranks = {}
        alphas = {}

    def pattern(values, common):
        return {re.escape(n): v for n, v in values.items() if v != common}

    method = LORA if portable else next(iter(specs.values())).method
    return {
        **method.settings,
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": max(spec.dropout for spec in specs.values()),
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": not portable and any(spec.use_rslora for spec in specs.values()),
        "rank_pattern": pattern(ranks, r),
        "alpha_pattern": pattern(alphas, alpha),
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
    }


def saved_modules(trained: Iterable[Trained]) -> list[str]:
    """Returns the modules trained in full, by their full names."""
    return sorted({name for name, parameter in trained if parameter != "bias"})


def bias_setting(trained: Sequence[Trained], adapted: Collection[str]) -> str:
    """Returns `bias` of adapter_config.json: which biases train."""
    saved = set(saved_modules(trained))
    biases = {n for n, parameter in trained if parameter == "bias" and n not in saved}
    if not biases:
        return "none"
    return "lora_only" if biases <= set(adapted) else "all"


def short_targets(names: list[str], linear: Sequence[str], others: Collection[str]) -> list[str]:
    """Returns the last names of adapted layers where these suffice, else the full names.

    Args:
        names: Of the adapted layers.
        linear: Of the layers that can carry an adapter.
        others: Of the other modules.
    """
    short = sorted({n.split(".")[-1] for n in names})
    config = LoraConfig(target_modules=tuple(short))
    try:
        again = [t.name for t in match_targets(linear, others, config)]
    except ValueError:
        return sorted(names)
    return short if again == names else sorted(names)


def layer_tensors(
    name: str, linear_map: Map, spec: Spec, values: Params, *, rank: int | None = None
) -> dict[str, np.ndarray]:
    """Returns a layer's tensors of adapter_model.safetensors: A as (r, in), B as (out, r), float32.

    Args:
        name: The layer's.
        linear_map: Likewise.
        spec: Its adapter.
        values: The adapter's values.
        rank: For ``peft-portable``: zeros fill the pair up to it, and the scale is within B.

    Raises:
        ValueError: If the adapter is more than ``peft-portable`` holds.
    """
    if rank is None:
        spec, values = spec.method.plain(spec, values)
        parameters = spec.method.parameters
    else:
        values = portable_values(spec, values, rank)
        parameters = LORA.parameters
    return {
        f"{PREFIX}{name}.{file_key(linear_map, about)}": to_file(
            linear_map, about, np.asarray(values[parameter])
        )
        for parameter, about in parameters.items()
    }


def portable_values(spec: Spec, values: Mapping[str, Any], rank: int) -> Mapping[str, Any]:
    """Returns a layer's A and B of one rank, the scale within B; see `Method.portable`.

    Raises:
        ValueError: If its adapter is more than they hold.
    """
    try:
        return spec.method.portable(spec, values, rank)
    except ValueError as error:
        raise ValueError(
            f"peft-portable holds A and B only, but {error}; export peft or merged"
        ) from None


def refuse_unportable(trained: Iterable[str]) -> None:
    """Refuses base tensors that train, which ``peft-portable`` does not hold.

    Raises:
        ValueError: Naming them.
    """
    if found := ", ".join(trained):
        raise ValueError(
            f"peft-portable holds A and B only, but this run also trained {found}; "
            "export it as peft or merged"
        )


def write_adapter(
    directory: str | Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    card: str | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> Path:
    """Writes an adapter's folder, whole or not at all.

    Args:
        directory: A folder that does not exist yet, or is empty.
        tensors: What adapter_model.safetensors holds.
        config: What adapter_config.json holds.
        card: Text of the README.md in the folder.
        files: Further texts by the name of their file; a path is copied.

    Raises:
        ValueError: If `directory` holds something, or a value is not finite.
    """
    bad = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"not saved: {bad[0]} holds values that are not finite")
    with write_folder(directory) as folder:
        save_tensors(dict(tensors), folder / TENSOR_FILE)
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        for name, given in (files or {}).items():
            if isinstance(given, Path):
                shutil.copyfile(given, folder / name)
            else:
                (folder / name).write_text(given, encoding="utf-8")
    return Path(directory)


def tensor_file(directory: Path) -> Path:
    """Returns the path of an adapter's tensors.

    Raises:
        AdapterError: If they are in a pickle, which can run code.
    """
    path = directory / TENSOR_FILE
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise AdapterError(
            f"{directory}: adapter_model.bin is a pickle and is never loaded; save it again with "
            "PEFT's save_pretrained(safe_serialization=True)"
        )
    return path


def compare_shapes(
    path: Path,
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
) -> None:
    """Compares the tensors of a file with those that must be there, and those that may be.

    Raises:
        AdapterError: Naming the file and the tensor: absent, unknown or of another shape.
    """
    for label, keys in (
        ("lacks", expected.keys() - entries.keys()),
        ("has unexpected", entries.keys() - expected.keys() - optional.keys()),
    ):
        if keys:
            first = clip(sorted(keys)[0])
            raise AdapterError(f"{path} {label} {len(keys)} tensors, first {first}")
    for key, entry in entries.items():
        needed = expected[key] if key in expected else optional[key]
        if entry.shape != needed:
            raise AdapterError(f"{path}: {key} has shape {entry.shape}, needed {needed}")


def copies_of_biases(
    keys: Iterable[str], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Returns the copies of trained biases in a file, each with the key of what it is a copy of.

    With ``bias="all"`` PEFT saves every tensor of that name. So each bias in a module of
    `modules_to_save` is there three times: under its own name, as the module's that trained
    (``.modules_to_save.``, and the adapter's name where the bias is of a module inside), and as the
    base's (``.original_module.``), which nothing reads.

    Args:
        keys: All keys of the file.
        expected: The shapes of the tensors that it must hold.
    """
    copies = {}
    for key in keys:
        for part in (_TRAINED_COPY, rf"{_TRAINED_COPY}[^.]+\.", r"\.original_module\."):
            own = re.sub(part, ".", key, count=1)
            if own != key and own in expected and own.endswith(".bias"):
                copies[key] = own
    return copies


def check_copies(
    path: Path, tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses a bias that has two values, both of them trained.

    Raises:
        AdapterError: Naming the file and both tensors.
    """
    for key, own in copies_of_biases(tensors, expected).items():
        if re.search(_TRAINED_COPY, key) and not np.array_equal(tensors[key], tensors[own]):
            raise AdapterError(
                f"{path}: {key} differs from {own}, and PEFT saves one bias under both names; save "
                "the adapter again with PEFT"
            )


def check_finite(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Refuses values that are not finite.

    Raises:
        AdapterError: Naming the file and the tensor.
    """
    for key, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise AdapterError(f"{path}: {key} holds values that are not finite")
