"""NF4's kernel: its values in the interpreter, its PTX emulated, and where it is chosen."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from lorax_kernels.device import runs_kernels
from lorax_kernels.weights.nf4 import Nf4, quantise
from lorax_kernels.weights.nf4.kernel import Variant, dequantise
from lorax_kernels.weights.nf4.lanes import SHIFTS, four_levels
from lorax_kernels.weights.nf4.levels import LEVELS
from tests.jaxprs import equations, on_h200
from tests.kernels.interpreter import interpret
from tests.weights.nf4_reference import dense, quantised

pytestmark = pytest.mark.usefixtures("one_after_the_other")
VARIANTS = (Variant(8), Variant(16))


def draw(seed, n, k, dtype):
    values = np.random.default_rng(seed).standard_normal((n, k))
    values[0] = 0
    return values.astype(jnp.dtype(dtype))


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint16)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_values_are_those_of_the_definition(variant, dtype, double):
    n, k, dtype = 512, 128, jnp.dtype(dtype)
    weight = draw(0, n, k, dtype)
    stored = quantise(jnp.asarray(weight).T, double=double)
    nested = (stored.nested_absmax, stored.offset) if double else None
    want = dense(*quantised(weight, double, "cuda"), (n, k), dtype)
    with interpret() as races:
        got = np.asarray(dequantise(stored.codes, stored.absmax, nested, dtype, variant))
        assert not races.found()
    np.testing.assert_array_equal(bits(got.T.copy()), bits(want))


def test_a_stored_matrix_is_dequantised_by_the_kernel():
    matrix = quantise(jnp.asarray(draw(1, 128, 128, "bfloat16")).T, double=True)
    want = matrix.dense()
    with interpret() as races:
        got = np.asarray(matrix.dense())
        assert not races.found()
    assert (got.shape, got.dtype) == (matrix.shape, jnp.bfloat16)
    np.testing.assert_array_equal(got.view(np.uint16), np.asarray(want).view(np.uint16))


def kernels_of(matrix, dtype=None):
    traced = jax.make_jaxpr(lambda matrix: matrix.dense(dtype))(matrix)
    return [e.params["name"] for e in equations(traced.jaxpr) if e.primitive.name == "jit"].count(
        "dequantise"
    )


def test_the_kernel_is_chosen_on_hopper_gpus_only_and_not_under_a_mesh():
    def matrix(k, n, dtype="bfloat16"):
        return jax.eval_shape(quantise, jax.ShapeDtypeStruct((k, n), jnp.dtype(dtype)))

    device = AbstractDevice("NVIDIA H200", 132, "cuda")
    whole = matrix(4096, 1024)
    assert kernels_of(whole) == 0
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), abstract_device=device)):
        assert kernels_of(whole) == 0
    with on_h200():
        assert kernels_of(whole) == 1 == kernels_of(matrix(64, 128), "float16")
        assert kernels_of(whole, "float32") == 0
        # Blocks that span columns, and blocks that do not fill a tile.
        assert kernels_of(matrix(96, 128)) == kernels_of(matrix(64, 96)) == 0


def permute(a, b, selector):
    pool = [(v >> 8 * i) & 255 for v in (a, b) for i in range(4)]
    return sum(pool[(selector >> 4 * i) & 7] << 8 * i for i in range(4))


def run_ptx(text, word):
    """Returns the registers after the few instructions of PTX that are used, as its manual says."""
    registers = {"$4": word}
    number = lambda v: registers[v] if v in registers else int(v, 0)
    for line in re.findall(r"(\w+\.b32 [^;{}]+);", text.split(";", 1)[1]):
        name, operands = line.split(" ", 1)
        target, *rest = operands.split(", ")
        p, *more = map(number, rest)
        registers[target] = {
            "shr.b32": lambda p, q=0: p >> q,
            "and.b32": lambda p, q=0: p & q,
            "mov.b32": lambda p: p,
            "lop3.b32": lambda p, q=0, r=0, table=0: {0xEA: (p & q) | r}[table],
            "prmt.b32": permute,
        }[name](p, *more)
    return registers


@pytest.mark.parametrize("first", [0, 16])
def test_permutations_give_the_levels_of_four_codes(first):
    levels = np.array(LEVELS, np.float32).view(np.uint32)
    for word in np.random.default_rng(0).integers(0, 1 << 32, 100).tolist():
        registers = run_ptx(four_levels(first), word)
        want = [levels[word >> first + 4 * place & 15] for place in range(4)]
        assert [registers[f"${place}"] for place in range(4)] == want


def test_a_word_holds_the_codes_in_their_order():
    codes = np.arange(8, dtype=np.uint8)
    (word,) = (codes[0::2] << 4 | codes[1::2]).view("<u4")
    assert [int(word) >> shift & 15 for shift in SHIFTS] == codes.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(
    jax.default_backend() != "gpu" or not runs_kernels(), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_gpu_makes_the_bytes_and_values_of_bitsandbytes(variant):
    n, k = 1024, 4096
    weight = draw(2, n, k, "bfloat16")
    want = quantised(weight, True, "cuda")
    stored = quantise(jnp.asarray(weight).T, double=True)
    for got, expected in zip(stored.to_bitsandbytes(), want, strict=True):
        np.testing.assert_array_equal(np.asarray(got).reshape(-1), expected)
    values = dense(*want, (n, k), jnp.bfloat16)
    np.testing.assert_array_equal(
        bits(np.asarray(jax.jit(Nf4.dense)(stored)).T.copy()), bits(values)
    )
    nested = stored.nested_absmax, stored.offset
    for scales in ((stored.absmax, nested), (stored.scales(), None)):
        got = dequantise(stored.codes, *scales, jnp.dtype(jnp.bfloat16), variant)
        np.testing.assert_array_equal(bits(np.asarray(got).T.copy()), bits(values))
