"""The switch: a Trainer run with it gives the run without it, it can be taken back, and it says what it left alone."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from phi3_lora_plugin.chat.pack import PackedCollator, pack
from phi3_lora_plugin.speed.apply import PARTS, SpeedError, accelerate_phi3, slow_down, speed_up

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def rows(count: int = 24, length: int = 20, equal: bool = True) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(5)
    made = []
    for index in range(count):
        ids = torch.randint(3, 500, (length if equal else 3 + index % length,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return made


def run(folder: Path, parts: object, data: list[dict], steps: int = 6, **arguments: object) -> tuple[list[float], dict]:
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS))
    speed_up(model, parts)  # type: ignore[arg-type]
    settings = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=1,
    )
    trainer = Trainer(model, TrainingArguments(**(settings | arguments)), train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}], ids=str
)
def test_a_trainer_run_is_the_same_with_and_without(tmp_path: Path, arguments: dict[str, object]) -> None:
    stock_losses, stock = run(tmp_path / "a", "off", rows(), **arguments)
    losses, ours = run(tmp_path / "b", "auto", rows(), **arguments)
    assert losses == pytest.approx(stock_losses, rel=1e-5)
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_can_be_switched_alone(tmp_path: Path, part: str) -> None:
    stock_losses, _ = run(tmp_path / "a", "off", rows(), steps=3)
    losses, _ = run(tmp_path / "b", dict.fromkeys(PARTS, False) | {part: True}, rows(), steps=3)
    assert losses == pytest.approx(stock_losses, rel=1e-5)


def test_everything_is_said_and_can_be_taken_back() -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
    classes = [type(module) for module in model.modules()]
    base_names, names = set(model.get_base_model().__dict__), set(model.__dict__)
    applied = speed_up(model)
    assert [(one.part, one.on) for one in applied] == [(part, True) for part in PARTS]
    assert speed_up(model) == applied
    assert str(applied[2]) == "lora: on (8 layers)"
    slow_down(model)
    assert [type(module) for module in model.modules()] == classes
    assert set(model.get_base_model().__dict__) == base_names and set(model.__dict__) == names


def test_what_cannot_be_done_is_left_alone_with_its_reason() -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["lm_head"]))
    loss, _, lora, *_ = speed_up(model)
    assert not loss.on and "adapter" in loss.why and lora.on
    with pytest.raises(SpeedError, match="unknown part tea; there are loss, attention, lora, masters, host"):
        speed_up(model, {"tea": True})
    with pytest.raises(SpeedError, match="fast"):
        speed_up(model, "fast")


def test_accelerate_phi3_leaves_the_loss_to_a_trainer_that_has_its_own(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return super().compute_loss(*args, **kwargs)

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    for kind, on in ((Trainer, True), (Own, False)):
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
        applied = {one.part: one for one in accelerate_phi3(kind(model, arguments))}
        assert applied["loss"].on is on and applied["lora"].on
    assert applied["loss"].why == "Own computes the loss by itself"


def test_packed_training_equals_padded_training_on_the_same_rows(tmp_path: Path) -> None:
    data = rows(count=8, equal=False)
    order = pack([len(row["input_ids"]) for row in data], 64)
    packed = [{"rows": [data[index] for index in members]} for members in order]
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS)).train()
    speed_up(model)
    together = model(**PackedCollator()(packed), use_cache=False).loss
    together.backward()
    slow_down(model)
    assert model.config._attn_implementation == "sdpa"
    ours = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    items = sum(label != -100 for row in data for label in row["labels"][1:])
    total = 0.0
    for row in data:
        inputs = {key: torch.tensor([value]) for key, value in row.items()}
        loss = model(**inputs, num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    assert together.item() == pytest.approx(total, abs=1e-5)
    for mine, theirs in zip(ours, [p.grad for p in model.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_evaluation_builds_logits_only_for_who_asks(tmp_path: Path) -> None:
    data = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows(8)]
    arguments = dict(output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=4)
    arguments |= dict(remove_unused_columns=False, disable_tqdm=True)
    seen: list[torch.Tensor] = []

    def metrics(prediction):  # type: ignore[no-untyped-def]
        seen.append(torch.as_tensor(prediction.predictions))
        return {}

    results, calls = {}, []
    for asks in (None, metrics):
        for fast in (False, True):
            model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
            trainer = Trainer(model, TrainingArguments(**arguments), eval_dataset=data, compute_metrics=asks)  # type: ignore[arg-type]
            if fast:
                accelerate_phi3(trainer)
                calls.clear()
                model.get_base_model().lm_head.register_forward_hook(lambda *_: calls.append(1))
            results[asks is None, fast] = trainer.evaluate()["eval_loss"]
        assert bool(calls) is (asks is not None)  # the loss alone never goes through the head as a module
        assert results[asks is None, True] == pytest.approx(results[asks is None, False], rel=1e-6)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    batch = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
    model.train()
    _, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert outputs.logits.shape == (8, 20, 512)
    assert trainer.predict(data).predictions.shape == (8, 20, 512)
    assert model.train()(**batch).logits is None


def test_copies_and_pickles_of_a_fast_model_are_their_own() -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS)).train()
    speed_up(model)
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    labels = ids.masked_fill(mask == 0, -100)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.eval() is made and model.training and not made.training
        made.train()
        with torch.no_grad():
            made.get_base_model().model.norm.weight.fill_(0)
        assert made(input_ids=ids, attention_mask=mask, labels=labels).loss.item() == pytest.approx(math.log(512))
        slow_down(made)
    assert model(input_ids=ids, attention_mask=mask, labels=labels).loss.item() != pytest.approx(math.log(512))


def test_gradients_of_adapters_that_come_later_are_zeroed_too() -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS)).train()
    speed_up(model)
    model.zero_grad()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("other")
    speed_up(model)
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_adapters_get_masters_that_small_steps_move() -> None:
    def made() -> torch.nn.Module:
        torch.manual_seed(0)
        model = tiny.model().to(torch.bfloat16)
        config = LoraConfig(r=4, target_modules=TARGETS)
        return get_peft_model(model, config, autocast_adapter_dtype=False).train()

    model = made()
    narrow = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert {p.dtype for p in narrow.values()} == {torch.bfloat16}
    applied = {one.part: one for one in speed_up(model)}
    assert applied["masters"].why == "16 adapter tensors were in half precision"
    assert all(p.dtype == torch.float32 and p is narrow[n] for n, p in model.named_parameters() if n in narrow)
    weight = next(p for n, p in narrow.items() if "lora_A" in n)
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=1e-6)
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in narrow.items():
            if "lora_B" in name:
                p.normal_(std=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(weight, before) and torch.equal(weight.bfloat16(), before.bfloat16())
    slow_down(model)
    assert {p.dtype for p in narrow.values()} == {torch.bfloat16}
