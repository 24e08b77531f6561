"""Rows of a `datasets` object -> encoded rows, batch by batch: for scripts, and for what is too large to load."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.adapt import adapted
from phi3_lora_plugin.chat.columns import rename
from phi3_lora_plugin.chat.dataset import DataError
from phi3_lora_plugin.chat.encode import EncodeError, Policy, encode_batch
from phi3_lora_plugin.chat.formats import ADAPTERS, Adapter
from phi3_lora_plugin.chat.row_error import RowError, shown
from phi3_lora_plugin.chat.templates import template_for
from phi3_lora_plugin.chat.turns import Message
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

_NAMED = 8  # rows that a line of the log names


def encode_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: Any,
    format: str | Adapter = "messages",
    *,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    policy: Policy | None = None,
    template: str | None = None,
    on_error: str = "stop",
    batch_size: int = 1000,
) -> Dataset | IterableDataset:
    """Return the same kind of data set with the columns `input_ids` and `labels`, as `load_data` would make them.

    A streaming one stays one: nothing is read before it is asked for, and shards, shuffling and resuming are kept. Rows
    without a trained token are left out and named in the log, as are malformed ones with `on_error="skip"`.

    Args:
        dataset: of the datasets library, streaming or not; no dictionary of splits.
        format: name of a format, or an adapter such as `load_plugins().pick("dataset_adapters", name)`.
        columns: canonical name to foreign name, as `data.columns` in a recipe.
        max_length: ids beyond it are cut on the right.
        policy: what to train on, and what to do with what the template has no place for; see `Policy`.
        template: name of a template instead of the tokenizer's own.
        on_error: "stop" or "skip".
        batch_size: rows that are read, rendered and tokenised in one go.

    Raises:
        DataError: while reading, with each malformed row of a batch by its number (from 1, as they come).
        ValueError: an unknown format, or another `on_error`.
    """
    import datasets

    if isinstance(format, str) and format not in ADAPTERS:
        raise Phi3LoraError(
            f"format={format!r} is not one of {', '.join(ADAPTERS)}; pass a plugin's data format as a function"
        )
    if on_error not in ("stop", "skip"):
        raise Phi3LoraError(f"on_error={on_error!r} is neither stop nor skip")
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise Phi3LoraError(f"dataset is {shown(dataset)}; expected one split of a data set, as dataset['train']")
    template_for(tokenizer, template)  # raises now and not at the first row
    adapt = ADAPTERS[format] if isinstance(format, str) else format
    name = format if isinstance(format, str) else getattr(format, "__name__", type(format).__name__)
    policy = policy or Policy()

    def encoded(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[list[int]]]:
        conversations: list[list[Message]] = []
        numbers: list[int] = []
        wrong: list[str] = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            row = dict(zip(batch, values, strict=True))
            try:
                conversations.append(adapted(adapt, rename(row, columns or {}), name))
                numbers.append(index + 1)
            except RowError as error:
                wrong.append(f"row {index + 1}: {error}")
        rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        untrained: list[int] = []
        cut: list[int] = []
        made = encode_batch(conversations, tokenizer, max_length, policy, template) if conversations else []
        for number, one in zip(numbers, made, strict=True):
            if not isinstance(one, EncodeError) and "weights" in one:
                wrong.append(f"row {number}: has a weight between 0 and 1, which only `phi3-lora train` supports")
            elif not isinstance(one, EncodeError):
                rows["input_ids"].append(one["input_ids"])
                rows["labels"].append(one["labels"])
                if one["truncated"]:
                    cut.append(number)
            elif one.reason in ("untrained", "truncated"):
                untrained.append(number)
            else:
                wrong.append(f"row {number}: {one}")
        if wrong and on_error == "stop":
            raise DataError(sorted(wrong, key=lambda text: int(text[4 : text.index(":")])))
        for text in wrong:
            log.warning("left out: %s", text)
        if untrained:
            log.warning("left out, without a trained token%s: %s", _within(max_length), _listed(untrained))
        if cut:
            log.info("cut%s: %s", _within(max_length), _listed(cut))
        return rows

    ids = datasets.Sequence(datasets.Value("int32"))
    return dataset.map(
        encoded,
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names or list(next(iter(dataset), {})),
        features=datasets.Features({"input_ids": ids, "labels": ids}),
    )


def _within(limit: int | None) -> str:
    return "" if limit is None else f" within {limit:,} tokens"


def _listed(numbers: Sequence[int]) -> str:
    return f"row{'s' * (len(numbers) > 1)} {listed(numbers, _NAMED)}"
