"""The switch: a Trainer run with it gives the run without it, it can be taken back, and it says what it left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from phi3_lora_plugin.chat.pack import PackedCollator, pack
from phi3_lora_plugin.speed.apply import PARTS, SpeedError, accelerate_phi3, packed_rows, slow_down, speed_up

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
    assert [(one.part, one.on) for one in applied] == [("loss", True), ("lora", True), ("host", True)]
    assert speed_up(model) == applied
    assert str(applied[1]) == "lora: on (8 layers)"
    slow_down(model)
    assert [type(module) for module in model.modules()] == classes
    assert set(model.get_base_model().__dict__) == base_names and set(model.__dict__) == names


def test_what_cannot_be_done_is_left_alone_with_its_reason() -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["lm_head"]))
    loss, lora, _ = speed_up(model)
    assert not loss.on and "adapter" in loss.why and lora.on
    with pytest.raises(SpeedError, match="unknown part tea; there are loss, lora, host"):
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
    with packed_rows(model):
        together = model(**PackedCollator()(packed), use_cache=False).loss
        together.backward()
    assert model.config._attn_implementation == "sdpa"
    ours = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    slow_down(model)
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
