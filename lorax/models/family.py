"""A family of models: all that lorax knows of it, in one object."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flax import nnx

from lorax.devices.specs import REPLICATED, Parts
from lorax.models.stack.recompute import GradientCheckpointing
from lorax.system.json_fields import JsonFields


@dataclasses.dataclass(frozen=True)
class ModelType:
    """Defaults of a transformers configuration class for fields that config.json lacks.

    Attributes:
        architecture: The class of the model, for example ``LlamaForCausalLM``.
        max_position_embeddings: Its default.
        num_key_value_heads: Its default; None is as many as there are query heads.
        head_dim: Its default; None is the width by the query heads.
        attention_bias: Whether it has the field.
        mlp_bias: Whether it has the field.
        window: Which layers slide: none, every layer, or those that layer_types names.
    """

    architecture: str
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    window: Literal["none", "every", "layers"] = "none"


@dataclasses.dataclass(frozen=True)
class Tensor:
    r"""Tensors whose names in files are not those of their parameters here.

    Attributes:
        ours: A pattern that matches the whole name by the rule, which is the parameter's path with
            the leaf that Hugging Face gives it: ``model.layers.0.mlp.up_proj.weight``.
        theirs: The name in the file, where ``\1`` stands for the pattern's first group.
    """

    ours: str
    theirs: str


@dataclasses.dataclass(frozen=True)
class Kept:
    """Activations that one layer stores for the backward pass, per token.

    Attributes:
        elements: Elements in the compute dtype.
        float32: Elements in float32.
        attention: Elements that only cuDNN's attention stores, whose scores are never written.
        inputs: (names of layers, elements) that are stored only where one of these layers trains or
            carries an adapter.
    """

    elements: int
    float32: int = 0
    attention: int = 0
    inputs: tuple[tuple[tuple[str, ...], int], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """All that lorax knows of a family of models.

    Its configuration is a `lorax.models.architecture.DecoderConfig`, or a class derived from it.

    Attributes:
        types: transformers' defaults by the ``model_type`` of config.json.
        read: (this family, the fields of a config.json) to a configuration. Every field that may
            change the result is honoured or refused; `lorax.models.families.read_architecture`
            refuses those that are left unread.
        write: A configuration to fields that `read` and transformers read back.
        layer: Builds layer number `index` from (configuration, index, execution, rngs). It is
            called with (x, context, cache, empty) and returns its output and its cache.
        kept: (configuration, policy) to the activations that a layer stores for the backward pass.
        together: Names of layers of one module that read one input, and so run as one operation.
        tensors: Exceptions to the rule that tensors are named in files as parameters are here; the
            first that matches counts.
        parts: (pattern of a parameter's dotted path, its partition over the axes of the mesh); the
            first that matches counts.
    """

    types: Mapping[str, ModelType]
    read: Callable[["Family", JsonFields], Any]
    write: Callable[[Any], dict[str, Any]]
    layer: Callable[..., nnx.Module]
    kept: Callable[[Any, GradientCheckpointing], Kept]
    together: tuple[tuple[str, ...], ...]
    tensors: tuple[Tensor, ...] = ()
    parts: Parts = REPLICATED

    @property
    def model_types(self) -> tuple[str, ...]:
        """Returns the values of ``model_type`` of this family."""
        return tuple(self.types)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Returns the transformers classes of the models, in the order of `model_types`."""
        return tuple(each.architecture for each in self.types.values())

    def stored_name(self, name: str) -> str:
        """Returns the name in files of the tensor that has `name` by the rule."""
        for tensor in self.tensors:
            if match := re.fullmatch(tensor.ours, name):
                return match.expand(tensor.theirs)
        return name

    def together_with(self, layer: str) -> tuple[str, ...]:
        """Returns the names of the layers that run together with one, its own name among them."""
        return next((names for names in self.together if layer in names), (layer,))
