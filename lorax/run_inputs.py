"""What a run is made of, and what can be checked before it begins."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.adapters.nnx.apply import apply_lora, set_kernels
from lorax.adapters.targets import TargetError
from lorax.config.run import RunConfig
from lorax.data.batches import BatchPlan
from lorax.data.chat.renderer import RENDERER
from lorax.data.chat.template import read_own_template
from lorax.data.chat.tokenizer import load_tokenizer
from lorax.data.dataset import EncodedDataset
from lorax.data.encode import load_encoded_dataset
from lorax.data.reading.rows import SourceError
from lorax.devices.host_memory import HostArray, embedding_obstacle
from lorax.devices.mesh import make_mesh
from lorax.interop.adapter_base import with_recorded_revision
from lorax.interop.adapter_tokenizer import tokenizer_files
from lorax.interop.folder import resolve_base
from lorax.interop.load import check_checkpoint, load_hf_config, load_model
from lorax.interop.peft import check_adapter, load_adapter, trains_base_weights
from lorax.interop.peft_config import adapter_notes, read_adapter_config
from lorax.interop.stop_tokens import stop_token_ids
from lorax.models.decoder import CausalLM
from lorax.models.stack.recompute import Recomputation
from lorax.planning.kernels import check_kernels
from lorax.planning.memory import POLICIES, Planner
from lorax.recovery.store import CHECKPOINT_FOLDER, CheckpointStore
from lorax.system.hardware import GIB, device_gib
from lorax.system.threads import await_tracing
from lorax.training.calendar import count_steps, plan_training
from lorax.training.optim.schedules import make_schedule

CHATS = ("auto", "messages", "sharegpt", "alpaca")
"""Formats of data whose rows a chat template renders, or may render."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything a run reads but the weights.

    Attributes:
        base: Folder of the base checkpoint's configuration and tokenizer.
        tokenizer: Its tokenizer.
        train: Encoded rows to learn from.
        eval: Encoded held-out rows.
        chat_template: Text of the run's own template; None where it is the tokenizer's.
        date: The day that the chat template was told, if it asks for it.
    """

    base: Path
    tokenizer: Any
    train: EncodedDataset
    eval: EncodedDataset | None
    chat_template: str | None
    date: str | None = None

    @property
    def datasets(self) -> dict[str, EncodedDataset]:
        """The data by name, training data first."""
        return {"train": self.train} | ({} if self.eval is None else {"eval": self.eval})

    @property
    def context(self) -> int:
        """Tokens of a row that the base model was made for."""
        return load_hf_config(self.base).context

    def stop_ids(self, *, needed: bool = True) -> tuple[int, ...]:
        """Returns what the trained model stops with; see `stop_token_ids`."""
        trained = self.train.report.stop_ids
        return stop_token_ids(self.base, self.tokenizer, trained, needed=needed)


def load_inputs(config: RunConfig) -> Inputs:
    """Reads the tokenizer and the data of a run.

    Raises:
        ValueError: Naming the file, the line or the setting that cannot be used.
    """
    model = config.model
    base = resolve_base(model, weights=False)
    vocab_size = load_hf_config(base).vocab_size
    if config.data.format in CHATS:
        RENDERER.start()
    tokenizer = load_tokenizer(str(base))

    def encode(name: str) -> EncodedDataset:
        sources = getattr(config.data, name)
        try:
            return load_encoded_dataset(sources, config.data, tokenizer, vocab_size=vocab_size)
        except SourceError as error:
            raise SourceError(f"data.{name}: {error}") from error

    train = encode("train")
    held_out = encode("eval") if config.data.eval else None
    RENDERER.close_unused()
    date = next((data.report.date for data in (train, held_out) if data and data.report.date), None)
    if config.data.date is not None and date is None:
        raise ValueError(
            f"data.date: {config.data.date} has no effect, since no chat template asks for today's "
            "date: remove it"
        )
    inputs = Inputs(base, tokenizer, train, held_out, read_own_template(config.data), date)
    inputs.stop_ids(needed=False)  # what it raises is about the files of the base
    return inputs


def input_notes(base: Path, adapter: str | None = None, *, trains: bool = True) -> list[str]:
    """Returns what of a base model's and an adapter's files is not read.

    Args:
        base: Folder of the base checkpoint.
        adapter: Folder of an adapter on it, if there is one.
        trains: Whether it is for a run, which encodes its rows by the base's tokenizer.
    """
    notes = [*load_hf_config(base).notes, *(adapter_notes(adapter) if adapter else ())]
    if adapter and trains and (names := tokenizer_files(adapter)):
        notes.append(
            f"{adapter} holds {', '.join(names)}, which are not read: a run takes the base's"
        )
    return notes


def model_shapes(config: RunConfig, base: Path) -> CausalLM:
    """Returns the model that trains, adapters included, with shapes instead of weights.

    Raises:
        TargetError: If the adapter's settings do not fit the model.
        ValueError: If more layers are to be kept than it has.
    """
    full = config.train.method == "full"
    adapter, dtype = config.model.adapter, jnp.dtype(config.model.dtype)
    settings = read_adapter_config(adapter) if adapter else config.lora
    architecture = load_hf_config(base)
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
            model = apply_lora(model, settings, rngs=nnx.Rngs(0))
        set_kernels(model, config.model.kernels)
        return model

    try:
        model = nnx.eval_shape(build)
    except TargetError as error:
        place = f"{adapter} does not fit {base}: " if adapter else ""
        raise TargetError(f"{place}{error}") from None
    if config.model.offload_embedding:
        _put_embedding_on_host(model)
    return model


def _put_embedding_on_host(model: CausalLM) -> None:
    """Says of a model of shapes that its embedding stays in the host's memory."""
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


def make_planner(config: RunConfig) -> Planner:
    """Returns the planner of a run, from the checkpoint's config.json: it reads no weights."""
    model = config.model
    base = resolve_base(model, weights=False)
    return Planner(config, load_hf_config(base), model_shapes(config, base))


def check_weights(config: RunConfig) -> None:
    """Checks all that can be seen of the weights without reading the base model's.

    That is what files and their headers say: of a base model in a folder, and of an adapter.

    Raises:
        ValueError: Naming the file and the tensor that cannot be used.
    """
    model = config.model
    base = resolve_base(model, weights=False)
    if Path(model.name_or_path).expanduser().is_dir():
        check_checkpoint(base)
    if model.adapter:
        check_adapter(model_shapes(config, base), model.adapter)


def check_targets(config: RunConfig, base: Path) -> CausalLM:
    """Matches the adapter's settings against the model's names, without any weights.

    Returns:
        The model that trains, with shapes instead of weights.

    Raises:
        ValueError: If a setting matches nothing, a rank does not fit, or the kernels asked for
            cannot run here.
    """
    adapted = model_shapes(config, base)
    if config.train.method == "full":
        return adapted
    if "peft-portable" in config.save.export and trains_base_weights(adapted):
        raise ValueError(
            "save.export: peft-portable holds A and B only, but lora.bias or lora.modules_to_save "
            "trains other weights too; export peft or merged"
        )
    check_kernels(config, adapted)
    return adapted


def check_plan(config: RunConfig, inputs: Inputs) -> BatchPlan:
    """Plans the batches as the trainer will, and checks devices and schedule against them.

    Raises:
        ValueError: If the mesh asks for absent devices, or the schedule does not fit the run.
    """
    plan = plan_training(config, inputs.train, make_mesh(config.mesh.data).size)
    make_schedule(config.train, count_steps(config, plan))
    return plan


def choose_recomputation(config: RunConfig) -> tuple[Recomputation, str]:
    """Returns what the backward pass will recompute, and why.

    `auto` is the fastest that fits; or what it was before, where `save.output_dir` holds a run: it
    would not go on to the same bits with anything else.

    Raises:
        ValueError: If `train.memory_gib` is too little.
    """
    train = config.train
    if train.gradient_checkpointing != "auto":
        kept = 1 if train.kept_layers is None else train.kept_layers
        return Recomputation(train.gradient_checkpointing, kept), "as asked"
    gib, before = train.memory_gib or device_gib(), recomputed_before(config)
    if gib is None:
        kind = jax.devices()[0].device_kind
        return before or Recomputation("none"), f"{kind} does not tell its memory"
    planner = make_planner(config)
    shape = train.per_device_train_batch_size, config.data.max_seq_length
    peak_of = lambda r: planner.memory(r.policy, *shape, r.kept_layers).peak / GIB
    if before is not None:
        reason = f"as before, about {peak_of(before):.3g} of {gib:.3g} GiB"
        if peak_of(before) > gib and train.memory_gib:
            raise ValueError(
                f"train.memory_gib: {gib:g} is less than the run in {config.save.output_dir} takes "
                f"by the estimate: {peak_of(before):.3g} for {before}; raise it, or leave it out"
            )
        return before, reason
    choice = planner.fastest(*shape, gib)
    peak = peak_of(choice)
    if peak > gib:
        found = f"no policy fits: {choice} takes the least, about {peak:.3g} GiB of {gib:.3g}"
        if train.memory_gib:
            raise ValueError(
                f"train.memory_gib: {found}; lower train.per_device_train_batch_size or "
                "data.max_seq_length (`lorax plan` shows what fits), or raise it"
            )
        return choice, f"{found}, by the estimate of `lorax plan`"
    reason = f"about {peak:.3g} of {gib:.3g} GiB, the fastest that fits"
    if host := planner.host_bytes(choice.policy, *shape, choice.kept_layers) / GIB:
        reason += f", and {host:.1f} GiB of the host's memory per device"
    return choice, reason


def saved_identity(config: RunConfig) -> dict[str, Any] | None:
    """Returns `identify_run` of the run in `save.output_dir`, if one is there and has saved."""
    record = CheckpointStore(Path(config.save.output_dir) / CHECKPOINT_FOLDER).newest_record()
    return None if record is None else record["identity"]


def recomputed_before(config: RunConfig) -> Recomputation | None:
    """Returns what the run in `save.output_dir` recomputes, if one is there and has saved."""
    identity = saved_identity(config)
    return None if identity is None else Recomputation.read(identity["gradient checkpointing"])


def build_model(config: RunConfig) -> CausalLM:
    """Loads the base model and puts fresh or loaded adapters on it, as the config says."""
    config = with_recorded_revision(config, print)
    return adapt_base(load_base(config), config, choose_recomputation(config)[0])


def load_base(config: RunConfig) -> CausalLM:
    """Loads the base model, which needs no other input of the run."""
    return load_model(
        config.model.name_or_path,
        revision=config.model.revision,
        dtype=jnp.dtype(config.model.dtype),
        # Weights that train are float32: in bfloat16 small updates would be rounded away.
        param_dtype=jnp.float32 if config.train.method == "full" else None,
        attn_impl=config.model.attn_impl,
        offload_embedding=config.model.offload_embedding,
        pace=await_tracing,
    )


def adapt_base(model: CausalLM, config: RunConfig, recomputation: Recomputation) -> CausalLM:
    """Puts fresh or loaded adapters on the base model, and says what it makes again.

    Args:
        model: From `load_base`.
        config: The run's settings.
        recomputation: From `choose_recomputation`.
    """
    _check_kept_layers(config, model.config.num_hidden_layers)
    recomputation.put_on(model)
    if config.model.adapter:
        model = load_adapter(model, config.model.adapter)
    elif config.train.method != "full":
        model = apply_lora(model, config.lora, rngs=nnx.Rngs(config.train.seed))
    set_kernels(model, config.model.kernels)
    return model


def explain_memory(config: RunConfig, recomputation: Recomputation, error: Exception) -> str:
    """Returns what to change when the device's memory did not suffice."""
    train, length = config.train, config.data.max_seq_length
    rows, planner = train.per_device_train_batch_size, make_planner(config)
    gib = train.memory_gib or device_gib() or 0.0
    line = str(error).splitlines()[0]
    if not gib:
        return f"out of memory: {line}. `lorax plan` says what takes less"
    moves, kept = [], recomputation.kept_layers
    now = planner.memory(recomputation.policy, rows, length, kept).peak
    without = "" if train.kept_layers is None else " without train.kept_layers"
    for other in POLICIES:
        peak = planner.memory(other, rows, length).peak
        if peak < now:
            about = f"{without} (about {peak / GIB:.1f} GiB)"
            moves.append(f"train.gradient_checkpointing: {other}{about}")
    if spared := planner.spared_by_host:
        moves.append(f"model.offload_embedding: true ({spared / GIB:.1f} GiB less)")
    smallest = min(POLICIES, key=lambda policy: planner.memory(policy, 1, length).peak)
    if (most := planner.largest_batch(smallest, length, gib)) and most < rows:
        moves.append(f"train.per_device_train_batch_size: {most} with `{smallest}`{without}")
    if not moves:
        longest = planner.longest_sequence(smallest, 1, gib)
        moves.append(f"data.max_seq_length: {longest} with one row and `{smallest}`{without}")
    found = "; ".join(moves)
    return f"out of memory: {line}. By the estimate of `lorax plan` these take less: {found}"
