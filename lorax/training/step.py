"""One optimizer step as a pure, compiled function: accumulate, divide once, clip, update."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from lorax.adapters.nnx.tree import split_trainable
from lorax.devices.determinism import compiler_options, repeatable_attention
from lorax.devices.placement import place_parameters, placed_shapes
from lorax.devices.specs import parts_of
from lorax.objectives.objective import RESERVED, Batch, LossFunction, Objective
from lorax.objectives.objectives import as_objective
from lorax.objectives.sft import SFT
from lorax.system.arguments import check_kind
from lorax.system.threads import TRACING, in_background
from lorax.system.wording import describe
from lorax.training.accumulate import accumulate_terms
from lorax.training.arguments import check_arguments, check_batch
from lorax.training.optim.stacking import stack_alike
from lorax.training.split import Split, split_model
from lorax_kernels import compile_kernels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of training that a step changes.

    Attributes:
        step: Optimizer steps done, int32.
        trainable: The model's `nnx.Param` state.
        opt_state: The optimizer's state.
        halted: Whether a loss or gradient was not finite; from then on no step changes anything.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    halted: jax.Array

    def resumable(self) -> "TrainState":
        """Returns it as it is saved: a run that is resumed tries again what was not finite."""
        # No array of the device's: it would wait for the step that runs.
        return dataclasses.replace(self, halted=np.zeros((), bool))


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """``step(state, batch) -> (state, metrics)``; see `make_train_step`.

    Attributes:
        compiled: The jitted or compiled function of (state, frozen, batch).
        frozen: The weights that no step changes, passed to every call.
        mesh: Where the arrays are; the kernels are divided along its axes.
        full_determinism: Whether it was made to come to the same bits every time.
        figures: The objective's metrics besides `RESERVED`; a loss function's own are not known
            before its first step.
    """

    compiled: Any
    frozen: Any
    mesh: Mesh | None = None
    full_determinism: bool = False
    figures: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, without those of a loss function's own."""
        return (*RESERVED, *self.figures)

    def __call__(self, state: TrainState, batch: Batch):
        """Returns the next state and ``{"loss", "grad_norm", "tokens", "applied"}`` with figures.

        `state` is donated: its arrays are deleted, and the returned state takes their place. A step
        that is not `applied` has changed no weight and no moment.

        Raises:
            ValueError: If an earlier call has consumed the state, or an array of the batch is not
                (micro-batches, rows, …).
        """
        check_kind("state", state, TrainState, "the TrainState, and the batch comes second")
        if state.step.is_deleted():
            raise ValueError(
                "the state was donated to an earlier call of the step: pass the state that it "
                "returned, as in `state, metrics = step(state, batch)`"
            )
        with self._settings():
            return self.compiled(state, self.frozen, batch)

    def compile(self, state: TrainState, batch: Batch) -> "TrainStep":
        """Returns the step compiled for the shapes of `batch`, before it is needed."""
        with self._settings():
            with TRACING:
                lowered = self.compiled.lower(state, self.frozen, batch)
            compiled = compile_lowered(lowered)
        return dataclasses.replace(self, compiled=compiled)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """Sets what decides how the function is lowered."""
        with contextlib.ExitStack() as settings:
            if self.mesh is not None:
                settings.enter_context(jax.set_mesh(self.mesh))
            if self.full_determinism:
                settings.enter_context(repeatable_attention())
            yield


def compile_lowered(lowered: Any, options: dict[str, Any] | None = None) -> Any:
    """Compiles a lowered step, and its kernels in a background thread.

    Args:
        lowered: From `lower` of a jitted function.
        options: The compiler's, added to the function's own.
    """
    on_gpu = jax.default_backend() == "gpu"
    kernels = in_background("kernels", compile_kernels) if on_gpu else None
    try:
        compiled = lowered.compile(compiler_options=options)
    finally:  # no thread is left in the compiler
        error = kernels and kernels.exception()
    if error:
        warnings.warn(
            f"the kernels were not compiled ahead of the step: {describe(error)}", stacklevel=2
        )
    return compiled


def make_train_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFunction | Objective = SFT,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    skip_nonfinite: bool = False,
    full_determinism: bool = False,
) -> tuple[TrainStep, TrainState]:
    """Returns a compiled training step for `model` and the state it starts from.

    The step computes, over the micro-batches i on the leading axis of its batch,
    ``gradient = Σ ∇Lᵢ / Σ nᵢ`` and hands it to `optimizer` once. It trains the model's `nnx.Param`
    variables, frees the old state, and gives every layer a fresh dropout mask that is a pure
    function of (seed, step, micro-batch).

    Where the loss or the gradient's norm is not finite the update is not applied: weights and
    optimizer state are those before the step, and stay so in all steps that follow.

    Args:
        model: A model from `apply_lora`. Of any other NNX model every `nnx.Param` trains: a full
            fine-tune.
        optimizer: Any optax transformation, clipping included.
        loss_fn: ``(model, micro_batch) -> (sum of losses, count)``, or an objective. A third value
            may be a dict of further sums: the metrics hold each, divided by the count.
        seed: Seed of the dropout masks.
        mesh: Where to put the arrays; None leaves them where they are.
        skip_nonfinite: Whether steps that follow one without an update are applied.
        full_determinism: Whether the step comes to the same bits every time on NVIDIA GPUs too,
            where attention's backward pass adds up in any order otherwise: slower, and with more
            memory.

    Raises:
        TypeError: If the model, the optimizer or the loss is something else.
        ValueError: If nothing trains, an adapter is merged, a batch norm would update its
            statistics, or the optimizer scales its updates by the size of a parameter: the B of an
            adapter is zero, and would stall.
    """
    check_arguments(model, optimizer, loss_fn)
    return build_step(
        model,
        optimizer,
        loss_fn,
        seed=seed,
        mesh=mesh,
        skip_nonfinite=skip_nonfinite,
        full_determinism=full_determinism,
    )


def build_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFunction | Objective,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    skip_nonfinite: bool = False,
    full_determinism: bool = False,
) -> tuple[TrainStep, TrainState]:
    """Returns what `make_train_step` does, of an optimizer from `make_optimizer`.

    Raises:
        ValueError: As `make_train_step`, but of the optimizer.
    """
    return compile_step(
        split_model(model),
        optimizer,
        loss_fn,
        seed=seed,
        mesh=mesh,
        skip_nonfinite=skip_nonfinite,
        full_determinism=full_determinism,
    )


def compile_step(
    model: Split,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFunction | Objective,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    skip_nonfinite: bool = False,
    full_determinism: bool = False,
) -> tuple[TrainStep, TrainState]:
    """Returns what `make_train_step` does, of a model that is taken apart."""
    begin = functools.partial(_begin, optimizer)
    if mesh is not None:  # else each array stays where it is, which a compiled function may change
        begin = jax.jit(begin)
    trainable, opt_state = begin(model.trainable)
    frozen = model.frozen
    state = TrainState(jnp.zeros((), jnp.int32), trainable, opt_state, jnp.zeros((), bool))
    if mesh is not None:
        state = place_parameters(state, mesh, model.parts)
        frozen = place_parameters(frozen, mesh, model.parts)
    objective = as_objective(loss_fn)

    def terms_of(trainable, micro_batch, key, frozen):
        return objective.terms(model.rebuild(trainable, frozen, key), micro_batch)

    def step(state: TrainState, frozen: Any, batch: Batch):
        check_batch(batch)
        size = jax.tree.leaves(batch)[0].shape[0]
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(size))
        total = accumulate_terms(lambda t, b, k: terms_of(t, b, k, frozen))
        loss, count, figures, gradients = total(state.trainable, batch, keys)
        norm = optax.tree.norm(stack_alike(gradients))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        applied = jnp.isfinite(loss) & jnp.isfinite(norm) & ~state.halted
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            (trainable, opt_state),
            (state.trainable, state.opt_state),
        )
        halted = jnp.zeros((), bool) if skip_nonfinite else ~applied
        # Where no step follows one without an update, the count is that of updates.
        done = state.step + (1 if skip_nonfinite else applied.astype(jnp.int32))
        metrics = {"loss": loss, "grad_norm": norm, "tokens": count, "applied": applied}
        return TrainState(done, trainable, opt_state, halted), metrics | figures

    compiled = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(full_determinism))
    return TrainStep(compiled, frozen, mesh, full_determinism, objective.figures), state


def make_abstract_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFunction | Objective = SFT,
    *,
    seed: int = 0,
    mesh: Mesh,
    skip_nonfinite: bool = False,
    full_determinism: bool = False,
) -> tuple[TrainStep, TrainState]:
    """Returns what `make_train_step` would for a model of shapes: it can be compiled, not run."""
    found: list[TrainStep] = []

    def build(model):
        step, state = build_step(
            model,
            optimizer,
            loss_fn,
            seed=seed,
            mesh=None,
            skip_nonfinite=skip_nonfinite,
            full_determinism=full_determinism,
        )
        found.append(step)
        return state, step.frozen

    state, frozen = jax.eval_shape(build, model)
    parts = parts_of(model)
    state = placed_shapes(state, mesh, parts)
    frozen = placed_shapes(frozen, mesh, parts)
    return dataclasses.replace(found[0], frozen=frozen, mesh=mesh), state


def _begin(optimizer: optax.GradientTransformation, trainable: Any) -> tuple[Any, Any]:
    """Returns what trains and the optimizer's state, each leaf an array of its own."""
    return jax.tree.map(jnp.copy, (trainable, optimizer.init(trainable)))


def merge_state(model: nnx.Module, state: TrainState) -> nnx.Module:
    """Returns `model` with the trained values of `state` (copied, for a step frees its state).

    Raises:
        TypeError: If the two come in another order.
        ValueError: If a later step has consumed the state.
    """
    if not isinstance(model, nnx.Module) or not isinstance(state, TrainState):
        found = f"{type(model).__name__}, {type(state).__name__}"
        raise TypeError(f"merge_state takes a model and a TrainState, got {found}")
    graph, _, frozen = split_trainable(model)
    return nnx.merge(graph, trained_values(state), frozen)


def trained_values(state: TrainState) -> Any:
    """Returns copies of the trained values of a state, which a later step frees.

    Raises:
        ValueError: If a later step has consumed the state.
    """
    if any(getattr(leaf, "is_deleted", bool)() for leaf in jax.tree.leaves(state)):
        raise ValueError(
            "the state was donated to a later step: merge the state that the last step returned"
        )
    return jax.tree.map(jnp.copy, state.trainable)
