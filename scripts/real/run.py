"""Trains as a config says, shows answers before and after, and verifies the exports elsewhere.

    python -m scripts.real.run configs/real_cpu.yaml save.output_dir=outputs/real

The answers are to held-out questions, written greedily by the base model and by the trained one.
The exports are loaded by transformers and PEFT, whose logits must be lorax's. What came out is
written to `real.json` in the run's folder.
"""

import argparse
import json
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import lorax
from lorax.cli.main import main as lorax_main
from lorax.config.run import RunConfig
from lorax.interop.export import LOGIT_BOUNDS
from lorax.interop.stop_tokens import stop_token_ids
from lorax.runs.folder import EXPORT_FOLDERS

SHOWN = 3
NEW_TOKENS = 64
RESULT_FILE = "real.json"

type Chat = list[dict[str, str]]


def main(words: Sequence[str] | None = None) -> None:
    """Runs all of it; ends with the status of `lorax train`, or 1 if an export is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_args(words)
    started = time.monotonic()
    if status := lorax_main(["train", parsed.config, *parsed.overrides]):
        raise SystemExit(status)
    config = lorax.load_config(parsed.config, parsed.overrides)
    run = Path(config.save.output_dir)
    chats = shown_chats(Path(config.data.eval[0].path))
    base = lorax.load_model(config.model.name_or_path, dtype=jnp.dtype(config.model.dtype))
    trained = lorax.load_adapter(base, run / EXPORT_FOLDERS["peft"])
    answers = describe_answers(chats, answer(base, chats, config), answer(trained, chats, config))
    print_answers(answers)
    with warnings.catch_warnings():  # PEFT reads what transformers will call otherwise
        warnings.simplefilter("ignore", FutureWarning)
        distances = compare_logits(base, trained, chats, config)
    bound = LOGIT_BOUNDS[config.model.dtype]
    print_distances(distances, bound)
    result = {
        "answers": answers,
        "logits_differ": distances,
        "seconds_in_all": time.monotonic() - started,
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (run / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
    print(f"\n{result['seconds_in_all']:.0f} s in all; {run / RESULT_FILE}")
    # Written so that NaN fails too.
    if not all(distances[export] <= bound for export in ("peft", "merged")):
        raise SystemExit("an export is not the trained model in PEFT or transformers")


def shown_chats(path: Path) -> list[Chat]:
    """Returns some chats of a file, from its beginning to its end at equal distances."""
    lines = path.read_text(encoding="utf-8").splitlines()
    places = [index * len(lines) // SHOWN for index in range(SHOWN)]
    return [json.loads(lines[place])["messages"] for place in places]


def answer(model: Any, chats: Sequence[Chat], config: RunConfig) -> list[str]:
    """Lets a model answer the questions of some chats, greedily."""
    base = config.model.name_or_path
    tokenizer = lorax.load_tokenizer(base)
    prompts = [encode(tokenizer, chat[:-1], asks=True) for chat in chats]
    stop_ids = stop_token_ids(base, tokenizer)
    model.eval()
    written = lorax.generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=stop_ids)
    return [str(tokenizer.decode(new, skip_special_tokens=True)).strip() for new in written]


def encode(tokenizer: Any, chat: Chat, *, asks: bool) -> list[int]:
    """Returns the token ids of a chat, up to where an answer begins if it `asks` for one."""
    return tokenizer.apply_chat_template(chat, add_generation_prompt=asks, return_dict=False)


def describe_answers(
    chats: Sequence[Chat], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    """Joins the questions with the answers that they have and get."""
    return [
        {
            "question": chat[-2]["content"],
            "expected": chat[-1]["content"],
            "before": old,
            "after": new,
        }
        for chat, old, new in zip(chats, before, after, strict=True)
    ]


def print_answers(answers: Sequence[dict[str, str]]) -> None:
    """Prints each question and its answers, which end where the longest answer must."""
    for row in answers:
        print()
        for name, text in row.items():
            lead = f"{name:<10}"
            indent = " " * len(lead)
            flat = " ".join(text.split())
            print(textwrap.fill(flat, 100, initial_indent=lead, subsequent_indent=indent))


def compare_logits(
    base: Any, trained: Any, chats: Sequence[Chat], config: RunConfig
) -> dict[str, float]:
    """Returns how far the logits of PEFT and transformers are from lorax's.

    All see the given chats as one sequence.

    Returns:
        Relative L2 distances to the trained model in lorax: of its adapter in PEFT (`peft`), of the
        merged model in transformers (`merged`), and of the base model in lorax (`base`).
    """
    import peft
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    tokenizer = lorax.load_tokenizer(config.model.name_or_path)
    tokens = [token for chat in chats for token in encode(tokenizer, chat, asks=False)]
    run = Path(config.save.output_dir)
    dtype = getattr(torch, config.model.dtype)

    def load(folder: str | Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def logits_of(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(torch.tensor([tokens])).logits.float().numpy()

    ours = jnp.array([tokens], jnp.int32)
    expected = np.asarray(trained(ours), np.float32)
    adapter = run / EXPORT_FOLDERS["peft"]
    found = {
        "peft": logits_of(peft.PeftModel.from_pretrained(load(config.model.name_or_path), adapter)),
        "merged": logits_of(load(run / EXPORT_FOLDERS["merged"])),
        "base": np.asarray(base(ours), np.float32),
    }
    norm = np.linalg.norm(expected)
    return {name: float(np.linalg.norm(logits - expected) / norm) for name, logits in found.items()}


def print_distances(distances: dict[str, float], bound: float) -> None:
    """Prints how far each model is from the trained one."""
    print(
        f"\nlogits on these chats, compared with the trained model's in lorax (accepted "
        f"{bound:.0e}; the base model's differ by {distances['base']:.2f})\n"
        f"  adapter in PEFT              differ by {distances['peft']:.1e}\n"
        f"  merged model in transformers differ by {distances['merged']:.1e}"
    )


if __name__ == "__main__":
    main()
