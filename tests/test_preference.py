"""`preference.loss`: pairs in, DPO against the bare base, LoRA-only checkpoints out, going on exactly."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lora_runs import same
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from phi3_lora_plugin import Recipe, RecipeError, encode, load_recipe, load_tokenizer, train
from phi3_lora_plugin.chat.dataset import DataError, load_data
from phi3_lora_plugin.training.trl_trainers import ObjectiveError

pytestmark = pytest.mark.slow

pytest.importorskip("trl.trainer.dpo_trainer")
try:
    import phi3_lora_plugin.training.preference  # noqa: F401
except ObjectiveError as missing:
    pytest.skip(str(missing), allow_module_level=True)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def pair(number: str, turn: int) -> dict[str, Any]:
    (ask, good), (_, bad) = (tiny.turns(f"what is {number}?", text) for text in (f"\n it is {number}.", "who knows"))
    shapes = [
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"chosen": [ask, good], "rejected": [ask, bad]},
        {"instruction": ask["content"], "chosen": good["content"], "rejected": bad["content"]},
    ]
    return shapes[turn % 3]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    tiny.base(folder / "base")
    tiny.write(folder / "pairs.jsonl", [pair(number, turn) for turn, number in enumerate(NUMBERS)])
    return folder


def recipe(place: Path, out: Path, *more: str) -> Recipe:
    given = [
        f"model.path={place / 'base'}", "model.dtype=float32", "model.device=cpu", f"data.path={place / 'pairs.jsonl'}",
        "data.eval_path=null", "data.eval_fraction=0.25", "preference.loss=sigmoid", "preference.beta=0.3",
        "training.max_steps=6", "training.num_train_epochs=null", "training.per_device_train_batch_size=2",
        "training.learning_rate=1e-2", "training.logging_steps=1", "checkpoint.every_steps=2", "checkpoint.keep_last=9",
        f"output_dir={out}",
    ]  # fmt: skip
    return load_recipe("tiny-cpu", [*given, *more])


def log_probability(model: Any, row: dict[str, list[int]]) -> torch.Tensor:
    """Of what is trained of one row, summed, by full logits."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, labels.clamp(min=0)[:, None])[:, 0][labels != -100].sum()


@pytest.mark.usefixtures("reload_in_fork")
@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, v_proj, down_proj]"])
def test_a_run_learns_and_its_loss_is_that_of_the_paper(targets: str, place: Path, tmp_path: Path) -> None:
    run = recipe(place, tmp_path / "run", f"lora.targets={targets}")
    result = train(run)  # with the check that plain PEFT reloads the same logits
    assert result.eval_loss_before == pytest.approx(math.log(2), abs=1e-5)  # the reference is the bare base
    assert result.status == "done" and result.eval_loss_after < 0.6
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), result.adapter).eval()
    assert list(adapted.peft_config) == ["default"]
    held_out = load_data(run, load_tokenizer(place / "base"), {}).eval
    losses = []
    for row in held_out:
        halves = [{key: row[key][part] for key in ("input_ids", "labels")} for part in
                  (slice(None, row["cut"]), slice(row["cut"], None))]  # fmt: skip
        chosen, rejected = (log_probability(adapted, half) - log_probability(base, half) for half in halves)
        losses.append(-F.logsigmoid(0.3 * (chosen - rejected)).item())
    assert result.eval_loss_after == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert not any(".ref." in name for name in load_file(Path(result.adapter) / "adapter_model.safetensors"))


def test_rows_are_two_chats_as_our_encoder_has_them(place: Path, tmp_path: Path) -> None:
    words = load_tokenizer(place / "base")
    rows = load_data(recipe(place, tmp_path, "data.eval_fraction=0"), words, {}).train
    made = [encode(tiny.turns("what is one?", text), words) for text in ("\n it is one.", "who knows")]
    assert rows[0]["cut"] == len(made[0]["input_ids"])
    for key in ("input_ids", "labels"):
        assert rows[0][key] == made[0][key] + made[1][key]


def test_a_run_that_was_cut_off_goes_on_exactly(place: Path, tmp_path: Path) -> None:
    whole, cut = (recipe(place, tmp_path / name) for name in ("whole", "cut"))
    train(whole, check=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / "lora" / f"step-{step:08d}")
    assert train(cut, resume=True, check=False).steps == 6
    ended = [load_file(tmp_path / name / "lora/step-00000006/adapter_model.safetensors") for name in ("whole", "cut")]
    assert same(*ended)


def test_fast_paths_change_nothing(place: Path, tmp_path: Path) -> None:
    losses = [
        train(recipe(place, tmp_path / speed, f"speed={speed}"), check=False).eval_loss_after
        for speed in ("auto", "off")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_prompts_are_held_out_whole(place: Path, tmp_path: Path) -> None:
    rows = [row | {"rejected": other} for row in (pair(number, 2) for number in NUMBERS) for other in ("no", "never")]
    path = tiny.write(tmp_path / "twice.jsonl", rows)
    words = load_tokenizer(place / "base")
    data = load_data(recipe(place, tmp_path, f"data.path={path}", "data.eval_fraction=0.5"), words, {})
    prompts = [{tuple(row["input_ids"][: row["cut"]]) for row in part} for part in (data.train, data.eval)]
    assert len(prompts[0]) == len(prompts[1]) == 4 and not prompts[0] & prompts[1]


def test_what_is_wrong_is_said_before_anything_is_trained(place: Path, tmp_path: Path) -> None:
    bad = [pair("one", 0), {"prompt": "a", "chosen": "b"}, pair("two", 0) | {"rejected": "x <|end|>"}]
    path = tiny.write(tmp_path / "bad.jsonl", bad)
    words = load_tokenizer(place / "base")
    with pytest.raises(DataError) as caught:
        load_data(recipe(place, tmp_path, f"data.path={path}"), words, {})
    said = "\n".join(caught.value.problems)
    assert "bad.jsonl:2: has no column 'rejected'" in said and "bad.jsonl:3: rejected: message 2" in said
    with pytest.raises(RecipeError, match="label_smoothing: has no effect with preference.loss: ipo"):
        recipe(place, tmp_path, "preference.loss=ipo", "preference.label_smoothing=0.1")
    with pytest.raises(RecipeError, match="pairs are not packed(.|\n)*pissa does not start at the base model"):
        recipe(place, tmp_path, "data.packing=true", "lora.init=pissa")
