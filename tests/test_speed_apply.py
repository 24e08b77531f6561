"""The switch: a Trainer run with it gives the run without it, it can be taken back, and it says what it left alone."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate.utils import TorchDynamoPlugin
from peft import LoraConfig, get_peft_model
from test_speed_documents import padded
from transformers import Trainer, TrainingArguments

from phi3_lora_plugin.chat.pack import PackedCollator, pack
from phi3_lora_plugin.speed.apply import PARTS, SpeedError, accelerate_phi3, slow_down, speed_up
from phi3_lora_plugin.speed.loss import asked

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


def arguments_of(folder: Path, **changes: object) -> TrainingArguments:
    settings = dict(output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, logging_steps=1, seed=1)
    settings |= dict(save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2)
    return TrainingArguments(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.slow
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
    with pytest.raises(
        SpeedError, match="unknown part tea; available: loss, attention, lora, layers, last_layer, masters, host"
    ):
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


def test_evaluation_builds_logits_only_for_who_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows(8)]
    arguments = dict(output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=4)
    arguments |= dict(remove_unused_columns=False, disable_tqdm=True)
    seen: list[torch.Tensor] = []

    def metrics(prediction):  # type: ignore[no-untyped-def]
        seen.append(torch.as_tensor(prediction.predictions))
        return {}

    results, calls = {}, []
    linear = torch.nn.Linear.forward
    # not a hook: who hangs one on the head gets its logits
    monkeypatch.setattr(
        torch.nn.Linear,
        "forward",
        lambda self, x: (calls.append(1) if self.out_features == 512 else None, linear(self, x))[1],
    )
    for asks in (None, metrics):
        for fast in (False, True):
            model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
            trainer = Trainer(model, TrainingArguments(**arguments), eval_dataset=data, compute_metrics=asks)  # type: ignore[arg-type]
            if fast:
                accelerate_phi3(trainer)
                calls.clear()
            results[asks is None, fast] = trainer.evaluate()["eval_loss"]
        assert bool(calls) is (asks is not None)  # the loss alone never goes through the head as a module
        assert results[asks is None, True] == pytest.approx(results[asks is None, False], rel=1e-6)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    batch = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
    model.train()
    _, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert outputs.logits.shape == (8, 20, 512)
    assert trainer.predict(data).predictions.shape == (8, 20, 512)
    assert model.train()(**batch).logits.shape == (8, 20, 512)
    calls.clear()
    trainer.compute_loss(model, dict(batch)).backward()
    assert not calls


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_loss_of_one_s_own_on_the_trainer_gets_logits(tmp_path: Path, when: str) -> None:
    def own(model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        outputs = model(**inputs)
        loss = outputs.logits.float().logsumexp(-1).mean()
        return (loss, outputs) if return_outputs else loss

    found = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
        trainer = Trainer(model, arguments_of(tmp_path), train_dataset=rows())  # type: ignore[arg-type]
        if when == "before":
            trainer.compute_loss = own
        if fast:
            loss = accelerate_phi3(trainer)[0]
            assert loss.on is (when == "after")
            if when == "before":
                assert loss.why == "compute_loss of this trainer was replaced"
        trainer.compute_loss = own
        trainer.train()
        found.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_hooks_on_the_head_see_logits_and_the_loss_stays(tmp_path: Path) -> None:
    losses, seen = [], []
    for hooked in (False, True):
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS)).train()
        speed_up(model)
        if hooked:
            model.get_base_model().lm_head.register_forward_hook(lambda *_: seen.append(_[2].shape))
        ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert seen == [(2, 9, 512)] and losses[1] == pytest.approx(losses[0], rel=1e-6)
    (loss, *_) = speed_up(model)
    assert not loss.on and "hooks on the head" in loss.why and "logits of every position" in loss.why


def test_two_gpus_in_one_process_get_what_survives_copies_of_the_model(tmp_path: Path) -> None:
    trainer = Trainer(
        get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS)),
        arguments_of(tmp_path),
        train_dataset=rows(),  # type: ignore[arg-type]
    )
    trainer.args._n_gpu = 2
    applied = {one.part: one for one in accelerate_phi3(trainer)}
    assert [part for part, one in applied.items() if one.on] == ["lora", "masters"]
    assert applied["attention"].why == "nn.DataParallel copies the model onto 2 GPUs: start one process a GPU"
    replica = trainer.model._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica


@pytest.mark.slow
def test_what_torch_compile_would_compile_for_every_batch_is_left_to_it(tmp_path: Path) -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
    trainer = Trainer(model, arguments_of(tmp_path), train_dataset=rows())  # type: ignore[arg-type]
    trainer.args.torch_compile = True
    applied = {one.part: one for one in accelerate_phi3(trainer)}
    assert not applied["attention"].on and "for each new number of documents" in applied["attention"].why
    assert not applied["layers"].on and "fuses these by itself" in applied["layers"].why
    assert applied["loss"].on and applied["lora"].on
    assert graphs_of_batches(model) == 1, "what is before the loss, once"
    slow_down(model)
    assert graphs_of_batches(model) == 1
    speed_up(model)  # by hand, who compiles it cannot be known beforehand
    assert graphs_of_batches(model) == 1


def graphs_of_batches(model: Any) -> int:
    """How many graphs are compiled for three batches of one shape, packed and with labels at other positions each."""
    made: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(1)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model.train(), backend=backend)
    draw = torch.Generator().manual_seed(0)
    for documents in ((12,), (5, 7), (3, 4, 5)):
        ids = torch.randint(3, 500, (1, 12), generator=draw)
        labels = ids.masked_fill(torch.rand(1, 12, generator=draw) < 0.4, -100)
        batch = {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(9)}
        batch["position_ids"] = torch.cat([torch.arange(length) for length in documents])[None]
        losses, grads = [], []
        for run in (compiled, model):
            model.zero_grad()
            with asked(model.get_base_model(), "loss"):
                losses.append(run(**batch).loss)
            losses[-1].backward()
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads)
    torch._dynamo.reset()
    return len(made)


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_are_counted_without_a_look_at_the_card(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(8, equal=False)
    seen = {}
    stock = Trainer._track_num_input_tokens
    for speed in ("off", "auto"):
        for mode in ("non_padding", "all"):
            monkeypatch.setattr(Trainer, "_track_num_input_tokens", stock)
            arguments = arguments_of(tmp_path, gradient_accumulation_steps=2, remove_unused_columns=False)
            arguments.include_num_input_tokens_seen = mode
            model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
            trainer = Trainer(
                model, arguments, train_dataset=data, data_collator=PackedCollator() if packed else padded
            )  # type: ignore[arg-type]
            accelerate_phi3(trainer, speed)
            if speed == "auto":
                monkeypatch.setattr(Trainer, "_track_num_input_tokens", lambda *_: pytest.fail("the card is asked"))
            trainer.train()
            seen[speed, mode] = trainer.state.num_input_tokens_seen
    assert seen["off", "all"] == seen["auto", "all"]
    assert seen["auto", "non_padding"] == (seen["auto", "all"] if packed else seen["off", "non_padding"])


def test_accelerate_s_own_setting_compiles_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
    trainer = Trainer(model, arguments_of(tmp_path), train_dataset=rows())  # type: ignore[arg-type]
    monkeypatch.setattr(trainer.accelerator.state, "dynamo_plugin", TorchDynamoPlugin(backend="eager"))
    applied = {one.part: one for one in accelerate_phi3(trainer)}
    assert "torch_compile" in applied["attention"].why and "torch_compile" in applied["layers"].why


def test_liger_leaves_the_loss_to_us_unless_it_was_asked_for(tmp_path: Path) -> None:
    for wanted, on in ((None, True), ({"rope": False}, True), ({"fused_linear_cross_entropy": True}, False)):
        model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS))
        trainer = Trainer(model, arguments_of(tmp_path), train_dataset=rows())  # type: ignore[arg-type]
        trainer.args.use_liger_kernel, trainer.args.liger_kernel_config = True, wanted
        loss = accelerate_phi3(trainer)[0]
        assert loss.on is on
        if on:
            ours = {"fused_linear_cross_entropy": False, "cross_entropy": False}
            assert trainer.args.liger_kernel_config == (wanted or {}) | ours
        else:
            assert loss.why == "Liger's fused_linear_cross_entropy was asked for"
            assert trainer.args.liger_kernel_config == wanted


def test_a_forward_that_someone_put_over_ours_stays_when_ours_goes() -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS)).train()
    base = model.get_base_model()
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    speed_up(model)
    ours, calls = base.forward, []
    base.forward = lambda *args, **kwargs: (calls.append(1), ours(*args, **kwargs))[1]  # as Liger does
    slow_down(model)
    assert model(input_ids=ids, labels=ids).logits.shape == (2, 9, 512) and calls == [1]


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


def test_what_a_second_call_does_not_want_is_taken_back() -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=TARGETS)).train()
    classes = [type(module) for module in model.modules()]
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    for part in PARTS:
        speed_up(model)
        said = {one.part: one.on for one in speed_up(model, {part: False})}
        assert said == dict.fromkeys(PARTS, True) | {part: False, "last_layer": part in ("lora", "masters", "host")}
        assert (model(input_ids=ids, labels=ids).logits is None) is (part != "loss")
    speed_up(model, "off")
    assert [type(module) for module in model.modules()] == classes
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_a_step_begins_in_the_mode_and_with_the_gradients_that_it_has_in_stock_code() -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, lora_dropout=0.1, target_modules=TARGETS)).train()
    base = model.get_base_model()
    speed_up(model)
    base.model.layers[0].eval()
    assert all(module.training for module in model.train().modules())
    model.eval()
    base.model.layers[1].mlp.train()
    assert not any(module.training for module in model.eval().modules())
    before = base.num_parameters(exclude_embeddings=True)
    model.zero_grad()
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("default")
    base.model.norm.weight = torch.nn.Parameter(torch.ones(32))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert before - base.num_parameters(exclude_embeddings=True) == sum(p.numel() for p in trained) - 32
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    model.zero_grad()
    assert all(p.grad is None for p in trained)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_masters_of_an_adapter_that_is_trained_in_part(frozen: str) -> None:
    model = tiny.model().to(torch.bfloat16)
    config = LoraConfig(r=4, lora_bias=True, target_modules=TARGETS)  # which takes PEFT's forward
    model = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    speed_up(model)
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    slow_down(model)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}


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
