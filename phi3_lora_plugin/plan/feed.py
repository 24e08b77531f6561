"""What a run is fed: the largest micro-batch, how many there are, and how many tokens they have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_lora_plugin.plan.dry_run import Batch
    from phi3_lora_plugin.recipe import Recipe


@dataclass(frozen=True)
class Lengths:
    """Tokens of each encoded row, to train on and to evaluate on, and how many of the first are supervised."""

    train: tuple[int, ...]
    supervised: int
    eval: tuple[int, ...] = ()


def encoded_lengths(recipe: Recipe, adapters: Any, config: Any) -> Lengths:
    """Read and encode the data of a recipe as the run would; return how long the rows are. Raises as `load_data`."""
    from phi3_lora_plugin.chat.dataset import load_data
    from phi3_lora_plugin.chat.rows import lengths as row_lengths
    from phi3_lora_plugin.model.families import row_limit
    from phi3_lora_plugin.model.tokenizer import load_tokenizer

    longest = row_limit(recipe.data.max_length, config.to_dict())
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    data = load_data(recipe, tokenizer, adapters, max_length=longest, cache=True)
    if recipe.reward:  # each prompt is answered several times, each answer as long as it may be
        answer, many = recipe.grpo.max_completion_length, recipe.grpo.num_generations
        train = tuple(length + answer for length in row_lengths(data.train) for _ in range(many))
        held_out = () if data.eval is None else tuple(length + answer for length in row_lengths(data.eval))
        return Lengths(train, answer * len(train), held_out)
    return lengths_of(data.train, data.eval)


def lengths_of(train: Any, held_out: Any = None) -> Lengths:
    """Of data sets of encoded rows, to train on and to evaluate on."""
    from phi3_lora_plugin.chat.rows import lengths, trained_tokens

    return Lengths(tuple(lengths(train)), trained_tokens(train), () if held_out is None else tuple(lengths(held_out)))


@dataclass(frozen=True)
class Feed:
    """The largest micro-batch, how many there are in an epoch, and tokens (not padding) in one."""

    largest: Batch
    batches: int | None
    tokens_per_batch: int


def feed(lengths: Lengths | None, rows: int, longest: int, packing: bool) -> Feed:
    """What training is fed; without `lengths`, rows as long as they may be."""
    from phi3_lora_plugin.chat.pack import pack
    from phi3_lora_plugin.plan.dry_run import Batch

    if lengths is None:
        return Feed(Batch((longest,) * rows, 1.0, packing), None, rows * longest)
    train, total = lengths.train, sum(lengths.train)
    share = lengths.supervised / total
    if packing:
        packs = sorted(pack(train, longest), key=lambda members: -sum(train[row] for row in members))
        count = math.ceil(len(packs) / rows)
        largest = Batch(tuple(train[row] for members in packs[:rows] for row in members), share, True)
        return Feed(largest, count, total // count)
    rows = min(rows, len(train))
    count = math.ceil(len(train) / rows)
    return Feed(_heaviest(sorted(train, reverse=True), rows, share), count, total // count)


def _heaviest(order: Sequence[int], rows: int, share: float) -> Batch:
    """The batch that a few epochs may bring: as wide as the longest row, the others from the longer half."""
    from phi3_lora_plugin.plan.dry_run import Batch

    half = order[: max(rows, len(order) // 2)]
    return Batch(tuple(half[int(place * len(half) / rows)] for place in range(rows)), share)


def evaluation_batch(lengths: Lengths | None, rows: int, longest: int) -> Batch:
    """The largest batch of an evaluation."""
    from phi3_lora_plugin.plan.dry_run import Batch

    if lengths is None or not lengths.eval:
        return Batch((longest,) * rows)
    return Batch(tuple(sorted(lengths.eval, reverse=True)[:rows]), lengths.supervised / sum(lengths.train))
