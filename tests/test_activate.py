"""Activation: what a process is changed by, that it is said, that it is done once, and that all of it is taken back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from lora_runs import arguments, peft_model, rows, same, trained, trainer
from pages import blocks, page
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from warm_process import Warm

from phi3_lora_plugin import activate, attach, deactivate, latest_complete, load_recipe, resumable
from phi3_lora_plugin.hosts.activate import PARTS, ActivationError, active
from phi3_lora_plugin.hosts.trainers import CallbackError
from phi3_lora_plugin.training.resume import ResumeError


@pytest.fixture(autouse=True)
def back() -> Iterator[None]:
    yield
    deactivate()


def adapted(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_importing_changes_nothing_and_everything_is_taken_back() -> None:
    before = dict(TARGETS), dict(INTEGRATION_TO_CALLBACK), Trainer.train
    assert activate(parts=list(PARTS)) and activate(parts=list(PARTS)) == [] and active() == tuple(PARTS)
    assert (dict(TARGETS), dict(INTEGRATION_TO_CALLBACK), Trainer.train) != before
    deactivate()
    assert (dict(TARGETS), dict(INTEGRATION_TO_CALLBACK), Trainer.train) == before and active() == ()


def test_a_config_without_targets_reaches_every_projection_of_phi3() -> None:
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(tiny.model(), LoraConfig(r=2))
    assert "LoRA without target_modules goes to qkv_proj, o_proj, gate_up_proj, down_proj of a phi3 model" in activate()
    assert adapted(get_peft_model(tiny.model(), LoraConfig(r=2))) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_of_phimoe_it_reaches_attention_and_never_the_router() -> None:
    activate()
    model = get_peft_model(tiny.moe(), LoraConfig(r=2))
    assert adapted(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_what_somebody_else_put_into_the_table_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "phi3", ["o_proj"])
    assert not any("of a phi3 model" in sentence for sentence in activate())
    deactivate()
    assert TARGETS["phi3"] == ["o_proj"]


def test_a_recipe_says_the_targets_where_peft_can_place_them() -> None:
    activate(load_recipe("tiny-cpu", ["lora.targets=[qkv_proj, o_proj]"]))
    assert TARGETS["phi3"] == ["qkv_proj", "o_proj"]
    deactivate()
    said = activate(load_recipe("tiny-cpu", ["lora.targets=[q_proj, gate_proj]"]))
    assert any("q_proj, gate_proj, which PEFT alone cannot place" in sentence for sentence in said)
    assert TARGETS["phi3"] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_report_to_adds_checkpoints_as_the_recipe_has_them(tmp_path: Path) -> None:
    activate(load_recipe("tiny-cpu", ["checkpoint.every_steps=2", "checkpoint.keep_last=9"]))
    trainer(tmp_path, report_to="phi3_lora").train()
    assert [path.name[-1] for path in sorted((tmp_path / "lora").glob("step-*"))] == ["2", "4", "6"]


def test_every_trainer_is_attached_to_as_it_trains_and_trains_the_same(tmp_path: Path) -> None:
    alone = trainer(tmp_path / "alone", model=peft_model(dropout=0))
    alone.train()
    said: list[str] = []
    activate(parts=["trainers"], say=said.append)
    made = [trainer(tmp_path / name, model=peft_model(dropout=0)) for name in "ab"]
    for each in made:
        each.train()
        assert latest_complete(tmp_path / Path(each.args.output_dir).name)
    assert same(trained(made[0].model), trained(made[1].model))
    difference = max((trained(alone.model)[name] - value).abs().max() for name, value in trained(made[0].model).items())
    assert difference < 1e-5
    assert said.count("Trainer: LoRA-only checkpoints are saved next to the Trainer's own") == 2
    assert any(sentence.startswith("Trainer: speed: lora: on") for sentence in said)


def test_a_trainer_without_lora_is_left_alone(tmp_path: Path) -> None:
    said: list[str] = []
    activate(parts=["trainers"], say=said.append)
    Trainer(tiny.model(hidden_size=16, intermediate_size=32), arguments(tmp_path), train_dataset=rows()).train()
    assert said == ["Trainer unchanged: Phi3ForCausalLM has no LoRA"] and not (tmp_path / "lora").exists()


def test_a_trainer_with_a_train_of_its_own_is_told_what_it_does_not_get(tmp_path: Path) -> None:
    class Alone(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> str:
            return "trained in a way of its own"

    class Polite(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            return super().train(*args, **kwargs)

    said: list[str] = []
    activate(parts=["trainers"], say=said.append)
    for kind in (Alone, Polite):
        kind(model=peft_model(), args=arguments(tmp_path, max_steps=1), train_dataset=rows()).train()
    deactivate()
    told = [sentence for sentence in said if "its own train()" in sentence]
    assert len(told) == 1 and told[0].startswith("Alone has its own train()") and "attach(trainer)" in told[0]
    assert any(sentence.startswith("Polite: ") for sentence in said)
    assert Trainer.__init__.__qualname__ == "Trainer.__init__"
    for kind, warned in ((Alone, True), (Polite, False), (Trainer, False)):
        made = kind(model=peft_model(), args=arguments(tmp_path, max_steps=1), train_dataset=rows())
        told = attach(made, speed="off")
        assert any("has its own train()" in sentence for sentence in told) == warned


def test_a_checkpoint_of_ours_given_to_the_trainer_is_refused_with_the_way_that_works(tmp_path: Path) -> None:
    activate(parts=["trainers"], say=lambda sentence: None)
    trainer(tmp_path).train()
    saved = latest_complete(tmp_path)
    for given in (saved, str(saved), tmp_path / "lora"):
        with pytest.raises(ResumeError, match=r"LoRA-only checkpoint.*resumable\(trainer, "):
            trainer(tmp_path).train(resume_from_checkpoint=given)
    with resumable(again := trainer(tmp_path), saved) as checkpoint:
        again.train(resume_from_checkpoint=checkpoint)
    assert latest_complete(tmp_path) == saved


def test_callbacks_are_chosen_by_name(tmp_path: Path) -> None:
    activate(parts=["trainers"], callbacks=["transformers:PrinterCallback"], say=lambda sentence: None)
    made = trainer(tmp_path, disable_tqdm=False)
    made.train()
    kinds = [type(callback).__name__ for callback in made.callback_handler.callbacks]
    assert "PrinterCallback" in kinds and "LoraCheckpoint" not in kinds


def test_unknown_names_are_refused_with_what_there_is() -> None:
    with pytest.raises(CallbackError, match="callbacks: phi4 is not a plugin with callbacks; available: .*phi3"):
        activate(parts=["trainers"], callbacks=["phi4"])
    with pytest.raises(ActivationError, match="unknown part trainer; available: targets, "):
        activate(parts=["trainer"])
    assert active() == ()


def test_attach_says_which_split_names_peft_has_passed_over(tmp_path: Path) -> None:
    model = peft_model(target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    said = attach(trainer(tmp_path, model=model), speed="off")
    passed_over = "q_proj, v_proj got no LoRA: this model fuses them into qkv_proj"
    assert any(passed_over in one and "WARNING" in one for one in said)


def test_attach_changes_no_pad_token_of_rows_that_are_padded(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    pad = words.pad_token_id
    padded = {"input_ids": [1, 5, 6, pad, pad], "attention_mask": [1, 1, 1, 0, 0], "labels": [1, 5, 6, -100, -100]}
    for name, data, kept in (("padded", [padded] * 16, True), ("plain", rows(), False)):
        words = tiny.tokenizer()
        made = Trainer(peft_model(), arguments(tmp_path / name), train_dataset=data, processing_class=words)
        said = attach(made, speed="off")
        assert (words.pad_token == "<|endoftext|>") == kept
        assert any("are already padded with <|endoftext|>" in sentence for sentence in said) == kept
        stops = words.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
        assert set(stops) <= set(made.model.generation_config.eos_token_id)


def test_attach_leaves_other_models_tokens_alone(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tiny.tokenizer()
    sizes = dict(vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, task_type="CAUSAL_LM"))
    made = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(), processing_class=words)
    assert attach(made) == ["LoRA-only checkpoints are saved next to the Trainer's own"]
    made.train()
    assert words.pad_token == "<|endoftext|>" and latest_complete(tmp_path)


@pytest.mark.slow
def test_activating_imports_no_trl(warm: Warm, tmp_path: Path) -> None:
    code = "import sys; from phi3_lora_plugin import activate; activate(); print('trl' in sys.modules)"
    assert warm.run(code, cwd=tmp_path).stdout == "False\n"


def test_the_snippets_of_the_page_run(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1)
    for snippet in blocks(page("trainer"), "python"):
        exec(compile(snippet, "docs/trainer.md", "exec"), {"trainer": made})
    assert made.state.global_step == 1 and latest_complete(tmp_path) and active() == ()
