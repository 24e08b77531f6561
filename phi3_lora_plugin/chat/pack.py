"""Best-fit packing: put encoded rows together so that little of `max_length` is left empty."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Indices of the rows of each pack, by best-fit decreasing; cost grows as rows x log(max_length).

    Longest rows first, each into the pack where it leaves the least room (Johnson 1973; Ding et al. 2024,
    arXiv 2404.10830, for language models). Ties keep the order of the rows, so packs depend on the lengths alone.

    Raises:
        ValueError: a row is longer than `max_length`, or empty; says which.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= max_length:
            raise Phi3LoraError(f"row {index} has {length} tokens; a pack holds 1 to {max_length}")
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = defaultdict(list)  # by room left
    rooms: list[int] = []  # of the open packs, each once, the smallest first
    for index in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        smallest = bisect_left(rooms, lengths[index])
        if smallest == len(rooms):
            room, place = max_length, len(packs)
            packs.append([index])
        else:
            room = rooms[smallest]
            place = open_packs[room].pop(0)
            packs[place].append(index)
            if not open_packs[room]:
                del rooms[smallest]
        if left := room - lengths[index]:
            if not open_packs[left]:
                insort(rooms, left)
            open_packs[left].append(place)
    return [sorted(members) for members in packs]


@dataclass(frozen=True)
class PackedCollator:
    """Flatten the rows of packs into one row of tokens: documents are separated by positions and by their bounds.

    Each example is a pack, {"rows": [{"input_ids": [...], "labels": [...]}, ...]}, or a plain row: a pack of one.
    There is no attention mask on purpose: with packed positions, a mask of ones lets documents see each other.
    """

    def __call__(self, examples: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """One batch: input_ids, labels, position_ids [1, tokens]; cu_seq_lens_q/k [documents + 1]; max_length_q/k.

        Where rows have `weights`, also loss_weights [1, tokens].
        """
        import torch

        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        weights: list[float] = []
        weighted = False
        bounds = [0]
        for example in examples:
            for row in example.get("rows", [example]):
                ids += row["input_ids"]
                # The first token of a document would be predicted from the last one of the document before.
                labels += [-100, *row["labels"][1:]]
                weighted = weighted or "weights" in row
                weights += row.get("weights", [1.0] * len(row["input_ids"]))
                positions += range(len(row["input_ids"]))
                bounds.append(len(ids))
        limits = torch.tensor(bounds, dtype=torch.int32)
        longest = max(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
            "cu_seq_lens_q": limits,
            "cu_seq_lens_k": limits,
            "max_length_q": longest,
            "max_length_k": longest,
        } | ({"loss_weights": torch.tensor([weights], dtype=torch.float32)} if weighted else {})
