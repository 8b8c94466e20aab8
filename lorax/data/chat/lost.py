"""Finds the parts of a row that a rendering leaves out: every text must be in it."""

import json
import re
from collections.abc import Iterable, Sequence

from lorax.data.chat.fields import NEEDED, Field
from lorax.data.reading.rows import RowError

_LONG = 16
"""Characters of a text that does not occur inside a word by chance."""

_GLUED = re.compile(r"\w\w", re.ASCII)


def lost_fields(fields: Sequence[Field], text: str) -> list[Field]:
    """Returns the fields that are not whole in `text`.

    Each text must be found, white space at its ends aside, as it is or as in JSON, in a place of
    its own: in order, or anywhere if the template orders them otherwise. In that case the longest
    are placed first, so that no text is found inside another; among equal ones those that every
    template writes, and among equal thoughts the last.
    """
    if end_of_fields(fields, text, 0) is not None:
        return []
    left = text
    lost = set[int]()
    order = {i: (f.rank, -i if f.is_thinking else i) for i, f in enumerate(fields)}
    wanted = [(i, words) for i, field in enumerate(fields) for words in field.texts]
    for i, words in sorted(wanted, key=lambda pair: (-len(pair[1]), order[pair[0]])):
        place = _find(words, left, 0)
        if place is None:
            lost.add(i)
        else:
            left = left[: place[0]] + "\0" * (place[1] - place[0]) + left[place[1] :]
    return list(dict.fromkeys(fields[i] for i in sorted(lost)))


def end_of_fields(fields: Sequence[Field], text: str, start: int) -> int | None:
    """Returns where the last of the fields ends after `start`, if they are there in order."""
    position = start
    for words in (words for field in fields for words in field.texts):
        place = _find(words, text, position)
        if place is None:
            return None
        position = place[1]
    return position


class LostError(RowError):
    """Texts that a rendering leaves out, and keys that the template does not read.

    Attributes:
        lost: The fields left out.
        unread: The keys, as `data.ignore` names them.
    """

    def __init__(self, lost: Iterable[Field], unread: Iterable[str]) -> None:
        self.lost = list(dict.fromkeys(lost))
        self.unread = list(dict.fromkeys(unread))
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
    """Returns a text as it is, and as in JSON where that differs."""
    forms = [words, *(json.dumps(words, ensure_ascii=flag)[1:-1] for flag in (False, True))]
    return list(dict.fromkeys(forms))


def _find(words: str, text: str, start: int) -> tuple[int, int] | None:
    """Returns the start and end of a text after `start`; a short one must be whole words."""
    for form in forms(words):
        place = text.find(form, start)
        while place >= 0 and len(form) < _LONG and _is_inside_a_word(form, text, place):
            place = text.find(form, place + 1)
        if place >= 0:
            return place, place + len(form)
    return None


def _is_inside_a_word(form: str, text: str, place: int) -> bool:
    before = text[place - 1 : place]
    behind = text[place + len(form) :][:1]
    return bool(_GLUED.fullmatch(before + form[0]) or _GLUED.fullmatch(form[-1] + behind))
