"""Rows of one answer and a `label`, whether it is good (KTO) -> chats of which the last turn is judged; their encoding.

Read are chats of every format with TRL's `label` or LLaMA-Factory's `kto_tag`, and pairs, each as a good and a bad one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phi3_lora_plugin.chat.adapt import Reading, conversations
from phi3_lora_plugin.chat.encode import EncodeError, Policy, encode_batch
from phi3_lora_plugin.chat.formats import Adapter
from phi3_lora_plugin.chat.marks import LABELS, label_of
from phi3_lora_plugin.chat.pairs import read_pairs
from phi3_lora_plugin.chat.preferences import is_pair
from phi3_lora_plugin.chat.readers import Place, Problem, Row, Rows
from phi3_lora_plugin.chat.row_error import RowError, named, shown
from phi3_lora_plugin.chat.sources import Source
from phi3_lora_plugin.chat.turns import Message, context
from phi3_lora_plugin.recipe.sections import ChatSection


@dataclass(frozen=True)
class Judged:
    """A chat whose last turn, the assistant's, is good or not; every turn before it is `train: False`."""

    chat: list[Message]
    good: bool


def read_judged(
    source: Source, reading: Reading, data: ChatSection, adapters: Mapping[str, Adapter]
) -> Iterator[tuple[Place, Judged] | Problem]:
    """Yield what is judged of each row (of a pair, two), or what is wrong with it; arguments as of `conversations`.

    Raises `SourceError` where the source as a whole cannot be read that way.
    """
    first = next((item for item in source.rows() if isinstance(item, Row)), None)
    if first is not None and _unlabelled_pair(first.values, data.columns):
        for read in read_pairs(source, reading, data):
            if isinstance(read, Problem):
                yield read
                continue
            place, pair = read
            yield place, Judged(pair.chosen, True)
            yield place, Judged(pair.rejected, False)
        reading.because = "as preference.loss says; each pair is a good and a bad answer"
        return
    labels: dict[Place, bool | RowError] = {}
    outer = {name: foreign for name, foreign in data.columns.items() if name not in LABELS}
    foreign = data.columns.get("label", "label")

    def rows() -> Rows:
        for item in source.rows():
            if isinstance(item, Row):
                values = dict(item.values)
                if foreign != "label" and foreign in values:
                    values["label"] = values.pop(foreign)
                labels[item.place] = _label(values)
                item = Row({name: value for name, value in values.items() if name not in LABELS}, item.place)
            yield item

    unlabelled = data.model_copy(update={"columns": outer})
    for item in conversations(replace(source, rows=rows), reading, unlabelled, adapters):
        label = labels.pop(item[0], False)
        if isinstance(item, Problem):
            yield Problem(item.place, str(label)) if isinstance(label, RowError) else item
            continue
        place, chat = item
        if isinstance(label, RowError):
            yield Problem(place, str(label))
        elif chat[-1]["role"] != "assistant":
            yield Problem(place, f"ends with a turn of role {chat[-1]['role']}; the label is about an answer")
        else:
            *before, last = chat
            answer = {key: value for key, value in last.items() if key != "train"}
            yield place, Judged([*context(before), answer], label)


def _unlabelled_pair(row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    labelled = "label" in columns or any(row.get(name) is not None for name in LABELS)
    return not labelled and ("rejected" in columns or is_pair(row))


def _label(row: Mapping[str, Any]) -> bool | RowError:
    given = [name for name in LABELS if row.get(name) is not None]
    if not given:
        if is_pair(row):
            return RowError("is a pair, but the first row of its source has a label; keep them in sources of their own")
        return RowError(
            f"has no label (true or false), only {named(row)}; preference.loss: kto learns from good and bad answers"
        )
    if len(given) > 1:
        return RowError(f"has its label twice, as {' and '.join(given)}; keep one")
    label = label_of(row)
    return RowError(f"{given[0]} is {shown(row[given[0]])}; expected true or false") if label is None else label


def encode_judged(
    rows: Sequence[Judged], tokenizer: Any, max_length: int | None, policy: Policy, template: str | None
) -> list[dict[str, Any] | EncodeError]:
    """As `encode_batch` for judged chats, with `label` in each row."""
    encoded = encode_batch([row.chat for row in rows], tokenizer, max_length, policy, template)
    return [_judged(row, one.good) for row, one in zip(encoded, rows, strict=True)]


def _judged(row: dict[str, Any] | EncodeError, good: bool) -> dict[str, Any] | EncodeError:
    if isinstance(row, EncodeError):
        return row
    if "weights" in row:
        return EncodeError("messages", "has a weight between 0 and 1, which preference losses cannot use")
    return row | {"label": good}
