"""A Linen model with adapters: the variables are the caller's, this says what they mean."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import unfreeze
from flax.core.scope import in_filter
from jaxtyping import Array, Key

from lorax.adapters.linen.sites import site_called, update_of
from lorax.adapters.linen.tree import Path, dotted, get, leaves, put
from lorax.adapters.linen.update import BESIDE, Update
from lorax.adapters.method import Params, Spec
from lorax.adapters.stack import keys_for
from lorax.layers.maps import Map
from lorax_kernels import Kernels, check_kernels_name

TRAINED = "lora"
"""The collection of what trains."""

FIXED = "lora_fixed"
"""The collection of what adapters need besides, and does not train."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """An adapted layer.

    Attributes:
        path: Its place in the parameters.
        spec: Its adapter.
        linear_map: Its linear map.
        weight: The name of its weight.
        stack: Axes of stacked layers, before those of its weight.
    """

    path: Path
    spec: Spec
    linear_map: Map
    weight: str
    stack: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its dotted name."""
        return dotted(self.path)

    def params(self, variables: Mapping[str, Any]) -> Params:
        """Returns the values of what trains, by name."""
        found = get(variables, (TRAINED, *self.path)) or {}
        names = self.spec.method.parameters
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"variables[{TRAINED!r}] has no {missing[0]} of {self.name}: pass the variables "
                "that apply_lora or load_adapter returned"
            )
        return {name: found[name] for name in names}

    def values(self, variables: Mapping[str, Any]) -> Params:
        """Returns all values by name."""
        return {**self.params(variables), **(get(variables, (FIXED, *self.path)) or {})}


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A Linen model with adapters on its layers; see `apply_lora`.

    Attributes:
        model: The model, which is not changed.
        layers: The adapted layers.
        kernels: What computes them: see `lorax_kernels.lora_linear`.
        deterministic: Whether the adapters' dropout is off.
        modules: The names of all modules, and whether each can carry an adapter.
    """

    model: linen.Module
    layers: tuple[Layer, ...]
    kernels: Kernels = "auto"
    deterministic: bool = False
    modules: Mapping[str, bool] = dataclasses.field(default_factory=dict, repr=False)

    def for_evaluation(self) -> "AdaptedModel":
        """Returns the model without dropout of the adapters; the model's own is its own matter.

        With the kernels ``auto`` XLA computes it, because the shapes of evaluation change, and
        compiling a kernel for each costs more than it saves.
        """
        return dataclasses.replace(self, deterministic=True)

    def with_kernels(self, kernels: Kernels) -> "AdaptedModel":
        """Returns the model computed by other kernels: ``auto``, ``pallas`` or ``xla``.

        Raises:
            ValueError: If `kernels` is none of these.
        """
        check_kernels_name(kernels)
        return dataclasses.replace(self, kernels=kernels)

    def apply(
        self, variables: Mapping[str, Any], *args: Any, rngs: Any = None, **kwargs: Any
    ) -> Any:
        """Returns what the model's `apply` does, with the adapters taking part.

        Args:
            variables: ``{"params": …, "lora": …}`` and the model's other collections.
            args: Of the model's call.
            rngs: As of `model.apply`. With `lora_dropout` the stream ``lora``, or ``params`` in its
                place, decides the adapters' masks.
            kwargs: Of the model's `apply` and its call, such as `method`, `mutable` or `train`.

        Raises:
            ValueError: If `lora_dropout` has no key, the variables are not those of this model, or
                the parameters would be mutable.
        """
        if in_filter(kwargs.get("mutable", False), "params"):
            raise ValueError(
                "the parameters of an adapted model are not mutable: name the collections that "
                "change, as in mutable=['batch_stats']"
            )
        whole = self.variables_for(variables, self._dropout_key(rngs))
        with linen.intercept_methods(_intercept):
            return self.model.apply(whole, *args, rngs=rngs, **kwargs)

    def variables_for(self, variables: Mapping[str, Any], key: Any = None) -> dict[str, Any]:
        """Returns the variables as the model is applied to them.

        Args:
            variables: From `apply_lora`.
            key: Decides the dropout masks; None: there is none.
        """
        rest = {name: value for name, value in variables.items() if name not in (TRAINED, FIXED)}
        params = self.base_params(variables)
        kernels = "xla" if self.kernels == "auto" and self.deterministic else self.kernels
        for index, layer in enumerate(self.layers):
            own = None
            if key is not None and layer.spec.dropout:
                own = keys_for(jax.random.fold_in(key, index), layer.stack)
            update = Update(layer.values(variables), own, layer.spec, layer.linear_map, kernels)
            params = put(params, (*layer.path, BESIDE), update)
        return {**rest, "params": params}

    def base_params(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the model, with those that train in their places."""
        if not isinstance(variables, Mapping) or not {"params", TRAINED} <= set(variables):
            found = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
            raise ValueError(
                f"variables must hold 'params' and {TRAINED!r}, as apply_lora returns them, got "
                f"{found}"
            )
        params = unfreeze(variables["params"])
        for path, value in self.trained_base(variables):
            if get(params, path) is None:
                raise ValueError(
                    f"variables[{TRAINED!r}] has {dotted(path)}, which is no parameter of the model"
                )
            params = put(params, path, value)
        return params

    def trained_base(self, variables: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
        """Yields (path, value) of the model's own parameters that train."""
        own = {(*layer.path, n) for layer in self.layers for n in layer.spec.method.parameters}
        for path, value in leaves(variables[TRAINED]):
            if path not in own:
                yield path, value

    def _dropout_key(self, rngs: Any) -> Key[Array, ""] | None:
        if self.deterministic or not any(layer.spec.dropout for layer in self.layers):
            return None
        streams = rngs if isinstance(rngs, Mapping) else {"params": rngs}
        key = streams.get(TRAINED, streams.get("params"))
        if key is None:
            raise ValueError(
                "lora_dropout needs a fresh key every step: apply(variables, …, rngs={'lora': "
                "key}), or adapted.for_evaluation().apply(variables, …) to turn it off"
            )
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # of jax.random.PRNGKey
            key = jax.random.wrap_key_data(key)
        return key


def _intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    site = site_called(context)
    update = None if site is None else update_of(context.module)
    if site is None or update is None:
        return next_fun(*args, **kwargs)
    return site.calls[context.method_name](site, context.module, update, *args, **kwargs)
