"""Explains why a model cannot be fetched from the Hugging Face hub."""

import http
import os
from collections.abc import Iterator

from huggingface_hub import constants, errors

from lorax.system.wording import describe, show

_LOG_IN = "log in with `hf auth login`"


def explain_hub(error: BaseException, revision: str | None = None) -> str | None:
    """Returns why the hub does not give a model and the remedy, or None if it is not the cause.

    The error of a library is often a guess, and its cause the reason: the whole chain is checked.

    Args:
        error: Raised by huggingface_hub, or by a library that calls it.
        revision: The requested branch, tag or commit.
    """
    chain = list(_chain(error))

    def has(kind):
        return any(isinstance(e, kind) for e in chain)

    if has(errors.HFValidationError):  # it was not even asked
        return "no model can have this name there, which would be like Qwen/Qwen3-0.6B"
    answers = [e.response for e in chain if isinstance(e, errors.HfHubHTTPError)]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    system = next((e for e in chain if isinstance(e, OSError) and e.strerror), None)
    if has(errors.GatedRepoError):
        return f"its owner must agree: ask for access on its page, then {_LOG_IN}"
    if has(errors.RevisionNotFoundError):
        return f"it has no revision {show(revision)} of it: give one that its page lists"
    if has(errors.RepositoryNotFoundError) or status in (401, 404):
        return f"it shows you none of this name: correct the name, or {_LOG_IN} if it is private"
    if status is not None:
        return f"it answers {_phrase(status)}: try again later"
    if has(errors.LocalEntryNotFoundError):
        remedy = "and no copy was fetched before"
        if has(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
            switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
            switch = next((name for name in switches if os.environ.get(name)), switches[0])
            return f"{switch} is set, {remedy}: unset it, or name a folder"
        reason = f" ({describe(system)})" if system else ""
        return f"it cannot be reached{reason}, {remedy}: check the connection, or name a folder"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _phrase(status: int) -> str:
    known = status in {known.value for known in http.HTTPStatus}
    return f"{status} ({http.HTTPStatus(status).phrase})" if known else str(status)
