"""Trained weights: put on the model, and written to a folder."""

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
    """Puts trained weights on the model of a run, and writes them as the run's method does.

    Args:
        config: The run's settings.
        model: Decides the structure.
        frozen: The frozen parameters.
        save_options: Options of `save_model`, for the method `full`; the base model's folder if not
            given. Else `files` of `save_adapter`.
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
        # A hub id is resolved to a folder now, so that a missing one fails before the first save.
        if save_options is None and config.train.method == "full":
            save_options = {"source_directory": resolve_base(config.model)}
        self._save_options = dict(save_options or {})

    def on_model(self, trained: nnx.State) -> Any:
        """Returns the model with copies of the weights, which a step may consume."""
        return self._merge(jax.tree.map(jax.numpy.copy, trained))

    def write(self, folder: Path, trained: nnx.State) -> None:
        """Writes the weights into a folder that does not exist yet."""
        model = self._config.model
        if self._config.train.method == "full":
            dtype = jax.numpy.dtype(model.dtype)
            save_model(self.on_model(trained), folder, dtype=dtype, **self._save_options)
        else:  # fetched all at once: one by one takes longer than writing them
            base = {"base_model_name_or_path": model.name_or_path, "revision": model.revision}
            files = self._save_options.get("files")
            save_adapter(self._merge(jax.device_get(trained)), folder, files=files, **base)

    def _merge(self, trained: nnx.State) -> Any:
        return nnx.merge(self._graph, trained, self._frozen)
