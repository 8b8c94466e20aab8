"""Checks of the kernels in a folder, each in a forked process that ends with what it found.

    python -m tests.kernels.fault_checks

It reads requests, a line of JSON each: `{"folder": …, "check": …, "log": …}`. What all checks
import is imported once; the kernels are not, since each folder has its own.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import jax
import jax.experimental.pallas.mosaic_gpu
import jax.numpy as jnp
import numpy as np

NOTICED = 3  # exit status of a check that found something wrong


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
    from tests.kernels.interpreter import interpret

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
        return grouped_matmul([[Term(x, (w,))]], config=config, begun=([jnp.asarray(y)], 128))

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

    expected = wide(*jax.jit(lambda: value_and_gradients("xla"))())
    run(lambda: value_and_gradients("pallas"), expected, 3)


def check_layer():
    compare_layers([64], 200)


def check_group():
    compare_layers([40, 40], 16)


def check_layer_dropout():
    compare_layers([16], 16, dropout_rate=0.3, dropout_key=jax.random.key(1))


CHECKS = {
    name.removeprefix("check_"): value
    for name, value in list(globals().items())
    if name.startswith("check_")
}


def run_check(folder, name):
    """Runs a check on the package in `folder`; does not come back."""
    sys.path.insert(0, folder)
    import lorax_kernels

    assert Path(lorax_kernels.__file__).is_relative_to(folder), "not the copy"
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_disable_most_optimizations", True)  # what is compiled runs once
    try:
        CHECKS[name]()
    except (AssertionError, jax.errors.JaxRuntimeError) as error:
        if "EvaluationError" in str(error):
            raise  # the check fails, and says nothing of the kernel
        print(f"{name}: {error!r}"[:500], flush=True)
        os._exit(NOTICED)  # threads of a kernel may still be waiting for each other


def fork(request):
    """Starts a check in a process of its own, which writes to a file; returns its number."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run_check(request["folder"], request["check"])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


def main():
    for line in sys.stdin:
        _, status = os.waitpid(fork(json.loads(line)), 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
