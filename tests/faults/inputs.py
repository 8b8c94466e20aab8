"""Hostile and broken inputs: refused by name, in little memory and time, and nothing is run."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.faults.damages import ADAPTERS, GOOD, MODELS, ROWS, TEMPLATES, TOKENIZERS
from tests.faults.foreign import search_for_foreign_code
from tests.faults.processes import cpu_seconds, in_child, read_status

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "tiny" / "model"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
"""A model of 43 MB in float32: large enough that reading it twice would show."""

MIB = 2**20
SECONDS = 5.0


def make_models(folder: Path) -> None:
    """Writes the sound model and the sound adapter that are damaged."""
    import jax.numpy as jnp
    from flax import nnx

    import lorax
    from lorax.interop.peft import save_adapter
    from lorax.interop.save import save_model
    from lorax.models.decoder import CausalLM
    from lorax.models.families import read_architecture

    model = CausalLM(read_architecture(CONFIG, "tiny"), rngs=nnx.Rngs(0))
    save_model(model, folder / "model", dtype=jnp.dtype("float32"))
    settings = lorax.LoraConfig(r=4, target_modules=("q_proj",))
    adapted = lorax.apply_lora(model, settings, rngs=nnx.Rngs(0))
    save_adapter(adapted, folder / "adapter")
    shutil.copytree(TOKENIZER, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))


def read_model(folder: Path) -> Callable[[], object]:
    """Returns what reads a damaged model."""
    import jax.numpy as jnp

    from lorax.interop.load import load_model

    # What is compiled once for a sound model is no cost of a damaged one.
    load_model(folder.parent / "good" / "model", dtype=jnp.float32)
    return lambda: load_model(folder, dtype=jnp.float32)


def read_tokenizer(folder: Path) -> Callable[[], object]:
    """Returns what reads a damaged tokenizer."""
    from lorax.data.chat.tokenizer import load_tokenizer

    load_tokenizer(str(folder.parent / "good" / "tokenizer"))
    return lambda: load_tokenizer(str(folder))


def read_adapter(folder: Path) -> Callable[[], object]:
    """Returns what reads a damaged adapter."""
    import jax.numpy as jnp

    from lorax.interop.load import load_model
    from lorax.interop.peft import load_adapter

    good = folder.parent / "good"
    base = load_model(good / "model", dtype=jnp.float32)
    load_adapter(base, good / "adapter")
    return lambda: load_adapter(base, folder)


def read_rows(folder: Path, **settings: Any) -> Callable[[], object]:
    """Returns what reads a file of rows."""
    from lorax.config.data import DataConfig
    from lorax.data.chat.renderer import RENDERER, Part, Request
    from lorax.data.chat.tokenizer import load_tokenizer
    from lorax.data.encode import load_encoded_dataset

    path, template = folder / "rows.jsonl", folder / "chat.jinja"
    if not path.exists():
        path.write_text(GOOD)
    if template.exists():
        settings |= {"chat_template": str(template)}
    config = DataConfig.model_validate({"train": str(path), "max_seq_length": 64} | settings)
    tokenizer = load_tokenizer(str(TOKENIZER))
    # That the process which renders starts is no cost of a template.
    sound = Request([{"role": "user", "content": ""}], [Part(1)])
    list(RENDERER.render("", [sound], special_tokens={}))
    return lambda: load_encoded_dataset(config.train, config, tokenizer, vocab_size=512)


def listing(folder: Path) -> dict[str, str]:
    """Returns the digest of every file below a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def is_refused(
    folder: Path,
    pattern: str,
    reader: Callable[[Path], Callable[[], object]],
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Says whether what is in a folder is refused by name, within bounds, and left as it is."""
    import jax

    jax.devices()
    use, before = reader(folder), listing(folder)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    os.chdir(folder)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    resident, started = read_status("VmRSS"), clock()
    try:
        use()
    except ValueError as error:
        seconds, grown = clock() - started, read_status("VmHWM") - resident
        said = re.search(pattern, str(error)) is not None and len(str(error)) < 1500
        small = grown < 2 * size + 32 * MIB
        good = said and small and seconds < SECONDS and listing(folder) == before
        if not good:
            print(f"     {folder.name}: {seconds:.1f} s, {grown / MIB:.0f} MiB: {error}"[:400])
        return good
    print(f"     {folder.name}: accepted")
    return False


def try_apart(folder: Path, *how: Any) -> bool:
    """Says whether a folder is refused, in a process of its own; see `is_refused`."""
    return in_child(lambda: is_refused(folder, *how), silent=False)


def refuse_hostile_files(count: int, folder: Path) -> tuple[int, int]:
    """S1: hostile models, adapters, tokenizers, templates: refused by name, bounded, as before."""
    assert in_child(lambda: make_models(folder / "good") is None)
    cases = [(f"model, {k}", "model", read_model, *v) for k, v in MODELS.items()]
    cases += [(f"adapter, {k}", "adapter", read_adapter, *v) for k, v in ADAPTERS.items()]
    cases += [(f"tokenizer, {k}", "tokenizer", read_tokenizer, *v) for k, v in TOKENIZERS.items()]
    cases += [(f"template, {k}", None, read_rows, *v) for k, v in TEMPLATES.items()]
    chosen = cases[:: max(1, len(cases) // count)] if count < len(cases) else cases
    # The short form runs beside other tests, so there only its own time counts.
    clock = time.monotonic if chosen is cases else cpu_seconds
    passed = 0
    for name, origin, reader, damage, pattern in chosen:
        place = folder / name
        if origin is None:
            place.mkdir()
        else:
            shutil.copytree(folder / "good" / origin, place)
        damage(place)
        passed += try_apart(place, pattern, reader, clock)
        shutil.rmtree(place)
    return passed, len(chosen)


def refuse_broken_rows(count: int, folder: Path) -> tuple[int, int]:
    """D1: broken rows are refused by file and line."""
    chosen, passed = list(ROWS.items())[:count], 0
    for name, (damage, pattern, settings) in chosen:
        place = folder / name
        place.mkdir()
        damage(place)
        reader = lambda place, settings=settings: read_rows(place, **settings)
        passed += try_apart(place, pattern, reader)
    return passed, len(chosen)


DATA = "rows.jsonl", "rows.csv"
WORDS = "canaryofthequestion", "canaryoftheanswer"
SECRET = "hf_canaryOfTheEnvironment0123456789"
TALK = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": WORDS[1]}]
SAID = json.dumps({"messages": TALK}) + "\n"
LEAKS: dict[str, tuple[str, str, list[str], str]] = {
    "a run": (
        SAID * 4,
        "train",
        ["data.eval=rows.jsonl", "eval.exact_match=true"],
        "merged: run/merged",
    ),
    "a valid config": (SAID, "validate", [], "run.yaml: valid"),
    "a broken line": (SAID[:-4], "validate", [], "rows.jsonl:1: invalid JSON"),
    "a text where a list should be": (
        json.dumps({"messages": WORDS[0]}),
        "validate",
        [],
        "must be a list of objects",
    ),
    "a text where an object should be": (
        json.dumps({"messages": [WORDS[0]]}),
        "validate",
        [],
        "must be an object",
    ),
    "a text as role": (
        SAID.replace('"user"', f'"{WORDS[0]} {WORDS[1]}"'),
        "validate",
        [],
        "role must be one of",
    ),
    "a text among ids": (
        json.dumps({"input_ids": [1, WORDS[0]]}),
        "validate",
        [],
        "must be an integer",
    ),
    "no answer": (SAID.replace("assistant", "user"), "validate", [], "no assistant turn"),
    "half a surrogate": (
        SAID.replace(WORDS[1], WORDS[1] + "\\ud800"),
        "validate",
        [],
        "half a surrogate",
    ),
    "rows too long": (SAID, "validate", ["data.max_seq_length=4"], "rows.jsonl:1 has"),
    "markers not found": (
        SAID,
        "validate",
        ["data.instruction_part='[U]'", "data.response_part='[A]'"],
        "is not in the",
    ),
    "a turn without end": (
        SAID,
        "validate",
        ["data.chat_template=endless.jinja"],
        "never learn to stop",
    ),
    "a template that fails": (
        SAID,
        "validate",
        ["data.chat_template=failing.jinja"],
        "has no attribute",
    ),
    "a template that repeats": (
        SAID,
        "validate",
        ["data.chat_template=repeating.jinja"],
        "may repeat the messages",
    ),
    "a table without a header": (
        f"{WORDS[0]} is asked,and {WORDS[1]} said\n" * 2,
        "validate",
        ["data.train=rows.csv"],
        "fit no format",
    ),
    "a template that leaves out": (
        SAID,
        "validate",
        ["data.chat_template=last.jinja"],
        "leaves out the user's content of messages[0]",
    ),
    "a template that rewrites": (
        json.dumps({"messages": TALK * 2}) + "\n",
        "validate",
        ["data.chat_template=rewriting.jinja"],
        "rewrites earlier turns",
    ),
    "a run that diverges": (
        SAID * 4,
        "train",
        ["train.learning_rate=1e38", "train.max_steps=6"],
        "nonfinite-step-2.json",
    ),
    "a run that crashes": (SAID * 4, "train", ["CRASH"], "unforeseen"),
}
"""Rows, command, settings and what is said of what must not show a word of the rows."""


def run_and_record(folder: Path, command: str, settings: list[str]) -> None:
    """Runs a command, its output in a file; with the setting CRASH something unforeseen happens."""
    os.environ["HF_TOKEN"] = SECRET
    os.chdir(folder)
    config = {
        "model": {"name_or_path": str(TOKENIZER), "dtype": "float32"},
        "lora": {"r": 4, "target_modules": ["q_proj"]},
        "data": {"train": "rows.jsonl", "max_seq_length": 128},
        "train": {"max_steps": 2, "gradient_checkpointing": "none"},
        "save": {"output_dir": "run", "export": ["peft", "merged"]},
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    for name, text in (
        ("endless", "{% for m in messages %}{{ m.content }}{% endfor %}"),
        ("failing", "{{ messages[0].content.absent.absent }}"),
        ("repeating", "{{ raise_exception('cannot say ' ~ messages[0].content) }}"),
        ("last", "{% if messages | length > 1 %}{{ messages[-1].content }}{% endif %}<|im_end|>"),
        (
            "rewriting",
            "{% for m in messages %}{{ 'now ' if loop.last else 'then ' }}{{ m.content }}<|im_end|>"
            "{% endfor %}",
        ),
    ):
        (folder / f"{name}.jinja").write_text(text)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import lorax.training.trainer
    from lorax.cli.main import main

    crash = mock.patch.object(
        lorax.training.trainer.Trainer, "_settle", side_effect=RuntimeError("unforeseen")
    )
    with crash if settings == ["CRASH"] else contextlib.nullcontext():
        try:
            main([command, "run.yaml", *(s for s in settings if s != "CRASH")])
        except Exception:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()


def look_for_leaks(count: int, folder: Path) -> tuple[int, int]:
    """S3: no word of the rows and no token of the environment is in a log, file or traceback."""
    passed, chosen = 0, list(LEAKS.items())[:count]

    def work() -> bool:
        for name, (rows, command, settings, _) in chosen:
            place = folder / name
            place.mkdir()
            for data in DATA:
                (place / data).write_text(rows)
            run_and_record(place, command, settings)
        return True

    ended = in_child(work)
    for name, (*_, said) in chosen:
        place = folder / name
        files = (
            p for p in place.rglob("*") if p.is_file() and str(p.relative_to(place)) not in DATA
        )
        texts = {str(p): p.read_bytes() for p in files}
        canaries = [text.encode() for text in (*WORDS, SECRET)]
        leaks = [path for path, data in texts.items() if any(c in data for c in canaries)]
        for path in leaks:
            print(f"     {name}: {path}")
        reached = said.encode() in texts[str(place / "output.txt")]
        passed += ended and reached and not leaks
        if not reached:
            print(f"     {name}: did not say {said!r}")
    return passed, len(chosen)


CASES = {
    "D1": (refuse_broken_rows, len(ROWS), 4),
    "S1": (refuse_hostile_files, 1000, 6),
    "S2": (search_for_foreign_code, 1, 1),
    "S3": (look_for_leaks, 1000, 17),
}
"""By id: what to run, how often by hand, and how often in the tests."""
