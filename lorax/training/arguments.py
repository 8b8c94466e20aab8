"""Refuses arguments of `make_train_step` and its step that would train wrongly."""

from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lorax.adapters.nnx.tree import adapted_layers, named_modules, split_trainable
from lorax.config.run import RunConfig
from lorax.data.dataset import EncodedDataset
from lorax.system.arguments import check_kind
from lorax.system.wording import clip
from lorax_kernels import Weight

_SMALLEST = 0.01
"""Least ratio of an update of B at 0 to one of B at 1: Adam's is 1, Adafactor's 0.001."""

_MOST_STEPS = 100
"""Steps of an optimizer that are tried until one updates something."""


def check_arguments(model: Any, optimizer: Any, loss_fn: Any) -> None:
    """Refuses what a step cannot be made of.

    Raises:
        TypeError: Naming what came and what is needed.
        ValueError: If the optimizer would hardly move what starts at zero.
    """
    check_kind("model", model, nnx.Module, "an nnx.Module")
    check_functions(optimizer, loss_fn)
    _, trainable, _ = split_trainable(model)
    for leaf in jax.tree.leaves(trainable, is_leaf=_is_weight):
        if _is_weight(leaf):
            raise ValueError(
                "the model trains whole, but its matrices are quantised: apply_lora it first, or "
                "load the 16-bit checkpoint"
            )
    if adapted_layers(model):
        refuse_scaled_by_size(optimizer, trainable)


def check_functions(
    optimizer: Any, loss_fn: Any, order: str = "make_train_step(model, optimizer, loss_fn)"
) -> None:
    """Refuses what is no optimizer and no loss.

    Args:
        optimizer: What was given as the optimizer.
        loss_fn: What was given as the loss.
        order: The call as it should be.

    Raises:
        TypeError: Naming what came and what is needed.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "optimizer must be an optax transformation, such as optax.adamw(1e-3), got "
            f"{clip(repr(optimizer))}; the order is {order}"
        )
    if not (callable(loss_fn) or hasattr(loss_fn, "terms")):
        raise TypeError(
            "loss_fn must be a function (model, micro_batch) -> (sum of losses, count), got "
            f"{clip(repr(loss_fn))}; the order is {order}"
        )


def refuse_untrainable(model: nnx.Module) -> None:
    """Refuses merged adapters, which get no gradient, and batch norms that update statistics.

    Raises:
        ValueError: Naming the layers.
    """
    merged = [name for name, layer in adapted_layers(model).items() if layer.merged]
    if merged:
        raise ValueError(
            f"{len(merged)} layers are merged, {merged[0]} is the first: their adapters would not "
            "train. unmerge_lora the model first"
        )
    for name, module in named_modules(model).items():
        if getattr(module, "use_running_average", True) is False:
            raise ValueError(
                f"{name} would update batch statistics, which this step does not carry; freeze "
                "them with model.set_attributes(use_running_average=True)"
            )


def check_run(
    model: Any, config: Any, train_data: Any, eval_data: Any, *, one_objective: bool
) -> None:
    """Refuses what a trainer cannot be made of.

    Raises:
        TypeError: Naming what came and what is needed.
        ValueError: If there are two objectives, a course's and a loss function.
    """
    if not one_objective:
        raise ValueError("a course has its own objective: give loss_fn or course, not both")
    check_kind("model", model, nnx.Module, "an nnx.Module, as lorax.build_model returns")
    check_kind("config", config, RunConfig, "a lorax.RunConfig, as lorax.load_config returns")
    rows = "encoded rows, as lorax.load_encoded_dataset returns"
    check_kind("train_data", train_data, EncodedDataset, rows)
    check_kind("eval_data", eval_data, (EncodedDataset, NoneType), rows)


def check_batch(batch: Any) -> None:
    """Refuses a batch that is not (micro-batches, rows, …) in every array, or on another mesh.

    Raises:
        ValueError: Naming the arrays.
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    arrays = {f"batch{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
    if not arrays:
        raise ValueError("the batch holds no array: it needs (micro-batches, rows, …) in each")
    short = [f"{name} has the shape {x.shape}" for name, x in arrays.items() if x.ndim < 2]
    if short:
        raise ValueError(
            f"{'; '.join(short)}: every array of a step's batch is (micro-batches, rows, …). For "
            "one micro-batch, pass jax.tree.map(lambda x: x[None], batch)"
        )
    if len({x.shape[0] for x in arrays.values()}) > 1:
        sizes = ", ".join(f"{name} {x.shape[0]}" for name, x in arrays.items())
        raise ValueError(f"every array needs as many micro-batches on its first axis, got {sizes}")
    here = jax.sharding.get_abstract_mesh()
    for name, x in arrays.items():
        sharding = jax.typeof(x).sharding
        if not (sharding.mesh.empty or here.empty) and sharding.mesh != here:
            raise ValueError(
                f"{name} lies on another mesh than the step: {sharding.mesh}, and {here}. Give "
                "make_train_step the mesh of the batch"
            )
        if sharding.spec[:1] not in ((), (None,)):
            raise ValueError(
                f"{name} has its micro-batches divided, by {sharding.spec}: divide the rows, as by "
                "PartitionSpec(None, 'data')"
            )


def refuse_scaled_by_size(optimizer: optax.GradientTransformation, trainable: Any) -> None:
    """Refuses an optimizer whose updates grow with the parameter: B, which is zero, would stall.

    It updates parameters that differ in size alone: a single B, or, where the optimizer knows the
    model's parameters by name, small ones in their places.

    Raises:
        ValueError: Saying by how much they do.
    """
    untraced = jax.ensure_compile_time_eval  # a step may be built of shapes, where all is traced
    with jax.numpy_dtype_promotion("standard"), untraced():  # optax needs that promotion
        try:
            ratio = _update_ratio(optimizer, {"lora_b": jnp.ones((2, 2))})
        except (KeyError, TypeError, ValueError):
            small = jax.tree.map(lambda x: jnp.ones((2,) * x.ndim, x.dtype), trainable)
            ratio = _update_ratio(optimizer, small)
    if ratio < _SMALLEST:
        raise ValueError(
            "the optimizer scales its updates by the size of each parameter, and a LoRA's B starts "
            f"at zero: its updates there are {ratio:.1e} of those at 1, and training would stall. "
            "Leave out what scales them, such as adaptive_grad_clip; with Adafactor, pass "
            "optax.adafactor(…, multiply_by_parameter_scale=False)"
        )


def _update_ratio(optimizer: optax.GradientTransformation, ones: Any) -> float:
    """Returns the least ratio of a B's update at zero to its update at 1; 1 if none updates it.

    The first steps may update nothing, in a warm-up or while `optax.MultiSteps` gathers.
    """

    @jax.jit
    def update(params, state):
        updates, state = optimizer.update(ones, state, params)
        paths = jax.tree_util.tree_leaves_with_path(updates)
        sizes = [jnp.abs(x).sum() for path, x in paths if "lora_b" in jax.tree_util.keystr(path)]
        return jnp.stack(sizes), state

    zeros = jax.tree.map(jnp.zeros_like, ones)
    states = optimizer.init(zeros), optimizer.init(ones)
    for _ in range(_MOST_STEPS):
        (at_zero, first), (at_one, second) = map(update, (zeros, ones), states)
        states = first, second
        moved = at_one > 0
        if moved.any():
            return float(jnp.where(moved, at_zero / jnp.where(moved, at_one, 1), 1).min())
    return 1.0


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, Weight)
