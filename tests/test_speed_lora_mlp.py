"""The MLP with its LoRA as one function: PEFT's numbers, and PEFT's own way where something is unusual."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_speed_documents import equal, padded, rows
from test_speed_lora_linear import lora, step

from phi3_lora_plugin.lora.inject import add_lora
from phi3_lora_plugin.speed import lora_mlp
from phi3_lora_plugin.speed.apply import PARTS, slow_down, speed_up

ALONE = dict.fromkeys(PARTS, False) | {"layers": True, "lora": True}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a time that the function really ran."""
    made, real = [], lora_mlp._LoraMlp.apply
    monkeypatch.setattr(lora_mlp._LoraMlp, "apply", lambda *args: (made.append(1), real(*args))[1])
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["down_proj"]},
        {"target_modules": ["gate_up_proj"], "use_rslora": True},
        {"rank_pattern": {"gate_up_proj": 9}},
        {"target_modules": ["gate_up_proj", "down_proj"], "alpha_pattern": {"down_proj": 1}},
    ],
    ids=str,
)
def test_it_is_one_function_for_whatever_is_adapted(options: dict[str, Any], calls: list[int]) -> None:
    model = lora(tiny.model().double(), **options).double()
    equal(model, padded(rows()), ALONE)
    assert len(calls) == 2
    model.get_base_model().enable_input_require_grads()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    equal(model, padded(rows()), ALONE)
    assert len(calls) == 2 + 4


def test_slices_of_gate_and_up_go_block_by_block(calls: list[int]) -> None:
    model = add_lora(tiny.model(), ["up_proj", "down_proj"], 4, 8).double().train()
    for name, gradient in step(model)[1].items():  # so that B is not zero inside its blocks
        if "lora_B" in name:
            model.get_parameter(name).data.sub_(gradient)
    equal(model, padded(rows()), ALONE)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.3}, {"use_dora": True}, {"target_modules": ["qkv_proj", "o_proj"]}],
    ids=str,
)
def test_dropout_variants_and_an_mlp_without_lora_take_the_projections_one_by_one(
    options: dict[str, Any], calls: list[int]
) -> None:
    model = lora(tiny.model().double(), **options).double()
    equal(model, padded(rows((9, 9, 9)), more=0), ALONE)
    assert calls == []


def test_switched_adapters_and_hooks_inside_are_honoured(calls: list[int]) -> None:
    model = lora()
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    down = model.get_base_model().model.layers[0].mlp.down_proj
    results = []
    for fast in (False, True):
        (speed_up(model, ALONE) if fast else slow_down(model))
        found = []
        for name in ("default", "other"):
            model.set_adapter(name)
            found.append(step(model)[0])
        with model.disable_adapter():
            found.append(model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.detach())
        ran = len(calls)
        hook = down.lora_A["other"].register_forward_hook(lambda module, args, out: out * 0)
        found.append(step(model)[0])
        hook.remove()
        assert len(calls) - ran == (1 if fast else 0), "the layer with a hook inside goes PEFT's way"
        results.append(found)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
