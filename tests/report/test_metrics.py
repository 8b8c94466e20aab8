import json
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax.report.log
from lorax.report.log import RunLog
from lorax.system.hardware import MemoryUse, memory_gib, peak_bf16_tflops
from lorax.system.versions import library_versions
from lorax.training.events import ModelSize, Throughput

SIZE = ModelSize(frozen_parameters=1000, trained_parameters=10, layers=2, attention_width=8)


def read_metrics(path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def device(kind: str, **statistics: int) -> Any:
    return SimpleNamespace(device_kind=kind, memory_stats=lambda: statistics or None)


# The log.


def test_each_step_is_a_line_that_is_there_at_once(tmp_path):
    with RunLog(tmp_path) as log:
        log.write(1, {"loss": 2.5, "tokens": 128, "note": "warm", "nothing": None})
        assert read_metrics(tmp_path / "metrics.jsonl") == [
            {"step": 1, "loss": 2.5, "tokens": 128, "note": "warm", "nothing": None}
        ]
        log.write(2, {"loss": 2.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "number",
    [
        jnp.float32(1.5),
        jnp.asarray([1.5], jnp.bfloat16),
        np.float64(1.5),
        np.asarray(1.5, jnp.bfloat16),
    ],
)
def test_arrays_of_one_element_are_numbers(tmp_path, number):
    with RunLog(tmp_path) as log:
        log.write(1, {"loss": number})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.5}]


def test_whole_numbers_stay_whole(tmp_path):
    with RunLog(tmp_path) as log:
        log.write(1, {"tokens": jnp.int32(7), "rows": np.int64(2**40)})
    assert '"tokens": 7, "rows": 1099511627776' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("value", [[1.0, 2.0], np.ones(2), {"a": 1}, object()])
def test_metric_that_is_no_scalar_is_refused(tmp_path, value):
    with RunLog(tmp_path) as log, pytest.raises(ValueError, match="metric 'loss' needs one number"):
        log.write(1, {"loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_nonfinite_numbers_are_null_and_named(tmp_path):
    with RunLog(tmp_path) as log:
        log.write(1, {"loss": jnp.float32("nan"), "lr": 0.1, "grad_norm": float("inf")})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    assert json.loads(line) == {
        "step": 1,
        "loss": None,
        "lr": 0.1,
        "grad_norm": None,
        "nonfinite": ["loss", "grad_norm"],
    }


def test_resumed_run_appends_and_cuts_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    with RunLog(tmp_path) as log:
        log.write(2, {"loss": 2.0})
    assert path.read_text() == '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'


BEFORE = (
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 2.9},
    {"step": 2, "loss": 2.8},
    {"step": 2, "eval_loss": 2.7},
    {"step": 3, "loss": 2.6},
    {"step": 4, "loss": 2.5},
    {"step": 4, "eval_loss": 2.4},
)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("reached", "evaluated", "kept"),
    [(0, False, 0), (1, True, 2), (2, False, 3), (2, True, 4), (3, True, 5), (9, True, 7)],
)
def test_a_resumed_run_writes_each_step_once(tmp_path, reached, evaluated, kept):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, BEFORE)
    with RunLog(tmp_path, reached=reached, evaluated=evaluated) as log:
        assert read_metrics(path) == list(BEFORE[:kept])
        for record in BEFORE[kept:]:
            log.write(record["step"], {k: v for k, v in record.items() if k != "step"})
    assert read_metrics(path) == list(BEFORE)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_an_older_version_wrote_twice_is_read_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [*BEFORE, {"step": 4, "loss": 2.51}, {"step": 4, "eval_loss": 2.41}])
    assert lorax.report.log.read_metrics(path) == [
        *BEFORE[:5], {"step": 4, "loss": 2.51}, {"step": 4, "eval_loss": 2.41}
    ]  # fmt: skip
    with RunLog(tmp_path, reached=4):
        assert read_metrics(path) == lorax.report.log.read_metrics(path)


@pytest.mark.parametrize("broken", [b"{", b"\xff", b"\0\0", b"[1]", b'{"step": 9e9}', b"[" * 9999])
def test_a_damaged_line_is_named_with_a_remedy_that_works(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + broken + b'\n{"step": 2, "loss": 1.0}\n')
    for use in (lambda: lorax.report.log.read_metrics(path), lambda: RunLog(tmp_path, reached=1)):
        with pytest.raises(ValueError, match=r"metrics.jsonl:2: .*remove that line, or move the"):
            use()
    path.write_bytes(path.read_bytes().replace(broken + b"\n", b""))
    assert len(lorax.report.log.read_metrics(path)) == 2


def test_log_creates_nothing_outside_the_run_directory(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        RunLog(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_log_writes_only_where_it_was_asked_to(tmp_path):
    with RunLog(tmp_path, report_to=()) as log:
        log.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers(tmp_path):
    with RunLog(tmp_path, report_to=("jsonl", "tensorboard")) as log:
        log.write(1, {"loss": 1.0, "note": "text"})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content and b"note" not in content
    assert (tmp_path / "metrics.jsonl").exists()


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"lorax-train\[tensorboard\]"):
        RunLog(tmp_path, report_to=("jsonl", "tensorboard"))
    assert list(tmp_path.iterdir()) == []


# Speed.


def test_frozen_weights_cost_two_thirds_of_trained_ones():
    full = ModelSize(frozen_parameters=0, trained_parameters=1000, layers=2, attention_width=8)
    frozen = ModelSize(frozen_parameters=1000, trained_parameters=0, layers=2, attention_width=8)
    assert full.flops_per_token(0) == 6000
    assert frozen.flops_per_token(0) == 4000
    assert full.flops_per_token(100) - full.flops_per_token(0) == 12 * 2 * 8 * 100
    assert frozen.flops_per_token(100) - frozen.flops_per_token(0) == 12 * 2 * 8 * 100


def test_flops_of_a_forward_and_backward_pass_are_what_the_formula_says():
    """Counted by XLA on one attention layer with a LoRA adapter, of which only B·A is trained."""
    tokens, width, rank = 128, 64, 8
    keys = jax.random.split(jax.random.key(0), 6)
    weight, query, key, value = (jax.random.normal(k, (width, width)) for k in keys[:4])
    adapter = (
        jax.random.normal(keys[4], (width, rank)),
        jax.random.normal(keys[5], (rank, width)),
    )
    x = jnp.ones((tokens, width))

    def loss(adapter, x):
        x = x + x @ adapter[0] @ adapter[1]
        scores = jax.nn.softmax((x @ query) @ (x @ key).T)
        return jnp.sum(jnp.square((scores @ (x @ value)) @ weight))

    # The input's gradient stands for the layers below.
    step: Any = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    counted = step.lower(adapter, x).compile().cost_analysis()["flops"]
    size = ModelSize(
        frozen_parameters=4 * width * width,
        trained_parameters=2 * width * rank,
        layers=1,
        attention_width=width,
    )
    assert tokens * size.flops_per_token(tokens) == pytest.approx(counted, rel=0.02)


def test_compiling_steps_do_not_enter_the_mean():
    throughput = Throughput(SIZE, [device("NVIDIA H200")] * 2)
    assert throughput.mean() == {"tokens_per_s": None, "mfu": None}
    first = throughput.add(100, 50.0, context_tokens=10)
    assert first["tokens_per_s"] == 2.0
    assert throughput.mean()["tokens_per_s"] is None
    throughput.add(100, 1.0, context_tokens=10)
    throughput.add(300, 1.0, context_tokens=10)
    throughput.add(100, 90.0, context_tokens=10, compiled=True)
    assert throughput.mean()["tokens_per_s"] == 200.0


def test_mfu_is_the_share_of_all_devices_peak():
    throughput = Throughput(SIZE, [device("NVIDIA H200")] * 2)
    step = throughput.add(10**6, 0.5, context_tokens=10)
    flops = 10**6 * (4 * 1000 + 6 * 10 + 12 * 2 * 8 * 10)
    assert step["mfu"] == pytest.approx(flops / 0.5 / (2 * 989.5e12))


def test_mfu_of_an_unknown_device_is_unknown():
    throughput = Throughput(SIZE)
    assert throughput.add(10, 1.0, context_tokens=10)["mfu"] is None
    mixed = Throughput(SIZE, [device("NVIDIA H200"), device("cpu")])
    assert mixed.add(10, 1.0, context_tokens=10)["mfu"] is None


def test_step_without_duration_is_refused():
    with pytest.raises(ValueError, match="seconds > 0, got 0"):
        Throughput(SIZE).add(10, 0.0, context_tokens=10)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A1000", None),
        ("cpu", None),
    ],
)
def test_peak_follows_the_device(kind, peak):
    assert peak_bf16_tflops(kind) == peak


# Memory and versions.


def test_memory_is_the_highest_device_peak():
    devices = [device("x", peak_bytes_in_use=2**30), device("x", peak_bytes_in_use=3 * 2**30)]
    assert memory_gib(devices) == MemoryUse(3.0, "device")


def test_memory_without_device_statistics_is_the_process():
    use = memory_gib([device("cpu")])
    assert use.source == "process" and 0.01 < use.gib < 1000


def test_versions_name_libraries_and_device():
    versions = library_versions()
    assert versions["jax"] == jax.__version__
    assert set(versions) == {
        *("lorax", "jax", "jaxlib", "flax", "optax", "transformers", "python", "device")
    }
    assert versions["device"].endswith("× cpu")
