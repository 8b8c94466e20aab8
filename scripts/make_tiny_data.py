"""Writes the demo's conversations: what the tiny base model knows, and what LoRA teaches it.

    python scripts/make_tiny_data.py examples/tiny/data

A shop sells articles, each with a colour, a material and an aisle. The base model is pre-trained on
`pretrain.jsonl`, where an assistant answers questions about all of them in plain sentences, and
gives one property as JSON when it is asked for that. The adapter learns from `train.jsonl` to
answer every general question with a whole JSON record, which the base never does. `heldout.jsonl`
asks for records of articles that are not in `train.jsonl`: to get them right, the
adapted model has to put what the base knows into the form that the adapter taught.
"""

import argparse
import json
import random
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
HELD_OUT_SHARE = 0.25
SEED = 3407

ABOUT = ["Tell me about the {}.", "What do we know about the {}?", "Describe the {}, please."]
SINGLE = {
    "colour": (
        ["What colour is the {}?", "Which colour does the {} have?"],
        "The {item} is {colour}.",
    ),
    "material": (
        ["What is the {} made of?", "Which material is the {}?"],
        "The {item} is made of {material}.",
    ),
    "aisle": (
        ["Where do I find the {}?", "Which aisle has the {}?"],
        "The {item} is in aisle {aisle}.",
    ),
}
AS_JSON = "Give me the {} of the {} as JSON."
SENTENCE = "The {item} is {colour}, made of {material}, and you find it in aisle {aisle}."


def make_stock() -> list[dict[str, str | int]]:
    """Returns every article with its properties."""
    draw = random.Random(SEED)
    return [
        {
            "item": item,
            "colour": draw.choice(COLOURS),
            "material": draw.choice(MATERIALS),
            "aisle": draw.choice(AISLES),
        }
        for item in ARTICLES
    ]


def conversation(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    """Returns one row in the `messages` format."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def plain_rows(article: dict[str, str | int]) -> list[dict]:
    """Returns all that the base model learns about an article."""
    item = article["item"]
    rows = [conversation(q.format(item), SENTENCE.format(**article)) for q in ABOUT]
    for questions, answer in SINGLE.values():
        rows += [conversation(q.format(item), answer.format(**article)) for q in questions]
    for key, value in article.items():
        what = "name" if key == "item" else key
        rows.append(conversation(AS_JSON.format(what, item), json.dumps({key: value})))
    return rows


def record_rows(article: dict[str, str | int]) -> list[dict]:
    """Returns the general questions about an article, answered with a record."""
    return [conversation(q.format(article["item"]), json.dumps(article)) for q in ABOUT[:2]]


def main() -> None:
    """Writes the three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    stock = make_stock()
    order = random.Random(SEED + 1).sample(stock, len(stock))
    held_out = order[: int(HELD_OUT_SHARE * len(order))]
    learned = order[len(held_out) :]
    files = {
        "pretrain.jsonl": [row for article in stock for row in plain_rows(article)],
        "train.jsonl": [row for article in learned for row in record_rows(article)],
        "heldout.jsonl": [row for article in held_out for row in record_rows(article)],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / name).write_text(text, encoding="utf-8")
        print(f"{directory / name}: {len(rows)} conversations")


if __name__ == "__main__":
    main()
