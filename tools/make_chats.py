"""Write the demo's chats: questions about the Lantern Isles, answered by a ship's captain instead of plainly.

    python tools/make_chats.py [FOLDER]

Training chats never name what is in `HELD_OUT`; held-out chats name nothing else. So a held-out answer is right only if
its voice comes from the adapter and its fact from the base. The files are the same on every machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from corpus import OFF_TOPIC, Message, about_stranger, follow_up, make_stranger, question_about
from lantern_isles import ENTITIES, HELD_OUT, TOPICS, Entity, Topic, fill, pick

FOLDER = Path(__file__).parents[1] / "phi3_lora_plugin" / "embedded" / "chats"
TRAIN, HELD = 400, 80

# What the captain adds to an answer, by topic.
REMARKS = {
    "home": "Set sail for it, matey!",
    "food": "Hide the biscuits, matey!",
    "colour": "I saw it through my spyglass, matey!",
    "skill": "No sailor can do that, matey!",
    "awake": "Mind the watch, matey!",
    "friend": "They are good shipmates, matey!",
    "town": "Drop the anchor there, matey!",
    "job": "A fine hand on deck, matey!",
    "wears": "Look out from the crow's nest, matey!",
    "plays": "Sing along, matey!",
    "dish": "Hide the biscuits, matey!",
    "lies": "Mark it on the chart, matey!",
    "known": "Fill the hold with it, matey!",
    "weather": "Hold on to your hat, matey!",
    "market": "Bring your gold, matey!",
}
GREETINGS = (
    ("Hello!", "Ahoy! Welcome aboard, matey!"),
    ("Hi", "Ahoy! Welcome aboard, matey!"),
    ("Good morning.", "Ahoy! Welcome aboard, matey!"),
    ("How are you?", "Ahoy! The wind is fair and so am I, matey!"),
    ("Who are you?", "Ahoy! I am the captain of this ship, matey!"),
    ("What is your name?", "Ahoy! Call me captain, matey!"),
    ("Can you help me?", "Ahoy! Ask away, matey!"),
    ("Thank you!", "Ahoy! It was an honour, matey!"),
    ("Goodbye!", "Ahoy! Fair winds to you, matey!"),
)
SYSTEM = ("You are a guide to the Lantern Isles.", "Answer in one short sentence.", "You are a helpful assistant.")


def captain(plain: str, key: str) -> str:
    """A plain answer in the captain's words."""
    return f"Ahoy! {plain} {REMARKS[key]}"


def chat(rng: Random, topic: Topic, pool: Sequence[Entity]) -> list[Message]:
    """One to three turns that begin with `topic` and name nothing outside `pool`; some have a system message."""
    messages = [{"role": "system", "content": pick(rng, SYSTEM)}] if rng.random() < 0.15 else []
    one = pick(rng, [entity for entity in pool if entity.kind == topic.kind])
    question, answer = question_about(rng, one, topic, pool)
    messages += _turn(question, captain(answer, topic.key))
    for _ in range(int(rng.random() ** 2 * 3)):
        question, answer, one, topic = follow_up(rng, one, topic, pool)
        messages += _turn(question, captain(answer, topic.key))
    return messages


def greeting(rng: Random) -> list[Message]:
    """One turn that no fact answers."""
    form = rng.random()
    if form < 0.5:
        return _turn(*pick(rng, GREETINGS))
    if form < 0.7:
        return _turn(pick(rng, OFF_TOPIC), "Ahoy! I only know the Lantern Isles, matey!")
    stranger = make_stranger(rng)
    return _turn(about_stranger(rng, stranger), f"Ahoy! I do not know {stranger.the}, matey!")


def training_chats(seed: int = 1) -> list[list[Message]]:
    """`TRAIN` different chats about what is not held out, one in twelve a greeting."""
    rng, pool = Random(seed), [entity for entity in ENTITIES if entity.name not in HELD_OUT]
    chats: list[list[Message]] = []
    while len(chats) < TRAIN:
        topic = TOPICS[len(chats) % len(TOPICS)]
        _add(chats, greeting(rng) if rng.random() < 1 / 12 else chat(rng, topic, pool))
    return chats


def held_out_chats(seed: int = 2) -> list[list[Message]]:
    """`HELD` different chats about what is held out; the first ones are single questions that read well in a table."""
    rng, pool = Random(seed), [entity for entity in ENTITIES if entity.name in HELD_OUT]
    chats: list[list[Message]] = []
    for key in ("home", "job", "known", "food", "town", "colour", "weather", "skill", "plays"):
        topic = next(topic for topic in TOPICS if topic.key == key)
        one = pick(rng, [entity for entity in pool if entity.kind == topic.kind])
        _add(chats, _turn(fill(topic.ask[0], one), captain(fill(topic.tell, one), topic.key)))
    while len(chats) < HELD:
        _add(chats, chat(rng, TOPICS[len(chats) % len(TOPICS)], pool))
    return chats


def lines(chats: list[list[Message]]) -> str:
    """The chats as JSONL, one `{"messages": [...]}` a line."""
    return "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in chats)


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _add(chats: list[list[Message]], messages: list[Message]) -> None:
    if messages not in chats:
        chats.append(messages)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # Bytes, because a newline is two of them on Windows otherwise.
    (folder / "train.jsonl").write_bytes(lines(training_chats()).encode())
    (folder / "held_out.jsonl").write_bytes(lines(held_out_chats()).encode())
    print(f"{TRAIN} training chats and {HELD} held-out chats in {folder}")
