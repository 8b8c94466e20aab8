"""`lorax generate`: what is asked of which model is checked before its weights are read."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from lorax.cli.common import DTYPES, base_format, note
from lorax.generation.generate import generate
from lorax.generation.sampling import option_problems
from lorax.interop.adapter_base import BaseModel, choose_base, recorded_base, resolve_recorded
from lorax.interop.adapter_tokenizer import find_tokenizer
from lorax.interop.folder import CONFIG_FILE, expand, resolve_checkpoint
from lorax.interop.load import find_stored_dtype, load_hf_config, load_model
from lorax.interop.new_tokens import NewTokens
from lorax.interop.peft import load_adapter
from lorax.interop.peft_config import CONFIG_FILE as ADAPTER_FILE
from lorax.interop.peft_config import read_adapter_config
from lorax.interop.stop_tokens import stop_token_ids
from lorax.models.architecture import DecoderConfig
from lorax.runs.folder import CONFIG_FILE as RUN_FILE
from lorax.runs.folder import EXPORT_FOLDERS, SavedRun, list_folder, read_run, run_of
from lorax.runs.prompts import choose_form, encode_as
from lorax.runs.setup import input_notes

NEW_TOKENS = 256
"""Default limit of an answer in tokens, where the context has room."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_SAMPLING = ("temperature", "top_k", "top_p", "seed")


@dataclasses.dataclass(frozen=True)
class _Source:
    """The model that answers: the base's folder, an adapter on it, and the run of both."""

    base: Path
    adapter: str | None
    run: SavedRun | None


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A prompt as it was given, and the name by which messages speak of it."""

    text: str
    name: str


def add_generate(add) -> None:
    """Adds the command, by a function that makes one of its name, action and description."""
    command = add("generate", _generate, "Let a model answer a prompt.")
    command.add_argument("model", help="a checkpoint folder, a hub id, or the folder of a run")
    command.add_argument(
        "--adapter", help="a PEFT adapter folder to put on the model (default: the run's)"
    )
    command.add_argument(
        "--prompt",
        action="append",
        help="a text to answer (default: standard input). The answer alone is written; of several "
        "prompts, which may be given by several --prompt, each one's number and text as a JSON "
        "string before its answer",
    )
    command.add_argument("--system", help="a system message before each prompt (default: none)")
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--raw",
        dest="form",
        action="store_const",
        const="text",
        help="continue the text, without a chat template (default: for a run on plain text)",
    )
    form.add_argument(
        "--chat",
        dest="form",
        action="store_const",
        const="chat",
        help="put the prompt into the chat template (default: but for a run on plain text)",
    )
    _add_sampling(command)
    command.add_argument("--revision", help="of a hub id (default: main, or the run's)")
    command.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: the run's, or the model's)"
    )


def _add_sampling(command) -> None:
    command.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"longest answer (default: {NEW_TOKENS}, or as many as the context has room for)",
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="above 0 an answer is sampled; 0 takes the likeliest token (default: %(default)s)",
    )
    command.add_argument(
        "--top-k", type=int, help="sample among so many likeliest tokens (default: all)"
    )
    command.add_argument(
        "--top-p",
        type=float,
        help="sample among the likeliest tokens of this probability together (default: all)",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of the sampling (default: %(default)s)"
    )


def _generate(parsed, _: Console) -> None:
    prompts = _check_options(parsed)
    source = _find_source(parsed)
    architecture = load_hf_config(source.base)
    tell = note("generate")
    for text in input_notes(architecture, source.adapter, trains=False):
        tell(text)
    run = source.run
    dtype = parsed.dtype or (run.config.model.dtype if run else find_stored_dtype(source.base))
    folder = run.folder if run else None
    tokenizer = find_tokenizer(source.base, source.adapter, run=folder, tell=tell).tokenizer
    if run is not None and run.chat_template is not None:
        tokenizer.chat_template = run.chat_template
    trained = (run.stop_ids if run else None) or ()
    stop_ids = stop_token_ids(source.base, tokenizer, trained)
    date = run.config.data.date if run else None
    system = parsed.system
    form = choose_form(run, tokenizer, asked=parsed.form, system=system, tell=tell)
    tokens = [encode_as(form, tokenizer, p.text, system=system, date=date) for p in prompts]
    new_tokens = NewTokens.read(source.adapter)
    longest = _check_tokens(parsed, prompts, tokens, new_tokens.grow(architecture))
    if source.adapter is not None:
        read_adapter_config(source.adapter)
    model = load_model(source.base, dtype=jnp.dtype(dtype), format=base_format(run))
    if source.adapter is not None:
        model = load_adapter(new_tokens.resize(model), source.adapter)
    model.eval()
    sampling = {name: getattr(parsed, name) for name in _SAMPLING}
    written = generate(model, tokens, max_new_tokens=longest, stop_ids=stop_ids, **sampling)
    for prompt, new in zip(prompts, written, strict=True):
        if not new:
            tell(f"the answer to {prompt.name} is empty: the model ended its answer at once")
    _write(prompts, [str(tokenizer.decode(new, skip_special_tokens=True)) for new in written])


def _check_options(parsed) -> list[_Prompt]:
    """Returns the prompts, after every check that needs the options alone.

    Raises:
        ValueError: Naming every option that cannot be used.
    """
    given = {name: getattr(parsed, name) for name in ("max_new_tokens", *_SAMPLING)}
    asked = {name: value for name, value in given.items() if value is not None}
    problems = [
        f"--{name.replace('_', '-')} {text}" for name, text in option_problems(**asked).items()
    ]
    if not parsed.model.strip():
        problems.append(
            "MODEL is empty: give the folder of a run or a model, or a hub id such as "
            "Qwen/Qwen3-0.6B"
        )
    texts = [("--system", parsed.system)] if parsed.system is not None else []
    if parsed.prompt:
        single = len(parsed.prompt) == 1
        names = ["--prompt" if single else f"--prompt {i + 1}" for i in range(len(parsed.prompt))]
        prompts = [_Prompt(text, name) for text, name in zip(parsed.prompt, names, strict=True)]
    else:
        prompts = [] if problems else [_Prompt(_read_stdin(), "standard input")]
    texts += [(prompt.name, prompt.text) for prompt in prompts]
    problems += [f"{p.name} is empty: give it some text" for p in prompts if not p.text]
    for name, text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # what Python makes of other bytes
            problems.append(_not_unicode(name, ord(text[error.start]) & 0xFF, error.start))
    if parsed.form == "text" and parsed.system is not None:
        problems.append("--system needs a chat template: leave it out, or leave out --raw")
    if problems:
        raise ValueError("; ".join(problems))
    return prompts


def _read_stdin() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            _not_unicode("standard input", error.object[error.start], error.start)
        ) from None


def _not_unicode(name: str, byte: int, place: int) -> str:
    return f"{name} must be UTF-8, got byte 0x{byte:02x} at {place}: convert it"


def _find_source(parsed) -> _Source:
    """Finds the base, the adapter and the run that a command line means.

    Raises:
        ValueError: If the name is none of a run, a model and a hub id; the hub is not asked then.
    """
    tell = note("generate")
    folder = expand(parsed.model)
    run = read_run(folder)
    adapter = parsed.adapter
    if run is None:
        _check_name(parsed.model, folder)
        chosen = BaseModel(parsed.model, parsed.revision)
        owner = run_of(folder)
    else:
        chosen = _base_of_run(run, parsed.revision, tell)
        owner = run
    if run is not None and run.config.train.method == "full":
        chosen = BaseModel(str(run.folder / EXPORT_FOLDERS["merged"]))
    elif adapter is None and run is not None:
        adapter = str(run.adapter)
    elif adapter is not None:
        recorded = recorded_base(adapter)
        where = Path(adapter) / ADAPTER_FILE
        chosen = choose_base(recorded, where, name=chosen.name, revision=chosen.revision, tell=tell)
        # Of a run that gives the base alone, prompts and stop tokens are another adapter's.
        owner = run_of(Path(adapter)) or (owner if run is None else None)
    if owner is not None and (missing := owner.missing_record()):
        tell(missing)
    if run is None or adapter is None:
        key = "MODEL" if run is None else str(run.folder / RUN_FILE)
        base = resolve_checkpoint(chosen.name, chosen.revision, key=key)
    else:
        remedy = f"pass its folder in the place of the run's, with --adapter {adapter}"
        base = resolve_recorded(chosen, run.folder / RUN_FILE, remedy)
    return _Source(base, adapter, owner)


def _base_of_run(run: SavedRun, revision: str | None, tell) -> BaseModel:
    model = run.config.model
    recorded = BaseModel(model.name_or_path, model.revision)
    return choose_base(recorded, run.folder / RUN_FILE, revision=revision, tell=tell)


def _check_name(name: str, folder: Path) -> None:
    """Refuses a name that is nothing here and could be nothing on the hub."""
    if not folder.exists():
        if not _HUB_ID.fullmatch(name):
            raise ValueError(
                f"{name}: no such folder of a run or a model, and no hub id, which would be like "
                "Qwen/Qwen3-0.6B; the hub was not asked"
            )
    elif folder.is_dir() and not any((folder / n).exists() for n in (CONFIG_FILE, ADAPTER_FILE)):
        raise ValueError(
            f"{name} holds {list_folder(folder)}: give a run's folder, which holds {RUN_FILE}, or "
            f"a model's, which holds {CONFIG_FILE}"
        )


def _check_tokens(
    parsed, prompts: list[_Prompt], tokens: list[list[int]], architecture: DecoderConfig
) -> int:
    """Returns how many tokens may be written, by the option or by what the context leaves.

    Raises:
        ValueError: If a prompt cannot be continued, or it and what the option asks for are more
            than the model was made for: memory would grow with the square of their length.
    """
    context = architecture.context
    vocabulary = architecture.vocab_size
    made = f"the model was made for {context:,}"
    problems = []
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            problems.append(f"{prompt.name} has no token: give it some text")
        elif max(ids) >= vocabulary:
            problems.append(
                f"{prompt.name} has the token {max(ids)}, outside the model's vocabulary of "
                f"{vocabulary:,}: the folder's tokenizer is another model's"
            )
        elif len(ids) >= context:
            problems.append(
                f"{prompt.name} has {len(ids):,} tokens and leaves no room for an answer, {made}: "
                "shorten it"
            )
    longest = max(map(len, tokens))
    room = context - longest
    asked = parsed.max_new_tokens
    if not problems and asked is not None and asked > room:
        problems.append(
            f"--max-new-tokens {asked} and a prompt of {longest:,} tokens are more than {made}: "
            f"ask for at most {room}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return min(NEW_TOKENS, room) if asked is None else asked


def _write(prompts: list[_Prompt], answers: list[str]) -> None:
    """Writes the answer, or several with their prompts; as they are, so past the console."""
    several = len(prompts) > 1
    parts = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        head = f"[{number}/{len(prompts)}] {json.dumps(prompt.text, ensure_ascii=False)}\n"
        end = "\n" if several and number < len(prompts) else ""
        parts.append(f"{head if several else ''}{answer}\n{end}")
    text = "".join(parts)
    encoding = sys.stdout.encoding or "utf-8"
    errors = sys.stdout.errors or "strict"
    try:
        text.encode(encoding, errors)
    except UnicodeEncodeError:
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        note("generate")(
            f"standard output is {encoding}, which lacks characters of the answer: they are "
            "written as escapes, such as \\xe9; PYTHONIOENCODING=utf-8 writes them as they are"
        )
    sys.stdout.write(text)
    sys.stdout.flush()
