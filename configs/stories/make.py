"""Writes the records of `configs/stories.py` beside this file: openings, each with a happy and a sad next sentence.

    python configs/stories/make.py

pairs.jsonl (600) and heldout.jsonl (200) are {prompt, chosen, rejected}, the happy sentence chosen; sft.jsonl (600) is
{prompt, completion}, happy and sad in turn; prompts.jsonl (400) is {prompt}. The sets share no opening.
"""

import itertools
import json
import random
from pathlib import Path

PEOPLE = [
    ("Lily", "she", "her"),
    ("Tom", "he", "his"),
    ("Mia", "she", "her"),
    ("Ben", "he", "his"),
    ("Sue", "she", "her"),
]
PEOPLE += [
    ("Max", "he", "his"),
    ("Anna", "she", "her"),
    ("Sam", "he", "his"),
    ("Amy", "she", "her"),
    ("Tim", "he", "his"),
]
THINGS = [
    "ball",
    "dog",
    "cat",
    "car",
    "kite",
    "book",
    "cake",
    "bird",
    "box",
    "hat",
    "tree",
    "flower",
    "fish",
    "boat",
    "toy",
]
LOOKS = ["big", "little", "red", "blue", "shiny", "old"]
OPENINGS = [
    "Once upon a time, there was a kid named {name}. One day, {they} found a {look} {thing} in the park.",
    "{name} loved to play outside. Today {name} saw a {look} {thing} near the house.",
    "One day, {name} went for a walk with {their} mom. They saw a {look} {thing}.",
]
HAPPY = [
    "{Name} was very happy and smiled.",
    "{Name} laughed and played with the {thing} all day.",
    "It was so much fun, and {name} hugged {their} mom.",
    "{Name} said thank you and had a great day.",
]
SAD = [
    "{Name} was very sad and cried.",
    "The {thing} was gone, and {name} cried all day.",
    "It was so scary, and {name} ran away.",
    "{Name} was angry and did not want to play.",
]
COUNTS = {"pairs": 600, "heldout": 200, "sft": 600, "prompts": 400}


def main() -> None:
    rng = random.Random(0)
    stories = list(itertools.product(OPENINGS, PEOPLE, LOOKS, THINGS))
    rng.shuffle(stories)
    folder = Path(__file__).parent
    for name, count in COUNTS.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for number in range(count):
                opening, (person, they, their), look, thing = stories.pop()
                words = dict(name=person, Name=person, they=they, their=their, look=look, thing=thing)
                happy, sad = (" " + rng.choice(ends).format(**words) for ends in (HAPPY, SAD))
                record = {"id": f"{name}-{number}", "prompt": opening.format(**words)}
                if name in ("pairs", "heldout"):
                    record |= {"chosen": happy, "rejected": sad}
                elif name == "sft":
                    record["completion"] = happy if number % 2 else sad
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
