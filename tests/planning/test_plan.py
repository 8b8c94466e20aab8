"""The planner beside what was measured, and at its edges."""

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.adapters.nnx.apply import apply_lora
from lorax.config.adapter import LoraConfig
from lorax.config.run import load_config
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.models.stack.recompute import Recomputation
from lorax.planning.memory import FILLED, POLICIES, Planner
from lorax.runs import memory as runs_memory
from lorax.runs import model as runs_model
from lorax.runs.memory import choose_recomputation
from lorax.system.hardware import GIB

ROOT = Path(__file__).parents[2]
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


LLAMA_1B: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def make_planner(
    targets: Any = "all-linear", *overrides, base=LLAMA_8B, host=False, settings=None, **sizes
) -> Planner:
    architecture = read_architecture(base | sizes, "here")
    bf16, adapters = jnp.bfloat16, LoraConfig(r=16, target_modules=targets, **(settings or {}))

    def build():
        model = CausalLM(architecture, dtype=bf16, param_dtype=bf16, rngs=nnx.Rngs(0))
        return apply_lora(model, adapters, rngs=nnx.Rngs(0))

    settings_of_run = ["train.gradient_accumulation_steps=1", *overrides]
    config = load_config(ROOT / "configs" / "llama3_8b_lora.yaml", settings_of_run)
    model = nnx.eval_shape(build)
    if host:
        runs_model._put_embedding_on_host(model)
    return Planner(config, architecture, model)


@functools.cache
def planner_with(*overrides: str, layers: int = 32) -> Planner:
    return make_planner("all-linear", *overrides, num_hidden_layers=layers)


@pytest.fixture
def planner():
    return planner_with()


@functools.cache
def planner_of(model: str, accumulation: int, offload_embedding: bool) -> Planner:
    base = {"llama-8b": LLAMA_8B, "llama-1b": LLAMA_1B}[model]
    override = f"train.gradient_accumulation_steps={accumulation}"
    return make_planner("all-linear", override, base=base, host=offload_embedding)


def measured_cells() -> dict[tuple, dict[str, dict[str, Any]]]:
    """The newest measurement of each policy, by model, accumulation, rows, length, embedding.

    Rows that a later change of the program has made untrue say so.
    """
    path = ROOT / "docs" / "measurements" / "step_h200.jsonl"
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        counts = row.get("kernels") in ("pallas", "auto") and not row["options"]
        counts = counts and row["base_dtype"] == "bfloat16"
        if counts and "superseded" not in row:
            cell = row["model"], row["accumulation"], row["batch"], row["seq"]
            cell = *cell, row.get("offload_embedding", False)
            policies = cells.setdefault(cell, {})
            name = str(Recomputation(row["policy"], row.get("kept_layers", 1)))
            before = policies.get(name)
            if before and before["call"] == row["call"] and before["step_ms"] < row["step_ms"]:
                continue  # both kernels were run, and `auto` takes the faster
            policies[name] = row
    return cells


ROWS = [
    pytest.param(row, id="-".join(map(str, (*cell, policy))))
    for cell, policies in measured_cells().items()
    for policy, row in policies.items()
]


@pytest.mark.parametrize("row", ROWS)
def test_memory_is_that_measured_within_five_per_cent_and_time_within_ten(row):
    planner = planner_of(row["model"], row["accumulation"], row.get("offload_embedding", False))
    cell = row["policy"], row["batch"], row["seq"], row.get("kept_layers", 1)
    assert row["r"] == 16
    assert planner.memory(*cell).peak / GIB == pytest.approx(row["planned_gib"], rel=0.05)
    if row["seq"] == 131072:
        return  # one step was measured, the first, which also sets aside the host's memory
    seconds = row["accumulation"] * planner.seconds(*cell)
    assert seconds * 1e3 == pytest.approx(row["step_ms"], rel=0.1)


@pytest.mark.parametrize("cell", measured_cells())
def test_what_is_picked_is_what_was_fastest_among_what_fits(cell):
    (model, accumulation, rows, length, host), policies = cell, measured_cells()[cell]
    planner = planner_of(model, accumulation, host)
    cell_of = lambda row: (row["policy"], rows, length, row.get("kept_layers", 1))
    for limit in policies.values():
        gib = 1.05 * limit["planned_gib"]
        fits = [row for row in policies.values() if row["planned_gib"] <= limit["planned_gib"]]
        # Rows of different calls: the chip's speed differs by a few per cent.
        most = 1.05 * min(row["step_ms"] for row in fits)
        assert min(fits, key=lambda row: planner.seconds(*cell_of(row)))["step_ms"] <= most
        picked = policies.get(str(planner.fastest(rows, length, gib)))
        if picked is not None:  # what was not measured, with more layers kept, may be faster still
            assert picked["planned_gib"] <= gib and picked["step_ms"] <= most


def test_what_is_held_all_the_time_is_counted_to_the_byte(planner):
    memory = planner.memory("full", 1, 128)
    adapter = 41_943_040
    assert memory.weights == 2 * (8_030_261_248)
    assert memory.trained == memory.gradients == 4 * adapter
    assert memory.optimizer == pytest.approx(2 * memory.trained, abs=64)
    twice = make_planner("all-linear", "train.gradient_accumulation_steps=2")
    assert twice.memory("full", 1, 128).gradients == 2 * memory.gradients


def test_only_adapted_layers_keep_their_inputs():
    every, some = make_planner(num_hidden_layers=1), make_planner(["q_proj"], num_hidden_layers=1)
    kept = lambda planner, policy: planner.memory(policy, 1, 1024).activations
    assert kept(every, "none") - kept(some, "none") == 2 * 1024 * 4096
    assert kept(every, "selective") == kept(some, "selective")


def test_the_largest_batch_fits_and_one_more_does_not(planner):
    for policy in POLICIES:
        most = planner.largest_batch(policy, 2048, 80)
        assert planner.memory(policy, most, 2048).peak <= 80 * GIB
        assert planner.memory(policy, most + 1, 2048).peak > 80 * GIB
        longest = planner.longest_sequence(policy, 1, 80)
        assert planner.memory(policy, 1, longest).peak <= 80 * GIB
        assert planner.memory(policy, 1, longest + 128).peak > 80 * GIB
    assert planner.largest_batch("full", 2048, 10) == 0


@pytest.mark.parametrize(
    "gib, choice",
    [
        (100, "none"),
        (42, "selective"),
        (30, "offload with 17 layers kept"),
        (20, "offload with 4 layers kept"),
        (18, "offload"),
        (3, "offload"),
    ],
)
def test_the_fastest_that_fits_is_picked(planner, gib, choice):
    assert str(planner.fastest(4, 2048, gib)) == choice


def test_auto_keeps_as_many_layers_as_fit(planner):
    peak = lambda r, kept: planner.memory(r.policy, 4, 2048, kept).peak / GIB
    seconds = lambda r: planner.seconds(r.policy, 4, 2048, r.kept_layers)
    before = None
    for gib in np.arange(18.5, 38, 0.5):
        choice = planner.fastest(4, 2048, gib)
        kept = choice.kept_layers
        assert peak(choice, kept) <= FILLED * gib < peak(choice, kept + 1)
        assert before is None or seconds(choice) <= seconds(before)
        before = choice


@pytest.mark.parametrize("policy", ["full", "offload"])
def test_with_every_layer_kept_a_policy_takes_what_selective_takes(planner, policy):
    peak = lambda kept: planner.memory(policy, 4, 2048, kept).peak
    selective = planner.memory("selective", 4, 2048).peak
    assert peak(30) < peak(31) <= 1.01 * peak(32) and peak(32) == selective
    assert planner.host_bytes(policy, 4, 2048, 32) == 0
    slow, fast = planner.seconds(policy, 4, 2048, 31), planner.seconds(policy, 4, 2048, 32)
    assert slow > fast and fast == pytest.approx(planner.seconds("selective", 4, 2048), rel=1e-3)


# As compiled for an H200: eight layers of Llama-8B's shape; accumulation, rows, length, GiB.
KEPT = [
    ("offload", 1, (8, 2, 512), 5.743),
    ("offload", 4, (8, 2, 512), 6.012),
    ("full", 1, (1, 4, 2048), 6.989),
    ("full", 4, (1, 4, 2048), 8.940),
    ("offload", 4, (1, 4, 2048), 8.671),
    ("offload", 7, (8, 2, 512), 6.282),
    ("full", 7, (1, 4, 2048), 10.912),
    ("offload", 7, (1, 4, 2048), 10.827),
]


@pytest.mark.parametrize("policy, kept, cell, gib", KEPT)
def test_what_kept_layers_take_is_known(policy, kept, cell, gib):
    accumulation, rows, length = cell
    setting = f"train.gradient_accumulation_steps={accumulation}"
    planner = planner_with(setting, layers=8)
    assert planner.memory(policy, rows, length, kept).peak / GIB == pytest.approx(gib, rel=0.02)


def test_a_policy_that_does_not_fit_is_never_picked_while_another_fits():
    planner = make_planner(num_hidden_layers=2)
    peaks: Any = {policy: planner.memory(policy, 4, 8192).peak / GIB for policy in POLICIES}
    assert peaks["full"] < peaks["offload"]  # with so few layers, two of them weigh more
    between = (peaks["full"] + peaks["offload"]) / 2
    assert planner.fastest(4, 8192, between).policy == "full"


@pytest.mark.parametrize(
    "targets, columns",
    [("all-linear", 64 + 16 + 32 + 16), (["q_proj"], 16), (["gate_proj", "down_proj"], 32)],
)
def test_what_is_kept_of_x_a_is_what_the_kernels_lay_out(targets, columns):
    assert make_planner(targets, num_hidden_layers=2).ranks == 2 * columns


def test_auto_says_what_it_picked_and_why(monkeypatch):
    def choose(*overrides):
        settings = [f"model.name_or_path={ROOT / 'examples' / 'tiny' / 'model'}", *overrides]
        config = load_config(ROOT / "configs" / "tiny_cpu.yaml", settings)
        return choose_recomputation(runs_model.Blueprint.of(config))

    auto = "train.gradient_checkpointing=auto"
    full = "train.gradient_checkpointing=full"
    assert choose(full) == (Recomputation("full"), "as asked")
    assert choose(full, "train.kept_layers=2") == (Recomputation("full", 2), "as asked")
    assert choose(auto)[0].policy == "none" and "does not report its memory" in choose(auto)[1]
    choice, reason = choose(auto, "train.memory_gib=100")
    assert choice.policy == "none" and reason.endswith("of 100 GiB, the fastest that fits")
    with pytest.raises(ValueError, match=r"memory_gib: no policy fits: .*lower train.per_device"):
        choose(auto, "train.memory_gib=0.0001")
    monkeypatch.setattr(runs_memory, "device_gib", lambda: 0.0001)
    choice, reason = choose(auto)
    assert choice.policy == "offload" and "no policy fits: offload takes the least, about" in reason


@pytest.mark.parametrize(
    "rows, length, extra", [(4, 2048, 896), (1, 8192, 3968), (1, 32768, 65024)]
)
def test_the_planner_knows_the_memory_that_it_takes(rows, length, extra):
    # As cuDNN asked for on an H200 with the heads of Llama-8B, in MiB.
    usual = planner_with().memory("none", rows, length)
    settings = ["train.full_determinism=true", "data.packing=false"]
    repeatable = planner_with(*settings)
    planned = repeatable.memory("none", rows, length)
    # A little of it takes the place of what the loss would need at another time.
    assert extra - 128 <= (planned.peak - usual.peak) / 2**20 <= extra
    packed = planner_with(settings[0]).memory("none", rows, length)
    assert packed.peak - planned.peak == 2 * rows * length**2  # the documents' mask
    assert repeatable.seconds("none", rows, length) > planner_with().seconds("none", rows, length)


@pytest.mark.parametrize("tied", [False, True])
def test_a_lookup_streams_no_rows_of_its_table_and_trains_its_adapter(tied):
    base = LLAMA_1B | {"tie_word_embeddings": tied}
    with_table, without = (
        make_planner(["q_proj", *more], base=base, num_hidden_layers=2)
        for more in (["embed_tokens"], [])
    )
    sizes = base["vocab_size"] + base["hidden_size"]
    assert with_table.streamed - without.streamed == sizes * tied
    assert with_table.trained_elements - without.trained_elements == 16 * sizes
    assert with_table.spared_by_host == 0
    assert (without.spared_by_host == 0) == tied


def test_the_products_that_factors_multiply_are_counted():
    """Of DoRA on an H200, as the compiler planned it."""
    path = ROOT / "docs" / "measurements" / "adapted_h200.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    *_, row = [row for row in rows if row["variant"] == "dora"]
    planner = make_planner(settings={"use_dora": True})
    planned = planner.memory("none", row["batch"], row["seq"]).peak / GIB
    assert planned == pytest.approx(row["planned_gib"], rel=0.05)
    # Where a layer is recomputed, its products are kept for as long as it is at hand.
    plain = make_planner().memory("full", 4, 2048).peak
    assert plain < planner.memory("full", 4, 2048).peak < 1.05 * plain
