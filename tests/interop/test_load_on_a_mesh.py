"""A checkpoint goes from the file to its devices: each is given its part, and nothing twice."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import lorax
from lorax.devices.host_memory import HostArray
from lorax.devices.mesh import DATA_AXIS, make_mesh
from lorax.devices.placement import place_parameters
from lorax.devices.specs import parameter_sharding
from lorax.interop.folder import find_tensors
from lorax.interop.load import load_model, load_values
from lorax.interop.safetensors import read_parts, read_tensor
from lorax.interop.save import save_model
from lorax.interop.storage import matrix_formats
from lorax.interop.tensors import tensor_table
from lorax.models.decoder import init_model
from lorax.models.families import read_architecture
from lorax.system.files import CheckpointError
from tests.int8 import INT8, store
from tests.interop.shards import SMALL

CONFIG = read_architecture(SMALL, "here")
UP, EMBED = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"  # (48, 32), (61, 32)
BY_ROWS, BY_COLUMNS = PartitionSpec(DATA_AXIS), PartitionSpec(None, DATA_AXIS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    return save_model(init_model(CONFIG, dtype=jnp.float32, seed=3), path, dtype=jnp.float32)


@pytest.fixture
def bytes_read(monkeypatch):
    """What is read of files that are opened without a buffer, in bytes."""
    counts = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            counts.append(super().readinto(buffer))
            return counts[-1]

    ordinary = Path.open

    def opened(path, mode="r", buffering=-1, **options):
        if mode == "rb" and buffering == 0:
            return Counting(path)
        return ordinary(path, mode, buffering, **options)

    monkeypatch.setattr(Path, "open", opened)
    return counts


@pytest.fixture
def divide(monkeypatch):
    """Has the family divide parameters, by the end of their paths."""

    def enter(**rows):
        own = tuple((rf".*{name}\.\w+", spec) for name, spec in rows.items())
        family = CONFIG.family
        monkeypatch.setitem(vars(family), "parts", own + family.parts)

    return enter


def buffers(tree):
    """Returns where each device's part of each array lies."""
    return [
        [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
        for leaf in jax.tree.leaves(tree)
    ]


def values_of(model):
    return {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}


def loaded(folder, format):
    """Returns what `load_values` yields on four devices, with the matrices in a format."""
    table, mesh, parts = tensor_table(CONFIG), make_mesh(4), CONFIG.family.parts
    paths = {name: ".".join(map(str, spec.path)) for name, spec in table.items()}
    places = {name: parameter_sharding(path, mesh, parts) for name, path in paths.items()}
    entries = find_tensors(folder)
    formats = matrix_formats(CONFIG, entries, format)
    return dict(load_values(table, entries, jnp.dtype("float32"), places, formats))


# Where it lies


def test_every_device_of_a_mesh_has_a_copy_and_training_makes_no_other(folder):
    mesh, config = make_mesh(4), lorax.LoraConfig(r=2)
    base = load_model(folder, dtype=jnp.float32, mesh=mesh)
    for path, value in values_of(base).items():
        assert value.sharding.is_fully_replicated and value.devices() == set(mesh.devices.flat), (
            path
        )
    again = place_parameters(nnx.state(base), mesh)
    assert buffers(again) == buffers(nnx.state(base))
    adapted = lorax.apply_lora(base, config, rngs=nnx.Rngs(0))
    step, _ = lorax.make_train_step(adapted, optax.sgd(0.1), mesh=mesh)
    assert sorted(buffers(step.frozen)) == sorted(buffers(nnx.state(base)))


def test_weights_on_a_mesh_are_those_on_one_device(folder):
    whole = values_of(load_model(folder, dtype=jnp.bfloat16))
    for devices in (1, 4):
        placed = values_of(load_model(folder, dtype=jnp.bfloat16, mesh=make_mesh(devices)))
        jax.tree.map(np.testing.assert_array_equal, placed, whole)


@pytest.mark.parametrize("spec", [BY_ROWS, BY_COLUMNS], ids=["rows", "columns"])
def test_a_divided_matrix_comes_in_parts_and_is_the_whole_one(folder, divide, spec):
    whole = values_of(load_model(folder, dtype=jnp.float32))
    divide(up_proj=spec)
    mesh = make_mesh(4)
    model = load_model(folder, dtype=jnp.float32, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, values_of(model), whole)
    kernel = model.model.layers[1].mlp.up_proj.kernel.get_value()
    assert kernel.sharding.spec == spec
    assert {shard.data.size for shard in kernel.addressable_shards} == {32 * 48 // 4}
    state = nnx.state(model)
    assert buffers(place_parameters(state, mesh, model.parts)) == buffers(state)


def test_an_embedding_for_the_hosts_memory_goes_onto_no_mesh(folder):
    model = load_model(folder, dtype=jnp.float32, mesh=make_mesh(4), offload_embedding=True)
    embedding = model.model.embed_tokens.embedding.get_value()
    assert isinstance(embedding, HostArray)
    np.testing.assert_array_equal(embedding, read_tensor(find_tensors(folder)[EMBED]))


class Whole(type(INT8)):
    """The same format, whose scales lie whole on every device."""

    def parts(self, spec):
        return spec, PartitionSpec()


@pytest.mark.parametrize("format", [INT8, Whole()], ids=["divided", "whole"])
@pytest.mark.parametrize("spec", [PartitionSpec(), BY_ROWS, BY_COLUMNS], ids=str)
def test_a_format_stores_each_part_where_it_lies(folder, divide, spec, format):
    divide(up_proj=spec, down_proj=spec)
    values = loaded(folder, format)
    entries = find_tensors(folder)
    for name, value in values.items():
        tensor = read_tensor(entries[name])
        if "proj" not in name:
            want = tensor.T if name == "lm_head.weight" else tensor
            np.testing.assert_array_equal(value, want)
            continue
        want = jax.jit(store)(tensor.T)
        np.testing.assert_array_equal(value.codes, want.codes)
        np.testing.assert_array_equal(value.scales, want.scales)
        if "up_proj" in name:
            for leaf, part in zip(jax.tree.leaves(value), format.parts(spec), strict=True):
                place = NamedSharding(make_mesh(4), part)
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


# What is read


def test_headers_that_are_known_are_not_read_again(folder, monkeypatch):
    entries = find_tensors(folder)
    before = dict(entries)
    monkeypatch.setattr("lorax.interop.load.find_tensors", None)
    model = load_model(folder, dtype=jnp.float32, entries=entries)
    assert entries == before
    embedding = model.model.embed_tokens.embedding.get_value()
    np.testing.assert_array_equal(embedding, read_tensor(entries[EMBED]))


@pytest.mark.parametrize("spec", [PartitionSpec(), BY_ROWS, BY_COLUMNS], ids=str)
def test_every_byte_is_read_once_for_all_devices_of_a_process(folder, divide, bytes_read, spec):
    divide(up_proj=spec, down_proj=spec)
    load_model(folder, dtype=jnp.float32, mesh=make_mesh(4))
    entries = find_tensors(folder)
    assert sum(bytes_read) == sum(4 * np.prod(entry.shape) for entry in entries.values())
    # Columns are rows of the file, which holds the transpose: each device's are read alone.
    divided = 4 if spec == BY_COLUMNS else 0
    assert len(bytes_read) == len(entries) + 3 * divided


@pytest.mark.parametrize(
    "part, elements",
    [
        ((slice(12, 24),), 12 * 32),  # rows
        ((slice(12, 24), slice(None)), 12 * 32),
        ((slice(12, 24), slice(8, 16)), 11 * 32 + 8),  # a block
        ((slice(None), slice(8, 16)), 47 * 32 + 8),  # columns
        ((slice(5, 6), slice(8, 16)), 8),
        ((slice(3, 3),), 0),
        ((), 48 * 32),
    ],
)
def test_a_part_is_read_with_no_more_than_lies_between_its_ends(folder, bytes_read, part, elements):
    entry = find_tensors(folder)[UP]
    whole = read_tensor(entry)
    bytes_read.clear()
    (found,) = read_parts(entry, [part])
    np.testing.assert_array_equal(found, whole[part])
    assert sum(bytes_read) == 4 * elements


def test_parts_are_read_together_where_they_lie_between_each_other(folder, bytes_read):
    entry = find_tensors(folder)[UP]
    whole = read_tensor(entry)
    bytes_read.clear()
    parts = [(slice(None), slice(8, 16)), (slice(2, 4),), (slice(1, 48), slice(0, 8))]
    for part, found in zip(parts, read_parts(entry, parts), strict=True):
        np.testing.assert_array_equal(found, whole[part])
    # Both columns' cover, from the first's 8 in row 0; and the rows alone.
    assert sum(bytes_read) == 4 * (47 * 32 + 8 + 2 * 32)


@pytest.mark.parametrize("spec", [BY_ROWS, BY_COLUMNS], ids=["rows", "columns"])
def test_a_value_that_is_not_finite_is_found_on_any_device(folder, divide, tmp_path, spec):
    model = init_model(CONFIG, dtype=jnp.float32)
    kernel = model.model.layers[0].mlp.up_proj.kernel
    kernel.set_value(kernel.get_value().at[-1, -1].set(jnp.nan))
    bad = save_model(model, tmp_path / "bad", dtype=jnp.float32)
    divide(up_proj=spec)
    with pytest.raises(CheckpointError, match=f"{UP} holds values that are not finite"):
        load_model(bad, dtype=jnp.float32, mesh=make_mesh(4))
