"""A whole run on a tiny real model: what it trains, leaves behind and says."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lora_runs import trainer
from rich.console import Console
from safetensors.torch import load_file
from warm_process import Warm

from phi3_lora_plugin import attach, latest_complete, load_recipe, train, verify
from phi3_lora_plugin.cli.train import report
from phi3_lora_plugin.pipeline import Result, Sample, TrainingError

pytestmark = pytest.mark.slow

WORDS = "fox dog apples basket paris france jumps lazy three brown".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and forty chats of which every answer is one word."""
    folder = tmp_path_factory.mktemp("place")
    tiny.base(folder / "base")
    tiny.write(folder / "chats.jsonl", [tiny.chat(f"what about the {word}?", word) for word in WORDS * 4])
    return folder


def recipe(place: Path, out: Path, *overrides: str) -> Any:
    settings = [
        f"model.path={place / 'base'}", f"data.path={place / 'chats.jsonl'}", "data.eval_path=null",
        "data.eval_fraction=0.2", "data.max_length=64", "training.num_train_epochs=null", "training.max_steps=12",
        "training.logging_steps=4", "training.learning_rate=0.02", f"output_dir={out}",
    ]  # fmt: skip
    return load_recipe("tiny-cpu", [*settings, *overrides])


@pytest.mark.usefixtures("reload_in_fork")
def test_a_run_leaves_a_checked_adapter_and_says_what_it_did(place: Path, tmp_path: Path) -> None:
    said = StringIO()
    given = recipe(place, tmp_path / "run")
    result = train(given, samples=2, console=Console(file=said, width=200))

    assert (result.status, result.steps) == ("done", 12)
    assert result.eval_loss_after < result.eval_loss_before
    assert result.reload_difference == 0.0
    adapter = Path(result.adapter)
    assert adapter == latest_complete(tmp_path / "run") and verify(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors) and all(t.any() for n, t in tensors.items() if "lora_B" in n)
    assert sum(t.numel() for t in tensors.values()) == result.trainable_parameters
    # What was run can be read again, and run again.
    assert load_recipe(tmp_path / "run" / "recipe.yaml").digest() == given.digest()
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["rows_read"] == 40
    assert json.loads(result.to_json())["steps"] == 12
    assert len(result.samples) == 2 and result.samples[0].expected in WORDS
    text = said.getvalue()
    for part in ("qkv_proj", "gate_up_proj", "speed: loss: on", "held-out loss before training", "step 12/12"):
        assert part in text
    end = StringIO()
    report(result, "again", Console(file=end, width=200))
    for part in ("held-out loss", "phi3-lora chat", "phi3-lora eval", "phi3-lora export", str(adapter)):
        assert part in end.getvalue()


def test_the_report_shows_any_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    odd = Sample("[b]x[/i] [/INST]", "\x1b[31m", "[/]", "[red]")
    result = Result(
        "done", "out", "runs/[1]/lora", "base", 1, 1.0, 9, 1.0, 0.5, 2.0, 1.0, 1, 10, 100, 1000, 0.0, samples=(odd,)
    )
    report(result, "again", Console(width=200))
    shown = capsys.readouterr().out
    for part in ("[b]x[/i] [/INST]", "\\x1b[31m", "[/]", "[red]", "runs/[1]/lora"):
        assert part in shown


def test_the_adapter_opens_with_nothing_but_transformers_and_peft(place: Path, tmp_path: Path, warm: Warm) -> None:
    result = train(recipe(place, tmp_path / "run", "training.max_steps=2"), check=False)
    program = (
        "import sys; from transformers import AutoModelForCausalLM; from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({result.adapter!r})\n"
        "assert not any(name.startswith('phi3_lora') for name in sys.modules)\n"
        "print(sum(p.numel() for n, p in model.named_parameters() if 'lora_' in n))"
    )
    done = warm.run(program, cwd=tmp_path, plain=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == result.trainable_parameters


@pytest.mark.usefixtures("reload_in_fork")
@pytest.mark.parametrize("how", ["training.bf16=true", "model.dtype=bfloat16"])
def test_sixteen_bits_are_no_reason_to_doubt_an_adapter(how: str, place: Path, tmp_path: Path) -> None:
    """Mixed precision rounds in training only; rounding grows with the logits, here of some hundreds."""
    model = tiny.model(eos_token_id=400, pad_token_id=400)
    model.lm_head.weight.data *= 1000
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    targets = "lora.targets=[q_proj, v_proj, up_proj]"
    changed = (f"model.path={tmp_path / 'base'}", "training.max_steps=3", "training.learning_rate=0.002", targets)
    result = train(recipe(place, tmp_path / "run", *changed, how))
    assert result.status == "done" and result.reload_difference is not None
    if how.startswith("training"):
        assert result.reload_difference < 1e-3


def test_only_lora_moves_whatever_the_speed(place: Path, tmp_path: Path) -> None:
    """Fast paths on and off, packed and not, end in the same losses; the base is the same bytes afterwards."""
    before = (place / "base" / "model.safetensors").read_bytes()
    fast = train(recipe(place, tmp_path / "fast"), check=False)
    slow = train(recipe(place, tmp_path / "slow", "speed=off"), check=False)
    assert fast.eval_loss_after == pytest.approx(slow.eval_loss_after, abs=1e-4)
    assert fast.train_loss == pytest.approx(slow.train_loss, abs=1e-4)
    packed = train(recipe(place, tmp_path / "packed", "data.packing=true"), check=False)
    assert packed.eval_loss_after < packed.eval_loss_before
    assert packed.eval_loss_before == pytest.approx(fast.eval_loss_before, abs=1e-6)
    assert (place / "base" / "model.safetensors").read_bytes() == before


def test_a_run_that_goes_wrong_stops_with_the_reason_and_saves_nothing_of_it(place: Path, tmp_path: Path) -> None:
    wild = ("training.learning_rate=1.0e+30", "training.lr_scheduler_type=constant", "training.logging_steps=1")
    with pytest.raises(TrainingError, match=r"not finite|is (nan|inf)"):
        train(recipe(place, tmp_path / "run", *wild, "checkpoint.every_steps=1", "training.max_grad_norm=0"))
    for file in (tmp_path / "run").rglob("adapter_model.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


def test_tensorboard_is_written_if_asked(place: Path, tmp_path: Path) -> None:
    asked = ("training.report_to=tensorboard", "training.max_steps=2", "training.logging_steps=1")
    train(recipe(place, tmp_path / "run", *asked), check=False)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_attach_adds_checkpoints_once(place: Path, tmp_path: Path) -> None:
    from phi3_lora_plugin import LoraCheckpoint, add_lora, load_model, load_tokenizer

    made = trainer(
        tmp_path / "out",
        model=add_lora(load_model(place / "base", device="cpu"), "all-linear", 2, 4),
        data=[{"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7]}] * 4,
        max_steps=2,
    )
    made.processing_class = load_tokenizer(place / "base")
    assert attach(made, every_steps=1, keep_last=1)
    attach(made)
    assert sum(isinstance(one, LoraCheckpoint) for one in made.callback_handler.callbacks) == 1
    made.train()
    assert [path.name for path in (tmp_path / "out" / "lora").glob("step-*")] == ["step-00000002"]
