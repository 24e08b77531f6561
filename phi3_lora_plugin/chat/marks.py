"""How much of a row is to be learned: the marks that data sets use, and the keys that must not be silently ignored.

Read are OpenAI's and Mistral's `weight`, ms-swift's `loss` and `loss_scale`, LLaMA-Factory's `loss_weight`, axolotl's
`train` and `train_detail`, and KTO's `label`. Any other key whose name has to do with training is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from phi3_lora_plugin.chat.row_error import RowError, shown

Span = tuple[int, int, float]  # first character, the one after the last, and how much that text is to be learned

#: Keys of a row, a message or a part of one that say whether it is to be learned.
MARKS = ("train", "trainable", "training", "loss", "loss_mask", "weight", "loss_weight", "loss_scale")
#: Everything that is read of a message for this.
MESSAGE_MARKS = (*MARKS, "train_detail")
#: Whether a row's answer is good, by TRL's and by LLaMA-Factory's name; the rest is what a row may have for this.
LABELS = ("label", "kto_tag")
ROW_MARKS = (*MARKS, *LABELS)

#: No weight may be larger; one of a thousand is a mistake.
HEAVIEST = 1000
_NUMBERS = ("weight", "loss_weight", "loss_scale")
_WORDS = frozenset(
    "weight weights loss losses train trained trainable training untrained mask masks masked label labels learn "
    "learned supervise supervised ignore ignored segments".split()
)
_INVERSE = frozenset("mask masks masked ignore ignored untrained".split())
#: Names of columns that hold something else than text.
MEDIA = frozenset("image images video videos audio audios image_url image_urls image_path pixel_values".split())
_PAIRS = frozenset("chosen rejected rejected_response chosen_messages rejected_messages preferred_output "
                   "non_preferred_output".split())  # fmt: skip
_DEEPEST = 8  # levels of unread values that are looked through


def weight_of(item: Mapping[str, Any], what: str) -> float | None:
    """How much `item` is to be learned by its own marks, from 0 on; None where it has none.

    Raises:
        RowError: a value that says neither yes nor no nor how much, or two marks that contradict each other.
    """
    found: dict[str, float] = {}
    for name in MARKS:
        if (value := item.get(name)) is not None:
            found[name] = _number(name, value, what)
    if len(set(found.values())) > 1:
        both = " and ".join(f"{name}: {_written(item[name])}" for name in found)
        raise RowError(f"{what} has {both}, which contradict each other; leave one out")
    return next(iter(found.values()), None)


def spans_of(item: Mapping[str, Any], text: str, what: str) -> list[Span] | None:
    """axolotl's `train_detail` as spans over the whole of `text`; None where there is none.

    Both offsets are part of the span, counted from 0; text that no entry covers is not trained.
    """
    details = item.get("train_detail")
    if details is None or details == []:
        return None
    if not isinstance(details, list):
        raise RowError(f"train_detail of {what} is not a list")
    weights = [0.0] * len(text)
    for number, one in enumerate(details, 1):
        given = one if isinstance(one, Mapping) else {}
        begin, end, train = (given.get(key) for key in ("begin_offset", "end_offset", "train"))
        if not isinstance(begin, int) or not isinstance(end, int) or not isinstance(train, bool):
            raise RowError(f"train_detail {number} of {what} needs begin_offset, end_offset and train (true or false)")
        if not 0 <= begin <= end or end >= len(text):
            raise RowError(
                f"train_detail {number} of {what} covers characters {begin} to {end}; its text has {len(text)}, "
                f"counted from 0"
            )
        weights[begin : end + 1] = [float(train)] * (end + 1 - begin)
    return joined(weights)


def joined(weights: list[float]) -> list[Span]:
    """Spans of equal weight over characters that each have one."""
    spans: list[Span] = []
    for place, weight in enumerate(weights):
        if spans and spans[-1][2] == weight:
            spans[-1] = (spans[-1][0], place + 1, weight)
        else:
            spans.append((place, place + 1, weight))
    return spans


def label_of(row: Mapping[str, Any]) -> bool | None:
    """KTO's `label` of a row, also as 0 or 1 or as the text of a CSV file; None for anything else."""
    value = next((row[name] for name in LABELS if row.get(name) is not None), None)
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool) or value in (0, 1) else None


def decisive(name: str, value: Any) -> str | None:
    """Say why a column or key that nothing reads would change what is trained; None if it cannot matter.

    Names decide, and a value that means "as usual" (null, nothing, `loss: true`) changes nothing.
    """
    for path, inner in _inside(name, value, 0):
        kind = _kind(path.rsplit(".", 1)[-1])
        if kind is None or inner is None or inner == [] or inner == "":
            continue
        if kind == "learn" and _usual(path.rsplit(".", 1)[-1], inner):
            continue
        return f"{path!r} {_REASONS[kind]}"
    return None


_REASONS = {
    "learn": "looks like a mark of what to train, but is not one that is read here",
    "media": "holds pictures or sound, and text alone would be trained",
    "pairs": "is one side of a preference; set preference.loss to train on pairs",
    "refusal": "holds the assistant's text instead of its content",
}


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    yield name, value
    if depth == _DEEPEST:
        return
    for one in value[:100] if isinstance(value, list) else [value]:
        if isinstance(one, Mapping):
            for key, inner in one.items():
                yield from _inside(f"{name}.{key}", inner, depth + 1)


@lru_cache(maxsize=4096)
def _kind(name: str) -> str | None:
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()))
    if name.lower() in MEDIA:
        return "media"
    if name.lower() in _PAIRS:
        return "pairs"
    if name == "refusal":
        return "refusal"
    return "learn" if words & _WORDS else None


def _usual(name: str, value: Any) -> bool:
    words = set(re.findall(r"[a-z]+", name.lower()))
    text = value.strip().lower() if isinstance(value, str) else value
    if words & _INVERSE and "loss" not in words:
        return text in (False, 0, "false", "0")
    return text in (True, 1, "true", "1", "1.0")


def _number(name: str, value: Any, what: str) -> float:
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "0", "1", "0.0", "1.0"):
        value = value.strip().lower() in ("true", "1", "1.0")  # a column of a CSV file
    if isinstance(value, str) and name in _NUMBERS and re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*", value):
        value = float(value)
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return float(value)
    if name in _NUMBERS and isinstance(value, int | float) and 0 < value < HEAVIEST:
        return float(value)
    expected = f"a number from 0 to {HEAVIEST}" if name in _NUMBERS else "true or false"
    raise RowError(f"{name} of {what} is {shown(value)}; expected {expected}")


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def token_weights(spans: list[Span], text: str, offsets: list[tuple[int, int]], start: int, end: int) -> list[float]:
    """How much each token of a text is to be learned.

    A token is learned as little as the least learned of its letters: none of it may be in a span that is not to be
    learned. White space at its edge does not count, as most tokens begin with the blank before their word.

    Args:
        spans: over `text`.
        text: a stretch of what was tokenised, beginning at its character `start` and ending before `end`.
        offsets: first character of each token, and the one after its last, in what was tokenised.
    """
    of_character = [weight for first, stop, weight in spans for _ in range(first, stop)]
    found = []
    for first, stop in offsets:
        if first >= end:
            found.append(1.0)  # a token after the text
            continue
        places = range(max(first, start) - start, max(min(stop, end), first + 1, start + 1) - start)
        letters = [place for place in places if not text[place].isspace()]
        found.append(min((of_character[place] for place in letters or places[:1]), default=1.0))
    return found
