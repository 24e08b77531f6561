"""The chunked loss against the stock one: values, gradients, accumulation, and when it has to step aside."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import Phi3ForCausalLM

from phi3_lora_plugin.speed.loss import CHUNK, fuse_loss, head_obstacle, restore_loss, supervised_cross_entropy


def batch(rows: int = 4, tokens: int = 33, supervised: float = 0.4, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 500, (rows, tokens), generator=draw)
    labels = torch.where(torch.rand(rows, tokens, generator=draw) < supervised, ids, -100)
    return {"input_ids": ids, "labels": labels}


def lora(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def gradients(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], **more: object
) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs, **more).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("rows", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient_equal_full_cross_entropy_in_float64(rows: int, bias: bool) -> None:
    draw = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows + 5, 16, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(97, 16, generator=draw, dtype=torch.float64)
    offset = torch.randn(97, generator=draw, dtype=torch.float64) if bias else None
    targets = torch.full((rows + 5,), -100)
    targets[2 : 2 + rows] = torch.randint(0, 97, (rows,), generator=draw)
    ours = supervised_cross_entropy(hidden, weight, targets, bias=offset)
    (ours_gradient,) = torch.autograd.grad(ours, hidden)
    if rows == 0:
        assert ours.item() == 0 and not ours_gradient.any()
        return
    stock = functional.cross_entropy(functional.linear(hidden, weight, offset), targets)
    (stock_gradient,) = torch.autograd.grad(stock, hidden)
    assert ours.item() == pytest.approx(stock.item(), rel=1e-6)
    torch.testing.assert_close(ours_gradient, stock_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
def test_model_loss_and_lora_gradients_equal_stock(changes: dict[str, object]) -> None:
    model = lora(tiny.model(**changes))
    inputs = batch()
    for more in ({}, {"num_items_in_batch": torch.tensor(70)}, {"num_items_in_batch": 70}):
        stock_loss, stock = gradients(model, inputs, **more)
        fuse_loss(model.get_base_model())
        ours_loss, ours = gradients(model, inputs, **more)
        restore_loss(model.get_base_model())
        assert ours_loss == pytest.approx(stock_loss, rel=1e-6)
        for mine, theirs in zip(ours, stock, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_training_output_has_no_logits_and_everything_else_still_has_them() -> None:
    model = lora(tiny.model())
    base, inputs = model.get_base_model(), batch()
    fuse_loss(base)
    assert model(**inputs).logits is None
    assert model(input_ids=inputs["input_ids"]).logits.shape == (4, 33, 512)
    model.eval()
    out = model(**inputs)
    assert out.logits.shape == (4, 33, 512) and out.loss.item() > 0
    restore_loss(base)
    assert "forward" not in base.__dict__ and model.train()(**inputs).logits is not None


def test_a_batch_without_labels_gives_zero_not_nan() -> None:
    model = lora(tiny.model())
    fuse_loss(model.get_base_model())
    inputs = batch()
    loss, grads = gradients(model, inputs | {"labels": torch.full_like(inputs["labels"], -100)})
    assert loss == 0.0 and all(not grad.any() for grad in grads)


def test_a_trained_or_adapted_head_is_left_to_stock_code() -> None:
    trained = tiny.model()
    assert "trained" in (head_obstacle(trained) or "")
    trained.requires_grad_(False)
    assert head_obstacle(trained) is None
    adapted = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules=["lm_head"])).get_base_model()
    assert "adapter" in (head_obstacle(adapted) or "")
    fuse_loss(adapted)
    assert adapted.train()(**batch()).logits is not None


class _Doubled(Phi3ForCausalLM):  # type: ignore[misc]
    """A model that changes its loss."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.loss = output.loss * 2
        return output


def test_a_loss_of_the_model_s_own_is_taken() -> None:
    inputs, found = batch(), []
    for fast in (False, True):
        model = lora(tiny.model())
        if fast:
            fuse_loss(model.get_base_model())
        model.get_base_model().loss_function = lambda logits, labels, **_: logits.pow(2).mean()
        found.append(gradients(model, inputs))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert head_obstacle(model.get_base_model()) == "the model has a loss_function of its own, which wants logits"
    doubled = _Doubled(tiny.config()).requires_grad_(False)
    assert head_obstacle(doubled) == "_Doubled has a forward of its own"


def test_whatever_stock_code_takes_the_fused_loss_takes() -> None:
    model = lora(tiny.model())
    inputs = batch(rows=1)
    all_labels = {"labels": inputs["input_ids"], "ignore_index": int(inputs["input_ids"][0, 5])}
    cases = [{}, {"labels": inputs["labels"][0]}, all_labels, {"return_dict": False}]
    want = [model(**(inputs | case))[0].item() for case in cases]
    fuse_loss(model.get_base_model())
    found = [model(**(inputs | case)) for case in cases]
    assert [output[0].item() for output in found] == pytest.approx(want, rel=1e-6)
    assert isinstance(found[-1], tuple)
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == inputs["labels"].shape[1]


def test_four_accumulated_batches_equal_one() -> None:
    model = lora(tiny.model())
    fuse_loss(model.get_base_model())
    whole = batch(rows=4)
    items = whole["labels"][:, 1:].ne(-100).sum()
    _, expected = gradients(model, whole, num_items_in_batch=items)
    model.zero_grad()
    for row in range(4):
        model(**{key: value[row : row + 1] for key, value in whole.items()}, num_items_in_batch=items).loss.backward()
    for mine, theirs in zip([p.grad for p in model.parameters() if p.requires_grad], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_bfloat16_stays_close_to_stock() -> None:
    model = lora(tiny.model().to(torch.bfloat16))
    inputs = batch()
    stock_loss, _ = gradients(model, inputs)
    fuse_loss(model.get_base_model())
    ours_loss, _ = gradients(model, inputs)
    assert ours_loss == pytest.approx(stock_loss, abs=2e-2)


@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_float16_keeps_gradients_that_are_smaller_than_float16(scale: float) -> None:
    """One word of 200,000 is wrong by 1e-7: what stock code keeps by scaling the loss is kept here too."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 16, generator=draw) * 3, torch.randn(3000, 16, generator=draw)
    targets = torch.matmul(hidden, weight.T).argmax(-1)  # as sure as a trained model: small gradients
    errors = []
    exact = hidden.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact @ weight.double().T, targets, reduction="sum").backward()
    for ours in (True, False):
        half = hidden.half().requires_grad_()
        if ours:
            loss = supervised_cross_entropy(half, weight.half(), targets, num_items=1)
        else:
            logits = torch.nn.functional.linear(half, weight.half()).float()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        (loss * scale).backward()
        assert half.grad.isfinite().all()
        errors.append((half.grad.double() / scale - exact.grad).norm() / exact.grad.norm())
    assert errors[0] < 0.02 and errors[0] <= errors[1] * 1.5


def test_a_hook_that_only_moves_inputs_leaves_the_loss_on_and_a_forward_of_its_own_does_not() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    from phi3_lora_plugin.speed.loss import head_obstacle

    moved, counted = tiny.model(), tiny.model()
    for model in (moved, counted):
        model.requires_grad_(False)
    add_hook_to_module(
        moved.lm_head, AlignDevicesHook("cpu")
    )  # as PEFT does where an adapter is loaded into a device_map
    assert head_obstacle(moved) is None
    counted.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, counted.lm_head.weight)
    assert "a forward of its own" in str(head_obstacle(counted))
