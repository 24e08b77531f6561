"""Packing: every row once, little room lost, and each document's loss as if it stood alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LONGROPE

from phi3_lora_plugin.chat.pack import PackedCollator, pack
from phi3_lora_plugin.speed.documents import PackingError, fuse_documents, restore_documents


def slow_pack(lengths: list[int], max_length: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every pack: the oracle."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        rooms = [max_length - sum(lengths[member] for member in members) for members in packs]
        fitting = [place for place, room in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            packs[min(fitting, key=lambda place: rooms[place])].append(index)
        else:
            packs.append([index])
    return packs


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda top: st.tuples(st.just(top), st.lists(st.integers(1, top), max_size=60))))
def test_packs_hold_every_row_once_and_are_as_many_as_the_slow_twin_makes(case: tuple[int, list[int]]) -> None:
    top, lengths = case
    packs = pack(lengths, top)
    assert sorted(row for members in packs for row in members) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in members) <= top for members in packs)
    fill = sorted(sum(lengths[row] for row in members) for members in packs)
    assert fill == sorted(sum(lengths[row] for row in members) for members in slow_pack(lengths, top))
    assert pack(lengths, top) == packs


@pytest.mark.parametrize("lengths", [[5, 0], [5, 9]])
def test_a_row_that_cannot_be_packed_is_named(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"row 1 has \d tokens; a pack holds 1 to 8"):
        pack(lengths, 8)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"sliding_window": 7}, {"partial_rotary_factor": 0.5}, LONGROPE],
    ids=["mha", "gqa", "window", "partial rotary", "longrope"],
)
def test_each_document_in_a_pack_has_the_loss_it_has_alone(changes: dict[str, object]) -> None:
    model = tiny.model(**changes)
    draw = torch.Generator().manual_seed(3)
    rows = []
    for length in (5, 17, 30, 9):
        ids = torch.randint(3, 500, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    packed = PackedCollator()([{"rows": rows}])
    labels, bounds = packed["labels"][0], packed["cu_seq_lens_q"].tolist()
    fuse_documents(model, model)
    inputs = {key: value for key, value in packed.items() if key != "labels"}
    logits = model(**inputs, use_cache=True).logits[0]  # a cache would let documents see each other in stock code
    del inputs["cu_seq_lens_q"]  # positions alone say it too
    torch.testing.assert_close(model(**inputs).logits[0], logits)
    restore_documents(model)
    model.set_attn_implementation("eager")
    for row, start, stop in zip(rows, bounds, bounds[1:], strict=False):
        alone = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        together = torch.nn.functional.cross_entropy(logits[start : stop - 1], labels[start + 1 : stop])
        assert together.item() == pytest.approx(alone.item(), abs=1e-5)
    assert (labels[bounds[:-1]] == -100).all()


def test_a_mask_beside_packed_documents_is_refused() -> None:
    model = tiny.model().train()
    fuse_documents(model, model)
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
    packed = PackedCollator()([{"rows": rows}])
    with pytest.raises(PackingError, match="one row"):
        model(input_ids=packed["input_ids"].repeat(2, 1), cu_seq_lens_q=packed["cu_seq_lens_q"], use_cache=False)
    ones = torch.ones_like(packed["input_ids"])
    for names in (("input_ids", "cu_seq_lens_q"), ("input_ids", "position_ids")):
        with pytest.raises(PackingError, match="leave attention_mask out"):
            model(**{name: packed[name] for name in names}, attention_mask=ones)
    model.eval()  # the same where a batch is evaluated
    with pytest.raises(PackingError, match="leave attention_mask out"):
        model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], attention_mask=ones)
