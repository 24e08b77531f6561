"""The fused LoRA layer against PEFT's own forward, which stays the oracle and the way out."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from phi3_lora_plugin.speed.apply import speed_up
from phi3_lora_plugin.speed.lora_linear import FusedLoraLinear
from phi3_lora_plugin.speed.lora_swap import fuse_lora, restore_lora

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def lora(model: torch.nn.Module | None = None, **options: object) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))  # type: ignore[arg-type]
    wrapped = get_peft_model(model if model is not None else tiny.model(), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 500, (3, 21), generator=torch.Generator().manual_seed(seed))


def step(model: PeftModel, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.3}, {"use_rslora": True}, {"rank_pattern": {"qkv_proj": 9}}, {"lora_alpha": 1}],
    ids=str,
)
@pytest.mark.parametrize("heads", [4, 2])
def test_loss_and_gradients_equal_peft(options: dict[str, object], heads: int) -> None:
    model = lora(tiny.model(num_key_value_heads=heads), **options)
    stock_loss, stock = step(model)
    assert fuse_lora(model) == 8
    ours_loss, ours = step(model)
    assert ours_loss.item() == pytest.approx(stock_loss.item(), rel=1e-6)
    assert ours.keys() == stock.keys()
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_base_with_float32_adapters_and_autocast_stay_close() -> None:
    for model, autocast in ((lora(tiny.model().to(torch.bfloat16)), False), (lora(), True)):
        stock_loss, stock = step(model, autocast)
        fuse_lora(model)
        ours_loss, ours = step(model, autocast)
        assert ours_loss.item() == pytest.approx(stock_loss.item(), abs=2e-2)
        for name in stock:
            assert ours[name].dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(ours[name].flatten(), stock[name].flatten(), 0) > 0.99, name


def test_slices_are_multiplied_block_by_block_and_nothing_else_gets_a_gradient() -> None:
    from phi3_lora_plugin.lora.inject import add_lora

    model = add_lora(tiny.model(num_key_value_heads=2), ["q_proj", "v_proj", "up_proj"], 4, 8).train()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    _, first = step(model)
    with torch.no_grad():  # one step down the gradient, so that B is not zero inside its blocks
        for name, gradient in first.items():
            if "lora_B" in name:
                model.get_parameter(name).sub_(gradient)
    stock_loss, stock = step(model)
    assert fuse_lora(model) == 4
    ours_loss, ours = step(model)
    assert ours_loss.item() == pytest.approx(stock_loss.item(), rel=1e-6)
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=1e-7, msg=name)
        if "lora_B" in name:
            assert torch.equal(ours[name] == 0, stock[name] == 0), name


def test_merge_disable_a_second_adapter_and_restoring_all_work() -> None:
    model = lora().eval()
    x = ids()
    expected = model(input_ids=x).logits
    with model.disable_adapter():
        base = model(input_ids=x).logits
    fuse_lora(model)
    torch.testing.assert_close(model(input_ids=x).logits, expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=x).logits, base)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=x).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("other")
    torch.testing.assert_close(model(input_ids=x).logits, base, rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(input_ids=x).logits, expected, rtol=1e-5, atol=1e-5)
    restore_lora(model)
    assert not any(isinstance(module, FusedLoraLinear) for module in model.modules())


@pytest.mark.parametrize("mlp", [False, True])
def test_a_trained_bias_under_an_adapter_gets_its_gradient(mlp: bool) -> None:
    model = lora()
    for layer in model.get_base_model().model.layers:
        part = layer.mlp.gate_up_proj if mlp else layer.self_attn.o_proj
        part.base_layer.bias = torch.nn.Parameter(torch.full((part.out_features,), 0.1))
    _, stock = step(model)
    speed_up(model)
    _, ours = step(model)
    assert sum("bias" in name for name in ours) == 2
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_who_looks_at_gradients_of_a_part_of_a_layer_sees_them(part: str, kind: str) -> None:
    model, seen = lora(), []
    for layer in model.get_base_model().model.layers:
        for block in (layer.self_attn.o_proj, layer.mlp.gate_up_proj):
            getattr(block.get_submodule(part), kind)(lambda module, *grads: seen.append(grads[-1][0]))
    step(model)
    want, seen[:] = list(seen), []
    speed_up(model)
    step(model)
    assert len(seen) == len(want) == 4
    for mine, theirs in zip(seen, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_dora_keeps_its_own_forward() -> None:
    model = lora(use_dora=True)
    stock_loss, stock = step(model)
    fuse_lora(model)
    ours_loss, ours = step(model)
    assert ours_loss.item() == stock_loss.item() and all(torch.equal(ours[name], stock[name]) for name in stock)


def test_files_copies_and_pickles_are_those_of_peft(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = lora().eval()
    model.save_pretrained(tmp_path / "stock")
    fuse_lora(model)
    model.save_pretrained(tmp_path / "fused")
    files = [(tmp_path / kind / "adapter_model.safetensors").read_bytes() for kind in ("stock", "fused")]
    assert files[0] == files[1]
    expected = model(input_ids=ids()).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=ids()).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=ids()).logits, expected)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = lora(lora_dropout=0.2)
    model.enable_input_require_grads()
    fuse_lora(model)
    _, plain = step(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    _, checkpointed = step(model)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_frozen_weight_is_never_differentiated_nor_changed() -> None:
    model = lora()
    fuse_lora(model)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    step(model)
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name


def test_a_float32_base_under_autocast_is_not_kept_a_second_time_in_16_bits() -> None:
    model = lora()
    fuse_lora(model)
    saved: list[tuple[torch.dtype, torch.Size]] = []
    tokens = ids()
    weights = {p.shape for name, p in model.named_parameters() if "base_layer" in name}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append((tensor.dtype, tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
    kept = [dtype for dtype, shape in saved if shape in weights]
    assert kept and set(kept) == {torch.float32}
    loss.backward()


def test_a_token_of_generation_casts_no_adapter() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model = lora().to(torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    shapes = {p.shape for name, p in model.named_parameters() if "lora_" in name}
    shapes |= {torch.Size(reversed(shape)) for shape in shapes}
    tokens = ids()[:1, :9]
    with torch.no_grad():
        want = model(input_ids=tokens).logits
    fuse_lora(model)
    casts: list[Any] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].shape in shapes:
                casts.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Casts():
        got = model(input_ids=tokens).logits
    assert not casts
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
