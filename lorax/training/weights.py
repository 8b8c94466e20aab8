"""The weights of a model that trains: on it, and in a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lorax.config.run import RunConfig
from lorax.interop.folder import resolve_base
from lorax.interop.peft import save_adapter
from lorax.interop.save import save_model


class TrainedWeights:
    """Puts what was trained on the model of a run, and writes it as the run's method says.

    Args:
        config: The run's settings.
        model: Decides the structure.
        frozen: What does not train.
        save_options: What `save_model` is given besides the model, with the method `full`; if not
            given, the base model's folder.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        frozen: nnx.State,
        save_options: Mapping[str, Any] | None,
    ):
        self._config = config
        self._graph = nnx.graphdef(model)
        self._frozen = frozen
        # A hub id becomes a folder now: what cannot be found must not wait for the first save.
        if save_options is None and config.train.method == "full":
            save_options = {"source_directory": resolve_base(config.model)}
        self._save_options = dict(save_options or {})

    def on_model(self, trained: nnx.State) -> Any:
        """Returns the model with copies of the weights, which a step may consume."""
        return self._merge(jax.tree.map(jax.numpy.copy, trained))

    def write(self, folder: Path, trained: nnx.State) -> None:
        """Writes the weights into a folder that is not there yet."""
        model = self._config.model
        if self._config.train.method == "full":
            dtype = jax.numpy.dtype(model.dtype)
            save_model(self.on_model(trained), folder, dtype=dtype, **self._save_options)
        else:  # fetched all at once: one by one takes longer than writing them
            base = {"base_model_name_or_path": model.name_or_path, "revision": model.revision}
            save_adapter(self._merge(jax.device_get(trained)), folder, **base)

    def _merge(self, trained: nnx.State) -> Any:
        return nnx.merge(self._graph, trained, self._frozen)
