"""SFTTrainer with our head in place of TRL's: the same losses, metrics and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from phi3_lora_plugin import accelerate_phi3, add_lora
from phi3_lora_plugin.speed.apply import PARTS, slow_down

pytestmark = pytest.mark.slow

pytest.importorskip("trl.trainer.utils").__dict__.get("FusedCausalLMOutput") or pytest.skip(
    "this TRL has no fused head", allow_module_level=True
)


def trainer(folder: Path, **changes: Any) -> SFTTrainer:
    model = tiny.model(seed=1, num_key_value_heads=2)
    torch.manual_seed(0)
    model = add_lora(model, "all-linear", 4, 8)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in (9, 30, 17, 5, 22, 12, 40, 8):
        ids = torch.randint(3, 400, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    args = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=64,
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="steps",
        eval_steps=2,
    )
    return SFTTrainer(
        model,
        SFTConfig(**(args | changes)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tiny.tokenizer(),
    )


def run(made: SFTTrainer) -> tuple[list[dict[str, Any]], torch.Tensor]:
    made.train()
    keys = ("loss", "eval_loss", "entropy", "mean_token_accuracy", "eval_mean_token_accuracy", "grad_norm")
    logs = [{key: log[key] for key in keys if key in log} for log in made.state.log_history]
    return logs, torch.cat([p.detach().flatten() for p in made.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("changes", [{}, {"loss_type": "dft"}, {"packing": True, "dataset_kwargs": None}])
def test_losses_metrics_and_adapters_are_trl_s(changes: dict[str, Any], tmp_path: Path) -> None:
    stock, adapter = run(trainer(tmp_path / "a", **changes))
    made = trainer(tmp_path / "b", **changes)
    applied = {one.part: one.on for one in accelerate_phi3(made)}
    assert applied == dict.fromkeys(PARTS, True)
    ours, twin = run(made)
    assert len(ours) == len(stock)
    for mine, theirs in zip(ours, stock, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    assert torch.allclose(twin, adapter, atol=2e-5)


def test_the_head_is_really_ours_and_goes_away_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path)
    base = made.model.get_base_model()
    stock = base.forward
    accelerate_phi3(made)
    seen = []
    from phi3_lora_plugin.speed import trl_loss

    real = trl_loss.supervised_rows
    monkeypatch.setattr(
        trl_loss, "supervised_rows", lambda hidden, *rest: (seen.append(len(hidden)), real(hidden, *rest))[1]
    )
    labels = torch.full((1, 12), -100)
    labels[0, 8:] = 5
    from phi3_lora_plugin.speed import layers

    made_of, mlp = [], layers.lora_mlp
    monkeypatch.setattr(layers, "lora_mlp", lambda x, *rest: (made_of.append(x.shape[1]), mlp(x, *rest))[1])
    base.train()(input_ids=torch.full((1, 12), 7), labels=labels, fused_lm_head=True)
    assert seen == [4] and made_of == [12, 4]  # four supervised positions, not eleven
    assert base(input_ids=torch.full((1, 12), 7)).logits.shape == (1, 12, 512)
    slow_down(made.model)
    assert base.forward == stock


def test_what_cannot_be_replaced_says_so(tmp_path: Path) -> None:
    class Own(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    made = trainer(tmp_path)
    made.__class__ = Own
    (loss,) = [one for one in accelerate_phi3(made) if one.part == "loss"]
    assert not loss.on and "Own computes the loss by itself" in str(loss)
