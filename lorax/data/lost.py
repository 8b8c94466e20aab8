"""Which parts of a row a rendering leaves out: every text must be found in it again."""

import json
from collections.abc import Iterable, Sequence

from lorax.data.fields import NEEDED, Field
from lorax.data.rows import RowError


def lost_fields(fields: Sequence[Field], text: str) -> list[Field]:
    """Returns the fields that are not whole in `text`.

    Each text must be found, white space at its ends aside, as it is or as in JSON: one after the
    other; or as often as all fields together hold it, where the template orders them otherwise.
    """
    position, doubtful = 0, list[str]()
    for field in fields:
        for words in field.texts:
            end = _end_of(words, text, position)
            if end is None:
                doubtful.append(words)
            else:
                position = end
    if not doubtful:
        return []
    # One that was found may have been found in another, which then is the doubtful one.
    everything = "\0".join(words for field in fields for words in field.texts)
    lost: list[Field] = []
    for words in dict.fromkeys(words for field in fields for words in field.texts):
        missing = everything.count(words) - sum(text.count(form) for form in forms(words))
        if missing > 0:
            # Which of several equal texts it is cannot be seen; users and assistants are always
            # written, so it is rather another's.
            holders = [field for field in fields if words in field.texts]
            holders.sort(key=lambda field: field.name.startswith(("user.", "assistant.content")))
            lost += holders[:missing]
    return list(dict.fromkeys(lost))


def end_of_fields(fields: Sequence[Field], text: str, start: int) -> int | None:
    """Returns where the last of the fields ends behind `start`, if they stand there in order."""
    position = start
    for words in (words for field in fields for words in field.texts):
        end = _end_of(words, text, position)
        if end is None:
            return None
        position = end
    return position


class LostError(RowError):
    """Texts that a rendering leaves out, and keys that the template does not read.

    Attributes:
        lost: What is left out.
        unread: The keys, as `data.ignore` names them.
    """

    def __init__(self, lost: Iterable[Field], unread: Iterable[str]) -> None:
        self.lost, self.unread = list(dict.fromkeys(lost)), list(dict.fromkeys(unread))
        places = list(dict.fromkeys(_what(field) for field in self.lost))
        keys = [name.removeprefix("message.") for name in self.unread]
        said = [f"leaves out the {_listed(places)}"] * bool(places)
        said += [f"does not read the key {_listed(keys)}"] * bool(keys)
        names = list(dict.fromkeys([*(field.name for field in self.lost), *self.unread]))
        allowed = [name for name in names if name not in NEEDED]
        ways = ["set data.chat_template to one that writes them", "remove them from the row"]
        if allowed == names:
            ways.append(f"allow it by name with data.ignore: [{', '.join(allowed)}]")
        super().__init__(
            f"the chat template {' and '.join(said)}: {', '.join(ways[:-1])}, or {ways[-1]}"
        )


def _what(field: Field) -> str:
    if field.name == field.owner:
        return field.name
    part, _, key = field.name.partition(".")
    named = key if part in ("message", "tools") else f"{part}'s {key.replace('_', ' ')}"
    return f"{named} of {field.owner}"


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def forms(words: str) -> list[str]:
    """Returns a text as it is, and as it stands in JSON where that differs."""
    forms = [words, *(json.dumps(words, ensure_ascii=flag)[1:-1] for flag in (False, True))]
    return list(dict.fromkeys(forms))


def _end_of(words: str, text: str, start: int) -> int | None:
    """Returns where a text ends that is found behind `start`."""
    found = text.find(words, start)
    if found >= 0:
        return found + len(words)
    for form in forms(words)[1:]:
        if (found := text.find(form, start)) >= 0:
            return found + len(form)
    return None
