"""Finds the layers of a Linen model by tracing it, because they have no shapes before."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen
from flax.core.scope import DenyList

from lorax.adapters.linen.sites import LinenSite, site_called, site_of, update_of
from lorax.adapters.linen.tree import Path, dotted, leaves, put, value_at
from lorax.adapters.linen.update import BESIDE, Marker
from lorax.adapters.targets import TargetError
from lorax.layers.maps import Map
from lorax.system.wording import clip, describe

_PROBE = (1009, 1013)
"""The shape of what stands for an adapter in a trace: of primes, so that no other axis has it."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Example inputs of a model: arrays, or their shapes, and settings.

    Attributes:
        args: As of `model.apply` after the variables.
        kwargs: Likewise.
        method: Likewise.
        forward: What calls the model with them; None: its `apply`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    method: Any = None
    forward: Callable[..., Any] | None = None

    def run(self, call: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> None:
        """Calls a model by `call`, with such inputs."""
        if self.forward is None:
            call(*args, method=self.method, **kwargs)
        else:
            self.forward(call, *args, **kwargs)


@dataclasses.dataclass
class Found:
    """One module of a model.

    Attributes:
        path: Its place in the parameters.
        site: Its kind, if that can carry an adapter.
        linear_map: Its linear map, if it can carry one.
        obstacle: Why a layer of such a kind cannot.
        stack: Axes of stacked layers, before those of its weight.
        has_dtype: Whether it declares the dtype in which it computes.
        called: Whether the trace came by.
    """

    path: Path
    site: LinenSite | None = None
    linear_map: Map | None = None
    obstacle: str | None = None
    stack: tuple[int, ...] = ()
    has_dtype: bool = False
    called: bool = True

    @property
    def can_carry(self) -> bool:
        """Whether it can carry an adapter."""
        return self.linear_map is not None and self.obstacle is None


def find_modules(model: linen.Module, params: Mapping[str, Any], rest: Any, inputs: Inputs):
    """Returns every module of a model but the model itself, `Found` by dotted name.

    Those that only have parameters, because the inputs do not lead to them, come last.

    Args:
        model: The model.
        params: Its parameters.
        rest: Its other variables.
        inputs: Example inputs.
    """
    found: dict[Path, Found] = {}

    def record(next_fun, args, kwargs, context):
        result = next_fun(*args, **kwargs)
        module = context.module
        if module.scope is not None and module.path:
            entry = found.setdefault(module.path, Found(module.path))
            entry.has_dtype |= getattr(module, "dtype", None) is not None
            if site := site_called(context):
                _record_call(entry, site, module, args, kwargs)
                _record_stack(entry, site, module, params)
            elif entry.site is None and (site := site_of(module)):
                entry.site = site
                kind = site.layer.__name__
                entry.obstacle = f"it has a method of its own that does not call that of nn.{kind}"
        return result

    modules = sorted({path[:-1] for path, _ in leaves(params)})
    marked = params
    for path in modules:
        marked = put(marked, (*path, BESIDE), Marker(None, object()))
    trace_call(model, {**rest, "params": marked}, inputs, record)
    for path in modules:
        if path:
            found.setdefault(path, Found(path, called=False))
    return {dotted(path): entry for path, entry in found.items()}


def _record_call(entry: Found, site: LinenSite, module: Any, args: Any, kwargs: Any) -> None:
    if entry.linear_map is None:
        entry.site = site
        entry.obstacle = site.obstacle(module)
    more = kwargs.values() if args else [v for k, v in kwargs.items() if k == "einsum_str"]
    linear_map = site.map_of(module, site.weight_of(module).shape, *args[1:], *more)
    if isinstance(linear_map, str):
        entry.obstacle = entry.obstacle or linear_map
    elif entry.linear_map not in (None, linear_map):
        entry.obstacle = "it is called in several ways, each with a matrix of its own"
    else:
        entry.linear_map = linear_map


def _record_stack(entry: Found, site: LinenSite, module: Any, params: Any) -> None:
    outer = value_at(params, (*entry.path, site.weight))
    inner = site.weight_of(module).shape
    count = 0 if outer is None else len(outer.shape) - len(inner)
    if outer is None or outer.shape[count:] != inner:
        where = "are not at its path" if outer is None else "come to it on other axes"
        entry.obstacle = entry.obstacle or f"its parameters {where} in variables['params']"
    else:
        entry.stack = tuple(outer.shape[:count])


def check_reached(
    model: linen.Module,
    params: Mapping[str, Any],
    rest: Any,
    inputs: Inputs,
    layers: Mapping[str, Found],
) -> None:
    """Checks that what lies beside a weight comes to its layer as it is.

    Raises:
        TargetError: Naming the layer, if something changes its parameters on the way.
    """
    reached: dict[Path, Any] = {}

    def look(next_fun, args, kwargs, context):
        if site_called(context) and isinstance(marker := update_of(context.module), Marker):
            reached[context.module.path] = marker.probe
        return next_fun(*args, **kwargs)

    for entry in layers.values():
        probe = jax.ShapeDtypeStruct((*entry.stack, *_PROBE), np.int8)
        params = put(params, (*entry.path, BESIDE), Marker(probe, object()))
    problem = ""
    try:
        trace_call(model, {**rest, "params": params}, inputs, look)
    except Exception as error:
        problem = f" ({clip(describe(error))})"
    for name, entry in layers.items():
        probe = reached.get(entry.path)
        if problem or probe is None or (probe.shape, probe.dtype) != (_PROBE, np.int8):
            raise TargetError(
                f"{name} cannot be adapted: its parameters are changed on their way to it, as by "
                "nn.WeightNorm or nn.map_variables, or stacked on another axis than the first"
                f"{problem}. Leave it out with lora.exclude_modules"
            )


def trace_call(model: linen.Module, variables: Any, inputs: Inputs, interceptor: Any) -> None:
    """Traces a call of a model, whose methods an interceptor sees.

    Args:
        model: The model.
        variables: Its variables.
        inputs: Example inputs; their arrays may be shapes.
        interceptor: As of `nn.intercept_methods`.
    """
    flat, tree = jax.tree.flatten((inputs.args, dict(inputs.kwargs)), is_leaf=lambda x: x is None)
    dynamic = [isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for x in flat]

    def run(variables, arrays):
        def call(*args, mutable=False, **kwargs):
            kwargs = {"rngs": {"params": jax.random.key(0)}, **kwargs}  # `params` is every stream
            all_but = DenyList(("params",))
            result, changed = model.apply(variables, *args, mutable=all_but, **kwargs)
            return result if mutable is False else (result, changed)

        given = iter(arrays)
        whole = [next(given) if is_array else x for x, is_array in zip(flat, dynamic, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, whole)
        with linen.intercept_methods(interceptor):
            inputs.run(call, args, kwargs)

    jax.eval_shape(
        run, variables, [x for x, is_array in zip(flat, dynamic, strict=True) if is_array]
    )
