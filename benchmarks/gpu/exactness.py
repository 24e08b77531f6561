"""Part 1a: each part of the switch gives what stock code gives, on this card, in float32 and in 16 bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.batches import items_in, loss_of, on_device, padded
from benchmarks.gpu.facts import Check, Found, LeftOut, Setup
from benchmarks.gpu.models import error, lengths, packed, rows, shapes, small_model, step

EXACT = 1e-5  # in float32, of losses and of gradients by their norm
SHARE = 1.5  # of stock code's own error in 16 bits


def checks(setup: Setup) -> list[Check]:
    """For each shape: float32, 16 bits, packs; then what waits for the card."""
    made = []
    for name in shapes(setup):
        made.append(Check(f"float32, each part alone and all: {name}", 3, partial(parts_in_float32, name)))
        made.append(Check(f"16 bits, error against float32: {name}", 2, partial(half_error, name)))
        made.append(Check(f"packed as alone, padded as packed: {name}", 2, partial(packed_as_alone, name)))
    made.append(Check("waits for the card", 3, host_reads))
    return made


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32, which has 10 bits of mantissa."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def parts_in_float32(shape: str, setup: Setup) -> Found:
    """Padded rows: each part alone, then all, against stock code on the same batch."""
    from phi3_lora_plugin.speed.apply import PARTS, slow_down, speed_up

    changes = shapes(setup)[shape]
    batch = padded(rows(setup, lengths(setup), setup.small(300, 4000)))
    worst: dict[str, float] = {}
    with exact_float32():
        model = small_model(setup, torch.float32, **changes)
        loss, exact = step(model, [batch], setup)
        for parts in (*({one: one == part for one in PARTS} for part in PARTS), dict.fromkeys(PARTS, True)):
            speed_up(model, parts)
            mine, got = step(model, [batch], setup)
            slow_down(model)
            on = [part for part, wanted in parts.items() if wanted]
            name = "all" if len(on) > 1 else on[0]
            worst[name] = max(abs(mine - loss) / abs(loss), error(got, exact))
    return Found(max(worst.values()) <= EXACT, _listed(worst), worst)


def half_error(shape: str, setup: Setup) -> Found:
    """Padded and packed rows in 16 bits: as near to float32 on the same weights as stock code is."""
    from phi3_lora_plugin.speed.apply import slow_down, speed_up

    changes = shapes(setup)[shape]
    data = rows(setup, lengths(setup), setup.small(300, 4000))
    alone = [padded([row]) for row in data]
    with exact_float32():
        exact = step(small_model(setup, setup.half, oracle=True, **changes), alone, setup)[1]
    model = small_model(setup, setup.half, **changes)
    # Packed, or longrope by document: what each row has alone is what is meant.
    stock = error(step(model, alone, setup, setup.half)[1], exact)
    speed_up(model)
    ours = error(step(model, [packed(data)], setup, setup.half)[1], exact)
    slow_down(model)
    said = f"ours is off by {ours:.2e} of the gradient, stock code by {stock:.2e}"
    return Found(ours <= SHARE * stock, said, {"ours": ours, "stock": stock})


def packed_as_alone(shape: str, setup: Setup) -> Found:
    """A document has in a pack what it has alone, and in a padded batch what it has in a pack."""
    from phi3_lora_plugin.speed.apply import speed_up

    data = rows(setup, lengths(setup), setup.small(300, 4000))
    with exact_float32():
        model = small_model(setup, torch.float32, **shapes(setup)[shape])
        loss, exact = step(model, [padded([row]) for row in data], setup)
        speed_up(model)
        found = {}
        batches = {"packed": [packed(data)], "in two packs": [packed(data[:3]), packed(data[3:])]}
        if shape != "longrope":  # a padded batch has the factors of its longest row, as in stock code
            batches["padded"] = [padded(data)]
        for name, some in batches.items():
            mine, got = step(model, some, setup)
            found[name] = max(abs(mine - loss) / abs(loss), error(got, exact))
    return Found(max(found.values()) <= EXACT, _listed(found), found)


def host_reads(setup: Setup) -> Found:
    """A step waits for the card no more often than `benchmarks.fake_card` counts for it without one."""
    from phi3_lora_plugin.speed.apply import speed_up

    batch = packed(rows(setup, lengths(setup), setup.small(300, 4000)))
    expected = _counted(batch, setup)
    if setup.device.type != "cuda":
        raise LeftOut(f"only a card can be waited for; {len(expected)} are counted: {', '.join(expected) or 'none'}")
    model = small_model(setup, setup.half)
    speed_up(model)
    step(model, [batch], setup, setup.half)  # the first one compiles and allocates
    inputs, items = on_device(batch, setup.device), items_in([batch])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            loss_of(model, inputs, setup.device, items, setup.half).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{warning.filename}:{warning.lineno}" for warning in seen if "synchroniz" in str(warning.message)]
    said = f"{len(waits)} in a step of two layers, {len(expected)} are counted without a card"
    return Found(len(waits) <= len(expected), said, {"waits": waits, "counted": expected})


def _counted(batch: dict[str, Any], setup: Setup) -> list[str]:
    """Lines that wait, by a step of the same model on a card that is not there."""
    from transformers import Phi3Config

    from benchmarks.fake_card import Card, on_a_card
    from benchmarks.fake_step import build, fast, items, loss, settle

    sizes = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, vocab_size=4000)
    config = Phi3Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
    lora = dict(targets="all-linear", r=4, alpha=8)
    model, card = build(config, lora, dtype=torch.bfloat16), Card()
    fast(model, "auto", card.device)
    with on_a_card(card):
        settle(model)
        loss(model, card.put(batch), items(batch), torch.bfloat16).backward()
    return sorted([*card.reads, *card.copies])


def _listed(found: dict[str, float]) -> str:
    return "off by " + ", ".join(f"{value:.0e} ({name})" for name, value in found.items())
