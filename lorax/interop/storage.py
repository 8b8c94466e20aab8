"""The format of each matrix of a model: the checkpoint's, or what the settings ask for."""

from collections.abc import Mapping
from pathlib import Path

from lorax.interop.folder import CONFIG_FILE
from lorax.interop.packed import Entry, PackedEntry
from lorax.interop.tensors import TensorSpec, listed, tensor_table
from lorax.models.architecture import DecoderConfig
from lorax.models.quantization import Quantization
from lorax.system.files import CheckpointError
from lorax.weights.dense import DENSE
from lorax.weights.format import Format
from lorax.weights.nf4 import NF4, NF4_DOUBLE


def stored_format(
    layer: str, config: DecoderConfig, entries: Mapping[str, Entry] | None, asked: Format
) -> Format:
    """Returns the format in which the matrix of a linear layer is kept.

    Args:
        layer: Its name.
        config: The architecture.
        entries: The tensors of the checkpoint, or None before it is fetched: then config.json says
            which of them are quantised.
        asked: The format that a setting asks for.
    """
    if layer == "lm_head":  # the loss reads it
        return DENSE
    if config.quantization is None:
        return asked
    if entries is None:
        return _own_format(config.quantization) if config.quantization.quantises(layer) else DENSE
    entry = entries[config.family.stored_name(f"{layer}.weight")]
    return entry.format if isinstance(entry, PackedEntry) else DENSE


def matrix_formats(
    config: DecoderConfig, entries: Mapping[str, Entry], asked: Format
) -> dict[str, Format]:
    """Returns the format of the matrix of every linear layer, by its name in the checkpoint.

    Args:
        config: The architecture.
        entries: The tensors of the checkpoint.
        asked: The format that a setting asks for.
    """
    layers = {
        name: ".".join(map(str, spec.path[:-1]))
        for name, spec in tensor_table(config).items()
        if spec.transpose
    }
    return {name: stored_format(layer, config, entries, asked) for name, layer in layers.items()}


def _own_format(quantization: Quantization) -> Format:
    return NF4_DOUBLE if quantization.double else NF4


def refuse_quantised(config: DecoderConfig, directory: Path, asked: Format, *, full: bool) -> None:
    """Refuses to quantise a quantised checkpoint in another format, or to train all of it.

    Raises:
        CheckpointError: Naming the folder and what to do.
    """
    if config.quantization is None:
        return
    found = _own_format(config.quantization)
    if full:
        raise CheckpointError(
            f"{directory} is quantised as {found.name}, and train.method `full` trains all: "
            "name the 16-bit checkpoint"
        )
    if asked not in (DENSE, found):
        raise CheckpointError(
            f"{directory} is quantised as {found.name}, and {asked.name} is asked for: leave "
            "model.quantization out, or name the 16-bit checkpoint"
        )


def check_quantised(
    directory: Path,
    config: DecoderConfig,
    table: Mapping[str, TensorSpec],
    entries: Mapping[str, Entry],
) -> None:
    """Compares what is quantised with what config.json says.

    Raises:
        CheckpointError: If they differ, or what is no linear layer is quantised.
    """
    file = directory / CONFIG_FILE
    packed = {name: e for name, e in entries.items() if isinstance(e, PackedEntry)}
    if odd := [name for name in packed if not table[name].transpose]:
        where = packed[odd[0]].file
        raise CheckpointError(f"{where} quantises {listed(odd)}, which is no linear layer")
    own = config.quantization
    if own is None:
        if not packed:
            return
        names = listed(list(packed))
        raise CheckpointError(
            f"{file} has no quantization_config, but the folder holds {names} in NF4; fetch "
            "config.json again"
        )
    if not packed:
        raise CheckpointError(
            f"{file} has a quantization_config, but no tensor of the folder is quantised: remove "
            "the field; model.quantization quantises while the weights are read"
        )
    if other := [name for name, e in packed.items() if e.format is not _own_format(own)]:
        raise CheckpointError(
            f"{file}: quantization_config.bnb_4bit_use_double_quant is {str(own.double).lower()}, "
            f"but {packed[other[0]].file} holds {listed(other)} as {packed[other[0]].format.name}"
        )
