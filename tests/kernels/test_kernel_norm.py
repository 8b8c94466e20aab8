"""The norm's backward pass: values against float64, where the kernel runs, and the choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.adapters.nnx.apply import apply_lora, set_kernels
from lorax.config.adapter import LoraConfig
from lorax.devices.mesh import DATA_AXIS, make_mesh
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax_kernels import rms_norm, rms_norm_fork
from lorax_kernels.device import interpreted
from tests.jaxprs import on_h200

EPSILON = 1e-5


def draw(shape, dtype):
    draw = np.random.default_rng(0)
    x, dx, dy = (jnp.asarray(draw.normal(size=shape), dtype) for _ in range(3))
    # Rows of very different size, so that the mean is of the row.
    x = x * jnp.logspace(-3, 3, shape[0]).astype(dtype).reshape(-1, *[1] * (len(shape) - 1))
    return x, jnp.asarray(draw.normal(size=shape[-1:]), dtype), dx, dy


def pulled(kernels, x, weight, dx, dy, **options):
    fork = lambda x: rms_norm_fork(x, weight, EPSILON, kernels=kernels, **options)
    outputs, pull = jax.vjp(fork, x)
    return [*outputs, *pull((dx, dy))]


def exact(x, weight, dx, dy):
    x, weight, dx, dy = (array.astype(jnp.float64) for array in (x, weight, dx, dy))
    weight = jnp.broadcast_to(weight, x.shape)
    norm = lambda x: weight * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)
    y, pull = jax.vjp(norm, x)
    return [x, y, dx + pull(dy)[0]]


def distances(got, want):
    """Returns the largest distance of a row, over the size of the row."""
    off = lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b, axis=-1)
    pairs = zip(got, map(np.asarray, want), strict=True)
    return [(off(a, b) / np.linalg.norm(b, axis=-1)).max() for a, b in pairs]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 128), (2, 3, 96), (4, 700)])
def test_the_kernel_is_as_near_to_the_truth_as_xla(shape, dtype):
    operands = draw(shape, dtype)
    with interpreted(3):
        got = pulled("pallas", *operands)
    with jax.enable_x64(True):
        want = exact(*operands)
    assert [a.dtype for a in got] == [dtype] * 3
    theirs = distances(pulled("xla", *operands), want)
    unit = {"bfloat16": 3.9e-3, "float16": 4.9e-4}[dtype]
    for ours, bound in zip(distances(got, want), theirs, strict=True):
        assert ours <= bound + unit / 4


def test_the_shards_of_a_mesh_are_computed_apart():
    operands = draw((4, 3, 96), "bfloat16")
    with interpreted(3):
        alone = pulled("pallas", *operands)
        with jax.set_mesh(make_mesh(2)):
            function = functools.partial(pulled, "pallas", row_axes=(DATA_AXIS,))
            shared = jax.jit(function)(*operands)
    for ours, theirs in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_weight_is_frozen():
    x, weight, *_ = draw((3, 128), "bfloat16")
    for kernels in ("pallas", "xla"):
        with interpreted(3):
            loss = lambda w, kernels=kernels: sum(
                part.astype(jnp.float32).sum()
                for part in rms_norm_fork(x, w, EPSILON, kernels=kernels)
            )
            assert not jnp.any(jax.grad(loss)(weight))


def test_the_norm_is_rounded_as_hugging_face_rounds_it():
    x, weight, *_ = draw((3, 128), "bfloat16")
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
    np.testing.assert_array_equal(rms_norm(x, weight, EPSILON), weight[None] * unit.astype(x.dtype))


@pytest.mark.parametrize(
    "kernels, dtype, adapted, norms",
    [
        ("auto", "bfloat16", True, 3),  # nothing before the first one trains
        ("xla", "bfloat16", True, 0),
        ("auto", "float32", True, 0),
        ("auto", "bfloat16", False, 0),  # the norms' weights train
    ],
)
def test_where_the_kernel_runs(kernels, dtype, adapted, norms):
    loss, trainable = small_model(kernels, dtype, adapted)
    with on_h200():
        text = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    assert text.count("name=_add_gradients") == norms


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_no_more_is_kept_than_without_it(policy):
    def kept(kernels):
        loss, trainable = small_model(kernels, "bfloat16", True, policy)
        with on_h200():
            leaves = jax.tree.leaves(jax.eval_shape(lambda t: jax.vjp(loss, t)[1], trainable))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert kept("auto") <= kept("xla")


def small_model(kernels, dtype, adapted, policy="none"):
    """Returns a loss and what it trains."""
    sizes = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": True}
    options = {"dtype": jnp.dtype(dtype), "attn_impl": "xla", "gradient_checkpointing": policy}
    model = CausalLM(read_architecture(sizes, "here"), **options, rngs=nnx.Rngs(0))
    if adapted:
        model = apply_lora(model, LoraConfig(target_modules=["q_proj"]), rngs=nnx.Rngs(1))
    set_kernels(model, kernels)
    graph, trainable, rest = nnx.split(model, nnx.Param, ...)

    def loss(trainable):
        hidden = nnx.merge(graph, trainable, rest).hidden_states(jnp.zeros((1, 16), jnp.int32))
        return hidden.astype(jnp.float32).sum()

    return loss, trainable
