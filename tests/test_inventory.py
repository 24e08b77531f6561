"""What is remembered of a model between two saves holds exactly as long as the model is made of the same parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from lora_runs import learn, peft_model, same
from peft import LoraConfig
from torch import nn

from phi3_lora_plugin.lora.inject import add_lora
from phi3_lora_plugin.lora.inventory import inventory_of
from phi3_lora_plugin.lora.slices import SliceError
from phi3_lora_plugin.lora.snapshot import take
from phi3_lora_plugin.lora.state import StateError
from phi3_lora_plugin.lora.walk import structure


def test_steps_and_modes_change_nothing_that_is_remembered() -> None:
    model = peft_model()
    known = inventory_of(model)
    learn(model, [torch.arange(8).reshape(1, 8)], lr=0.1)
    model.eval()
    again = inventory_of(model, None, known)
    assert again is known
    found, fresh = take(model, inventory=again), take(model)
    assert found is not None and fresh is not None
    assert same(dict(found.tensors), dict(fresh.tensors)) and found.config == fresh.config
    assert any(tensor.any() for name, tensor in found.tensors.items() if "lora_B" in name), "of now, not of before"


def _other_adapter(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))


def _other_parameter(model: Any) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"]
    layer.weight = nn.Parameter(torch.ones(4, 16))


def _other_layer(model: Any) -> None:
    lora_b = model.base_model.model.model.layers[1].mlp.down_proj.lora_B
    lora_b["default"] = nn.Linear(4, 16, bias=False)


def _other_name(model: Any) -> None:
    layers = model.base_model.model.model.layers
    layers._modules = {"7" if name == "1" else name: layer for name, layer in layers._modules.items()}


def _frozen(model: Any) -> None:
    model.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"].weight.requires_grad_(False)


@pytest.mark.parametrize("change", [_other_adapter, _other_parameter, _other_layer, _other_name, _frozen])
def test_whatever_comes_goes_or_is_replaced_is_looked_at_anew(change: Callable[[Any], None]) -> None:
    model = peft_model()
    known = inventory_of(model)
    change(model)
    again = inventory_of(model, None, known)
    assert again is not known
    found, fresh = take(model, inventory=again), take(model)
    assert found is not None and fresh is not None and same(dict(found.tensors), dict(fresh.tensors))


def test_another_adapter_that_is_asked_for_or_trained_is_another_inventory() -> None:
    model = peft_model()
    _other_adapter(model)
    known = inventory_of(model, "default")
    assert inventory_of(model, "default", known) is known and known.adapter == "default"
    assert inventory_of(model, "other", known).adapter == "other"
    trained = inventory_of(model)
    model.set_adapter("other")
    assert inventory_of(model, None, trained).adapter == "other"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(StateError, match=r"several adapters are trained at once \(default, other\)"):
        inventory_of(model, None, trained)


def test_layers_that_have_a_say_in_how_they_are_saved_are_asked_each_time() -> None:
    model = peft_model()
    assert inventory_of(model).parameters is not None
    layer = model.base_model.model.model.layers[0].self_attn.o_proj.lora_A["default"]
    ones = torch.ones(4, 16)
    layer.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}weight": ones}))
    assert inventory_of(model).parameters is None
    found = take(model)
    assert found is not None
    assert found.tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"].eq(1).all()


def test_slices_still_refuse_what_lies_between_them() -> None:
    model = add_lora(tiny.model(), ["q_proj", "v_proj"], 4, 8)
    known = inventory_of(model)
    assert known.parameters is None and inventory_of(model, None, known) is known
    between = next(p for name, p in model.named_parameters() if "qkv_proj.lora_B" in name)
    with torch.no_grad():
        between.fill_(1.0)
    with pytest.raises(SliceError, match="entry by entry"):
        take(model, inventory=known)


def test_a_module_that_moves_next_door_under_the_same_name_is_seen() -> None:
    model = nn.Sequential(nn.ModuleDict({"layer": nn.Linear(2, 2)}), nn.ModuleDict())
    before = structure(model)
    assert before.holds(model)
    first, second = model
    second["layer"] = first["layer"]
    del first["layer"]
    assert not before.holds(model)
