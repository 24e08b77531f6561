"""Settings under `training:` that transformers or torch would end a run for are refused in a sentence before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from lora_runs import arguments, peft_model, rows

from phi3_lora_plugin import load_recipe, train
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.training.refused_settings import (
    SettingsError,
    planned_steps,
    refused,
    require_batches,
    require_metric,
    require_optimizer,
)

HELD = "data.eval_path={place}/chats.jsonl"
REFUSED: dict[str, tuple[list[str], str]] = {
    "arguments that are not pairs": (["optim_args=nonsense"], "training.optim_args"),
    "an argument that the optimizer ignores": (["optim=sgd", "optim_args=nope=1"], "nope has no effect with"),
    "an exponent above 1": (["adam_beta1=1.5"], "Invalid beta parameter"),
    "an option that the schedule does not have": (["lr_scheduler_kwargs={nope: 1}"], "training.lr_scheduler_kwargs"),
    "a schedule without its option": (["lr_scheduler_type=cosine_with_min_lr"], "min_lr"),
    "a schedule that divides by zero at the last step": (
        ["lr_scheduler_type=polynomial", "warmup_steps=2"], "polynomial cannot run 2 steps, 2 of them warm-up",
    ),
    "a schedule without evaluations": (["lr_scheduler_type=reduce_lr_on_plateau"], "follows evaluations"),
    "evaluations that are switched off": (
        ["lr_scheduler_type=greedy", "eval_strategy=no", HELD], "follows evaluations",
    ),
    "evaluation of nothing": (["eval_on_start=true"], "nothing to evaluate on"),
    "a metric that is not measured": (["metric_for_best_model=accuracy", HELD], "available: eval_loss"),
    "a batch larger than the data": (
        ["dataloader_drop_last=true", "per_device_train_batch_size=64"], "drops all 8 rows to train on",
    ),
    "a batch larger than the held-out data": (
        ["dataloader_drop_last=true", "per_device_eval_batch_size=64", HELD], "drops all 8 rows to evaluate on",
    ),
    "steps in parts": (["logging_steps=1.5"], "--logging_steps must be an integer"),
    "an option that accelerate does not have": (["accelerator_config={nope: 1}"], "nope"),
    "workers' options without workers": (["dataloader_persistent_workers=true"], "dataloader_num_workers"),
    "packs grouped by length": (["group_by_length=true", "data.packing=true"], "no lengths to group by"),
    "an unknown log level": (["log_level=nope"], "no such value: 'nope'"),
    "an unknown mode of the compiler": (["torch_compile_mode=nope"], "Unrecognized mode=nope"),
    "a kernel package that is missing": (["use_liger_kernel=true"], "pip install liger-kernel"),
    "parts of nothing": (["eval_accumulation_steps=0"], "at least 1"),
    "tokens of no embedding": (["lora.trainable_token_indices={nope: [1]}"], "'nope' matches no module"),
    "an option that EVA does not have": (["lora.init=eva", "lora.eva_config={nope: 1}"], "unknown key 'nope'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.base(folder / "base")
    tiny.write(folder / "chats.jsonl", [tiny.chat(f"what about {number} apples?") for number in range(8)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSED)
def test_before_the_first_step(what: str, place: Path, tmp_path: Path) -> None:
    given, says = REFUSED[what]
    settings = [one if one.startswith(("data.", "lora.")) else f"training.{one}" for one in given]
    base = [
        f"model.path={place / 'base'}", f"data.path={place / 'chats.jsonl'}", "data.eval_path=null",
        "data.max_length=64", "training.max_steps=2", f"output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    with pytest.raises(Phi3LoraError) as refusal:
        train(
            load_recipe(
                "tiny-cpu", [*base, *(one.format(place=place) if "{place}" in one else one for one in settings)]
            )
        )
    assert says in str(refusal.value)
    assert not (tmp_path / "run" / "lora").exists()


def test_what_runs_is_not_refused(tmp_path: Path) -> None:
    model = peft_model()
    for name, options in {
        "polynomial": None, "warmup_stable_decay": {"num_decay_steps": 2}, "cosine_with_min_lr": {"min_lr": 1e-5},
        "inverse_sqrt": None, "constant": None,
    }.items():  # fmt: skip
        given = arguments(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=options, warmup_steps=5, max_steps=6)
        require_optimizer(given, model, 6)
        require_optimizer(given, model, None)
    require_optimizer(arguments(tmp_path, optim="rmsprop", optim_args="momentum=0.9"), model, 6)
    require_batches(arguments(tmp_path, dataloader_drop_last=True), rows(4), None)
    require_metric(arguments(tmp_path, metric_for_best_model="loss", eval_strategy="epoch"), {"eval_loss": 1.0})
    with pytest.raises(SettingsError, match="drops all 3 rows to train on"):
        require_batches(arguments(tmp_path, dataloader_drop_last=True), rows(3), None)


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (1, 3), (1.5, 5), (2, 6)])
def test_steps_are_counted_as_the_trainer_counts_them(epochs: float, steps: int, tmp_path: Path) -> None:
    given = arguments(tmp_path, max_steps=-1, num_train_epochs=epochs, gradient_accumulation_steps=2)
    assert planned_steps(given, 5) == steps


def test_a_full_card_is_not_put_down_to_settings() -> None:
    with pytest.raises(torch.OutOfMemoryError), refused("training"):
        raise torch.OutOfMemoryError("no room")
    with pytest.raises(SettingsError, match="training: no such value: 'x'"), refused("training"):
        raise KeyError("x")
