"""What a refusal must be: one clear sentence, and nothing written."""

import re
from collections.abc import Iterator

from tests.fuzz import kinds
from tests.fuzz.edits import WORDS
from tests.fuzz.kinds import Case
from tests.fuzz.pool import MIB, SECONDS, Outcome

REFUSED, ACCEPTED, FAULT = "refused", "accepted", "fault"

_LONGEST = 2000

_WORDS_OF_THE_INSIDE = re.compile(
    r"Traceback|\[Errno|embedded null|NoneType|has no attribute|not subscriptable|Event loop"
    r"|needs something else|<class |\bat 0x|Field \"|codec can't|unsupported operand|KeyError"
    r"|IndexError|TypeError|AttributeError|must be str|not iterable|unhashable|object is not"
    r"|Exception ignored|list index|dict object|argument must be|INTERNAL:|Fatal Python"
    r"|Segmentation"
)
"""Words that only who wrote the program understands."""

_ROW_WORDS = re.compile(r"zq\w+", re.IGNORECASE)
"""As every word of the rows begins: training text."""

_WRITES = {"export": ("out",), "train": ("run",)}
"""Where a command that succeeds may write."""


def judge(case: Case, outcome: Outcome) -> tuple[str, list[str]]:
    """Returns what became of a case, `REFUSED`, `ACCEPTED` or `FAULT`, and what is wrong."""
    wrong = list(_faults(case, outcome))
    if outcome.status == 0 and outcome.reason is None:
        wrong.append("nothing says why it is right that this was accepted")
    if wrong:
        return FAULT, wrong
    return (ACCEPTED if outcome.status == 0 else REFUSED), []


def _faults(case: Case, outcome: Outcome) -> Iterator[str]:
    if outcome.error:
        yield f"escaped: {outcome.error.strip().splitlines()[-1][:300]}"
        return
    if outcome.status not in (0, 1, 2):
        yield f"exit status {outcome.status}"
    if outcome.peak_mib > MIB:  # also where it was too short to be seen from outside
        yield f"took {outcome.peak_mib:,.0f} MiB"
    if outcome.cpu_seconds > SECONDS:
        yield f"took {outcome.cpu_seconds:.0f} s of the processor"
    # What Jinja says of a template is for who wrote the template.
    ours = re.sub(r"the chat template fails.*", "", outcome.err)
    if found := _WORDS_OF_THE_INSIDE.search(ours):
        yield f"says {found[0]!r}"
    yield from _leaks(case, outcome)
    yield from _written(case, outcome)
    if outcome.status != 0:
        yield from _unclear(case, outcome)


def _leaks(case: Case, outcome: Outcome) -> Iterator[str]:
    command = case.changed_words[0] if case.changed_words else ""
    if case.kind == "command line":
        return  # its words are no training text
    shown = outcome.err if command in ("generate", "inspect") else outcome.err + outcome.out
    if found := _ROW_WORDS.search(shown):
        yield f"shows text of the rows: {found[0]!r}"


def _written(case: Case, outcome: Outcome) -> Iterator[str]:
    """Says what was changed that must not have been."""
    for name in outcome.changed:
        parts = name.split("/")
        if outcome.status == 0 and not _is_input(case, parts):
            continue
        # A damaged checkpoint is put aside, and said.
        if parts[:2] == ["run", "checkpoints"] and "damaged" in outcome.out + outcome.err:
            continue
        yield f"changed {name}"


def _is_input(case: Case, parts: list[str]) -> bool:
    return parts[0] in (
        "model",
        "adapter",
        "rows.jsonl",
        "held.jsonl",
        "run.yaml",
        "chat.jinja",
    ) or (parts[0] == "run" and "train" not in case.changed_words)


def _unclear(case: Case, outcome: Outcome) -> Iterator[str]:
    """Says what is wrong with the message of a refusal."""
    said = re.sub(r"\Ausage: .*?(?=^lorax)", "", outcome.err, flags=re.DOTALL | re.MULTILINE)
    if said.count(": error: ") != 1 and "expected" not in said:
        yield f"{said.count(': error: ')} errors where one is needed: {said[:200]!r}"
    if not said.startswith("lorax"):
        yield f"says more than its error: {said[:200]!r}"
    if len(said) > _LONGEST:
        yield f"a message of {len(said):,} characters"
    message = said.partition(": error: ")[2]
    if not any(re.search(place, message) for place in _places(case)):
        yield f"names no place: {said[:200]!r}"


def _places(case: Case) -> Iterator[str]:
    """Yields patterns of what a message may name to tell where the fault is.

    That is a part of the case: a file, a row of it, a folder, a key or a tensor of what was
    changed, a word of the command line.
    """
    if case.kind == "command line" or any(edit.file == WORDS for edit in case.edits):
        parts = (part for word in case.changed_words[1:] for part in word.split("=", 1))
        yield from map(_pattern_of_word, parts)
        yield r"\b(argument|override|arguments|standard input|MODEL|is no command)\b"
    options = (word.partition("=")[0] for word in case.changed_words if word.startswith("--"))
    yield from (rf"{re.escape(option)}(?![\w-])" for option in options)
    for edit in case.edits:
        if edit.file == WORDS:
            continue
        folder, _, name = edit.file.rpartition("/")
        yield rf"(?<![\w.]){re.escape(name)}(?!\w)"
        if folder:
            first = re.escape(folder.split("/")[0])
            yield rf"(?<![\w.]){first}(?=/|: | (holds|has|lacks|does not fit) )"
        if name.endswith(".jinja") or "token" in name:
            yield "chat template|(rows|held)\\.jsonl"  # which are rendered with it
        if isinstance(edit.value, str) and len(edit.value) > 3:
            yield re.escape(edit.value[:60])  # such as a path that leads nowhere
        keys = (str(key) for key in edit.at if isinstance(key, str) and len(key) > 1)
        yield from (rf"(?<!\w){re.escape(key)}(?!\w)" for key in keys)


def _pattern_of_word(word: str) -> str:
    """Returns a pattern of what names a word; what is written at a path begins beside it."""
    if not word:
        return r"\bis empty\b|^\. "
    word = word.removeprefix("./") or "."
    shown = re.escape(word[:60])
    if len(word) < 3:  # it may stand in any sentence by chance
        return rf"(^|['\"\s]){shown}(['\":/]| exists| holds|$)" + r"|^\w+\.json\b" * (word == ".")
    folder, slash, name = word.rpartition("/")
    beside = rf"|{re.escape(f'{folder}/.{name}.')}" if slash else ""
    return rf"(?<!\w){shown}{beside}"


__all__ = ["ACCEPTED", "FAULT", "REFUSED", "judge", "kinds"]
