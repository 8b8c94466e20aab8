"""The form of a prompt: that of the rows that its run was trained on."""

from collections.abc import Callable
from typing import Any

from lorax.data.chat.masks import encode_text
from lorax.data.chat.template import encode_prompt
from lorax.data.reading.formats import ROW_KINDS, RowKind, alpaca_prompt
from lorax.runs.folder import SavedRun

_NAMES: dict[RowKind, str] = {
    "chat": "chats",
    "alpaca": "Alpaca rows without a chat template",
    "text": "plain text",
    "tokens": "token ids",
}


def choose_form(
    run: SavedRun | None,
    tokenizer: Any,
    *,
    asked: RowKind | None,
    system: str | None,
    tell: Callable[[str], object],
) -> RowKind:
    """Returns the form of prompts: the requested one, else that of the run's rows.

    Of several kinds of rows it is the first of `ROW_KINDS`. Token ids do not show how they were
    made, so they count as chats.

    Args:
        run: The run, if the prompt is for one.
        tokenizer: The tokenizer, with the run's chat template.
        asked: The user's option, if any.
        system: The system message, if there is one.
        tell: Called with a line about the choice, unless it was requested or all rows were chats.

    Raises:
        ValueError: If there is no chat template and one is needed.
    """
    kinds = run.row_kinds if run is not None else None
    trained = kinds[0] if kinds else "chat"
    form = asked or ("chat" if trained == "tokens" else trained)
    whose = "" if run is None else f" and {run.folder} was trained on {_list(kinds)}" * bool(kinds)
    has_template = tokenizer.chat_template is not None
    if form == "chat" and not has_template:
        raise ValueError(
            f"the tokenizer has no chat template{whose}; pass --raw to continue plain text"
        )
    if form == "text" and system is not None:
        raise ValueError(
            f"--system needs a chat template{whose}: leave it out"
            + (", or pass --chat" if has_template else "")
        )
    if run is None or asked is not None:
        return form
    if missing := run.missing_kinds():
        tell(missing)
    elif kinds != ("chat",):
        other = "; --chat puts it into the chat template" * has_template
        becomes = {
            "chat": "put into the chat template; --raw continues it as plain text",
            "alpaca": "put into lorax's Alpaca prompt, as they were; --raw continues it as it is",
            "text": f"continued as it is, as with --raw{other}",
        }[form]
        tell(f"{run.folder} was trained on {_list(kinds)}, so the prompt is {becomes}")
    return form


def encode_as(
    form: RowKind, tokenizer: Any, text: str, *, system: str | None, date: str | None
) -> list[int]:
    """Returns the token ids of a prompt up to where the answer begins.

    Args:
        form: From `choose_form`.
        tokenizer: The tokenizer, with the run's chat template.
        text: The prompt.
        system: The system message, if there is one.
        date: The day for a chat template that asks for it; None is today.

    Raises:
        ValueError: If the chat template or the tokenizer fails.
    """
    match form:
        case "text":
            return encode_text(tokenizer, text)
        case "alpaca":
            return encode_text(tokenizer, alpaca_prompt(text, system=system or ""))
    messages = [{"role": "system", "content": system}] if system else []
    return encode_prompt(tokenizer, [*messages, {"role": "user", "content": text}], date)


def _list(kinds: tuple[RowKind, ...] | None) -> str:
    return " and ".join(_NAMES[kind] for kind in ROW_KINDS if kind in (kinds or ()))
