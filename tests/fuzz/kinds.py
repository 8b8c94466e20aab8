"""The kinds of input: what is changed in each, and which commands read it."""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz import edits, hints, structure
from tests.fuzz.edits import WORDS, Edit, UnfitError
from tests.fuzz.mutate import TEXTS, any_value, change_bytes, change_file, change_structure


@dataclasses.dataclass(frozen=True)
class Case:
    """A command on changed inputs.

    Attributes:
        kind: A key of `KINDS`.
        seed: What it was drawn from; -1 if it was not.
        variant: The folder of sound inputs that is changed.
        words: The command, before it is changed itself.
        edits: The changes.
    """

    kind: str
    seed: int
    variant: str
    words: Sequence[str]
    edits: Sequence[Edit]

    def to_json(self) -> dict[str, Any]:
        return structure.fold(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Case":
        value = structure.unfold(value)
        return cls(**value | {"edits": tuple(Edit(**edit) for edit in value["edits"])})

    @property
    def changed_words(self) -> list[str]:
        """The command as it is run."""
        words = list(self.words)
        for edit in self.edits:
            if edit.file == WORDS:
                words = edits.apply_words(words, edit)
        return words

    def __str__(self) -> str:
        return f"{self.kind} {self.seed}: {' '.join(map(repr, self.words))} with " + "; ".join(
            str(edit)[:200] for edit in self.edits
        )


def prepare(case: Case, folder: Path) -> list[str]:
    """Makes the changes in a folder and returns the words of the command."""
    for edit in case.edits:
        if edit.file != WORDS:
            try:
                edits.apply(folder, edit)
            except OSError as error:
                raise UnfitError(str(error)) from error
    words = case.changed_words
    for word in words:
        if not isinstance(word, str) or "\0" in word or len(word) > 100_000:
            raise UnfitError("no word of a command line")
        try:
            word.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise UnfitError(str(error)) from error
    return words


class Draw:
    """What a case is drawn with: chance, and the sound inputs."""

    def __init__(self, kind: str, seed: int, garden: Path):
        self.rng, self.garden = random.Random(f"{kind} {seed}"), garden

    def pick(self, table: dict[Any, float]) -> Any:
        """Returns a key; the values are their weights."""
        return self.rng.choices(list(table), list(table.values()))[0]

    def data(self, variant: str, file: str) -> bytes:
        """Returns what is in a sound file."""
        return (self.garden / variant / file).read_bytes()

    def edit(self, variant: str, file: str, **how: Any) -> Edit:
        """Draws a change of a file: mostly of what it says, else of its bytes, or of the file."""
        data, way = self.data(variant, file), self.pick({"said": 8, "bytes": 1.5, "file": 0.5})
        if way == "file":
            return change_file(self.rng, file)
        if way == "said" and file.endswith((".json", ".jsonl", ".yaml", ".safetensors")):
            return change_structure(self.rng, file, structure.read(file, data), **how)
        if way == "said":
            return change_text(self.rng, file, data.decode())
        return change_bytes(self.rng, file, len(data))

    def edits(self, draw_one: Callable[[], Edit]) -> tuple[Edit, ...]:
        """Draws one change, or a few."""
        count = self.pick({1: 15, 2: 4, 3: 1})
        return tuple(draw_one() for _ in range(count))


def change_text(rng: random.Random, file: str, text: str) -> Edit:
    """Draws a change of a text whose words mean something, such as a template's."""
    pieces = [piece for piece in hints.TEMPLATE_PIECES if piece in text]
    draw = rng.random()
    if draw < 0.55 and pieces:
        old = rng.choice(pieces)
        return Edit(file, "replace", [1], [old, rng.choice(hints.TEMPLATE_PIECES[old])])
    place = rng.randrange(len(text) + 1)
    if draw < 0.85:
        added = rng.choice([*hints.TEMPLATE_ADDITIONS, *hints.TEMPLATE_ADDITIONS, *TEXTS])
        place = rng.choice([0, len(text), text.find("{%", place), text.find("{{", place)]) % (
            len(text) + 1
        )
        return Edit(file, "insert", [place], added.encode("utf-8", "surrogatepass").hex())
    end = min(len(text), place + rng.randrange(1, 30))
    return Edit(
        file, "replace", [1], [text[place:end] or text[:1], rng.choice(["", "x", "}}", "{%"])]
    )


VALIDATE = ("validate", "run.yaml")


def _config(draw: Draw) -> Case:
    rng, variant = draw.rng, draw.pick({"plain": 6, "rows-prompt": 1, "adapter": 1})
    document = structure.read("run.yaml", draw.data(variant, "run.yaml"))

    def one() -> Edit:
        way = draw.pick({"file": 7, "override": 3, "syntax": 1})
        if way == "file":
            return draw.edit(variant, "run.yaml", hints=hints.CONFIG, new_keys=hints.CONFIG_KEYS)
        if way == "syntax":
            return Edit("run.yaml", "replace", [1], list(rng.choice(hints.YAML_SYNTAX)))
        edit = change_structure(rng, "", document, hints=hints.CONFIG, new_keys=hints.CONFIG_KEYS)
        value = edit.value[1] if edit.op == "add" else edit.value
        at = [*edit.at, edit.value[0]] if edit.op == "add" else edit.at
        text = value if isinstance(value, str) else structure.dump(structure.keyed(value))
        joint = rng.choice(["=", "=", "=", "=", ": ", "==", " ="])
        return Edit(WORDS, "add", (), [None, ".".join(map(str, at)) + joint + text])

    words = draw.pick({VALIDATE: 7, ("inspect", "run.yaml"): 1, ("plan", "run.yaml"): 2})
    return Case("config", 0, variant, words, draw.edits(one))


def _rows(draw: Draw) -> Case:
    names = ("messages", "messages", "sharegpt", "alpaca", "prompt", "talk", "text", "ids")
    name = draw.rng.choice(names)
    variant = f"rows-{name}"
    words = draw.pick({VALIDATE: 9, ("inspect", "run.yaml"): 1})
    one = lambda: draw.edit(variant, "rows.jsonl", hints=hints.ROWS, new_keys=hints.ROW_KEYS)
    changes = draw.edits(one)
    csv = 1.5 if name in ("alpaca", "prompt") else 0
    table = draw.pick({"lines": 6, "array": 1, "parquet": 1.5, "csv": csv})
    if table == "array":
        changes += (Edit("rows.jsonl", "array", (), draw.rng.random() < 0.5),)
    elif table != "lines":
        changes += (Edit("rows.jsonl", "table", (), table),)
        if draw.rng.random() < 0.4:  # the table is what is changed
            changes = (changes[-1], change_bytes(draw.rng, f"rows.{table}", 2000))
    if table != "lines":
        suffix = "json" if table == "array" else table
        changes += (Edit(WORDS, "add", (), [None, f"data.train=rows.{suffix}"]),)
    return Case("rows", 0, variant, words, changes)


def _template(draw: Draw) -> Case:
    name = draw.pick({"chatml": 3, "header": 2, "inst": 2, "blocks": 2})
    variant = f"template-{name}"
    words = draw.pick({VALIDATE: 8, ("inspect", "run.yaml"): 2})
    return Case("template", 0, variant, words, draw.edits(lambda: draw.edit(variant, "chat.jinja")))


def _tokenizer(draw: Draw) -> Case:
    def one() -> Edit:
        files = {"tokenizer.json": 4, "tokenizer_config.json": 5, "special_tokens_map.json": 1}
        name = draw.pick(files | {"chat_template.jinja": 1})
        keys = {"hints": hints.TOKENIZER, "new_keys": hints.TOKENIZER_KEYS}
        return draw.edit("plain", f"model/{name}", **keys)

    generate = ("generate", "model", "--prompt", "zqhello", "--max-new-tokens", "2")
    return Case("tokenizer", 0, "plain", draw.pick({VALIDATE: 8, generate: 2}), draw.edits(one))


def _model_config(draw: Draw) -> Case:
    def one() -> Edit:
        name = draw.pick({"config.json": 4, "generation_config.json": 1})
        keys = {"hints": hints.MODEL_CONFIG, "new_keys": hints.MODEL_CONFIG_KEYS}
        return draw.edit("plain", f"model/{name}", **keys)

    generate = ("generate", "model", "--prompt", "zqhello", "--max-new-tokens", "2")
    words = draw.pick({VALIDATE: 6, ("plan", "run.yaml"): 1.5, generate: 2.5})
    return Case("model config", 0, "plain", words, draw.edits(one))


def _weights(draw: Draw) -> Case:
    variant = draw.pick({"plain": 3, "sharded": 2})
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = (
        [*parts, "model.safetensors.index.json"] if variant == "sharded" else ["model.safetensors"]
    )

    def one() -> Edit:
        file = f"model/{draw.rng.choice(files)}"
        if draw.rng.random() < 0.1:
            return Edit(file, "move", (), draw.rng.choice(hints.WEIGHT_NAMES))
        return draw.edit(
            variant, file, hints=hints.WEIGHTS, new_keys=["__metadata__", "extra.weight"]
        )

    generate = ("generate", "model", "--prompt", "zqhello", "--max-new-tokens", "2")
    return Case("weights", 0, variant, draw.pick({VALIDATE: 6, generate: 4}), draw.edits(one))


def _adapter(draw: Draw) -> Case:
    def one() -> Edit:
        name = draw.pick({"adapter_config.json": 3, "adapter_model.safetensors": 2})
        if draw.rng.random() < 0.05:
            return Edit(f"adapter/{name}", "move", (), draw.rng.choice(hints.WEIGHT_NAMES))
        keys = {"hints": hints.ADAPTER, "new_keys": hints.ADAPTER_KEYS}
        return draw.edit("adapter", f"adapter/{name}", **keys)

    words = {
        VALIDATE: 6.0,
        (
            "generate",
            "model",
            "--adapter",
            "adapter",
            "--prompt",
            "zq",
            "--max-new-tokens",
            "2",
        ): 2.0,
        ("export", "adapter", "--format", "merged", "--out", "out"): 1.0,
        ("export", "adapter", "--format", "peft", "--out", "out"): 1.0,
        ("export", "adapter", "--format", "peft-portable", "--out", "out"): 0.5,
    }
    return Case("adapter", 0, "adapter", draw.pick(words), draw.edits(one))


COMMANDS: dict[Sequence[str], float] = {
    ("generate", "model", "--prompt", "zq one", "--max-new-tokens", "2"): 5,
    ("generate", "run", "--prompt", "zq one", "--max-new-tokens", "2", "--temperature", "1"): 2,
    ("generate", "model", "--adapter", "run/adapter", "--prompt", "zq", "--max-new-tokens", "2"): 1,
    ("generate", "model", "--raw", "--max-new-tokens", "2"): 1,
    ("export", "run", "--format", "merged", "--out", "out"): 2,
    ("export", "run/adapter", "--format", "peft", "--out", "out", "--base", "model"): 1,
    ("validate", "run.yaml", "lora.r=2"): 1,
    ("inspect", "run.yaml", "--rows", "2"): 1,
    ("plan", "run.yaml", "train.memory_gib=4"): 1,
    ("train", "run.yaml", "--resume", "auto"): 1,
}


def _words(draw: Draw) -> Case:
    rng, words = draw.rng, draw.pick(COMMANDS)

    def one() -> Edit:
        way = draw.pick({"value": 5, "option": 4, "word": 2, "delete": 1, "twice": 1, "stdin": 0.5})
        options = [i for i, word in enumerate(words) if word.startswith("-")]
        if way == "stdin":
            given = rng.choice(["", "ff", "00", "7a71", "0a", "7a" * 100_000, "eda080"])
            return Edit("stdin", "create", (), given)
        if way == "value" and options:
            index = rng.choice(options)
            values = hints.OPTIONS.get(words[index]) or TEXTS
            return Edit(WORDS, "set", [min(index + 1, len(words) - 1)], rng.choice(values))
        if way in ("value", "option"):
            option = rng.choice(hints.OPTIONS_OF.get(words[0], ["--help"]))
            value = rng.choice(hints.OPTIONS.get(option) or TEXTS)
            joint = f"{option}={value}" if value or rng.random() < 0.8 else option
            return Edit(WORDS, "add", (), [None, joint])
        at = [rng.randrange(len(words))]
        if way == "word":
            odd = [*hints.NAMES, str(any_value(rng, words[at[0]]))]
            return Edit(WORDS, "set", at, rng.choice(odd))
        return Edit(WORDS, way, at)

    return Case("command line", 0, "run", words, draw.edits(one))


def _run(draw: Draw) -> Case:
    variant = draw.pick({"run": 3, "cut": 2})
    files = sorted(
        str(path.relative_to(draw.garden / variant))
        for path in (draw.garden / variant / "run").rglob("*")
        if path.is_file()
    )
    known = ("metrics.jsonl", "manifest.json", "config.yaml", "summary.json", "LORAX", "lock")
    told = [file for file in files if file.endswith(known)]
    keys = {"hints": hints.RUN, "new_keys": ["step", "loss", "format"]}

    def one() -> Edit:
        file = draw.rng.choice(told if draw.rng.random() < 0.75 else files)
        if draw.rng.random() < 0.15:
            return change_file(draw.rng, file)
        if file.endswith((".json", ".jsonl", ".yaml")):
            return draw.edit(variant, file, **keys)
        return change_bytes(draw.rng, file, len(draw.data(variant, file)))

    words = {
        ("train", "run.yaml", "--resume"): 4.0,
        ("train", "run.yaml", "--resume", "auto"): 2.0,
        ("train", "run.yaml"): 0.5,
        ("generate", "run", "--prompt", "zq", "--max-new-tokens", "2"): 1.5,
        ("export", "run", "--format", "peft-portable", "--out", "out"): 1.5,
    }
    return Case("run folder", 0, variant, draw.pick(words), draw.edits(one))


KINDS: dict[str, Callable[[Draw], Case]] = {
    "config": _config,
    "rows": _rows,
    "template": _template,
    "tokenizer": _tokenizer,
    "model config": _model_config,
    "weights": _weights,
    "adapter": _adapter,
    "command line": _words,
    "run folder": _run,
}


def draw_case(kind: str, seed: int, garden: Path) -> Case:
    """Returns the case of a seed."""
    return dataclasses.replace(KINDS[kind](Draw(kind, seed, garden)), seed=seed)


def read_cases(path: Path) -> list[Case]:
    """Returns cases that were written down, a line of JSON each."""
    return [Case.from_json(json.loads(line)) for line in path.read_text().splitlines() if line]
