"""Every kernel in every mode, interpreted on the CPU: exact to one rounding, and without races."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels.lora_linear.inline import InlineTerm, inline_matmul
from lorax_kernels.lora_linear.kernel import grouped_matmul
from lorax_kernels.lora_linear.plan import Dropout, MatmulConfig, Term, Update
from tests.kernels.operands import RATE, SEED, SMALL, check, compare, draw, dropout_factors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_after_the_other")]


def test_the_comparison_notices_one_wrong_column_and_one_wrong_element():
    x, w = draw(0, 16, 128), draw(1, 128, 128, scale=128**-0.5)
    formula = lambda xp, x, w: [x @ w]
    right = (x.astype(np.float32) @ w.astype(np.float32)).astype(x.dtype)
    compare([right], formula, (x, w))
    for place in (np.s_[:, 5], np.s_[3, 7]):
        wrong = right.copy()
        wrong[place] += np.asarray(0.25, x.dtype)
        with pytest.raises(AssertionError):
            compare([wrong], formula, (x, w))


@pytest.mark.parametrize(
    "m, k, n, r, dtype, cores, transposed, options",
    [
        (200, 128, 192, 16, "bfloat16", 2, False, {}),
        (200, 192, 192, 64, "bfloat16", 3, True, {"stages": 2}),
        (72, 128, 192, 32, "float16", 2, False, {}),
        (200, 192, 192, 32, "bfloat16", 3, True, {"stages": 2}),
        (16, 128, 128, 128, "float16", 7, False, {}),
        (16, 128, 128, 128, "float16", 7, True, {}),
        (136, 128, 256, 64, "bfloat16", 4, False, {"cluster": 2}),
        (136, 128, 256, 64, "bfloat16", 4, True, {"cluster": 2}),
        (200, 128, 256, 64, "bfloat16", 2, False, {"block_m": 256, "stages": 2}),
        (136, 128, 320, 64, "bfloat16", 3, False, {"block_n": 256, "raster_minor": 0}),
    ],
)
def test_a_product_and_its_update_are_one_sum(m, k, n, r, dtype, cores, transposed, options):
    x, h = draw(0, m, k, dtype=dtype), draw(1, m, r, dtype=dtype)
    w, b = draw(2, k, n, dtype=dtype, scale=k**-0.5), draw(3, r, n, dtype=dtype, scale=0.5)
    config = MatmulConfig(**{"block_n": 128, "stages": 3} | options)
    turn = (lambda v: v.T) if transposed else (lambda v: v)
    terms = [Term(x, (turn(w),)), Term(h, (turn(b),))]
    kernel = lambda: grouped_matmul([terms], config=config, transposed=transposed)
    check(kernel, lambda xp, x, w, h, b: [x @ w + h @ b], (x, w, h, b), cores)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster": 2},
        {"block_m": 256, "stages": 2},
        {"stages": 4, "store_slots": 1, "raster_minor": 0, "raster_width": 16},
    ],
)
@pytest.mark.parametrize("short", [True, False])
def test_a_product_is_added_to_what_there_is(options, short):
    m, k, n, r = 200, 128, 320, 16 if short else 64
    x, h, residual = draw(0, m, k), draw(1, m, r), draw(2, m, n)
    w, b, bias = draw(3, k, n, scale=k**-0.5), draw(4, r, n, scale=0.5), draw(5, 384)
    config = MatmulConfig(**{"block_n": 128, "stages": 3} | options)
    terms = [Term(x, (w,))] if short else [Term(x, (w,)), Term(h, (b,))]
    kernel = lambda: grouped_matmul(
        [terms],
        config=config,
        epilogue="add",
        bias=bias,
        tail=[residual],
        update=Update(h, b) if short else None,
    )
    formula = lambda xp, x, w, h, b, bias, y: [y + x @ w + h @ b + bias]
    check(kernel, formula, (x, w, h, b, bias[None, :n], residual), cores=4)


@pytest.mark.parametrize("cluster", [1, 2])
def test_groups_take_their_own_columns_bias_and_rows_of_the_update(cluster):
    m, k, widths = 200, 128, (192, 128, 256)
    x = draw(0, m, k)
    ws = [draw(1 + i, k, n, scale=k**-0.5) for i, n in enumerate(widths)]
    # Only the first and the last group have an update: h's columns 64 to 127, and 128 to 255.
    h, b = draw(5, m, 256), np.full((256, 576), np.nan, jnp.bfloat16)
    h[:, :64] = np.nan
    b[64:128, :192], b[128:, 320:] = draw(6, 64, 192, scale=0.3), draw(7, 128, 256, scale=0.3)
    b[64:128, 192:256] = 0.0  # the rest of the first group's last tile
    bias = draw(8, 256 + 128 + 256)
    groups = [[Term(x, (w,))] for w in ws]
    groups[0].append(Term(h, (b,), 64, 64, 64, (0,)))
    groups[2].append(Term(h, (b,), 128, 128, 128, (320,)))
    config = MatmulConfig(block_n=128, stages=3, cluster=cluster)

    def formula(xp, x, w0, w1, w2, h0, h2, b0, b2, bias0, bias1, bias2):
        return [x @ w0 + h0 @ b0 + bias0, x @ w1 + bias1, x @ w2 + h2 @ b2 + bias2]

    updates = (h[:, 64:128], h[:, 128:], b[64:128, :192], b[128:, 320:])
    biases = (bias[None, :192], bias[None, 256:384], bias[None, 384:])
    kernel = lambda: grouped_matmul(groups, config=config, bias=bias)
    check(kernel, formula, (x, *ws, *updates, *biases), cores=4)


def test_a_transposed_sum_takes_a_term_from_every_member():
    m, k, widths = 136, 192, (128, 192)
    dys = [draw(i, m, n) for i, n in enumerate(widths)]
    ws = [draw(2 + i, k, n, scale=n**-0.5) for i, n in enumerate(widths)]
    g, a = draw(4, m, 128), draw(5, k, 128, scale=0.2)
    terms = [Term(dy, (w,)) for dy, w in zip(dys, ws, strict=True)]
    kernel = lambda: grouped_matmul([[*terms, Term(g, (a,))]], config=SMALL, transposed=True)
    formula = lambda xp, dy0, dy1, w0, w1, g, a: [dy0 @ w0.T + dy1 @ w1.T + g @ a.T]
    check(kernel, formula, (*dys, *ws, g, a))


@pytest.mark.parametrize(
    "m, dtype, transposed, options",
    [
        (200, "bfloat16", False, {"stages": 2}),
        (16, "float16", True, {"stages": 3}),
        (136, "bfloat16", True, {"stages": 3, "cluster": 2}),
    ],
)
def test_an_update_of_rank_16_is_a_short_step(m, dtype, transposed, options):
    k, n = 128, 320
    x, h = draw(0, m, k, dtype=dtype), draw(1, m, 16, dtype=dtype)
    w, b = draw(2, k, n, dtype=dtype, scale=k**-0.5), draw(3, 16, n, dtype=dtype, scale=0.5)
    kernel = lambda: grouped_matmul(
        [[Term(x, (w.T if transposed else w,))]],
        config=MatmulConfig(block_n=128, **options),
        transposed=transposed,
        update=Update(h, b),
    )
    formula = lambda xp, x, w, h, b: [x @ w + h @ b]
    check(kernel, formula, (x, w, h, b), cores=4 if "cluster" in options else 2)


def test_a_short_step_takes_each_group_s_columns():
    m, k = 136, 128
    x, h, w0, w1 = draw(0, m, k), draw(1, m, 16), draw(2, k, 192), draw(3, k, 256)
    b, bias = draw(4, 16, 448, scale=0.5), draw(5, 512)
    kernel = lambda: grouped_matmul(
        [[Term(x, (w0,))], [Term(x, (w1,))]], config=SMALL, update=Update(h, b), bias=bias
    )
    formula = lambda xp, x, h, w0, w1, b0, b1, bias0, bias1: [
        x @ w0 + h @ b0 + bias0,
        x @ w1 + h @ b1 + bias1,
    ]
    parts = (b[:, :192], b[:, 192:], bias[None, :192], bias[None, 256:])
    check(kernel, formula, (x, h, w0, w1, *parts))


@pytest.mark.parametrize("r, is_short", [(16, True), (32, False), (128, False)])
def test_dropout_of_a_transposed_product_s_update(r, is_short):
    m, k, n = 200, 192, 128
    dy, g = draw(0, m, n), draw(1, m, r)
    w, a = draw(2, k, n, scale=n**-0.5), draw(3, k, r, scale=r**-0.5)
    terms = [Term(dy, (w,))] if is_short else [Term(dy, (w,)), Term(g, (a,))]
    kernel = lambda: grouped_matmul(
        [terms],
        config=SMALL,
        transposed=True,
        update=Update(g, a.T) if is_short else None,
        dropout=Dropout(SEED, RATE),
    )
    formula = lambda xp, dy, w, g, a, factors: [dy @ w.T + factors * (g @ a.T)]
    check(kernel, formula, (dy, w, g, a, dropout_factors(m, k)))


@pytest.mark.parametrize(
    "epilogue, m, r",
    [
        ("swiglu", 136, 64),
        ("swiglu_keep", 16, 64),
        ("swiglu_keep", 72, 32),
        ("swiglu_grad", 200, 64),
    ],
)
def test_swiglu_is_formed_from_the_sums(epilogue, m, r):
    k, n = 128, 192
    x, h, d_act = draw(0, m, k), draw(1, m, r), draw(2, m, n)
    gate, up = draw(3, k, n, scale=k**-0.5), draw(4, k, n, scale=k**-0.5)
    b = draw(5, r, 2 * n, scale=0.1)
    terms = [Term(x, (gate, up)), Term(h, (b, b), r, columns=(0, n))]

    def formula(xp, x, h, d_act, gate, up, b0, b1):
        gated, upped = x @ gate + h @ b0, x @ up + h @ b1
        sigmoid = 1.0 / (1.0 + xp.exp(-gated))
        if epilogue == "swiglu_grad":
            d_gated = d_act * upped * sigmoid * (1.0 + gated * (1.0 - sigmoid))
            return [d_gated, d_act * gated * sigmoid]
        return [gated * sigmoid * upped, gated, upped][: 1 if epilogue == "swiglu" else 3]

    tail = [d_act] if epilogue == "swiglu_grad" else []
    kernel = lambda: grouped_matmul([terms], config=SMALL, epilogue=epilogue, tail=tail)
    check(kernel, formula, (x, h, d_act, gate, up, b[:, :n], b[:, n:]))


@pytest.mark.parametrize(
    "r, m, rate", [(16, 200, 0.0), (32, 72, 0.0), (64, 72, 0.0), (16, 72, RATE)]
)
def test_gradients_of_gate_and_up_are_formed_from_the_sum(r, m, rate):
    # More columns than a tile has, and more pieces of a tile than the ring has slots.
    k, n = 320, 128
    dy, g, gate, up = draw(0, m, n), draw(1, m, r), draw(2, m, k), draw(3, m, k)
    w, a = draw(4, k, n, scale=n**-0.5), draw(5, k, r, scale=r**-0.5)
    terms = [Term(dy, (w,))] if r == 16 else [Term(dy, (w,)), Term(g, (a,))]
    kernel = lambda: grouped_matmul(
        [terms],
        config=dataclasses.replace(SMALL, block_n=256),
        transposed=True,
        epilogue="swiglu_back",
        update=Update(g, a.T) if r == 16 else None,
        dropout=Dropout(SEED, RATE) if rate else None,
        tail=[gate, up],
    )

    def formula(xp, dy, w, g, a, gate, up, factors):
        d_act = dy @ w.T + factors * (g @ a.T)
        sigmoid = 1.0 / (1.0 + xp.exp(-gate))
        d_gate = d_act * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        return [d_gate, d_act * gate * sigmoid, gate * sigmoid * up]

    factors = dropout_factors(m, k) if rate else np.ones((m, k))
    check(kernel, formula, (dy, w, g, a, gate, up, factors))


@pytest.mark.parametrize("transposed, width", [(False, 128), (True, 256)])
def test_a_result_that_was_begun_keeps_its_first_columns(transposed, width):
    m, k, n = 136, 128, 320
    x, h, b = draw(0, m, k), draw(1, m, 64), draw(2, 64, n, scale=0.3)
    w, w2 = draw(3, k, n, scale=k**-0.5), draw(4, k, 128, scale=k**-0.5)
    turn = (lambda v: v.T) if transposed else (lambda v: v)
    groups = [[Term(x, (turn(w),)), Term(h, (turn(b),))]]
    if not transposed:
        groups.append([Term(x, (w2,))])
    begun = draw(5, m, n)
    begun[:, width:] = np.nan

    def kernel():
        first = [jnp.asarray(begun)], width
        return grouped_matmul(groups, config=SMALL, transposed=transposed, begun=first)

    def formula(xp, x, h, w, w2, b, first):
        y = xp.concatenate([first, (x @ w + h @ b)[:, width:]], axis=1)
        return [y] if transposed else [y, x @ w2]

    check(kernel, formula, (x, h, w, w2, b, begun[:, :width]))


@pytest.mark.parametrize(
    "r, m, width, options, bias, adds",
    [
        (16, 200, 128, {}, False, True),
        (16, 136, 256, {"cluster": 2}, True, True),
        (32, 136, 256, {}, True, False),
        (64, 16, 256, {"store_slots": 1}, False, False),
    ],
)
def test_the_first_columns_come_with_the_narrow_product(r, m, width, options, bias, adds):
    k, n = 128, 320
    x, w, a = draw(0, m, k), draw(1, k, n, scale=k**-0.5), draw(2, r, k, scale=k**-0.5)
    b, added = draw(3, r, n, scale=0.5), draw(4, 384) if bias else None
    residual = draw(5, m, n) if adds else None

    def kernel():
        config = MatmulConfig(**{"block_n": 128, "stages": 3} | options)
        more = {"bias": added, "residual": residual}
        y, h = inline_matmul([InlineTerm(x, w, a)], b, n=n, width=width, config=config, **more)
        return [y[:, :width], h]

    def formula(xp, x, w, a, b, bias, residual):
        return [(residual + x @ w + (x @ a.T) @ b + bias)[:, :width], x @ a.T]

    nothing = np.zeros((1, n), x.dtype)
    shown = nothing if added is None else added[None, :n]
    check(kernel, formula, (x, w, a, b, shown, nothing if residual is None else residual), cores=4)


@pytest.mark.parametrize("r, m, cores", [(16, 136, 2), (32, 136, 3), (64, 200, 3)])
def test_the_narrow_product_of_a_transposed_sum_reads_each_member_s_columns(r, m, cores):
    k, widths = 256, (128, 192)
    dys = [draw(i, m, n) for i, n in enumerate(widths)]
    ws = [draw(2 + i, k, n, scale=n**-0.5) for i, n in enumerate(widths)]
    # The columns before the members' belong to somebody else.
    b = draw(4, r, 384, scale=0.1)
    b[:, :64] = np.nan
    a = draw(5, r, k, scale=0.3)

    def kernel():
        columns = (64, 192)
        terms = [InlineTerm(*parts) for parts in zip(dys, ws, (b, b), columns, strict=True)]
        dx, g = inline_matmul(terms, a, n=k, width=128, config=SMALL, transposed=True)
        return [dx[:, :128], g]

    def formula(xp, dy0, dy1, w0, w1, b0, b1, a):
        g = dy0 @ b0.T + dy1 @ b1.T
        return [(dy0 @ w0.T + dy1 @ w1.T + g @ a)[:, :128], g]

    check(kernel, formula, (*dys, *ws, b[:, 64:192], b[:, 192:], a), cores)
