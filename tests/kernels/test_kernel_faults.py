"""Faults planted into a copy of the kernels: the checks notice every one.

What they cannot notice: the interpreter runs products of the matrix units at once, so a slot of the
ring that is freed while its product still runs is not among the faults.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

PACKAGE = Path(__file__).parents[2] / "kernels" / "lorax_kernels"
NOTICED = 3  # exit status of a check that found something wrong
# A guard against a deadlock, which is reported as one: what takes long has not found anything.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# name, file in lora_linear/, text, its replacement, check that notices it
FAULTS = [
    (
        "the feeder does not wait for an empty slot",
        "roles.py",
        "@pl.when(count >= self.config.stages)",
        "@pl.when(count < 0)",
        "matmul",
    ),
    (
        "a multiplier does not wait for a full slot",
        "roles.py",
        "            plgpu.barrier_wait(self.full.at[slot])\n",
        "",
        "matmul",
    ),
    (
        "a staging buffer is used again without waiting",
        "roles.py",
        "        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)\n",
        "",
        "matmul",
    ),
    (
        "staged results are not made visible before the copy",
        "roles.py",
        "        plgpu.commit_smem()\n",
        "",
        "matmul",
    ),
    (
        "a piece is stored in the tile's first columns",
        "roles.py",
        "at = (m0 + i * 64, local * plan.tile_n + j * c.store_n)",
        "at = (m0 + i * 64, local * plan.tile_n)",
        "matmul",
    ),
    (
        "the ring's counter does not advance by a term's steps",
        "roles.py",
        "            count += steps\n\n    def feed_update",
        "\n    def feed_update",
        "matmul",
    ),
    (
        "the last rows make no tile",
        "plan.py",
        "rows = -(-self.m // (c.block_m * c.cluster)) * c.cluster",
        "rows = self.m // (c.block_m * c.cluster) * c.cluster",
        "matmul",
    ),
    (
        "a group reads another group's bias",
        "roles.py",
        "n0 = column * plan.tile_n + j * c.store_n",
        "n0 = (column - plan.select(column, plan.first_tiles)) * plan.tile_n + j * c.store_n",
        "update",
    ),
    (
        "a short step reads the first group's columns",
        "roles.py",
        "n0 = sum(plan.columns[:group]) + (column - plan.first_tiles[group]) * c.block_n",
        "n0 = (column - plan.first_tiles[group]) * c.block_n",
        "update",
    ),
    (
        "a short step's buffer is filled before it is free",
        "roles.py",
        "            pl.when(jnp.logical_not(first_tile))"
        "(lambda: plgpu.barrier_wait(self.short_empty))\n",
        "",
        "update",
    ),
    (
        "gate and up are swapped",
        "roles.py",
        "gate, up = part",
        "up, gate = part",
        "swiglu",
    ),
    (
        "the derivative of silu has a wrong sign",
        "roles.py",
        "(1.0 + gate * (1.0 - sigmoid))",
        "(1.0 - gate * (1.0 - sigmoid))",
        "swiglu_grad",
    ),
    (
        "a tail's slot is given back before its last piece is stored",
        "roles.py",
        "            if plan.tail:\n                plgpu.barrier_wait(self.full.at",
        "            if plan.tail:\n                plgpu.barrier_arrive(self.empty.at"
        "[self.tail_slot(count, j)])\n                plgpu.barrier_wait(self.full.at",
        "swiglu_back",
    ),
    (
        "the gradient of gate times up lies where a right operand would",
        "roles.py",
        "return self.lhs.at[slot], self.rhs.at[0, slot]",
        "return self.rhs.at[0, slot], self.lhs.at[slot]",
        "swiglu_grad",
    ),
    (
        "gate is read where up lies",
        "roles.py",
        "places = self.tail_places(self.tail_slot(count, j))[: len(self.plan.tail)]",
        "places = self.tail_places(self.tail_slot(count, j))[: len(self.plan.tail)][::-1]",
        "swiglu_back",
    ),
    (
        "every piece of a tail has the tile's first columns",
        "roles.py",
        "self.copy_tail(count + i, row, column * plan.tile_n + i * STEP)",
        "self.copy_tail(count + i, row, column * plan.tile_n)",
        "swiglu_back",
    ),
    (
        "the gradients of gate and up are written over each other",
        "kernel.py",
        "tail=(-3, -2) if in_place",
        "tail=(-2, -3) if in_place",
        "swiglu_back",
    ),
    (
        "dropout is not made up for",
        "roles.py",
        "product * (1.0 / keep_probability(plan.rate))",
        "product",
        "dropout",
    ),
    (
        "a shard's first row is ignored",
        "memory.py",
        "at[0].astype(jnp.uint32) + seed[2]",
        "at[0].astype(jnp.uint32)",
        "dropout",
    ),
    (
        "rows i and i + 8 are dropped together",
        "dropout.py",
        "bits >> word(16), bits & word(0xFFFF)",
        "bits & word(0xFFFF), bits & word(0xFFFF)",
        "mask",
    ),
    (
        "the backward pass draws another mask",
        "calls.py",
        "dropout = _kernel_dropout(dys[0], group)",
        "dropout = (lambda d: d and type(d)(d.seed[jnp.array([1, 0, 2])], d.rate))("
        "_kernel_dropout(dys[0], group))",
        "layer_dropout",
    ),
    (
        "a result that was begun is continued a tile too late",
        "kernel.py",
        "skipped=begun[1] // config.block_n if begun else 0",
        "skipped=begun[1] // config.block_n + 1 if begun else 0",
        "begun",
    ),
    (
        "h is stored at the other warpgroup's rows",
        "inline.py",
        "m0 = row * self.config.block_m + self.warpgroup * plan.warpgroup_m",
        "m0 = row * self.config.block_m + (1 - self.warpgroup) * plan.warpgroup_m",
        "inline",
    ),
    (
        "the buffer of the narrow operand is filled before it is free",
        "inline.py",
        "@pl.when(jnp.logical_not(first))",
        "@pl.when(count < 0)",
        "inline",
    ),
    (
        "one warpgroup's share of a projection is lost",
        "project.py",
        "(part_sum + sums[...])",
        "part_sum",
        "project",
    ),
    (
        "a share is overwritten before it is taken",
        "project.py",
        "                        plgpu.barrier_wait(taken)\n",
        "",
        "project",
    ),
    (
        "a gradient takes the first columns of its operand",
        "gradient.py",
        "v_hbm.at[rows, pl.ds(first, wide)]",
        "v_hbm.at[rows, pl.ds(0, wide)]",
        "gradient",
    ),
    (
        "the update is left out",
        "fused.py",
        "groups[member].append(Term(saved.h, (saved.b,), rows, first, first, columns))",
        "pass",
        "layer",
    ),
    (
        "the scale is left out of B",
        "fused.py",
        "jnp.pad(group.scales[index] * b,",
        "jnp.pad(b,",
        "layer",
    ),
    (
        "the scale enters the gradient of B twice",
        "fused.py",
        "return group.scales[index] * ",
        "return group.scales[index] ** 2 * ",
        "layer",
    ),
    (
        "A is reshaped and not transposed",
        "fused.py",
        "terms.append(Term(g, (a.T,)))",
        "terms.append(Term(g, (a.reshape(a.shape[1], -1),)))",
        "layer",
    ),
    (
        "only the first part of a sum counts",
        "fused.py",
        "return parts[0] if parts.shape[0] == 1 else parts.sum(axis=0)",
        "return parts[0]",
        "layer",
    ),
    (
        "a member reads the first member's rows of B",
        "fused.py",
        "Term(saved.h, (saved.b,), rows, first, first, columns)",
        "Term(saved.h, (saved.b,), rows, first, 0, columns)",
        "group",
    ),
    (
        "g is packed without gaps",
        "fused.py",
        "g = _stack([projected.T for _, projected in pairs], layout, dys[0].dtype).T",
        "g = jnp.concatenate([projected for _, projected in pairs], 1).astype(dys[0].dtype); "
        "g = jnp.pad(g, ((0, 0), (0, layout.size - g.shape[1])))",
        "group",
    ),
]


def draw(seed, *shape, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return values.astype(jnp.dtype("bfloat16"))


def same(results, expected):
    for got, want in zip(results, expected, strict=True):
        got = np.asarray(got).astype(np.float64)
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()


def wide(*arrays):
    return [np.asarray(v).astype(np.float64) for v in arrays]


def run(kernel, expected, cores):
    from lorax_kernels.testing import interpret

    with interpret(cores) as races:
        results = jax.block_until_ready(kernel())
        assert not races.found()
    same(results, expected)


def matmul(groups, expected, cores=2, **options):
    from lorax_kernels.lora_linear.kernel import grouped_matmul
    from lorax_kernels.lora_linear.plan import MatmulConfig

    config = MatmulConfig(block_n=128, stages=2, store_slots=1)
    run(jax.jit(lambda: grouped_matmul(groups, config=config, **options)), expected, cores)


def check_matmul():
    from lorax_kernels.lora_linear.plan import Term

    x, h, w, b = draw(0, 200, 128), draw(1, 200, 64), draw(2, 128, 192), draw(3, 64, 192)
    x64, h64, w64, b64 = wide(x, h, w, b)
    matmul([[Term(x, (w,)), Term(h, (b,))]], [x64 @ w64 + h64 @ b64])


def check_update():
    from lorax_kernels.lora_linear.plan import Term, Update

    x, h, b, bias = draw(0, 72, 128), draw(1, 72, 16), draw(2, 16, 256), draw(3, 256, scale=9.0)
    ws = [draw(4, 128, 128), draw(5, 128, 128)]
    x64, h64, b64, bias64, *w64 = wide(x, h, b, bias, *ws)
    sums = [
        x64 @ w + h64 @ b64[:, cs] for w, cs in zip(w64, (np.s_[:128], np.s_[128:]), strict=True)
    ]
    expected = [sums[0] + bias64[:128], sums[1] + bias64[128:]]
    groups = [[Term(x, (w,))] for w in ws]
    matmul(groups, expected, cores=1, update=Update(h, b), bias=jnp.asarray(bias))


def silu_operands():
    from lorax_kernels.lora_linear.plan import Term

    x, gate, up = draw(0, 64, 128), draw(1, 128, 128, scale=0.1), draw(2, 128, 128, scale=0.1)
    x64, gate64, up64 = wide(x, gate, up)
    gated, upped = x64 @ gate64, x64 @ up64
    return [[Term(x, (gate, up))]], gated, upped, 1.0 / (1.0 + np.exp(-gated))


def check_swiglu():
    groups, gated, upped, sigmoid = silu_operands()
    matmul(groups, [gated * sigmoid * upped, gated, upped], epilogue="swiglu_keep")


def check_swiglu_grad():
    groups, gated, upped, sigmoid = silu_operands()
    d_act = draw(3, 64, 128)
    (d64,) = wide(d_act)
    d_gate = d64 * upped * sigmoid * (1.0 + gated * (1.0 - sigmoid))
    matmul(groups, [d_gate, d64 * gated * sigmoid], epilogue="swiglu_grad", tail=[d_act])


def check_swiglu_back():
    from lorax_kernels.lora_linear.kernel import grouped_matmul
    from lorax_kernels.lora_linear.plan import MatmulConfig, Term, Update

    dy, gate, up = draw(0, 72, 64), draw(1, 72, 320), draw(2, 72, 320)
    w, g, a = draw(3, 320, 64, scale=0.1), draw(4, 72, 16), draw(5, 16, 320, scale=0.2)
    dy64, gate64, up64, w64, g64, a64 = wide(dy, gate, up, w, g, a)
    sigmoid = 1.0 / (1.0 + np.exp(-gate64))
    d_act = dy64 @ w64.T + g64 @ a64
    d_gate = d_act * up64 * sigmoid * (1.0 + gate64 * (1.0 - sigmoid))
    options = {"config": MatmulConfig(stages=3), "transposed": True, "tail": [gate, up]}
    kernel = lambda: grouped_matmul(
        [[Term(dy, (w,))]], epilogue="swiglu_back", update=Update(g, a), **options
    )
    run(jax.jit(kernel), [d_gate, d_act * gate64 * sigmoid, gate64 * sigmoid * up64], 1)


def check_dropout():
    from lorax_kernels.lora_linear.dropout import keep_mask, keep_probability
    from lorax_kernels.lora_linear.plan import Dropout, Term

    dy, g, w, a = draw(0, 72, 128), draw(1, 72, 64), draw(2, 128, 128), draw(3, 128, 64)
    dy64, g64, w64, a64 = wide(dy, g, w, a)
    seed = jnp.array([5, 7, 32], jnp.uint32)
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, (72, 128), i) for i in (0, 1))
    keep = np.asarray(keep_mask(seed[0], seed[1], seed[2], row, column, 0.3))
    expected = dy64 @ w64.T + keep / keep_probability(0.3) * (g64 @ a64.T)
    groups = [[Term(dy, (w,)), Term(g, (a,))]]
    matmul(groups, [expected], transposed=True, dropout=Dropout(seed, 0.3))


def check_mask():
    from lorax_kernels.lora_linear.dropout import apply_dropout

    keep = np.asarray(apply_dropout(jnp.ones((512, 512)), 0.5, jax.random.key(0))) > 0
    for shift in (1, 8, 16):
        pairs = (keep[shift:] == keep[:-shift]).mean() - 0.5
        assert abs(pairs) < 2.5 / keep[shift:].size ** 0.5


def check_begun():
    from lorax_kernels.lora_linear.kernel import grouped_matmul
    from lorax_kernels.lora_linear.plan import MatmulConfig, Term

    x, w, y = draw(0, 72, 128), draw(1, 128, 384), draw(2, 72, 384)
    y[:, 128:] = np.nan
    config = MatmulConfig(block_n=128, stages=2)

    def kernel():
        return grouped_matmul([[Term(x, (w,))]], config=config, begun=(jnp.asarray(y), 128))

    x64, w64, y64 = wide(x, w, y)
    run(jax.jit(kernel), [np.concatenate([y64[:, :128], (x64 @ w64)[:, 128:]], 1)], 2)


def check_inline():
    from lorax_kernels.lora_linear.inline import InlineTerm, inline_matmul
    from lorax_kernels.lora_linear.plan import MatmulConfig

    x, w, a, b = draw(0, 136, 128), draw(1, 128, 256), draw(2, 16, 128), draw(3, 16, 256)
    config = MatmulConfig(block_n=128, stages=2, store_slots=1)
    terms = [InlineTerm(x, w, a)]
    kernel = lambda: inline_matmul(terms, b, n=256, width=256, config=config)
    x64, w64, a64, b64 = wide(x, w, a, b)
    run(jax.jit(kernel), [x64 @ w64 + x64 @ a64.T @ b64, x64 @ a64.T], 1)


def check_project():
    from lorax_kernels.lora_linear.project import project
    from lorax_kernels.lora_linear.skinny import SkinnyConfig

    t, u = draw(0, 136, 192), draw(1, 64, 192)
    t64, u64 = wide(t, u)
    run(jax.jit(lambda: [project(t, u, config=SkinnyConfig(1, 256, 2))[0]]), [t64 @ u64.T], 1)


def check_gradient():
    from lorax_kernels.lora_linear.gradient import gradient
    from lorax_kernels.lora_linear.skinny import SkinnyConfig

    t, v = draw(0, 136, 128), draw(1, 136, 128)
    t64, v64 = wide(t, v)
    config = SkinnyConfig(2, 128, 2)
    kernel = lambda: [gradient(t, v, config=config, columns=(64, 64))[0].sum(0)]
    run(jax.jit(kernel), [t64.T @ v64[:, 64:]], 2)


def compare_layers(ranks, m, **options):
    """Values and gradients of a group, kernels against plain XLA."""
    from lorax_kernels import LoraWeights, lora_linear_group
    from lorax_kernels.lora_linear import calls, fused

    fused.inline_width = lambda *sizes: 0
    # Interpreted kernels of one compiled function would run side by side, and wait for each other.
    for name, value in list(vars(calls).items()):
        if hasattr(value, "lower") and hasattr(value, "__wrapped__"):
            setattr(calls, name, value.__wrapped__)
    x, k, n = draw(0, m, 128), 128, 128
    ws = [draw(10 * i + 1, k, n, scale=0.1) for i in range(len(ranks))]
    adapters = [
        (draw(10 * i + 2, k, r, scale=0.1), draw(10 * i + 3, r, n, scale=0.3))
        for i, r in enumerate(ranks)
    ]
    dys = [draw(90 + i, m, n) for i in range(len(ranks))]

    def value_and_gradients(kernels):
        def apply(x, adapters):
            members = [
                LoraWeights(w, a, b, scale=2.0) for w, (a, b) in zip(ws, adapters, strict=True)
            ]
            return lora_linear_group(x, members, kernels=kernels, **options)

        y, pull = jax.vjp(apply, x, adapters)
        return jax.tree.leaves((y, pull([jnp.asarray(dy) for dy in dys])))

    run(lambda: value_and_gradients("pallas"), wide(*value_and_gradients("xla")), 3)


def check_layer():
    compare_layers([64], 200)


def check_group():
    compare_layers([40, 40], 16)


def check_layer_dropout():
    compare_layers([16], 16, dropout_rate=0.3, dropout_key=jax.random.key(1))


CHECKS = [
    check_matmul, check_update, check_swiglu, check_swiglu_grad, check_swiglu_back, check_dropout,
    check_mask, check_begun, check_inline, check_project, check_gradient, check_layer, check_group,
    check_layer_dropout,
]  # fmt: skip


def run_checks(folder, *names):
    """Runs checks on the package in `folder`; returns the exit status and what was printed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, __file__, str(folder), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout[-2000:] + done.stderr[-2000:]


def copy_package(folder):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / "lorax_kernels", ignore=ignore)


def test_the_package_as_it_is_passes_every_check(tmp_path):
    copy_package(tmp_path)
    names = [check.__name__.removeprefix("check_") for check in CHECKS]
    status, output = run_checks(tmp_path, *names)
    assert status == 0, output
    assert {fault[4] for fault in FAULTS} == set(names)


def test_every_fault_changes_one_place():
    for name, file, old, new, _ in FAULTS:
        assert (PACKAGE / "lora_linear" / file).read_text().count(old) == 1, name
        assert old != new


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].replace(" ", "_"))
def test_a_fault_is_noticed(fault, tmp_path):
    _, file, old, new, check = fault
    copy_package(tmp_path)
    path = tmp_path / "lorax_kernels" / "lora_linear" / file
    path.write_text(path.read_text().replace(old, new))
    status, output = run_checks(tmp_path, check)
    assert status == NOTICED, output or "the check passed"


def main(folder, *names):
    import lorax_kernels

    assert Path(lorax_kernels.__file__).is_relative_to(folder), "not the copy"
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    for name in names:
        try:
            globals()[f"check_{name}"]()
        except (AssertionError, jax.errors.JaxRuntimeError) as error:
            print(f"{name}: {error!r}"[:500])
            os._exit(NOTICED)  # threads of a kernel may still be waiting for each other


if __name__ == "__main__":
    main(*sys.argv[1:])
