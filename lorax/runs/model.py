"""The model of a run: with shapes, and with arrays."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lorax.adapters.nnx.apply import apply_lora, apply_saved, set_kernels, targets_of
from lorax.adapters.nnx.eva import apply_ranks
from lorax.adapters.nnx.tree import named_modules
from lorax.adapters.targets import TargetError
from lorax.config.adapter import EVA, LoraConfig
from lorax.config.run import RunConfig
from lorax.devices.host_memory import HostArray, embedding_obstacle
from lorax.devices.mesh import make_mesh
from lorax.interop.folder import fetch_weights, resolve_base
from lorax.interop.load import check_checkpoint, load_hf_config, load_model
from lorax.interop.new_tokens import NO_NEW_TOKENS, NewTokens
from lorax.interop.packed import Entry
from lorax.interop.peft import load_adapter
from lorax.interop.peft_tied import settings_for
from lorax.interop.storage import refuse_quantised, stored_format
from lorax.layers.carrier import Frozen
from lorax.layers.linear import Linear
from lorax.models.architecture import DecoderConfig
from lorax.models.decoder import CausalLM
from lorax.models.stack.recompute import Recomputation
from lorax.system.threads import await_tracing
from lorax.weights.dense import DENSE
from lorax.weights.format import Format
from lorax.weights.formats import format_of


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """A run's model before its weights are read; each property is computed once.

    Attributes:
        config: The run's settings.
        folder: Folder of the base model's settings and tokenizer, and of its weights unless the
            model is on the hub.
        stored: The architecture in its config.json.
        ranks: The ranks that EVA came to, by layer; None without EVA, or before.
        new_tokens: The tokens in addition to its own.
    """

    config: RunConfig
    folder: Path
    stored: DecoderConfig
    ranks: Mapping[str, int] | None = None
    new_tokens: NewTokens = NO_NEW_TOKENS

    @classmethod
    def of(cls, config: RunConfig, ranks: Mapping[str, int] | None = None) -> Self:
        """Finds the base model, and reads its architecture.

        Args:
            config: The run's settings.
            ranks: From `lorax.runs.eva.saved_ranks`.

        Raises:
            ValueError: Naming the setting, or the file and the field, that cannot be used.
        """
        folder = resolve_base(config.model, weights=False)
        architecture = load_hf_config(folder)
        full = config.train.method == "full"
        refuse_quantised(architecture, folder, format_of(config.model), full=full)
        return cls(config, folder, architecture, ranks, NewTokens.of(config, folder))

    @functools.cached_property
    def architecture(self) -> DecoderConfig:
        """The architecture of the run's model, with rows for the new tokens."""
        return self.new_tokens.grow(self.stored)

    @property
    def lora(self) -> LoraConfig:
        """The settings of new adapters, which train the rows of the new tokens too."""
        tied = self.stored.tie_word_embeddings
        return self.new_tokens.trained_by(self.config.lora, tied)

    @property
    def is_on_hub(self) -> bool:
        """Whether the base model is on the hub, so that its weights may not be on the disk yet."""
        return not Path(self.config.model.name_or_path).expanduser().is_dir()

    @property
    def format(self) -> Format:
        """The format in which the settings ask for its frozen matrices."""
        return DENSE if self.config.train.method == "full" else format_of(self.config.model)

    def format_of(self, layer: str) -> Format:
        """Returns the format of a linear layer's matrix: the checkpoint's, if it is quantised."""
        # The headers are not needed where the checkpoint quantises nothing.
        entries = self.entries if self.architecture.quantization is not None else None
        return stored_format(layer, self.architecture, entries, self.format)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices of the run.

        Raises:
            ValueError: If there are fewer than requested.
        """
        return make_mesh(self.config.mesh.data)

    @functools.cached_property
    def entries(self) -> dict[str, Entry] | None:
        """The places of its tensors, from its headers, which are checked; None if it is on the hub.

        In that case the loader reads the headers after the files are fetched.
        """
        return None if self.is_on_hub else check_checkpoint(self.folder, self.stored)

    @functools.cached_property
    def shapes(self) -> CausalLM:
        """The model that trains, adapters included, with shapes instead of weights.

        Before EVA its adapters have the ranks that EVA will distribute.

        Raises:
            TargetError: If the adapter's settings do not fit the model.
            ValueError: If `train.kept_layers` is more than its layers.
        """
        config = self.config
        architecture = self.architecture
        full = config.train.method == "full"
        adapter = config.model.adapter
        dtype = jnp.dtype(config.model.dtype)
        _check_kept_layers(config, architecture.num_hidden_layers)

        def build():
            model = CausalLM(
                architecture,
                dtype=dtype,
                param_dtype=jnp.float32 if full else dtype,
                attn_impl=config.model.attn_impl,
                rngs=nnx.Rngs(0),
            )
            if not full:
                if adapter:
                    model = apply_saved(model, settings_for(model, adapter))
                else:
                    model = _adapt_shapes(model, self.lora, self.ranks)
            set_kernels(model, config.model.kernels)
            self._store(model)
            return model

        try:
            model = nnx.eval_shape(build)
        except TargetError as error:
            place = f"{adapter} does not fit {self.folder}: " if adapter else ""
            if self.new_tokens.ids and "trainable_token_indices" in str(error):
                place += "model.new_tokens trains rows of the embedding and the head: "
            raise TargetError(f"{place}{error}") from None
        if config.model.offload_embedding:
            _put_embedding_on_host(model)
        return model

    def _store(self, model: CausalLM) -> None:
        """Stores the matrices of a model of shapes as the loader would."""
        for name, layer in named_modules(model).items():
            if isinstance(layer, Linear) and isinstance(layer.kernel, Frozen):
                layer.freeze(self.format_of(name).store(layer.kernel.get_value()))

    def fetch(self) -> Path:
        """Fetches the base model's weights if needed, and returns their folder."""
        return fetch_weights(self.config.model, self.folder)

    def load(self, folder: Path) -> CausalLM:
        """Loads the base model, which needs no other input of the run.

        Args:
            folder: From `fetch`.
        """
        config = self.config
        model = load_model(
            folder,
            dtype=jnp.dtype(config.model.dtype),
            # Weights that train are float32: in bfloat16 small updates would be rounded away.
            param_dtype=jnp.float32 if config.train.method == "full" else None,
            attn_impl=config.model.attn_impl,
            offload_embedding=config.model.offload_embedding,
            architecture=self.stored,
            entries=self.entries,
            pace=await_tracing,
            mesh=self.mesh,
            format=self.format,
        )
        return self.new_tokens.resize(model)


def _adapt_shapes(
    model: CausalLM, settings: LoraConfig, ranks: Mapping[str, int] | None
) -> CausalLM:
    rngs = nnx.Rngs(0)
    if settings.init_lora_weights != EVA:
        return apply_lora(model, settings, rngs=rngs)
    targets = targets_of(model, settings)
    ranks = {target.name: target.r for target in targets} if ranks is None else ranks
    return apply_ranks(model, settings, ranks, rngs=rngs)


def _put_embedding_on_host(model: CausalLM) -> None:
    """Marks the embedding of a model of shapes as staying in the host's memory."""
    if reason := embedding_obstacle(model):
        raise ValueError(f"model.offload_embedding must be false: {reason}")
    embedding = model.model.embed_tokens.embedding
    shape = embedding.get_value()
    nothing = np.broadcast_to(np.zeros((), shape.dtype), shape.shape)  # takes no memory
    embedding.set_value(nothing.view(HostArray))  # type: ignore[arg-type]


def _check_kept_layers(config: RunConfig, layers: int) -> None:
    kept = config.train.kept_layers
    if kept is not None and kept > layers:
        raise ValueError(f"train.kept_layers: needs 0 to the model's {layers} layers, got {kept}")


class Begin(Protocol):
    """What puts new adapters on a base model."""

    def __call__(self, model: CausalLM, config: LoraConfig, *, rngs: nnx.Rngs) -> CausalLM:
        """See `apply_lora`."""
        ...


def adapt_base(
    model: CausalLM, blueprint: Blueprint, recomputation: Recomputation, begin: Begin = apply_lora
) -> CausalLM:
    """Puts fresh or loaded adapters on the base model, and sets its recomputation.

    Args:
        model: From `Blueprint.load`.
        blueprint: Of the run's model.
        recomputation: From `choose_recomputation`.
        begin: What puts fresh ones on it.
    """
    config = blueprint.config
    _check_kept_layers(config, model.config.num_hidden_layers)
    recomputation.put_on(model)
    if config.model.adapter:
        model = load_adapter(model, config.model.adapter)
    elif config.train.method != "full":
        model = begin(model, blueprint.lora, rngs=nnx.Rngs(config.train.seed))
    set_kernels(model, config.model.kernels)
    return model
