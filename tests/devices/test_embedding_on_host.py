"""An embedding in the host's memory changes where it lies, and no number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import lorax
from lorax.devices.host_memory import HostArray, embedding_on_host
from lorax.devices.mesh import make_mesh
from lorax.devices.placement import place_batch
from lorax.interop.load import load_model
from lorax.interop.save import save_model
from lorax.models.decoder import init_model
from lorax.models.families import read_architecture
from lorax.runs.checks import check_targets
from lorax.runs.memory import make_planner
from lorax.runs.model import Blueprint
from lorax.runs.run import run_training
from lorax.runs.setup import Setup, build_model
from lorax.training.ahead import compile_ahead
from lorax.training.nonfinite import find_micro_batches

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("LORAX_AOT_SITE", ROOT / ".aot"))
TINY = ROOT / "examples" / "tiny" / "model"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The tiny model's shape with two layers and an output head of its own."""
    raw = json.loads((TINY / "config.json").read_text())
    raw |= {"tie_word_embeddings": False, "num_hidden_layers": 2}
    model = init_model(read_architecture(raw, "here"), dtype=jnp.float32, seed=3)
    folder = tmp_path_factory.mktemp("untied") / "model"
    return save_model(model, folder, dtype=jnp.float32, source_directory=TINY)


@pytest.fixture
def settings(untied, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)

    def load(*overrides, offload=True):
        given = [f"model.name_or_path={untied}", f"model.offload_embedding={str(offload).lower()}"]
        given += ["train.max_steps=2", "eval.strategy=no", "eval.exact_match=false"]
        given += ["train.per_device_train_batch_size=1"]
        return lorax.load_config("configs/tiny_cpu.yaml", [*given, *overrides])

    return load


def train(config, ahead=False):
    events = []
    setup = Setup.of(Blueprint.of(config))
    data = setup.train, setup.eval
    compiled = compile_ahead(check_targets(setup.blueprint), setup.course) if ahead else None
    listeners = (events.append,)
    trainer = lorax.Trainer(
        build_model(config), config, *data, listeners=listeners, compiled=compiled
    )
    trainer.train()
    told = [
        {name: event.get(name) for name in ("loss", "grad_norm", "eval_loss")}
        for event in events
        if "step" in event
    ]
    return trainer, told, jax.device_get(jax.tree.leaves(nnx.state(trainer.model, nnx.Param)))


@pytest.mark.as_shipped
@pytest.mark.parametrize(
    "overrides, ahead",
    [
        (["lora.lora_dropout=0.1", "train.neftune_noise_alpha=5", "eval.strategy=epoch"], True),
        (["data.packing=false", "train.gradient_accumulation_steps=1"], True),
        (["train.gradient_checkpointing=offload"], False),
        (["model.dtype=bfloat16"], False),
        (["mesh.data=2"], True),
    ],
)
def test_a_run_with_it_is_the_run_without_it_bit_for_bit(settings, tmp_path, overrides, ahead):
    out = lambda name: f"save.output_dir={tmp_path}/{name}"
    trainer, told, weights = train(settings(*overrides, out("with")), ahead)
    plain, expected, same = train(settings(*overrides, out("without"), offload=False))
    assert told == expected and len(told) > 2
    for ours, theirs in zip(weights, same, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert embedding_on_host(trainer.model) is not None and embedding_on_host(plain.model) is None


def test_the_step_takes_the_rows_of_the_batch_and_not_the_embedding(settings, tmp_path):
    sizes = []
    for offload in (False, True):
        config = settings(f"save.output_dir={tmp_path}/run", offload=offload)
        setup = Setup.of(Blueprint.of(config))
        ahead = compile_ahead(check_targets(setup.blueprint), setup.course)
        (step,) = ahead.result().values()
        sizes.append(step.executable.memory_analysis().argument_size_in_bytes)
    model = build_model(settings(f"save.output_dir={tmp_path}/run"))
    embedding = embedding_on_host(model)
    assert isinstance(embedding, np.ndarray) and embedding.flags.c_contiguous
    tokens = 2 * 256
    saved, sent = embedding.nbytes, tokens * embedding.shape[1] * embedding.itemsize
    assert sizes[0] - sizes[1] == saved + 4 * tokens - sent  # nor are the ids needed


def test_rows_are_looked_up_as_the_model_does(settings, untied):
    for dtype in (jnp.float32, jnp.bfloat16):
        model = load_model(untied, dtype=dtype)
        away = load_model(untied, dtype=dtype, offload_embedding=True)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 3, 8))
        batch = {"input_ids": ids.astype(np.int32)}
        placed = place_batch(batch, make_mesh(), embedding_on_host(away))
        assert placed["inputs_embeds"].sharding.memory_kind == "pinned_host"
        assert placed["inputs_embeds"].dtype == dtype
        expected = model.model.embed_tokens(batch["input_ids"])
        np.testing.assert_array_equal(np.asarray(placed["inputs_embeds"]), np.asarray(expected))
        # Whoever brings no rows gets the same from the array on the host.
        np.testing.assert_array_equal(away(ids[0]), model(ids[0]))


@pytest.mark.as_shipped
def test_a_whole_run_answers_and_exports_what_it_does_without(settings, tmp_path):
    lines = ["eval.exact_match=true", "eval.exact_match_rows=4", "eval.strategy=epoch"]
    lines += ["save.export=[peft, merged]"]
    read = lambda name: {
        str(p.relative_to(tmp_path / name)): p.read_bytes()
        for p in sorted((tmp_path / name).rglob("*.safetensors"))
        if "checkpoints" not in p.parts
    }
    for name, offload in (("with", True), ("without", False)):
        config = settings(*lines, f"save.output_dir={tmp_path / name}", offload=offload)
        run_training(config, Console(quiet=True))
    assert read("with") == read("without") and len(read("with")) >= 3


def test_rows_that_are_not_finite_are_found_with_it_too(settings, untied):
    model = load_model(untied, dtype=jnp.float32, offload_embedding=True)
    ids = np.arange(24, dtype=np.int32).reshape(3, 1, 8)
    placed = place_batch({"input_ids": ids, "labels": ids}, make_mesh(), embedding_on_host(model))
    rows = np.array(placed["inputs_embeds"])
    rows[1, 0, 4] = np.inf
    placed["inputs_embeds"] = jax.device_put(rows, placed["inputs_embeds"].sharding)
    assert find_micro_batches(model, lorax.objectives.sft.SFT, placed) == [1]


def test_the_planner_leaves_it_out(settings, tmp_path):
    here, there = (
        make_planner(Blueprint.of(settings(f"save.output_dir={tmp_path}", offload=offload)))
        for offload in (False, True)
    )
    away = here.memory("full", 4, 256).peak - there.memory("full", 4, 256).peak
    size = here.architecture.vocab_size * here.architecture.hidden_size * 4
    assert here.weights - there.weights == size
    assert away == size  # the rows of a micro-batch are the first layer's input in either case


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([f"model.name_or_path={TINY}"], "the model's output head is the same array"),
        (["lora.modules_to_save=[embed_tokens]"], "lora.modules_to_save trains the embedding"),
        (["lora.target_modules=[q_proj, embed_tokens]"], "the embedding carries an adapter; take"),
    ],
)
def test_an_embedding_that_is_read_or_trained_is_refused(settings, tmp_path, overrides, message):
    config = settings(*overrides, f"save.output_dir={tmp_path}/run")
    blueprint = Blueprint.of(config)
    with pytest.raises(ValueError, match=rf"model\.offload_embedding must be false: {message}"):
        check_targets(blueprint)


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.modules_to_save=[embed_tokens]"],
        ["lora.target_modules=[q_proj, embed_tokens]"],
        ["train.method=full"],
    ],
)
def test_a_trainer_refuses_one_that_would_train(settings, untied, tmp_path, overrides):
    given = [*overrides, f"save.output_dir={tmp_path}/run"]
    if "full" in overrides[0]:
        given += ["lora=null", "save.export=[merged]"]
    config = settings(*given, offload=False)
    model = load_model(untied, dtype=jnp.float32, offload_embedding=True)
    if config.train.method == "lora":
        model = lorax.apply_lora(model, config.lora, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the input embedding trains, so it must be on the device"):
        lorax.Trainer(model, config, Setup.of(Blueprint.of(config)).train)


def test_a_full_fine_tune_refuses_it_with_the_key(settings):
    with pytest.raises(ValueError, match=r"model\.offload_embedding.*`full` trains it"):
        settings("train.method=full", "lora=null", "save.export=[merged]")


def test_loading_refuses_a_tied_one():
    with pytest.raises(ValueError, match="tie_word_embeddings: true, so the embedding"):
        load_model(TINY, offload_embedding=True)
    assert not isinstance(load_model(TINY).model.embed_tokens.embedding.get_value(), HostArray)


COMPILED_FOR_H200 = """
import sys
from pathlib import Path
sys.path[:0] = [".", "kernels"]
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
import lorax
from lorax_kernels.device import CUBLAS_ONLY, NO_TRIALS
from lorax.config.train import TrainConfig
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.step import make_train_step

target = Path("tests/kernels/golden/h200_target_config.txtpb").read_text()
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
mesh = topologies.make_mesh(topology, (1,), ("data",))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
sizes = {"model_type": "llama", "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 4096,
         "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
         "max_position_embeddings": 4096, "tie_word_embeddings": False}
bf16 = jnp.bfloat16


def build():
    model = CausalLM(read_architecture(sizes, "here"), dtype=bf16, param_dtype=bf16,
                     attn_impl="xla", gradient_checkpointing="full", rngs=nnx.Rngs(0))
    return lorax.apply_lora(model, lorax.LoraConfig(target_modules="all-linear"), rngs=nnx.Rngs(0))


forward = CausalLM.hidden_states


def with_a_copy(self, *given, inputs_embeds=None, **named):
    # A compilation without a device leaves out where arguments lie, so the rows go there first.
    if inputs_embeds is not None:
        rows = jax.device_put(jnp.tanh(inputs_embeds), jax.memory.Space.Host)
        inputs_embeds = jax.lax.optimization_barrier(rows)
    return forward(self, *given, inputs_embeds=inputs_embeds, **named)


CausalLM.hidden_states = with_a_copy
found = []


def begin(model):
    step, state = make_train_step(model, make_optimizer(TrainConfig(), 10))
    found.append(step)
    return state, step.frozen


shapes = jax.eval_shape(begin, nnx.eval_shape(build))
place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
state, frozen = jax.tree.map(place, shapes)
ids = jax.ShapeDtypeStruct((1, 4, 1024), jnp.int32, sharding=whole)
rows = jax.ShapeDtypeStruct((1, 4, 1024, 1024), bf16, sharding=whole)
batch = {"input_ids": ids, "labels": ids, "positions": ids}
for given in (batch, batch | {"inputs_embeds": rows}):
    lowered = found[0].compiled.trace(state, frozen, given).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options=CUBLAS_ONLY | NO_TRIALS)
    print(compiled.memory_analysis().temp_size_in_bytes, "S(5)" in compiled.as_text())
"""


@pytest.mark.skipif(
    not (SITE / "jax_plugins").is_dir(), reason="needs JAX's CUDA plugin: see test_kernel_compiled"
)
def test_a_copy_from_the_host_does_not_put_off_the_gradients():
    # Left alone, XLA's scheduler then keeps every layer's gradients' sources to the end.
    path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", COMPILED_FOR_H200],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    plain, copied = (line.split() for line in done.stdout.splitlines())
    assert (plain[1], copied[1]) == ("False", "True")
    assert int(copied[0]) <= 1.25 * int(plain[0])  # twice as much
