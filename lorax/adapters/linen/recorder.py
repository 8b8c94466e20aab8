"""Layers of a Linen model that record the directions of their inputs, beside their weights."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from flax.core.scope import union_filters
from jaxtyping import Array

from lorax.adapters.eva import Directions
from lorax.adapters.linen.sites import site_called, update_of
from lorax.adapters.linen.trace import Inputs, trace_call
from lorax.adapters.linen.tree import Path, get, put
from lorax.adapters.linen.update import BESIDE, Marker
from lorax.adapters.recording import Found, Recording, RowMask, no_recording, read, with_input
from lorax.layers.maps import Matmul

COLLECTION = "lora_eva"
"""The collection of what layers record. `nn.remat` and `nn.jit` carry it as any other."""

_NAME = "recorder"

type Forward = Callable[[Any, Any], Any]
"""``(model, batch)``: calls a model on a batch; what it returns is not read."""


class Heard(NamedTuple):
    """A layer whose inputs are recorded: its place in the parameters, and its linear map."""

    path: Path
    linear_map: Matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorder:
    """What a layer finds beside its weights while its inputs are recorded: a pytree.

    All but arrays is static, so no function that JAX has traced for another search is used again.

    Attributes:
        recording: What is known of its inputs.
        mask: Which rows count; None: all.
        name: The layer's.
        linear_map: Likewise.
        tau: The cosine at which a component has converged.
        search: What tells this search from all others.
    """

    recording: Recording
    mask: Array | None
    name: str = dataclasses.field(metadata={"static": True})
    linear_map: Matmul = dataclasses.field(metadata={"static": True})
    tau: float = dataclasses.field(metadata={"static": True})
    search: Any = dataclasses.field(metadata={"static": True})

    def with_input(self, x: Array) -> "Recorder":
        """Returns the recorder after one more input."""
        after = with_input(self.recording, x, self.mask, self.name, self.linear_map, self.tau)
        return dataclasses.replace(self, recording=after)


def _listen(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if site_called(context) is not None:
        before = context.module.get_variable(COLLECTION, _NAME)
        if before is not None:
            after = before.with_input(_input(args, kwargs))
            context.module.put_variable(COLLECTION, _NAME, after)
    return next_fun(*args, **kwargs)


def _input(args: Any, kwargs: Any) -> Array:
    return args[0] if args else kwargs["inputs"]


class Running:
    """A model as `forward` calls it; what its layers record goes from one call to the next.

    Args:
        model: The model.
        variables: Its variables.
        recorders: The collection of recorders.
    """

    def __init__(self, model: linen.Module, variables: Mapping[str, Any], recorders: Any):
        self._model = model
        self._variables = variables
        self.recorders = recorders

    def __call__(self, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """Returns ``model.apply(variables, *args, **kwargs)``."""
        whole = {**self._variables, COLLECTION: self.recorders}
        changes = union_filters(mutable, COLLECTION)
        with linen.intercept_methods(_listen):
            result, changed = self._model.apply(whole, *args, mutable=changes, **kwargs)
        changed = dict(changed)
        self.recorders = changed.pop(COLLECTION)
        return result if mutable is False else (result, changed)


class Collector:
    """Runs a Linen model on batches, and collects the directions of some layers' inputs.

    No input is stored: the compiled function of a batch updates the directions. A batch of another
    shape is compiled anew.

    Args:
        model: The model.
        variables: Its variables.
        layers: The layers by name.
        components: How many components each has.
        forward: Calls the model.
        mask: Which rows count; None: all.
        tau: The cosine at which a component has converged.
    """

    def __init__(
        self,
        model: linen.Module,
        variables: Mapping[str, Any],
        layers: Mapping[str, Heard],
        components: Mapping[str, int],
        forward: Forward,
        mask: RowMask | None,
        tau: float,
    ):
        maps = {name: layers[name].linear_map for name in components}
        paths: dict[str, Path] = {name: (*layers[name].path, _NAME) for name in components}
        search = object()
        self._variables = variables
        self._recordings = {
            name: no_recording(count, maps[name].shape[0]) for name, count in components.items()
        }

        @jax.jit
        def step(recordings, variables, batch):
            chosen = None if mask is None else mask(batch)
            counted = jnp.ones((), bool) if chosen is None else chosen.any()
            recorders: dict[str, Any] = {}
            for name, recording in recordings.items():
                recorder = Recorder(recording, chosen, name, maps[name], tau, search)
                recorders = put(recorders, paths[name], recorder)
            running = Running(model, variables, recorders)
            forward(running, batch)
            after = {name: get(running.recorders, path) for name, path in paths.items()}
            return {name: each.recording for name, each in after.items()}, counted

        self._step = step

    def run(self, batch: Any) -> dict[str, Found]:
        """Runs the model on a batch, and returns what is known of each layer then.

        Raises:
            ValueError: If the mask does not fit a layer's inputs, or inputs do not arrive.
        """
        try:
            recordings, counted = self._step(self._recordings, self._variables, batch)
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                "the inputs of layers do not arrive: forward calls the model within a transform of "
                "jax, such as jax.checkpoint, jax.jit or jax.vmap; call it outside of that, or use "
                "nn.remat or nn.jit in the model"
            ) from error
        self._recordings = recordings
        return read(
            recordings,
            counted,
            f"it runs within nn.scan or nn.vmap, which leaves out the collection {COLLECTION!r}; "
            f"give nn.scan variable_carry={COLLECTION!r}, or leave the layer out with "
            "lora.exclude_modules",
        )

    def go_on_with(self, names: Iterable[str]) -> None:
        """Has further batches change these layers' directions alone."""
        names = set(names)
        self._recordings = {
            name: each._replace(active=jnp.asarray(name in names))
            for name, each in self._recordings.items()
        }

    def directions(self, name: str) -> Directions:
        """Returns a layer's directions."""
        return self._recordings[name].directions


def readers_of_one_input(
    model: linen.Module, variables: Mapping[str, Any], layers: Mapping[str, Heard], inputs: Inputs
) -> list[list[str]]:
    """Returns the names of the layers in groups that read one array, without computing anything.

    A layer that is not called is in none.

    Args:
        model: The model.
        variables: Its variables.
        layers: Layers of it by name.
        inputs: What calls it, on what.
    """
    heard: dict[Path, list[Any]] = {}  # which keeps them, so that no two have one id

    def listen(next_fun, args, kwargs, context):
        if site_called(context) is not None and update_of(context.module) is not None:
            heard.setdefault(context.module.path, []).append(_input(args, kwargs))
        return next_fun(*args, **kwargs)

    params = variables["params"]
    for layer in layers.values():
        params = put(params, (*layer.path, BESIDE), Marker(None, object()))
    trace_call(model, {**variables, "params": params}, inputs, listen)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, layer in layers.items():
        if layer.path in heard:
            groups.setdefault(tuple(map(id, heard[layer.path])), []).append(name)
    return list(groups.values())
