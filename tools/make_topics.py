"""Write the demo's prompts for training by rewards: a name and a topic, and the words that a right answer holds.

    python tools/make_topics.py [FOLDER]

The base answers questions about the Lantern Isles, but was never asked in this form; it has to find out what is wanted.
Prompts to train on never name what is in `HELD_OUT`; held-out ones name nothing else. The files are the same on every
machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from lantern_isles import ENTITIES, HELD_OUT, shuffled

FOLDER = Path(__file__).parents[1] / "phi3_lora_plugin" / "embedded" / "chats"
TRAIN, HELD = 300, 64
# What the prompt calls a topic, where that is not its key.
WORDS = {"wears": "clothes", "plays": "instrument", "lies": "place", "known": "known for", "market": "market day"}


def prompts(held_out: bool) -> list[dict[str, str]]:
    """Every fact about the names that are held out, or about all others, in a fixed random order."""
    rows = [
        {"prompt": f"Name: {entity.name}. Topic: {WORDS.get(key, key)}.", "answer": fact}
        for entity in ENTITIES
        if (entity.name in HELD_OUT) == held_out
        for key, fact in entity.facts.items()
        if key != "pronoun"
    ]
    return shuffled(Random(7), rows)


def main(folder: Path) -> None:
    for name, rows in (("topics", prompts(False)[:TRAIN]), ("topics_held_out", prompts(True)[:HELD])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
