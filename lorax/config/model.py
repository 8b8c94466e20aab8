"""The base model's settings."""

from collections.abc import Iterator
from typing import Annotated, Literal, override

from lorax.config.marks import Free, OfStep
from lorax.config.types import Conflict, Names, Section, Text
from lorax.system.wording import show


class ModelConfig(Section):
    """The base model.

    Attributes:
        name_or_path: A local directory in Hugging Face layout, or a hub id.
        revision: Branch, tag or commit on the hub.
        dtype: Dtype of the base weights and of the computation.
        attn_impl: `auto` takes cuDNN on an NVIDIA GPU and XLA elsewhere.
        kernels: Backend of the adapted layers: `pallas` the fused kernels (Hopper GPUs), `xla`
            plain XLA, `auto` the faster one by measurements on an H200 (used for H100s too) at such
            sizes. The norms' backward pass and the loss use kernels too, except with `xla`.
        offload_embedding: Keeps the frozen input embedding in the host's memory and sends the rows
            that a batch needs with it: 1 GiB less on the device for Llama-3.1-8B. Not where the
            output head is the same array, or where the embedding trains.
        quantization: Format in which the matrices of the linear layers are kept; embedding
            and head stay as they are. `nf4`: 4-bit NormalFloat of bitsandbytes; `nf4_double`: its
            scales in 8 bits too; `int8`: 8 bits with one scale per output. A 16-bit checkpoint is
            quantised while it is read, one matrix at a time. One that holds NF4 of bitsandbytes is
            used as it is, without this setting.
        new_tokens: Texts that become tokens of their own, such as `["<tool>", "</tool>"]`. They are
            never split, and not special: decoding keeps them. Rows for them are added to the
            embedding and the head where there are none, begin as the mean of the others, and train.
        adapter: Folder of a PEFT adapter to train on; its own settings replace the lora section.
    """

    name_or_path: Annotated[Text, Free]
    revision: Annotated[Text | None, Free] = None
    adapter: Annotated[Text | None, OfStep] = None
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], OfStep] = "bfloat16"
    attn_impl: Annotated[Literal["auto", "xla", "cudnn"], OfStep] = "auto"
    kernels: Annotated[Literal["auto", "pallas", "xla"], OfStep] = "auto"
    offload_embedding: Annotated[bool, OfStep] = False
    quantization: Annotated[Literal["none", "nf4", "nf4_double", "int8"], OfStep] = "none"
    new_tokens: Annotated[Names | None, OfStep] = None

    @override
    def conflicts(self) -> Iterator[Conflict]:
        tokens = self.new_tokens or ()
        if twice := [token for token in tokens if tokens.count(token) > 1]:
            yield "new_tokens", f"names {show(twice[0])} twice: leave one out"
        if tokens and self.offload_embedding:
            yield "offload_embedding", "must be false with new_tokens, whose rows train"
