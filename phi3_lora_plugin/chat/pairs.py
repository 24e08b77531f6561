"""The rows of one source -> pairs of chats -> one row each: the chosen chat, the rejected one after it, the cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi3_lora_plugin.chat.adapt import Reading, each
from phi3_lora_plugin.chat.columns import refuse_decisive, rename, unread_values
from phi3_lora_plugin.chat.encode import EncodeError, Policy, encode_batch
from phi3_lora_plugin.chat.preferences import COLUMNS, Pair, preference
from phi3_lora_plugin.chat.propose import propose
from phi3_lora_plugin.chat.readers import Place, Problem
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.chat.sources import Source
from phi3_lora_plugin.recipe.sections import ChatSection


def read_pairs(source: Source, reading: Reading, data: ChatSection) -> Iterator[tuple[Place, Pair] | Problem]:
    """The pair of each row, or what is wrong with it, in order; `reading` is filled on the way.

    Raises `SourceError` for a source without rows.
    """
    reading.format, reading.because = "preference", "as the recipe's preference.loss says"
    good = False

    def read(values: Mapping[str, Any]) -> Pair:
        nonlocal good
        try:
            row = rename(values, data.columns, data.ignore)
            pair = preference(row)
            reading.unread.update(refuse_decisive(unread_values(row, COLUMNS)))
        except RowError as error:
            foreign = not good and not data.columns and "has no column" in str(error)
            if foreign and (given := propose([values], pairs=True)):
                raise RowError(f"{error}; if that is what they mean, write {given}") from None
            raise
        good = True
        return pair

    return each(source, reading, read)


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: Any, max_length: int | None, policy: Policy, template: str | None
) -> list[dict[str, Any] | EncodeError]:
    """As `encode_batch` for pairs: `input_ids` and `labels` of both chats end to end, `cut` where the second begins.

    `max_length` is for each chat; a pair of which one cannot be encoded is that one's `EncodeError`.
    """
    chats = [chat for pair in pairs for chat in (pair.chosen, pair.rejected)]
    encoded = encode_batch(chats, tokenizer, max_length, policy, template)
    return [_joined(*both) for both in zip(encoded[::2], encoded[1::2], strict=True)]


def _joined(chosen: dict[str, Any] | EncodeError, rejected: dict[str, Any] | EncodeError) -> Any:
    for name, one in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(one, EncodeError):
            return EncodeError(one.reason, f"{name}: {one}")
        if "weights" in one:
            return EncodeError("messages", f"{name} has a weight between 0 and 1, which preference losses cannot use")
    assert isinstance(chosen, dict) and isinstance(rejected, dict)
    return {
        "input_ids": chosen["input_ids"] + rejected["input_ids"],
        "labels": chosen["labels"] + rejected["labels"],
        "truncated": chosen["truncated"] or rejected["truncated"],
        "cut": len(chosen["input_ids"]),
    }
