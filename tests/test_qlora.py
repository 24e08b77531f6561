"""Runs on quantised bases through bitsandbytes, on the CPU: they learn, resume, reload and merge as plain ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from phi3_lora_plugin import add_lora, load_model, load_recipe, train
from phi3_lora_plugin.export.merge import merge
from phi3_lora_plugin.lora.inject import prepare_for_checkpointing

pytestmark = pytest.mark.slow

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that are not multiples of a block of 64, with grouped queries."""
    return tiny.base(tmp_path_factory.mktemp("qlora") / "base", num_key_value_heads=2, intermediate_size=80)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_evaluation_between_steps_takes_no_gradient_away(base: Path, kind: str, checkpointing: bool) -> None:
    model = add_lora(load_model(base, dtype="bfloat16", quantize=kind, device="cpu"), "all-linear", 4, 8)
    if checkpointing:
        prepare_for_checkpointing(model)
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # since 5.23
        enable({"use_reentrant": False})
    ids = torch.randint(3, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    before = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" not in name}

    def step() -> tuple[float, dict[str, torch.Tensor]]:
        model.train().zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, first = step()
    model.eval()
    with torch.no_grad():
        measured = float(model(input_ids=ids, labels=ids).loss)
    assert measured == pytest.approx(loss, rel=2e-2)  # int8 rounds activations where it does not train
    again, second = step()
    assert again == loss
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name} == set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].norm() > 0 for name in first if "lora_B" in name)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)


def run(base: Path, out: Path, steps: int, **options: Any) -> Any:
    chats = [tiny.chat(f"how many apples in basket {n}?", f"there are {n} apples") for n in range(24)]
    rows = tiny.write(out.parent / "rows.jsonl", chats)
    settings = [
        f"model.path={base}", "model.device=cpu", "model.dtype=bfloat16", f"data.path={rows}", "data.eval_path=null",
        "data.eval_fraction=0.2", f"output_dir={out}", f"training.max_steps={steps}", "training.eval_strategy=steps",
        "training.eval_steps=2", "training.lr_scheduler_type=constant", "training.warmup_steps=0",
        "training.learning_rate=1e-2", "checkpoint.every_steps=2", "lora.dropout=0.1",
    ]  # fmt: skip
    return train(load_recipe("tiny-cpu", [*settings, *options.pop("overrides", ())]), check=False, **options)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_learns_resumes_and_merges(base: Path, tmp_path: Path, kind: str) -> None:
    quantised = [f"model.quantize={kind}", "training.activation_checkpointing=true"]
    whole = run(base, tmp_path / "whole", 4, overrides=quantised)
    assert whole.eval_loss_after < whole.eval_loss_before
    run(base, tmp_path / "parts", 2, overrides=quantised)
    parts = run(base, tmp_path / "parts", 4, overrides=quantised, resume=True)
    one, other = (load_file(Path(result.adapter) / "adapter_model.safetensors") for result in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    plain = run(base, tmp_path / "plain", 4)
    assert whole.eval_loss_after == pytest.approx(plain.eval_loss_after, rel=0.1)

    report = merge(whole.adapter, None, tmp_path / "merged")
    (note,) = [note for note in report.notes if f"trained on a {kind} base" in note]
    assert "merged onto the unquantised base" in note and "loss on a sample text" in note
    merged = load_model(tmp_path / "merged", device="cpu")
    assert not hasattr(merged, "is_quantized") and type(merged.lm_head) is torch.nn.Linear
