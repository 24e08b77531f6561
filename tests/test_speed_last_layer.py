"""The last layer at supervised positions only: the stock step, and who looks at the layer sees every position."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_pack import LONGROPE
from test_speed_documents import LENGTHS, TARGETS, lora, padded, rows, step

from phi3_lora_plugin.chat.pack import PackedCollator
from phi3_lora_plugin.speed import layers
from phi3_lora_plugin.speed.apply import PARTS, Applied, slow_down, speed_up

TOKENS = sum(LENGTHS)
WITHOUT = {"last_layer": False}
Seen = Callable[..., list[int]]


def supervised(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Hold a fast step of a model to its twin; how many positions the MLP of each layer got in it."""
    found: list[int] = []
    real = layers.lora_mlp
    monkeypatch.setattr(layers, "lora_mlp", lambda x, *rest: (found.append(x[..., 0].numel()), real(x, *rest))[1])

    def held(model: torch.nn.Module, batch: dict[str, Any], parts: Any = "auto", twin: Any = "off") -> list[int]:
        slow_down(model)
        speed_up(model, twin)
        stock_loss, stock = step(model, batch)
        applied = speed_up(model, parts)
        found.clear()
        loss, ours = step(model, batch)
        assert loss == pytest.approx(stock_loss, rel=1e-6), applied
        for name in stock:
            torch.testing.assert_close(ours[name], stock[name], rtol=1e-5, atol=1e-7, msg=name)
        return list(found)

    return held


def line(model: torch.nn.Module) -> Applied:
    return next(one for one in speed_up(model) if one.part == "last_layer")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "sliding_window": 7},
        {"num_hidden_layers": 1, "tie_word_embeddings": True},
        LONGROPE,
    ],
    ids=["mha", "gqa partial window", "one layer, tied", "longrope"],
)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpointed", "reentrant"])
def test_a_step_is_the_stock_step_and_the_last_layer_sees_what_has_a_label(
    changes: dict[str, Any], checkpointing: bool | None, seen: Seen
) -> None:
    model, data = lora(**changes), rows()
    if checkpointing is not None:
        model.get_base_model().enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": checkpointing})
    first = [TOKENS] * (model.config.num_hidden_layers - 1)
    batch = padded(data)
    wanted = [*first, supervised(batch)]
    got = seen(model, batch)
    # what is checkpointed runs again in backward, and gets the same positions there; reentrant, the first without grad
    assert got == (wanted if checkpointing is None else wanted[::-1] if checkpointing else [*wanted, *wanted[::-1]])
    weights = torch.linspace(0.1, 2, batch["labels"].numel()).view_as(batch["labels"])
    assert seen(model, batch | {"loss_weights": weights}, twin=WITHOUT) == got


def test_packs_and_rows_without_padding(seen: Seen) -> None:
    model, data = lora(), rows()
    pack = PackedCollator()([{"rows": data}])
    assert seen(model, pack, twin=WITHOUT) == [TOKENS, supervised(pack)]
    full = padded(rows((12, 12, 12)), more=0)
    assert seen(model, full) == [36, supervised(full)]
    assert seen(model, {name: full[name] for name in ("input_ids", "labels")}) == [36, supervised(full)]
    left = padded(data, side="left")
    assert seen(model, left) == [left["labels"].numel(), supervised(left)]


def test_rows_and_batches_without_labels_and_with_nothing_else(seen: Seen) -> None:
    model, batch = lora(), padded(rows())
    batch["labels"][2] = -100
    assert seen(model, batch) == [TOKENS, supervised(batch)]
    every = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert seen(model, batch | {"labels": every}) == [TOKENS, TOKENS], "nothing to save"
    trained = batch | {"labels": batch["input_ids"]}  # padding that is trained on
    assert len(set(seen(model, trained))) == 1
    one = torch.full_like(every, -100)
    one[0, 9] = 5
    assert seen(model, batch | {"labels": one}) == [TOKENS, 1]
    speed_up(model)
    loss, gradients = step(model, batch | {"labels": torch.full_like(every, -100)})
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())


def test_micro_batches_add_up(seen: Seen) -> None:
    model = lora()
    batches = [padded(rows((9, 4))), padded(rows((17, 2, 8)))]
    items = sum(map(supervised, batches))
    total = []
    for parts in ("off", "auto"):
        slow_down(model)
        speed_up(model, parts)
        model.zero_grad()
        for batch in batches:
            model(**batch, num_items_in_batch=items).loss.backward()
        total.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for mine, stock in zip(*total, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["qkv_proj"]}, {"target_modules": ["o_proj", "down_proj"]}, {"use_dora": True}],
    ids=["qkv", "o and down", "DoRA"],
)
def test_any_adapter_on_the_last_layer_goes_along(settings: dict[str, Any], seen: Seen) -> None:
    chosen = LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | settings)  # type: ignore[arg-type]
    model = get_peft_model(tiny.model().double(), chosen, autocast_adapter_dtype=False).double().train()
    batch = padded(rows())
    assert seen(model, batch) == [TOKENS, supervised(batch)]
    assert line(model).on


def test_four_bits_with_few_rows(seen: Seen) -> None:
    pytest.importorskip("bitsandbytes")
    from test_speed_nf4 import quantised

    model, batch = quantised(True, torch.float32).train(), padded(rows())
    assert seen(model, batch, twin=WITHOUT) == [TOKENS, supervised(batch)]


@pytest.mark.parametrize("missing", ["loss", "attention", "layers"])
def test_it_needs_three_other_parts_and_says_which_is_off(missing: str) -> None:
    lines = {one.part: one for one in speed_up(lora(), {missing: False})}
    assert not lines["last_layer"].on and lines["last_layer"].why == f"it needs what is off: {missing}"
    assert "dropout" in line(lora(dropout=0.1)).why


def test_it_is_switched_off_and_taken_back(seen: Seen) -> None:
    model, batch = lora(), padded(rows())
    before = [set(module.__dict__) for module in model.modules()]
    assert seen(model, batch, WITHOUT) == [TOKENS, TOKENS]
    speed_up(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            made.get_base_model().model.norm.weight.fill_(0)
        assert step(made, batch)[0] != pytest.approx(step(model, batch)[0])
    slow_down(model)
    assert [set(module.__dict__) for module in model.modules()] == before
    alone = dict.fromkeys(PARTS, False) | {"last_layer": True}
    assert seen(model, batch, alone) == []


def test_who_looks_behind_the_last_attention_sees_every_position(seen: Seen) -> None:
    model, batch = lora(), padded(rows())
    decoder = model.get_base_model().model
    last = decoder.layers[-1]
    for module in (
        last,
        last.mlp,
        last.self_attn,
        last.self_attn.o_proj,
        last.mlp.down_proj.lora_A,
        decoder.norm,
        decoder,
    ):
        speed_up(model)
        hook = module.register_forward_hook(lambda *_: None)
        assert supervised(batch) not in seen(model, batch)
        assert not line(model).on and "want every position" in line(model).why
        hook.remove()
    own = last.mlp.forward
    last.mlp.forward = lambda x: own(x)
    assert supervised(batch) not in seen(model, batch)
    del last.mlp.forward
    speed_up(model)
    hidden = model(**batch, output_hidden_states=True).hidden_states
    assert {tuple(each.shape[:2]) for each in hidden} == {tuple(batch["labels"].shape)}


def test_logits_and_evaluation_have_every_position() -> None:
    model, batch = lora(), padded(rows())
    speed_up(model)
    shape = (*batch["labels"].shape, 512)
    without = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**without).logits.shape == shape and model.eval()(**batch).logits.shape == shape
