"""GPUs that are named and not there: what is known of them, and what a plan makes of it."""

import copy
import functools

import pytest

from lorax.planning.memory import Planner
from lorax.system.gpus import GPUS, H200, Gpu, find_gpu, gpu_of
from tests.planning.test_plan import make_planner


@pytest.mark.parametrize(
    "name, found",
    [
        *(("h100", "h100"), ("H100", "h100"), ("NVIDIA H100 80GB HBM3", "h100")),
        *(("NVIDIA H100 PCIe", "h100-pcie"), ("h100 nvl", "h100-nvl"), ("H200", "h200")),
        *(("a100", "a100"), ("A100-80GB", "a100"), ("a100 40gb", "a100-40gb")),
        *(("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A100 80GB PCIe", "a100")),
        *(("l40s", "l40s"), ("L40", "l40"), ("4090", "4090"), ("RTX 4090", "4090")),
        *(("NVIDIA GeForce RTX 5090", "5090"), ("rtx-6000-ada", "6000-ada")),
    ],
)
def test_a_gpu_is_found_by_the_names_that_people_and_devices_give_it(name, found):
    assert find_gpu(name).name == found


def test_an_unknown_gpu_is_told_with_the_nearest_and_with_all():
    with pytest.raises(
        ValueError, match=r"'h300' is not in .* \(did you mean h200\?\): b200, "
    ) as e:
        find_gpu("h300")
    assert all(gpu.name in str(e.value) for gpu in GPUS)
    with pytest.raises(ValueError, match=r"'toaster' is not in the table of GPUs: b200, h200"):
        find_gpu("toaster")


def test_the_table_has_no_name_twice_and_no_figure_that_cannot_be():
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert find_gpu(gpu.name) is gpu
        assert 0.9 * gpu.gb <= gpu.gib <= gpu.gb  # GB of 1024³ bytes or of 1000³, or less with ECC
        assert 50 < gpu.tflops < 3000 and 0.2 < gpu.tb_per_s < 10
    assert gpu_of("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None and gpu_of("cpu") is None


@pytest.mark.parametrize(
    "name, gb, tflops, tb_per_s",
    [
        ("h200", 141, 989.5, 4.8),  # NVIDIA's data sheets; TFLOP/s are half of those with sparsity
        ("h100", 80, 989.5, 3.35),
        ("h100-pcie", 80, 756.5, 2.0),
        ("a100", 80, 312.0, 2.0),
        ("l40s", 48, 362.05, 0.864),
        ("l4", 24, 121.0, 0.3),
        ("4090", 24, 165.2, 1.008),
    ],
)
def test_the_figures_are_those_of_the_data_sheets(name, gb, tflops, tb_per_s):
    gpu = find_gpu(name)
    assert (gpu.gb, gpu.tflops, gpu.tb_per_s) == (gb, tflops, tb_per_s)


@functools.cache
def usual() -> Planner:
    return make_planner(num_hidden_layers=8)


def planner_on(gpu: Gpu | str) -> Planner:
    planner = copy.copy(usual())
    planner.gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    return planner


def test_a_step_is_planned_by_the_gpus_own_rates():
    assert usual().gpu is H200
    names = ["b200", "h200", "h100", "l40s", "4090", "l4"]
    seconds = {name: planner_on(name).seconds("full", 4, 2048) for name in names}
    assert seconds["h200"] == usual().seconds("full", 4, 2048)
    assert sorted(seconds.values()) == list(seconds.values())
    # Most of a step is arithmetic, of which an A100 does a third.
    assert 2.5 < planner_on("a100").seconds("full", 4, 2048) / seconds["h200"] < 3.2


def test_copies_to_the_host_take_what_the_link_gives():
    slow = planner_on(H200._replace(host_gb_per_s=1.0))
    copied = 2 * slow.host_bytes("offload", 1, 512)
    assert slow.seconds("offload", 1, 512) == copied / 1e9 > usual().seconds("offload", 1, 512)


def test_without_lorax_kernels_the_loss_keeps_logits_and_their_gradient():
    assert planner_on("h100").memory("none", 1, 128) == usual().memory("none", 1, 128)
    more = (
        planner_on("4090").memory("none", 1, 128).working - usual().memory("none", 1, 128).working
    )
    assert more == 2 * 128 * 128256
