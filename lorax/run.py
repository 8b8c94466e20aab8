"""A whole run, from a config to verified exports; what the commands do, for Python too."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from lorax.card import write_card
from lorax.compilation_cache import use_compilation_cache
from lorax.config import RunConfig, dump_config
from lorax.data import (
    BatchPlan,
    EncodedDataset,
    load_encoded_dataset,
    load_tokenizer,
)
from lorax.evaluate import answer_rows, exact_match, last_answer
from lorax.export import export_model
from lorax.generate import stop_token_ids
from lorax.interop.checkpoint import resolve_checkpoint
from lorax.interop.files import refuse_occupied
from lorax.interop.huggingface import load_hf_config, load_model
from lorax.interop.peft import load_adapter, read_adapter_config, trains_base_weights
from lorax.kernel_choice import check_kernels
from lorax.lora import apply_lora, set_kernels
from lorax.metrics import RunLog, check_reporters, library_versions, memory_gib
from lorax.models import CausalLM, GradientCheckpointing
from lorax.optimizer import make_schedule
from lorax.overview import report_data, report_model
from lorax.phases import Phases
from lorax.plan import GIB, Planner, device_gib
from lorax.preparation import compile_ahead, count_steps, plan_training
from lorax.recorder import Recorder
from lorax.report import (
    RunSummary,
    draw_loss_curve,
    print_config,
    print_summary,
    show_progress,
)
from lorax.sharding import make_mesh
from lorax.targets import TargetError
from lorax.train import Trainer

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""In a run's folder: the template it was trained with, where that is not the tokenizer's own."""

EXPORT_FOLDERS = {"peft": "adapter", "peft-portable": "adapter-portable", "merged": "merged"}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything a run reads but the weights.

    Attributes:
        base: Folder of the base checkpoint's configuration and tokenizer.
        tokenizer: Its tokenizer.
        train: Encoded rows to learn from.
        eval: Encoded held-out rows.
        chat_template: Text of the run's own template; None where it is the tokenizer's.
    """

    base: Path
    tokenizer: Any
    train: EncodedDataset
    eval: EncodedDataset | None
    chat_template: str | None

    @property
    def datasets(self) -> dict[str, EncodedDataset]:
        """The data by name, training data first."""
        return {"train": self.train} | ({} if self.eval is None else {"eval": self.eval})


def load_inputs(config: RunConfig) -> Inputs:
    """Reads the tokenizer and the data of a run.

    Raises:
        ValueError: Naming the file, the line or the setting that cannot be used.
    """
    model = config.model
    base = resolve_checkpoint(model.name_or_path, model.revision, weights=False)
    vocab_size = load_hf_config(base).vocab_size
    tokenizer = load_tokenizer(str(base))
    encode = lambda sources: load_encoded_dataset(
        sources, config.data, tokenizer, vocab_size=vocab_size
    )
    train = encode(config.data.train)
    held_out = encode(config.data.eval) if config.data.eval else None
    return Inputs(base, tokenizer, train, held_out, _own_template(config))


def _own_template(config: RunConfig) -> str | None:
    if config.data.chat_template == "tokenizer":
        return None
    return Path(config.data.chat_template).read_text(encoding="utf-8-sig")


def model_shapes(
    config: RunConfig, base: Path, policy: GradientCheckpointing = "none"
) -> nnx.Module:
    """Returns the model that trains, adapters included, with shapes instead of weights.

    Raises:
        TargetError: If the adapter's settings do not fit the model.
    """
    full = config.train.method == "full"
    adapter, dtype = config.model.adapter, jnp.dtype(config.model.dtype)
    settings = read_adapter_config(adapter) if adapter else config.lora
    architecture = load_hf_config(base)

    def build():
        model = CausalLM(
            architecture,
            dtype=dtype,
            param_dtype=jnp.float32 if full else dtype,
            attn_impl=config.model.attn_impl,
            gradient_checkpointing=policy,
            rngs=nnx.Rngs(0),
        )
        if full:
            return model
        model = apply_lora(model, settings, rngs=nnx.Rngs(0))
        set_kernels(model, config.model.kernels)
        return model

    try:
        return nnx.eval_shape(build)
    except TargetError as error:
        place = f"{adapter} does not fit {base}: " if adapter else ""
        raise TargetError(f"{place}{error}") from None


def make_planner(config: RunConfig) -> Planner:
    """Returns the planner of a run, from the checkpoint's config.json: it reads no weights."""
    model = config.model
    base = resolve_checkpoint(model.name_or_path, model.revision, weights=False)
    return Planner(config, load_hf_config(base), model_shapes(config, base))


def check_targets(config: RunConfig, base: Path) -> nnx.Module | None:
    """Matches the adapter's settings against the model's names, without any weights.

    Returns:
        The adapted model with shapes instead of weights; None for a full fine-tune.

    Raises:
        ValueError: If a setting matches nothing, a rank does not fit, or the kernels asked for
            cannot run here.
    """
    if config.train.method == "full":
        return None
    adapted = model_shapes(config, base)
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


def choose_policy(config: RunConfig) -> tuple[GradientCheckpointing, str]:
    """Returns what the backward pass will recompute, and why: `auto` is the fastest that fits."""
    train = config.train
    if train.gradient_checkpointing != "auto":
        return train.gradient_checkpointing, "as asked"
    gib = train.memory_gib or device_gib()
    if gib is None:
        return "none", f"{jax.devices()[0].device_kind} does not tell its memory"
    planner = make_planner(config)
    shape = train.per_device_train_batch_size, config.data.max_seq_length
    policy = planner.fastest(*shape, gib)
    peak = planner.memory(policy, *shape).peak / GIB
    if peak > gib:
        found = f"no policy fits: {policy} takes the least, about {peak:.3g} GiB of {gib:.3g}"
        if train.memory_gib:
            raise ValueError(
                f"train.memory_gib: {found}; lower train.per_device_train_batch_size or "
                "data.max_seq_length (`lorax plan` shows what fits), or raise it"
            )
        return policy, f"{found}, by the estimate of `lorax plan`"
    reason = f"about {peak:.1f} of {gib:.1f} GiB, the fastest that fits"
    if host := planner.host_bytes(policy, *shape) / GIB:
        reason += f", and {host:.1f} GiB of the host's memory per device"
    return policy, reason


def build_model(config: RunConfig, policy: GradientCheckpointing | None = None) -> CausalLM:
    """Loads the base model and puts fresh or loaded adapters on it, as the config says.

    Args:
        config: The run's settings.
        policy: What `choose_policy` returned, if it was asked before.
    """
    full = config.train.method == "full"
    model = load_model(
        config.model.name_or_path,
        revision=config.model.revision,
        dtype=jnp.dtype(config.model.dtype),
        # Weights that train are float32: in bfloat16 small updates would be rounded away.
        param_dtype=jnp.float32 if full else None,
        attn_impl=config.model.attn_impl,
        gradient_checkpointing=policy or choose_policy(config)[0],
    )
    if full:
        return model
    if config.model.adapter:
        model = load_adapter(model, config.model.adapter)
    else:
        model = apply_lora(model, config.lora, rngs=nnx.Rngs(config.train.seed))
    set_kernels(model, config.model.kernels)
    return model


def run_training(config: RunConfig, console: Console, phases: Phases | None = None) -> RunSummary:
    """Trains as `config` says, exports, verifies the exports, and reports.

    Everything that can be checked is checked before the run directory is made: settings, data,
    targets, the checkpoint. Afterwards the directory holds config.yaml, versions.json,
    metrics.jsonl, loss.png, the weights of some steps, the exports and summary.json.

    Args:
        config: The run's settings.
        console: Where it reports.
        phases: The time up to now, if it belongs to the run.

    Raises:
        ValueError: Naming what cannot be used and what to do.
    """
    started = time.monotonic()
    output = Path(config.save.output_dir)
    refuse_occupied(output)
    check_reporters(config.log.report_to)
    phases = phases or Phases()
    console.rule("Settings")
    print_config(console, config)
    if jax.default_backend() == "gpu":
        console.print(use_compilation_cache()[1], highlight=False, soft_wrap=True)
    inputs = load_inputs(config)
    check_targets(config, inputs.base)
    check_plan(config, inputs)
    console.rule("Data")
    report_data(console, config, inputs.datasets, inputs.tokenizer)
    console.rule("Model")
    policy, reason = choose_policy(config)
    console.print(f"gradient checkpointing: {policy}, {reason}", highlight=False, soft_wrap=True)
    phases.end("data and device")
    shapes = model_shapes(config, inputs.base, policy)
    compiled = compile_ahead(shapes, config, inputs.train, inputs.eval)
    model = build_model(config, policy)
    phases.end("model and weights")
    report_model(console, config, model)
    recorder = Recorder(console, config.log.logging_steps, phases)
    data = inputs.train, inputs.eval
    trainer = Trainer(model, config, *data, listeners=(recorder,), compiled=compiled)
    del model
    before = _score(config, trainer.model, inputs, console, "before training")
    phases.end("first answers" if before is not None else "trainer")
    if compiled.done():
        compiled.result()  # raises what the compiler raised, before anything is written
    _make_directory(output, config, inputs)
    console.rule("Training")
    with RunLog(output, config.log.report_to) as log:
        recorder.log = log
        with show_progress(console, trainer.total_steps) as show:
            recorder.show = show
            result = trainer.train()
    after = _score(config, trainer.model, inputs, console, "after training")
    console.rule("Export")
    files = _export_all(config, trainer.model, inputs, console, result, (before, after))
    if "jsonl" in config.log.report_to:
        draw_loss_curve(output / "metrics.jsonl", output / "loss.png", title=_title(config))
        files |= {"loss curve": str(output / "loss.png")}
    files |= {"run": str(output)}
    memory, speed = memory_gib(), trainer.throughput.mean()
    summary = RunSummary(
        steps=result.steps,
        seconds=time.monotonic() - started,
        tokens_per_s=speed["tokens_per_s"],
        mfu=speed["mfu"],
        memory_gib=memory.gib,
        memory_source=memory.source,
        loss=(result.eval_loss_before, result.eval_loss),
        exact_match=(before, after),
        files=files,
    )
    text = json.dumps(dataclasses.asdict(summary), indent=2)
    (output / "summary.json").write_text(text + "\n", encoding="utf-8")
    console.rule("Result")
    print_summary(console, summary)
    return summary


def _make_directory(output: Path, config: RunConfig, inputs: Inputs) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    if inputs.chat_template is not None:
        (output / CHAT_TEMPLATE_FILE).write_text(inputs.chat_template, encoding="utf-8")
    versions = json.dumps(library_versions(), indent=2)
    (output / "versions.json").write_text(versions + "\n", encoding="utf-8")


def _score(config: RunConfig, model, inputs: Inputs, console: Console, when: str) -> float | None:
    """Lets the model answer held-out rows, if the config asks for it, and shows one answer."""
    if not config.eval.exact_match or inputs.eval is None:
        return None
    evaluated = nnx.clone(model)
    evaluated.eval()
    # A template may end turns with a token that the base model does not stop at.
    ends = {last_answer(inputs.train.row(i))[1][-1] for i in range(min(100, len(inputs.train)))}
    trained_ends = ends & set(inputs.tokenizer.all_special_ids)
    stop_ids = sorted({*stop_token_ids(inputs.base, inputs.tokenizer), *trained_ends})
    answers = answer_rows(
        evaluated,
        inputs.eval,
        inputs.tokenizer,
        rows=config.eval.exact_match_rows,
        max_new_tokens=config.eval.max_new_tokens,
        stop_ids=stop_ids,
    )
    score, shown = exact_match(answers), answers[0]
    console.print(
        f"{when}: exact match {score:.1%} of {len(answers)} held-out rows", highlight=False
    )
    console.print(f"  asked     {shown.prompt.strip()!r}", markup=False, highlight=False)
    console.print(f"  expected  {shown.expected.strip()!r}", markup=False, highlight=False)
    console.print(f"  answered  {shown.generated.strip()!r}", markup=False, highlight=False)
    return score


def _export_all(config, model, inputs: Inputs, console, result, scores) -> dict[str, str]:
    facts = {"optimizer steps": str(result.steps)}
    if result.eval_loss is not None:
        facts["held-out loss"] = f"{result.eval_loss_before:.4f} → {result.eval_loss:.4f}"
    if scores[1] is not None:
        facts["exact match"] = f"{scores[0]:.1%} → {scores[1]:.1%}"
    files = {}
    formats = list(config.save.export)
    if config.train.method == "lora" and "peft" not in formats:
        formats.insert(0, "peft")  # what `lorax export` makes the other formats from
    for format in formats:
        folder = Path(config.save.output_dir) / EXPORT_FOLDERS[format]
        found = export_model(
            model,
            folder,
            format,
            base=inputs.base,
            base_name=config.model.name_or_path,
            chat_template=inputs.chat_template,
            dtype=jnp.dtype(config.model.dtype),
            card=write_card(config, format, facts),
        )
        console.print(f"{format}: {folder}", highlight=False, soft_wrap=True)
        console.print(
            f"  verified: {found.describe()}",
            highlight=False,
        )
        files[format] = str(folder)
    return files


def _title(config: RunConfig) -> str:
    base = "/".join(Path(config.model.name_or_path).parts[-2:])
    method = "full fine-tuning" if config.train.method == "full" else "LoRA"
    return f"{method} of {base}"
