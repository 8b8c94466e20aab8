"""Exports, each read back from disk and compared with the trained model."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lorax.adapters.nnx.apply import set_kernels
from lorax.adapters.nnx.merge import merge_lora, rebase_lora, unload_lora
from lorax.adapters.nnx.tree import adapted_layers
from lorax.interop.export_files import companion_files
from lorax.interop.export_formats import refuse_rebased
from lorax.interop.load import load_model
from lorax.interop.new_tokens import NO_NEW_TOKENS, NewTokens
from lorax.interop.peft import adapter_tensors, load_adapter, save_adapter
from lorax.interop.peft_files import TENSOR_FILE
from lorax.interop.safetensors import read_headers, read_tensor
from lorax.interop.save import model_tensors, save_model
from lorax.system.files import refuse_occupied, write_folder

type ExportFormat = Literal["peft", "peft-portable", "merged", "rebased"]

WHOLE_MODELS = ("merged", "rebased")
"""The formats whose folder holds a whole model, with its tokenizer."""

REBASED_ADAPTER = "adapter"
"""The folder of the adapter within an export as ``rebased``."""

PROBE_TOKENS = 32
"""Length of the sequence on which logits are compared."""

# Relative L2 distance of logits. Float32 sums in another order; in half precision the merged
# weight is rounded once more, which moves each by up to half a unit in the last place (2⁻⁹ for
# bfloat16) and the logits of a deep model by a few per cent at most.
LOGIT_BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class ExportError(ValueError):
    """An export that, read back, is not the trained model."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of reading an export back.

    Attributes:
        tensors: Number of tensors, all of them bit-equal to the values to write.
        logit_error: Relative L2 distance of the reloaded model's logits to the trained model's.
        bound: The largest distance that is accepted.
    """

    tensors: int
    logit_error: float
    bound: float

    def describe(self) -> str:
        """Returns it as a line."""
        return (
            f"{self.tensors} tensors read back bit-equal, logits differ by "
            f"{self.logit_error:.1e} (accepted {self.bound:.0e})"
        )


def export_model(
    model: Any,
    directory: str | Path,
    format: ExportFormat,
    *,
    base: str | Path,
    base_name: str | None = None,
    base_revision: str | None = None,
    dtype: DTypeLike | None = None,
    card: str | None = None,
    chat_template: str | None = None,
    stop_ids: Sequence[int] | None = None,
    tokenizer: Any = None,
    tokenizer_folder: Path | None = None,
    new_tokens: NewTokens = NO_NEW_TOKENS,
) -> Verification:
    """Writes `model` in a format that other programs load, and verifies the files.

    Args:
        model: The trained model, adapters unmerged.
        directory: A path that does not exist, or an empty folder.
        format: ``peft``: PEFT's own layout. ``peft-portable``: one rank, scales folded into B.
            ``merged``: a full checkpoint with the adapters added to the weights. ``rebased``: see
            `_export_rebased`.
        base: Folder of the base checkpoint, whose tokenizer is copied to a whole model.
        base_name: The base recorded in the adapter; `base` if not given.
        base_revision: Branch, tag or commit of it, recorded in the adapter.
        dtype: Dtype of a whole model's weights; None is that of the base weights in `model`.
        card: Text of the README.md in the folder.
        chat_template: The template of a whole model, instead of the base's.
        stop_ids: The model's stop tokens, from `stop_token_ids`: a whole model's
            generation_config.json then names them; None leaves the base's.
        tokenizer: The tokenizer of the rows, from `load_tokenizer`: a whole model's
            tokenizer_config.json then names a class that gives its ids; None leaves the base's.
        tokenizer_folder: The folder of the tokenizer's files for a whole model; None is `base`.
        new_tokens: The tokens in addition to the base's, whose tokenizer goes with an adapter too.

    Returns:
        The result of the comparison.

    Raises:
        ValueError: If `directory` holds something or the format cannot hold what was trained.
        ExportError: If a tensor read back differs, or the logits differ by more than the bound.
            The files stay for inspection.
    """
    refuse_occupied(directory)
    files = companion_files(
        Path(base),
        chat_template=chat_template,
        stop_ids=stop_ids,
        card=card,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
    )
    source = tokenizer_folder or Path(base)
    if format in WHOLE_MODELS:
        files |= new_tokens.tokenizer_file(source)
        export = _export_merged if format == "merged" else _export_rebased
        return export(model, Path(directory), base, dtype, files)
    name = str(base_name or base)
    save_adapter(
        model,
        directory,
        format=format,
        base_model_name_or_path=name,
        revision=base_revision,
        card=card,
        files=new_tokens.adapter_files(source, files),
    )
    return verify_adapter(model, directory, portable=format == "peft-portable")


def verify_adapter(model: Any, directory: str | Path, *, portable: bool = False) -> Verification:
    """Compares an adapter on disk with the adapters of `model`: every tensor, and the logits.

    Raises:
        ExportError: Naming the tensor that differs, or the distance of the logits.
    """
    path = Path(directory) / TENSOR_FILE
    count = _compare(adapter_tensors(model, portable=portable).items(), [path])
    reloaded = load_adapter(unload_lora(model), directory)
    # Folding the scale into B rounds differently; all else must be the same computation.
    bound = LOGIT_BOUNDS[jnp.dtype(model.dtype).name] if portable else 0.0
    return _verified(model, reloaded, directory, count, bound)


def _export_merged(
    model, directory: Path, base, dtype, files: Mapping[str, str | Path | None]
) -> Verification:
    dtype = jnp.dtype(dtype or _weight_dtype(model))
    merged = merge_lora(model) if adapted_layers(model) else model
    save_model(merged, directory, dtype=dtype, source_directory=base, files=files)
    shards = sorted(directory.glob("*.safetensors"))
    count = _compare(model_tensors(merged, dtype=dtype), shards)
    del merged
    reloaded = load_model(directory, dtype=model.dtype, param_dtype=dtype)
    bound = max(LOGIT_BOUNDS[dtype.name], LOGIT_BOUNDS[jnp.dtype(model.dtype).name])
    return _verified(model, reloaded, directory, count, bound)


def _export_rebased(
    model, directory: Path, base, dtype, files: Mapping[str, str | Path | None]
) -> Verification:
    """Writes the base without what the adapters began with, and in it the adapters of rank r.

    The folder is a whole model with the weights ``W' = W - s·A₀·B₀``; its folder `REBASED_ADAPTER`
    is a plain adapter on it, as PEFT trains PiSSA and OLoRA. ``W'`` is computed in float32 and
    rounded once to the dtype of the base, by which the pair differs from the trained model. What
    trains beside A and B is in the adapter: magnitudes (DoRA), tokens, and copies of biases and of
    whole modules, which the changed base has too.
    """
    refuse_rebased(model)
    dtype = jnp.dtype(dtype or _weight_dtype(model))
    rebased = rebase_lora(model)
    changed = unload_lora(rebased)
    name = str(directory.absolute())
    with write_folder(directory) as folder:
        save_model(changed, folder, dtype=dtype, source_directory=base, files=files)
        save_adapter(rebased, folder / REBASED_ADAPTER, base_model_name_or_path=name)
    count = _compare(model_tensors(changed, dtype=dtype), sorted(directory.glob("*.safetensors")))
    adapter = directory / REBASED_ADAPTER
    count += _compare(adapter_tensors(rebased).items(), [adapter / TENSOR_FILE])
    del rebased, changed
    reloaded = load_adapter(load_model(directory, dtype=model.dtype, param_dtype=dtype), adapter)
    bound = max(LOGIT_BOUNDS[dtype.name], LOGIT_BOUNDS[jnp.dtype(model.dtype).name])
    return _verified(model, reloaded, directory, count, bound)


def _weight_dtype(model) -> Any:
    layers = adapted_layers(model)
    return next(iter(layers.values())).matrix.dtype if layers else model.dtype


def _compare(expected: Iterable[tuple[str, np.ndarray]], files: list[Path]) -> int:
    """Compares named arrays with safetensors files bit by bit, one at a time."""
    entries = read_headers(files)
    folder = files[0].parent
    count = 0
    for name, value in expected:
        count += 1
        if name not in entries:
            raise ExportError(f"{folder} lacks {name} after the export")
        found = read_tensor(entries[name])
        same = found.dtype == value.dtype and found.shape == value.shape
        if not same or found.tobytes() != np.ascontiguousarray(value).tobytes():
            raise ExportError(
                f"{entries[name].file}: {name} differs from the trained model after the export"
            )
    if count != len(entries):
        raise ExportError(f"{folder} holds {len(entries)} tensors, expected {count}")
    return count


def _verified(model, reloaded, directory, count: int, bound: float) -> Verification:
    error = logit_distance(model, reloaded)
    if not error <= bound:
        raise ExportError(
            f"{directory}: the reloaded logits differ from the trained model's by {error:.2e} "
            f"(relative L2), more than {bound:.0e}; do not use this export"
        )
    return Verification(count, error, bound)


def logit_distance(model: Any, other: Any) -> float:
    """Returns ``‖other - model‖ / ‖model‖`` of the logits on a fixed sequence of tokens."""
    length = min(PROBE_TOKENS, model.config.max_position_embeddings)
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, model.config.vocab_size, (1, length)), jnp.int32)
    # GPUs would otherwise round float32 matmuls to TF32, which is as large as the errors to find.
    with jax.default_matmul_precision("highest"):
        expected, actual = (np.asarray(_logits(m, tokens), np.float64) for m in (model, other))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _logits(model, tokens):
    evaluated = nnx.clone(model)
    evaluated.eval()
    set_kernels(evaluated, "xla")  # what is compared are weights, so both sides sum in one order
    return evaluated(tokens)
