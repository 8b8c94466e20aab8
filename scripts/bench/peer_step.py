"""Times training steps of Unsloth, or of transformers with PEFT, on one cell; prints one JSON row.

    python -m scripts.bench.peer_step unsloth /tmp/8b --batch 4 --seq 2048 --policy none

The folder holds a checkpoint, such as `scripts.make.random_checkpoint` writes. The model is the one
that the library's own functions return, called as its trainer calls it: bfloat16 autocast, fused
AdamW, gradients clipped to 1. Every token is supervised. The first steps, in which the library
compiles and tunes, are not timed. Memory is the allocator's peak over the timed steps.
`scripts.bench.peers` runs this and lorax.
"""

import argparse
import importlib
import json
import os
import time
from typing import Any

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTING: dict[str, Any] = {"none": False, "full": True, "offload": "unsloth"}


def load_unsloth(parsed: argparse.Namespace, torch) -> Any:
    """Returns Unsloth's model with its adapter; `offload` is its default checkpointing."""
    model_class = importlib.import_module("unsloth").FastLanguageModel
    mode = CHECKPOINTING[parsed.policy]
    model, _ = model_class.from_pretrained(
        parsed.checkpoint,
        max_seq_length=parsed.seq,
        dtype=torch.bfloat16,
        load_in_4bit=parsed.bits == 4,
        use_gradient_checkpointing=mode,
        local_files_only=True,
        use_exact_model_name=True,
        device_map={"": 0},
    )
    model = model_class.get_peft_model(
        model,
        r=parsed.r,
        lora_alpha=2 * parsed.r,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=mode,
        random_state=3407,
    )
    model_class.for_training(model, use_gradient_checkpointing=mode)
    return model


def load_peft(parsed: argparse.Namespace, torch) -> Any:
    """Returns a transformers model with PEFT's adapter."""
    transformers, peft = map(importlib.import_module, ("transformers", "peft"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        parsed.checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0}
    )
    model.config.use_cache = False
    if parsed.policy != "none":
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    settings = peft.LoraConfig(
        r=parsed.r, lora_alpha=2 * parsed.r, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, settings)
    if parsed.policy != "none":
        model.enable_input_require_grads()
    model.train()
    return model


def run_steps(model, parsed: argparse.Namespace, torch) -> tuple[float, list[float]]:
    """Returns the seconds per timed step, and the loss of every step."""
    generator = torch.Generator().manual_seed(0)
    size = (parsed.accumulation * parsed.batch, parsed.seq)
    tokens = torch.randint(4, model.config.vocab_size, size, generator=generator).cuda()
    count = torch.tensor(size[0] * (size[1] - 1), device="cuda")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.01, fused=True)
    losses = []
    begin = 0.0
    for step in range(parsed.warmup + parsed.steps):
        if step == parsed.warmup:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for rows in tokens.split(parsed.batch):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=rows, labels=rows, num_items_in_batch=count).loss
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(total)
    # As with lorax, the host may run ahead of the device until the last step.
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / parsed.steps, [float(loss) for loss in losses]


def main() -> None:
    """Runs one cell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", choices=("unsloth", "peft"))
    parser.add_argument("checkpoint")
    parser.add_argument("--policy", choices=tuple(CHECKPOINTING), default="none")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--bits", type=int, choices=(4, 16), default=16)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parsed = parser.parse_args()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
        os.environ[name] = "1"
    if parsed.system == "unsloth":
        importlib.import_module("unsloth")  # before torch and transformers, which it changes
    torch: Any = importlib.import_module("torch")
    model = (load_unsloth if parsed.system == "unsloth" else load_peft)(parsed, torch)
    seconds, losses = run_steps(model, parsed, torch)
    row = {
        "system": parsed.system,
        "base_dtype": "bfloat16" if parsed.bits == 16 else "nf4_double",
        "r": parsed.r,
        "batch": parsed.batch,
        "accumulation": parsed.accumulation,
        "seq": parsed.seq,
        "policy": parsed.policy,
        "tokens_per_s": round(parsed.accumulation * parsed.batch * parsed.seq / seconds, 1),
        "step_ms": round(seconds * 1e3, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "device": torch.cuda.get_device_name(),
        "versions": {name: _version(name) for name in (parsed.system, "torch", "transformers")},
    }
    print(json.dumps(row), flush=True)


def _version(package: str) -> str:
    metadata = importlib.import_module("importlib.metadata")
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
