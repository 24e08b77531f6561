"""The fused LoRA layer over an NF4 base: PEFT's result, the base unpacked once a direction, everything else PEFT's."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from phi3_lora_plugin.speed.lora_swap import fuse_lora, fused_layers, restore_lora

bnb = pytest.importorskip("bitsandbytes")

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def quantised(nested: bool, dtype: torch.dtype) -> torch.nn.Module:
    model = tiny.model(hidden_size=64, intermediate_size=128).to(dtype)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    packed = bnb.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=dtype,
                        quant_type="nf4",
                        compress_statistics=nested,
                    )
                    packed.weight = bnb.nn.Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=nested
                    )
                    setattr(parent, name, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def step(model: torch.nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = torch.randint(3, 500, (3, 21), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_peft_s_and_the_base_is_unpacked_twice(
    nested: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantised(nested, dtype)
    stock_loss, stock = step(model)
    assert fuse_lora(model) == 8 and fused_layers(model) == (8, {})
    calls, real = [], bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    loss, ours = step(model)
    # once forwards and once backwards; the first layer's input needs no gradient
    assert len(calls) == 8 + 7
    assert loss == pytest.approx(stock_loss, abs=1e-5 if dtype == torch.float32 else 2e-2)
    for name in stock:
        if dtype == torch.float32:
            torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert torch.nn.functional.cosine_similarity(ours[name].flatten(), stock[name].flatten(), 0) > 0.99, name
    restore_lora(model)
    assert fused_layers(model) == (0, {"not over a plain linear layer": 8})


def test_layers_of_other_sizes_share_the_buffer_without_mixing_up() -> None:
    model = quantised(True, torch.float32)
    fuse_lora(model)
    first, second = step(model), step(model)
    assert first[0] == second[0] and all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_disabling_and_merging_go_peft_s_way() -> None:
    model = quantised(True, torch.float32).eval()
    ids = torch.randint(3, 500, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        fuse_lora(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, base)
