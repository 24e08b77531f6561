"""A run that has gone wrong stops with a reason, and nothing that is not a number reaches the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_runs import peft_model, rows, trained, trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

from phi3_lora_plugin import LoraCheckpoint, latest_complete, verify
from phi3_lora_plugin.lora.finite import sick_weights
from phi3_lora_plugin.lora.state import StateError
from phi3_lora_plugin.training.health import HealthError, is_zero_loss, sick_log

pytestmark = pytest.mark.slow


class Poison(TrainerCallback):
    """Puts a value into one number of one trained tensor, after so many steps."""

    def __init__(self, step: int, value: float = float("nan"), where: str = "on_step_begin") -> None:
        self.step, self.value = step, value
        setattr(self, where, self._poison)

    def _poison(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            parameter = next(p for name, p in model.named_parameters() if "lora_A" in name)
            with torch.no_grad():
                parameter.view(-1)[0] = self.value


def broken_on_disk(folder: Path) -> list[str]:
    """Every tensor below a folder that is not finite, in whatever file."""
    found = []
    for file in folder.rglob("*"):
        tensors: dict[str, Any] = load_file(file) if file.suffix == ".safetensors" else {}
        if file.name == "optimizer.pt":
            states = torch.load(file, weights_only=True)["state"]
            tensors = {f"{number} {name}": one for number, state in states.items() for name, one in state.items()}
        found += [f"{file}: {name}" for name, tensor in tensors.items() if not torch.as_tensor(tensor).isfinite().all()]
    return found


SAVES = {"save_strategy": "steps", "save_steps": 1}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}
THEIRS: dict[str, dict[str, Any]] = {
    "the Trainer saves each step": SAVES,
    "and shows NaN as 0.0": SAVES | {"logging_nan_inf_filter": True},
    "and logs nothing": SAVES | {"logging_strategy": "no"},
    "and does not clip": SAVES | {"max_grad_norm": 0.0, "logging_strategy": "no"},
    "and evaluates": SAVES | EVALUATES,
    "and wants the best": SAVES | EVALUATES | {"load_best_model_at_end": True},
    "at the end of an epoch": {"save_strategy": "epoch", "logging_strategy": "no", "max_steps": 8},
    "ours alone": {"logging_strategy": "no"},
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", THEIRS)
def test_weights_that_are_not_finite_stop_the_run_and_are_never_saved(what: str, value: float, tmp_path: Path) -> None:
    last = 4 if "epoch" in what else 2
    where = "on_pre_optimizer_step" if what == "ours alone" else "on_step_begin"
    poison = Poison(7 if "epoch" in what else 2, value, where)
    ours = LoraCheckpoint(every_steps=None if "save_strategy" in THEIRS[what] else 1, keep_last=9)
    made = trainer(tmp_path, poison, ours, **({"logging_nan_inf_filter": False} | THEIRS[what]))
    with pytest.raises(HealthError, match=r"are not finite: .*lora_A|is (nan|inf) at step") as caught:
        made.train()
    assert made.state.global_step == poison.step + 1, "it stops at once"
    assert broken_on_disk(tmp_path) == []
    assert latest_complete(tmp_path).name == f"step-{last:08d}" and verify(tmp_path)
    assert not list(tmp_path.glob(f"checkpoint-{poison.step + 1}"))
    assert "not finite" in str(caught.value) or "last good checkpoint is kept" in str(caught.value)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_in_a_checkpoint(tmp_path: Path) -> None:
    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))

    made = trainer(tmp_path, Gradient(), LoraCheckpoint(), save_strategy="steps", save_steps=1)
    with pytest.raises(HealthError):
        made.train()
    assert made.state.global_step == 4 and broken_on_disk(tmp_path) == []


def test_rows_of_which_nothing_is_trained_stop_the_run(tmp_path: Path) -> None:
    for filtered in (True, False):
        out = tmp_path / str(filtered)
        settings = {"save_strategy": "steps", "save_steps": 2, "logging_nan_inf_filter": filtered}
        made = trainer(out, LoraCheckpoint(), data=rows(masked=True), **settings)
        with pytest.raises(HealthError):
            made.train()
        assert made.state.global_step <= 3 and broken_on_disk(out) == []


def zero_loss(model: Any) -> Any:
    """The model with a loss of exactly 0, as one has whose head cannot be reached."""
    forward = model.forward

    def nothing(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        found["loss"] = found["loss"] * 0.0
        return found

    model.forward = nothing
    return model


def test_a_loss_that_is_stuck_at_zero_stops_the_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, LoraCheckpoint(), model=zero_loss(peft_model()), max_steps=9)
    with pytest.raises(HealthError, match="the loss was exactly 0.0 in the last 3 logs, up to step 3: .*labels"):
        made.train()
    assert made.state.global_step == 3 and latest_complete(tmp_path) is None
    patient = trainer(tmp_path, LoraCheckpoint(zero_losses=20), model=zero_loss(peft_model()), max_steps=9)
    patient.train()
    assert patient.state.global_step == 9


def test_a_loss_that_is_very_small_is_not_stuck() -> None:
    assert not is_zero_loss({"loss": 0.0, "grad_norm": 1e-3}) and is_zero_loss({"loss": 0.0, "grad_norm": 0.0})
    assert not is_zero_loss({"loss": 0.0, "grad_norm": 0.0, "reward": 1.0, "rewards/format/mean": 1.0})
    assert is_zero_loss({"loss": 0.0, "grad_norm": float("nan")}) and not is_zero_loss({"eval_loss": 0.0})


def test_stop_ends_training_and_leaves_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = LoraCheckpoint(every_steps=1, unhealthy="stop")
    made = trainer(tmp_path, checkpoint, Poison(2))
    made.train()
    assert made.state.global_step == 3 and "not finite" in checkpoint.reason
    assert f"training stops: {checkpoint.reason}" in caplog.text
    assert latest_complete(tmp_path).name == "step-00000002" and broken_on_disk(tmp_path) == []
    good = trainer(tmp_path, checkpoint, max_steps=2)
    good.train()
    assert checkpoint.reason is None and checkpoint.saved.name == "step-00000002"


def test_ignore_trains_on_and_still_saves_nothing_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, LoraCheckpoint(every_steps=1, unhealthy="ignore"), Poison(2))
    made.train()
    assert made.state.global_step == 6
    assert latest_complete(tmp_path).name == "step-00000002" and broken_on_disk(tmp_path) == []
    said = [record.message for record in caplog.records if "is not saved" in record.message]
    assert len(said) == 4 and said[0].startswith("step 3 is not saved: ") and "not finite" in said[0]


def test_an_adapter_that_is_broken_from_the_start_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = peft_model()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("nan")
    made = trainer(tmp_path, LoraCheckpoint(), model=model)
    with pytest.raises(StateError, match="1 of 16 tensors are not finite"):
        made.train()
    assert made.state.global_step == 0 and not (tmp_path / "lora").exists()


def test_values_so_large_that_their_norm_overflows_are_no_reason(tmp_path: Path) -> None:
    model = peft_model()
    with torch.no_grad():
        for parameter in trained(model):
            model.get_parameter(parameter).fill_(3e38)
    assert sick_weights(model) is None
    with torch.no_grad():
        model.get_parameter(next(iter(trained(model))))[0, 0] = float("-inf")
    assert sick_weights(model).startswith("1 of 16 trained tensors are not finite: ")


@pytest.mark.parametrize(
    "logs", [{"loss": float("nan")}, {"loss": float("inf")}, {"loss": 1.0, "grad_norm": float("nan")}]
)
def test_each_sign_in_a_log_is_seen(logs: dict[str, float]) -> None:
    assert "at step 7" in sick_log(logs, 7)
    assert sick_log({"loss": 1.0, "grad_norm": 2.0}, 7) is None and sick_log({"eval_loss": float("nan")}, 7) is None
