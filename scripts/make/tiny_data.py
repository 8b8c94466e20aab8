"""Writes the demo's conversations: what the tiny base model knows, and what LoRA teaches it.

    python -m scripts.make.tiny_data examples/tiny/data

The user writes a note about an article of a shop. The base model is pre-trained on
`pretrain.jsonl`, where the assistant answers with a short label, or gives one or two properties
as JSON when it is asked for them. Some notes are about deliveries, with counts, prices and dates,
so that the base can copy any number. The adapter learns from `train.jsonl` to answer every note
with a whole JSON record, which the base never does. `heldout.jsonl` holds notes about articles
that are not in `train.jsonl`.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

ARTICLES = """
anvil apron armchair atlas axe backpack balloon banjo barrel basket bathtub bell belt bench
bicycle binder blanket blender boat bookcase boots bottle bowl box bracelet brick broom brush
bucket bulb button cabinet cage camera candle canoe cap carpet cart cello chain chair chess chisel
clarinet clock cloth coat coin comb compass cooker couch cradle crate crown cup curtain cushion
desk dice doll door drawer dress drill drum easel fan feather fence file flag flask flute folder
fork fountain frame funnel gate glass globe gloves glue goblet gong grill guitar hairpin hammer
hammock handle harp hat helmet hinge hook horn hose inkpot jacket jar jigsaw jug kayak kettle key
kite knife ladder ladle lamp lantern lens lever lock locket magnet mallet map marble mask mat
mattress medal mirror mug nail necklace needle net notebook oar oboe oven paddle pan parasol peg
pen pencil piano pillow pin pipe plate plough pot puzzle quilt racket radio rake ribbon ring robe
rope rug ruler saddle sail sandals saw scale scarf scissors screw shawl shelf shirt shoes shovel
sieve skates sled slippers spade spoon spring stamp stool stove suitcase sword table tape tent
thimble thread tiara tile tongs torch towel toy tray tripod trumpet tub typewriter umbrella vase
violin wagon wallet watch wheel whisk whistle
""".split()
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "grey", "pink", "purple"]
MATERIALS = [
    "wood",
    "steel",
    "brass",
    "glass",
    "paper",
    "wool",
    "leather",
    "plastic",
    "stone",
    "silk",
]
AISLES = range(1, 10)
MONTHS = """
January February March April May June July August September October November December
""".split()
PRETRAIN_ROWS = 6000
DELIVERY_ROWS = 2500
TRAIN_ROWS = 480
HELD_OUT_ROWS = 100
HELD_OUT_SHARE = 0.25
SEED = 3407

NOTES = [
    "The {item} is {colour}, made of {material}, in aisle {aisle}.",
    "In aisle {aisle}: a {colour} {item} made of {material}.",
    "We keep a {material} {item} in aisle {aisle}; it is {colour}.",
]
LABEL = "{colour} {material} {item}, aisle {aisle}"
DELIVERIES = [
    "Delivered on {date}: {count} pieces of the {item}, {price} each.",
    "Order {order}: the {item}, {count} times, at {price}, due on {date}.",
    "{count} of the {item} for {price} came on {date} with order {order}.",
]
DELIVERY_LABEL = "{count} {item}, {price}, {date}"
AS_JSON = " Give me the {} as JSON."


def draw_article(draw: random.Random, items: Sequence[str]) -> dict[str, str | int]:
    """Returns an article with random properties."""
    return {
        "item": draw.choice(items),
        "colour": draw.choice(COLOURS),
        "material": draw.choice(MATERIALS),
        "aisle": draw.choice(AISLES),
    }


def conversation(note: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """Returns one row in the `messages` format."""
    return {
        "messages": [
            {"role": "user", "content": note},
            {"role": "assistant", "content": answer},
        ]
    }


def pretrain_row(draw: random.Random) -> dict:
    """Returns a note about an article, with its label or with the JSON that it asks for."""
    article = draw_article(draw, ARTICLES)
    return label_or_json(draw, article, draw.choice(NOTES), LABEL)


def draw_date(draw: random.Random) -> str:
    """Returns a date in one of three ways of writing it."""
    year = draw.randint(1950, 2049)
    month = draw.randint(1, 12)
    day = draw.randint(1, 28)
    ways = [
        f"{year}-{month:02}-{day:02}",
        f"{day} {MONTHS[month - 1]} {year}",
        f"{day:02}.{month:02}.{year}",
    ]
    return draw.choice(ways)


def delivery_row(draw: random.Random) -> dict:
    """Returns a note about a delivery, with a label or with the JSON that it asks for."""
    note = draw.choice(DELIVERIES)
    delivery = {
        "item": draw.choice(ARTICLES),
        "count": draw.randint(1, 10 ** draw.randint(1, 3)),
        "price": f"{draw.randint(1, 10 ** draw.randint(1, 3))}.{draw.randint(0, 99):02}",
        "date": draw_date(draw),
    }
    if "{order}" in note:
        delivery["order"] = draw.randint(1000, 99999)
    return label_or_json(draw, delivery, note, DELIVERY_LABEL)


def label_or_json(
    draw: random.Random, values: dict[str, str | int], note: str, label: str
) -> dict[str, list[dict[str, str]]]:
    """Returns the note with its label, or with a question for one or two values and their JSON."""
    text = note.format(**values)
    if draw.random() < 0.5:
        return conversation(text, label.format(**values))
    keys = draw.sample(list(values), draw.choice([1, 2]))
    answer = {key: values[key] for key in keys}
    return conversation(text + AS_JSON.format(" and ".join(keys)), json.dumps(answer))


def record_row(draw: random.Random, items: Sequence[str]) -> dict:
    """Returns a note with a JSON record."""
    article = draw_article(draw, items)
    return conversation(draw.choice(NOTES).format(**article), json.dumps(article))


def main() -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(SEED)
    items = draw.sample(ARTICLES, len(ARTICLES))
    held_out = items[: int(HELD_OUT_SHARE * len(items))]
    learned = items[len(held_out) :]
    files = {
        "pretrain.jsonl": [pretrain_row(draw) for _ in range(PRETRAIN_ROWS)],
        "train.jsonl": [record_row(draw, learned) for _ in range(TRAIN_ROWS)],
        "heldout.jsonl": [record_row(draw, held_out) for _ in range(HELD_OUT_ROWS)],
    }
    numbers = random.Random(SEED + 1)
    files["pretrain.jsonl"] += [delivery_row(numbers) for _ in range(DELIVERY_ROWS)]
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / name).write_text(text, encoding="utf-8")
        print(f"{directory / name}: {len(rows)} conversations")


if __name__ == "__main__":
    main()
