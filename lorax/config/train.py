"""Settings of training: batches, schedule, optimizer, recomputation."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, override

from pydantic import Field

from lorax.config.marks import Free, OfCompiling, OfStep
from lorax.config.types import (
    BelowOne,
    Conflict,
    Count,
    CountOrMinusOne,
    Index,
    NotNegative,
    Positive,
    Section,
    Share,
)


def _default(section: Section, name: str) -> Any:
    return type(section).model_fields[name].default


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


class LrSchedulerKwargs(Section):
    """Settings of single schedules, each refused by a schedule that does not read it.

    Attributes:
        min_lr_rate: cosine_with_min_lr: last learning rate over the highest.
        num_decay_steps: wsd: steps of the final decay.
        power: polynomial: exponent of the decay, 1.0 when not given.
        lr_end: polynomial: last learning rate, 1e-7 when not given.
        timescale: inverse_sqrt: steps; the warm-up, or 10 000 without one, when not given.
    """

    min_lr_rate: Share | None = None
    num_decay_steps: Count | None = None
    power: Positive | None = None
    lr_end: NotNegative | None = None
    timescale: Count | None = None


class TrainConfig(Section):
    """Training: batches, schedule, optimizer, recomputation.

    Attributes:
        method: `lora` trains an adapter, `full` every weight.
        num_train_epochs: Passes over the data; may be a fraction.
        max_steps: Optimizer steps; overrides `num_train_epochs` unless -1.
        per_device_train_batch_size: Rows per device and micro-batch.
        gradient_accumulation_steps: Micro-batches per step; exactly equal to one larger batch.
        learning_rate: The highest of the schedule.
        loraplus_lr_ratio: LoRA+: the learning rate of every B, and of biases and norms that train,
            is this many times `learning_rate`, as in PEFT; null is off.
        loraplus_lr_embedding: LoRA+: the learning rate of adapters on embeddings.
        modules_to_save_learning_rate: The learning rate of what `lora.modules_to_save` trains
            whole, such as embedding and head; null is `learning_rate`, and LoRA+'s for its vectors.
        lr_scheduler_type: The schedule, with Hugging Face's values at every step.
        lr_scheduler_kwargs: Settings of single schedules.
        warmup_ratio: Warm-up as a share of all steps.
        warmup_steps: Warm-up in steps. Not together with `warmup_ratio`.
        weight_decay: Decoupled; on matrices only, never on biases and norms.
        optim: The optimizer.
        adam_beta1: Decay of the first moment (adamw, lion).
        adam_beta2: Decay of the second moment (adamw, lion).
        adam_epsilon: Added to the root of the second moment (adamw).
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        gradient_checkpointing: What the backward pass recomputes instead of storing it: `none`,
            `selective` (norms and activations, no matmul), `full` (each layer but the last),
            `offload` (as `full`, but not attention; stored activations wait in the host's memory);
            `auto` takes the fastest that fits, with as many layers kept as fit.
        kept_layers: How many layers, counted from the last, `full` and `offload` keep as
            `selective` does, from 0 to all; null is 1, the last alone. Not with `auto`, which
            decides it; a resumed run keeps its policy and layers.
        memory_gib: Memory of one device that `auto` may use, in GiB; null is all of it.
        neftune_noise_alpha: NEFTune: uniform noise in ±alpha/√(width of a row · hidden size) is
            added to the input embeddings in training, such as 5; null is off.
        seed: Seed of everything random in the run.
        full_determinism: The same bits every time on NVIDIA GPUs too; slower, with more memory.
        skip_nonfinite_steps: Steps whose loss or gradient may be not finite; each is left out with
            a warning. With 0 the first one ends the run.
        stuck_after_seconds: A step that takes longer ends the run, with every thread's stack
            printed; null waits for ever.
    """

    method: Annotated[Literal["lora", "full"], OfStep] = "lora"
    num_train_epochs: Annotated[Positive, OfStep] = 1.0
    max_steps: Annotated[CountOrMinusOne, OfStep] = -1
    per_device_train_batch_size: Annotated[Count, OfStep] = 2
    gradient_accumulation_steps: Annotated[Count, OfStep] = 1
    learning_rate: Annotated[Positive, OfStep] = 2e-4
    loraplus_lr_ratio: Annotated[Annotated[float, Field(ge=1)] | None, OfStep] = None
    loraplus_lr_embedding: Annotated[Positive, OfStep] = 1e-6
    modules_to_save_learning_rate: Annotated[Positive | None, OfStep] = None
    lr_scheduler_type: Annotated[
        Literal[
            "linear",
            "cosine",
            "cosine_with_min_lr",
            "constant",
            "constant_with_warmup",
            "wsd",
            "inverse_sqrt",
            "polynomial",
        ],
        OfStep,
    ] = "cosine"
    lr_scheduler_kwargs: Annotated[LrSchedulerKwargs, OfStep] = LrSchedulerKwargs()
    warmup_ratio: Annotated[Share, OfStep] = 0.0
    warmup_steps: Annotated[Index, OfStep] = 0
    weight_decay: Annotated[NotNegative, OfStep] = 0.01
    optim: Annotated[Literal["adamw", "lion", "sgd", "adafactor"], OfStep] = "adamw"
    adam_beta1: Annotated[BelowOne, OfStep] = 0.9
    adam_beta2: Annotated[BelowOne, OfStep] = 0.999
    adam_epsilon: Annotated[Positive, OfStep] = 1e-8
    max_grad_norm: Annotated[NotNegative, OfStep] = 1.0
    gradient_checkpointing: Annotated[
        Literal["auto", "none", "selective", "full", "offload"], Free
    ] = "full"
    kept_layers: Annotated[Index | None, Free] = None
    memory_gib: Annotated[Positive | None, Free] = None
    neftune_noise_alpha: Annotated[Positive | None, OfStep] = None
    seed: Annotated[int, Field(ge=0, lt=2**32), OfStep] = 3407
    full_determinism: Annotated[bool, OfStep] = False
    skip_nonfinite_steps: Annotated[Index, OfCompiling] = 0
    stuck_after_seconds: Annotated[Positive | None, Free] = 3600.0

    # Keys of `lr_scheduler_kwargs` that each schedule reads, and those that it requires.
    _reads: ClassVar[dict[str, tuple[str, ...]]] = {
        "cosine_with_min_lr": ("min_lr_rate",),
        "wsd": ("num_decay_steps",),
        "inverse_sqrt": ("timescale",),
        "polynomial": ("power", "lr_end"),
    }
    _needs: ClassVar[dict[str, str]] = {
        "cosine_with_min_lr": "min_lr_rate",
        "wsd": "num_decay_steps",
    }

    # Which optimizers read a key; elsewhere only its default is accepted.
    _optimizer_keys: ClassVar[dict[str, tuple[str, ...]]] = {
        "adam_beta1": ("adamw", "lion"),
        "adam_beta2": ("adamw", "lion"),
        "adam_epsilon": ("adamw",),
    }

    @override
    def conflicts(self) -> Iterator[Conflict]:
        yield from self._schedule_conflicts()
        yield from self._rate_conflicts()
        policy = self.gradient_checkpointing
        readers = ("full", "offload")
        if self.kept_layers is not None and policy not in readers:
            does = "decides it itself" if policy == "auto" else "does not read it"
            message = f"gradient_checkpointing `{policy}` {does}, only {_listed(readers)} read it"
            yield "kept_layers", message
        if self.memory_gib is not None and policy != "auto":
            message = f"gradient_checkpointing `{policy}` does not read it, only `auto` does"
            yield "memory_gib", message
        for name, readers in self._optimizer_keys.items():
            if self.optim not in readers and getattr(self, name) != _default(self, name):
                yield name, f"optim `{self.optim}` does not read it, only {_listed(readers)} does"

    def _schedule_conflicts(self) -> Iterator[Conflict]:
        if self.warmup_ratio and self.warmup_steps:
            yield "warmup_ratio", "set warmup_ratio or warmup_steps, not both"
        schedule = self.lr_scheduler_type
        settings = self.lr_scheduler_kwargs
        if schedule == "constant" and (self.warmup_ratio or self.warmup_steps):
            key = "warmup_ratio" if self.warmup_ratio else "warmup_steps"
            yield key, "schedule `constant` does not warm up: use `constant_with_warmup`"
        reads = self._reads.get(schedule, ())
        for name in settings.model_dump(exclude_none=True):
            if name not in reads:
                readers = [other for other in self._reads if name in self._reads[other]]
                message = f"schedule `{schedule}` does not read it, only `{readers[0]}` does"
                yield f"lr_scheduler_kwargs.{name}", message
        needed = self._needs.get(schedule)
        if needed and getattr(settings, needed) is None:
            message = f"schedule `{schedule}` needs lr_scheduler_kwargs.{needed}"
            yield "lr_scheduler_type", message
        lr_end = 1e-7 if settings.lr_end is None else settings.lr_end
        if schedule == "polynomial" and lr_end >= self.learning_rate:
            message = f"needs less than learning_rate ({self.learning_rate}), got {lr_end}"
            yield "lr_scheduler_kwargs.lr_end", message

    def _rate_conflicts(self) -> Iterator[Conflict]:
        if self.method == "full":
            for name in ("loraplus_lr_ratio", "modules_to_save_learning_rate"):
                if getattr(self, name) is not None:
                    yield name, "method `full` has no adapter: remove this key"
        name = "loraplus_lr_embedding"
        if self.loraplus_lr_ratio is None and getattr(self, name) != _default(self, name):
            yield name, "is only read together with loraplus_lr_ratio: set both"
