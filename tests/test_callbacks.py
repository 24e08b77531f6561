"""`LoraCheckpoint` in Trainer scripts as people write them: what it saves, when, and what it leaves alone."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loralib
import pytest
import tiny
import torch
from lora_runs import arguments, holder, peft_model, rows, same, trained, trainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from warm_process import Warm

from phi3_lora_plugin import LoraCheckpoint, attach, latest_complete, load_lora_state_dict, verify
from phi3_lora_plugin.lora.state import StateError, lora_state_dict
from phi3_lora_plugin.store.adapter_files import LORALIB, SIDECAR
from phi3_lora_plugin.store.checkpoint import best
from phi3_lora_plugin.store.lock import StoreBusy
from phi3_lora_plugin.store.manifest import read_manifest
from phi3_lora_plugin.training.callbacks import CheckpointError

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"


def steps(store: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in store.glob("step-*"))


def files(folder: Path, *without: str) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(without)}


# --- one line in a script ----------------------------------------------------------------------------------------


def test_a_trainer_script_with_one_line_more_leaves_an_adapter_that_peft_loads_exactly(tmp_path: Path) -> None:
    model = peft_model()
    trainer(tmp_path, LoraCheckpoint(), model=model).train()
    found = latest_complete(tmp_path)
    assert found == tmp_path / "lora" / "step-00000006" and verify(tmp_path)
    assert sorted(p.name for p in found.iterdir()) == ["adapter_config.json", WEIGHTS, "manifest.json", "resume"]
    manifest = read_manifest(found)
    assert manifest["step"] == 6 and manifest["lora"]["r"] == 4 and manifest["world_size"] == 1
    loaded = PeftModel.from_pretrained(tiny.model(hidden_size=16, intermediate_size=32), found)
    ids = torch.tensor([rows()[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_an_sft_script_with_one_line_more(tmp_path: Path) -> None:
    from datasets import Dataset

    pytest.importorskip("trl")
    from trl import SFTConfig, SFTTrainer

    chats = [
        {"messages": [{"role": "user", "content": f"what about {word}?"}, {"role": "assistant", "content": word}]}
        for word in "fox dog apples basket paris france".split()
    ]
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, save_strategy="steps", save_steps=2,
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, max_length=64,
        bf16=False,  # which accelerate would remember for the tests that follow
    )  # fmt: skip
    made = SFTTrainer(
        model=tiny.model(hidden_size=16, intermediate_size=32),
        args=config,
        train_dataset=Dataset.from_list(chats),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[LoraCheckpoint()],
    )
    made.train()
    assert steps(tmp_path / "lora") == [2, 3] and verify(tmp_path)
    found = latest_complete(tmp_path)
    names = {path.name for path in found.iterdir()}
    assert {WEIGHTS, "adapter_config.json", "manifest.json", "tokenizer.json", "tokenizer_config.json"} <= names
    manifest = read_manifest(found)
    assert manifest["template"]["name"] and manifest["tokenizer"] and manifest["data"]["rows"] == 6
    assert files(tmp_path / "checkpoint-3")[WEIGHTS] and same(
        load_file(found / WEIGHTS), load_file(tmp_path / "checkpoint-3" / WEIGHTS)
    )


def test_attach_is_one_line_on_a_trainer_that_exists(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert attach(made, every_steps=2, keep_last=9) and attach(made) == []
    made.train()
    assert steps(tmp_path / "lora") == [2, 4, 6]


@pytest.mark.parametrize("trained", [{"trainable_token_indices": [5, 9]}, {"modules_to_save": ["embed_tokens"]}])
def test_attach_takes_models_whose_embeddings_are_trained(trained: dict[str, Any], tmp_path: Path) -> None:
    made = trainer(tmp_path, model=peft_model(target_modules=["qkv_proj"], **trained), max_steps=1)
    made.processing_class = tiny.tokenizer()
    attach(made)
    made.train()
    assert verify(latest_complete(tmp_path))


def test_without_lora_it_refuses_before_the_first_step(tmp_path: Path) -> None:
    made = trainer(tmp_path, LoraCheckpoint(), model=tiny.model(hidden_size=16, intermediate_size=32))
    with pytest.raises(StateError, match="Phi3ForCausalLM has no LoRA parameters: nothing to save"):
        made.train()
    assert made.state.global_step == 0 and not (tmp_path / "lora").exists()


def test_other_trained_parameters_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = peft_model()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    trainer(tmp_path, LoraCheckpoint(), model=model, max_steps=1).train()
    assert "1 trained parameters are not LoRA and are not saved: base_model.model.model.norm.weight" in caplog.text


@pytest.mark.parametrize("wrong", [{"every_steps": 0}, {"format": "pt"}, {"unhealthy": "maybe"}, {"keep_last": 0}])
def test_senseless_settings_are_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected "):
        LoraCheckpoint(**wrong)


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["peft", "loralib", "both"])
def test_each_format_holds_the_trained_adapter(format: str, tmp_path: Path) -> None:
    model = peft_model()
    trainer(tmp_path, LoraCheckpoint(format=format), model=model, max_steps=2).train()
    found = latest_complete(tmp_path)
    assert ((found / WEIGHTS).exists(), (found / LORALIB).exists()) == (format != "loralib", format != "peft")
    live = lora_state_dict(model)
    if format != "loralib":
        saved = load_file(found / WEIGHTS)
        assert len(saved) == len(live)
        assert all(torch.equal(saved[key.replace(".default.", ".")], tensor) for key, tensor in live.items())
    if format != "peft":
        saved = load_file(found / LORALIB)
        assert saved and all("lora_" in key for key in saved)
        other = peft_model(seed=9)
        load_lora_state_dict(other, saved)
        assert same(lora_state_dict(other), live)
        assert json.loads((found / SIDECAR).read_text())["r"] == 4


def test_a_format_that_cannot_hold_the_adapter_is_refused_before_the_first_step(tmp_path: Path) -> None:
    made = trainer(tmp_path, LoraCheckpoint(format="loralib"), model=peft_model(use_dora=True))
    with pytest.raises(ValueError, match="(?i)dora"):
        made.train()
    assert made.state.global_step == 0 and not (tmp_path / "lora").exists()


def test_of_several_adapters_the_trained_one_is_saved_or_the_one_that_is_named(tmp_path: Path) -> None:
    def two() -> Any:
        model = peft_model(r=4)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
        model.set_adapter("second")
        return model

    trainer(tmp_path / "trained", LoraCheckpoint(), model=two(), max_steps=1).train()
    trainer(tmp_path / "named", LoraCheckpoint(adapter="default"), model=two(), max_steps=1).train()
    ranks = [
        json.loads((latest_complete(tmp_path / name) / "adapter_config.json").read_text())["r"]
        for name in ("trained", "named")
    ]
    assert ranks == [2, 4]
    made = trainer(tmp_path / "none", LoraCheckpoint(adapter="third"), model=two(), max_steps=1)
    with pytest.raises(StateError, match="'third'.*default, second"):
        made.train()


def test_models_with_lora_but_without_peft_s_wrapper(tmp_path: Path) -> None:
    from peft import inject_adapter_in_model

    added, injected = (tiny.model(hidden_size=16, intermediate_size=32) for _ in range(2))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    added.add_adapter(config, "mine")
    injected = inject_adapter_in_model(LoraConfig(r=4, target_modules=["o_proj"]), injected)
    for name, model in (("added", added), ("injected", injected)):
        trainer(tmp_path / name, LoraCheckpoint(), model=model, max_steps=2).train()
        found = latest_complete(tmp_path / name)
        loaded = PeftModel.from_pretrained(tiny.model(hidden_size=16, intermediate_size=32), found)
        ids = torch.tensor([rows()[0]["input_ids"]])
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits), name


def _loralib_model() -> Any:
    model = tiny.model(hidden_size=16, intermediate_size=32)
    torch.manual_seed(0)
    for layer in model.model.layers:
        old = layer.self_attn.o_proj
        layer.self_attn.o_proj = loralib.Linear(16, 16, r=4, lora_alpha=8, lora_dropout=0.1, bias=False)
        layer.self_attn.o_proj.weight.data.copy_(old.weight)
    loralib.mark_only_lora_as_trainable(model)
    return model


@pytest.mark.parametrize("load_best", [False, True])
def test_a_loralib_model_is_never_saved_with_merged_weights(load_best: bool, tmp_path: Path) -> None:
    model = _loralib_model()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    model.eval()  # merged, as a script may have it
    settings = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, max_steps=3)
    made = trainer(tmp_path, LoraCheckpoint(), model=model, load_best_model_at_end=load_best, **settings)
    made.train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        saved = load_file(checkpoint / "model.safetensors")
        assert all(torch.equal(saved[name], base[name]) for name in saved if name in base), checkpoint.name
    assert latest_complete(tmp_path).name == "step-00000003"
    saved = load_file(latest_complete(tmp_path) / LORALIB)
    assert len(saved) == 4 and all("lora_" in name for name in saved) and any(tensor.any() for tensor in saved.values())
    ids = torch.tensor([rows()[0]["input_ids"]])
    before = made.evaluate()["eval_loss"]
    model.eval()
    merged = model(ids).logits
    assert model.model.layers[0].self_attn.o_proj.merged, "once training is over eval() merges as loralib has it"
    assert made.evaluate()["eval_loss"] == pytest.approx(before, abs=1e-5)
    layer = model.model.layers[0].self_attn.o_proj
    assert not layer.merged and not layer.training and not layer.lora_dropout.training, "the mode stays as it was"
    made.save_model(str(tmp_path / "by hand"))
    saved = load_file(tmp_path / "by hand" / "model.safetensors")
    assert all(torch.allclose(saved[name], base[name], atol=1e-6) for name in saved if name in base)
    assert torch.allclose(model(ids).logits, merged, atol=1e-5)


# --- schedules ---------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    "only the end": ({}, {}, [6]),
    "with the Trainer": ({}, {"save_strategy": "steps", "save_steps": 2}, [2, 4, 6]),
    "with the Trainer's epochs": ({}, {"save_strategy": "epoch"}, [4, 6]),
    "with evaluations": ({}, {"eval_strategy": "steps", "eval_steps": 3}, [3, 6]),
    "its own": ({"every_steps": 4}, {}, [4, 6]),
    "its own, not the Trainer's": ({"every_steps": 4}, {"save_strategy": "steps", "save_steps": 3}, [4, 6]),
    "its own, not the evaluations'": ({"every_steps": 5}, {"eval_strategy": "steps", "eval_steps": 2}, [5, 6]),
    "accumulation": (
        {"every_steps": 2}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, [2, 4, 6]
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SCHEDULES)
def test_it_saves_on_its_schedule_and_the_end_in_any_case(what: str, tmp_path: Path) -> None:
    ours, theirs, expected = SCHEDULES[what]
    trainer(tmp_path, LoraCheckpoint(keep_last=9, **ours), **theirs).train()
    assert steps(tmp_path / "lora") == expected and verify(tmp_path / "lora")


def test_best_is_by_the_trainer_s_metric_and_stays(tmp_path: Path) -> None:
    losses = iter([0.9, 0.2, float("nan"), 0.5, 0.7, 0.8])

    class Fixed(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": next(losses), "eval_other": 1.0}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    made = Fixed(
        model=peft_model(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[LoraCheckpoint(keep_last=2, keep_best=1)],
    )
    made.train()
    assert steps(tmp_path / "lora") == [2, 5, 6]
    assert (tmp_path / "lora" / "BEST").read_text() == "step-00000002\n"
    assert best(tmp_path / "lora") == tmp_path / "lora" / "step-00000002"
    assert read_manifest(best(tmp_path / "lora"))["metric"] == {
        "name": "eval_loss", "value": 0.2, "greater_is_better": False
    }  # fmt: skip


def test_an_evaluation_that_is_not_a_number_does_not_keep_the_checkpoint_from_being_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masked = rows(4, masked=True)
    made = trainer(tmp_path, LoraCheckpoint(unhealthy="ignore"), evaluated=masked, eval_strategy="steps", eval_steps=3)
    made.train()
    assert steps(tmp_path / "lora") == [3, 6] and "metric" not in read_manifest(latest_complete(tmp_path))
    assert "eval_loss is nan" in caplog.text


def test_of_several_evaluation_sets_the_one_with_the_metric_counts(tmp_path: Path) -> None:
    sets = {"first": rows(4, seed=2), "second": rows(4, seed=3)}
    made = trainer(
        tmp_path, LoraCheckpoint(), evaluated=sets, eval_strategy="steps", eval_steps=3,
        metric_for_best_model="eval_first_loss",
    )  # fmt: skip
    made.train()
    assert read_manifest(latest_complete(tmp_path))["metric"]["name"] == "eval_first_loss"


def test_last_best_and_every_are_kept(tmp_path: Path) -> None:
    settings = dict(eval_strategy="steps", eval_steps=1, max_steps=10, learning_rate=0.5, lr_scheduler_type="constant")
    made = trainer(tmp_path, LoraCheckpoint(keep_last=2, keep_best=1, keep_every=5), **settings)
    made.train()
    losses = [(log["eval_loss"], log["step"]) for log in made.state.log_history if "eval_loss" in log]
    assert steps(tmp_path / "lora") == sorted({min(losses)[1], 5, 9, 10})
    kept = [path for path in (tmp_path / "lora").glob("step-*") if (path / "resume").is_dir()]
    assert sorted(path.name for path in kept) == ["step-00000009", "step-00000010"]


@pytest.mark.parametrize("ours", [{}, {"every_steps": 4}])
def test_the_best_weights_are_loaded_back_and_both_they_and_the_last_are_in_the_store(
    ours: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = dict(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        learning_rate=0.5, lr_scheduler_type="constant", max_steps=6,
    )  # fmt: skip
    ends = []
    for name, callbacks in (("without", ()), ("with", (LoraCheckpoint(keep_last=1, **ours),))):
        made = trainer(tmp_path / name, *callbacks, **settings)
        with caplog.at_level(logging.WARNING):
            made.train()
        ends.append(trained(made.model))
        assert "Could not locate the best model" not in caplog.text
    assert same(*ends)
    number = int(made.state.best_model_checkpoint.rpartition("-")[2])
    assert number < 6, "this test needs a run that gets worse"
    store = tmp_path / "with" / "lora"
    assert best(store).name == f"step-{number:08d}" and latest_complete(store).name == "step-00000006"
    for ours_, theirs in ((best(store), number), (latest_complete(store), 6)):
        assert same(load_file(ours_ / WEIGHTS), load_file(tmp_path / "with" / f"checkpoint-{theirs}" / WEIGHTS))
    live = {key.replace(".default.", "."): tensor for key, tensor in lora_state_dict(made.model).items()}
    assert same(load_file(best(store) / WEIGHTS), live)
    assert (latest_complete(store) / "resume" / "optimizer.pt").is_file()


def test_the_last_state_is_kept_where_training_is_stopped_and_the_best_is_loaded_over_it(tmp_path: Path) -> None:
    class Stops(TrainerCallback):
        live: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 5:
                control.should_training_stop = True
                self.live = {key.replace(".default.", "."): t.clone() for key, t in lora_state_dict(model).items()}

    stops = Stops()
    made = trainer(
        tmp_path, stops, LoraCheckpoint(), save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, learning_rate=0.5, lr_scheduler_type="constant", max_steps=8,
    )  # fmt: skip
    made.train()
    found = latest_complete(tmp_path)
    assert found.name == "step-00000005" and (found / "resume" / "optimizer.pt").is_file()
    assert same(load_file(found / WEIGHTS), stops.live)
    assert not same(trained(made.model), stops.live), "the best is another one"


# --- the Trainer's own files -------------------------------------------------------------------------------------


class Disturbing(TrainerCallback):
    """Draws random numbers and asks for a save, as other people's callbacks do."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.rand(3)
        control.should_save = state.global_step == 5


@pytest.mark.parametrize("order", ["last", "first", "between"])
@pytest.mark.parametrize("background", [False, True])
def test_the_trainer_s_own_files_are_the_same_with_and_without_us(
    order: str, background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.0)  # run times are in the Trainer's logs
    settings = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=2)

    def run(name: str, ours: bool, **more: Any) -> Trainer:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)  # its logs hold the output folder
        checkpoint = [LoraCheckpoint(background=background)] if ours else []
        callbacks = {
            "last": [Disturbing(), *checkpoint], "first": [*checkpoint, Disturbing()],
            "between": [TrainerCallback(), *checkpoint, Disturbing()],
        }[order]  # fmt: skip
        made = trainer(Path("out"), *callbacks, **settings, **more)
        if order == "first" and ours:
            handler = made.callback_handler.callbacks
            handler.insert(0, handler.pop(handler.index(checkpoint[0])))  # even before the Trainer's own flow
        return made

    run("without", False).train()
    run("with", True).train()
    plain, ours = files(tmp_path / "without" / "out"), files(tmp_path / "with" / "out", "lora/")
    assert plain.keys() == ours.keys() and any(name.startswith("checkpoint-5/") for name in plain)
    assert [name for name in plain if plain[name] != ours[name] and "training_args" not in name] == []
    assert verify(tmp_path / "with" / "out")


def test_our_hooks_change_no_byte_of_the_trainer_s_checkpoint(tmp_path: Path) -> None:
    seen: dict[str, dict[str, bytes]] = {}

    class Before(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[f"checkpoint-{state.global_step}"] = files(tmp_path / f"checkpoint-{state.global_step}")

    trainer(tmp_path, Before(), LoraCheckpoint(format="both"), save_strategy="steps", save_steps=2).train()
    assert list(seen) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert all(files(tmp_path / name) == content for name, content in seen.items())


def test_the_trainer_s_own_checkpoints_resume_as_without_us(tmp_path: Path) -> None:
    ends = []
    for name, ours in (("without", False), ("with", True)):

        def build() -> Trainer:
            checkpoint = [LoraCheckpoint(every_steps=1)] if ours else []  # noqa: B023 - called in this turn
            return trainer(tmp_path / name, *checkpoint, save_strategy="steps", save_steps=2, max_steps=4)  # noqa: B023

        whole = build()
        whole.train()
        broken = build()
        broken.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        ends += [whole, broken]
    assert all(same(trained(end.model), trained(ends[0].model)) for end in ends)
    assert all(same(end.optimizer.state_dict(), ends[0].optimizer.state_dict()) for end in ends)
    store = tmp_path / "with" / "lora"
    assert steps(store) == [3, 4] and verify(store), "what lay behind the step that was gone back to is aside"
    assert steps(store / "earlier-1") == [3, 4]


# --- other ways to run -------------------------------------------------------------------------------------------


def test_a_push_to_the_hub_leaves_our_store_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects
    from transformers import trainer as module

    pushed: list[str] = []

    def upload(*args: Any, folder_path: str, ignore_patterns: list[str], **kwargs: Any) -> Future[None]:
        found = (str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file())
        pushed.extend(filter_repo_objects(found, ignore_patterns=ignore_patterns))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    class Hub:
        """What the Trainer asks of the hub."""

        upload_folder = staticmethod(upload)
        create_repo = staticmethod(lambda name, **_: type("Repository", (), {"repo_id": name}))

    for place, value in (("hf_api", Hub), ("upload_folder", upload), ("create_repo", Hub.create_repo)):
        if hasattr(module, place):
            monkeypatch.setattr(module, place, value)
    monkeypatch.setattr(Trainer, "create_model_card", lambda *_, **__: None)
    made = trainer(
        tmp_path, LoraCheckpoint(every_steps=1), push_to_hub=True, hub_model_id="me/mine", hub_strategy="every_save",
        save_strategy="steps", save_steps=2, max_steps=4,
    )  # fmt: skip
    made.train()
    made.push_to_hub(blocking=True)
    assert WEIGHTS in pushed and not [name for name in pushed if "step-" in name]
    assert steps(tmp_path / "_lora") == [3, 4] and not (tmp_path / "lora").exists()
    assert latest_complete(tmp_path) == tmp_path / "_lora" / "step-00000004"


@dataclass(frozen=True)
class Trial:
    """What optuna hands to a Trainer."""

    number: int
    params: dict[str, float]


@pytest.mark.parametrize("bound", [False, True])
def test_trials_of_a_hyperparameter_search_have_a_store_each(
    bound: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import integrations
    from transformers.trainer_utils import HPSearchBackend

    monkeypatch.setattr(integrations, "hp_params", lambda trial: trial.params)  # which asks whether optuna is there
    checkpoint = LoraCheckpoint(tmp_path / "elsewhere")
    made = Trainer(model_init=lambda: peft_model(), args=arguments(tmp_path, max_steps=2), train_dataset=rows())
    made.add_callback(checkpoint)
    made.hp_search_backend, made.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    if bound:
        attach(made)
    stores = []
    for number in (3, 4):
        made.train(trial=Trial(number, {"learning_rate": 10.0**-number}))
        assert checkpoint.saved.name == "step-00000002" and verify(checkpoint.saved)
        stores.append(checkpoint.saved.parent)
    assert stores == [tmp_path / f"run-{number}" / "lora" for number in ((3, 4) if bound else (0, 1))]
    assert not (tmp_path / "elsewhere").exists()


def test_two_runs_one_after_the_other_in_one_folder(tmp_path: Path) -> None:
    trainer(tmp_path, LoraCheckpoint(every_steps=3)).train()
    first = files(tmp_path / "lora" / "step-00000006")
    trainer(tmp_path, LoraCheckpoint(every_steps=2), max_steps=4, seed=9).train()
    assert steps(tmp_path / "lora") == [2, 4] and steps(tmp_path / "lora" / "earlier-1") == [3, 6]
    assert files(tmp_path / "lora" / "earlier-1" / "step-00000006") == first, "nothing of the first run is lost"


def test_a_second_run_in_the_folder_of_a_running_one_is_refused_before_its_first_step(tmp_path: Path) -> None:
    trainer(tmp_path, LoraCheckpoint(), max_steps=1).train()
    other = holder(tmp_path / "lora")
    made = trainer(tmp_path, LoraCheckpoint())
    with pytest.raises(StoreBusy, match=f"in use by another run .process {other.pid} on"):
        made.train()
    assert made.state.global_step == 0
    other.kill()
    other.wait()
    made.train()
    assert made.state.global_step == 6 and verify(tmp_path)


def test_a_run_that_failed_does_not_keep_the_next_one_out(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("out of memory")

    made = trainer(tmp_path, LoraCheckpoint(every_steps=1, background=True), Fails())
    with pytest.raises(RuntimeError, match="out of memory"):
        made.train()
    made.remove_callback(Fails)
    made.train()
    trainer(tmp_path, LoraCheckpoint(), max_steps=1).train()
    assert verify(tmp_path)


# --- bytes -------------------------------------------------------------------------------------------------------


def test_the_adapter_is_its_numbers_and_a_header(tmp_path: Path) -> None:
    model = peft_model()
    made = trainer(tmp_path, LoraCheckpoint(), model=model, max_steps=1)
    made.processing_class = made.callback_handler.processing_class = tiny.tokenizer()
    made.train()
    found = latest_complete(tmp_path)
    raw = (found / WEIGHTS).read_bytes()
    header = int.from_bytes(raw[:8], "little")
    live = lora_state_dict(model)
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in live.values())
    assert len(raw) == 8 + header + numbers
    saved = load_file(found / WEIGHTS)
    assert {key.replace(".default.", "."): (t.shape, t.dtype) for key, t in live.items()} == {
        key: (t.shape, t.dtype) for key, t in saved.items()
    }
    assert all(torch.isfinite(tensor).all() and tensor.numel() for tensor in saved.values())


def test_the_size_is_that_of_the_lora_and_the_tokenizer(tmp_path: Path) -> None:
    """Rank 64 on a wider model: where numbers are many, what lies around them has to be small."""
    base = tiny.model(hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    model = get_peft_model(base, LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"))
    made = trainer(tmp_path, LoraCheckpoint(resume=False), model=model, max_steps=1)
    words = tiny.tokenizer()
    made.processing_class = made.callback_handler.processing_class = words
    made.train()
    words.save_pretrained(tmp_path / "words")
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in lora_state_dict(model).values())
    tokenizer = sum(path.stat().st_size for path in (tmp_path / "words").iterdir())
    size = sum(path.stat().st_size for path in latest_complete(tmp_path).rglob("*"))
    assert size <= numbers * 1.05 + tokenizer


def test_saving_asks_no_network_writes_no_embeddings_and_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("socket", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    contents = []
    for name in ("one", "other"):
        model = peft_model()
        model.get_base_model().config._name_or_path = "somebody/some-base"
        made = trainer(tmp_path / name, LoraCheckpoint(every_steps=1), model=model, max_steps=2)
        made.processing_class = made.callback_handler.processing_class = tiny.tokenizer()
        made.train()
        contents.append(files(latest_complete(tmp_path / name), "resume/manifest", "resume/trainer_state"))
    assert contents[0] == contents[1]
    config = json.loads(contents[0]["adapter_config.json"])
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "somebody/some-base"
    allowed = {
        "base_model_name_or_path", "bias", "inference_mode", "lora_alpha", "lora_dropout", "peft_type", "r", "revision",
        "target_modules", "task_type",
    }  # fmt: skip
    assert set(config) <= allowed, "what is at its default is left out, so that older versions of PEFT read the rest"
    saved = load_file(tmp_path / "one" / "lora" / "step-00000002" / WEIGHTS)
    assert not [key for key in saved if "embed" in key or "lm_head" in key]


def test_embeddings_are_written_where_they_are_trained(tmp_path: Path) -> None:
    model = peft_model(target_modules=["qkv_proj"], modules_to_save=["embed_tokens"])
    trainer(tmp_path, LoraCheckpoint(), model=model, max_steps=1).train()
    assert [key for key in load_file(latest_complete(tmp_path) / WEIGHTS) if "embed_tokens" in key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_reloaded_and_merged_logits_are_those_of_training(dtype: torch.dtype, tmp_path: Path) -> None:
    def base() -> Any:
        return tiny.model(hidden_size=16, intermediate_size=32).to(dtype)

    model = get_peft_model(base(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer(tmp_path, LoraCheckpoint(), model=model, max_steps=3).train()
    ids = torch.tensor([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        want = model.eval()(ids).logits
        loaded = PeftModel.from_pretrained(base(), latest_complete(tmp_path)).eval()
        assert torch.equal(loaded(ids).logits, want)
        merged = loaded.merge_and_unload()(ids).logits
    assert torch.allclose(merged, want, atol=1e-6 if dtype == torch.float32 else 0.02)
    assert not torch.equal(want, base().eval()(ids).logits), "an adapter that does nothing proves nothing"


# --- failing disks -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


class Breaks(TrainerCallback):
    """From one step on, until another, files cannot grow: what a full disk is to a program."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        full = self.first <= state.global_step < self.last
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if full else hard, hard))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fails_for_a_while_is_warned_of_and_trained_through(
    background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = LoraCheckpoint(every_steps=1, keep_last=9, background=background)

    class Drains(TrainerCallback):
        """The limit is the process's: what is being written is waited for, so that it meets the one of its step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            checkpoint._run._writer.drain()

    made = trainer(tmp_path, checkpoint, Drains(), Breaks(3, 5))
    made.train()
    assert steps(tmp_path / "lora") == [1, 2, 5, 6] and verify(tmp_path)
    said = [record.message for record in caplog.records if "was not saved" in record.message]
    assert len(said) == 2 and "File too large" in said[0]
    assert said[0].startswith("step 3 was not saved (the newest good checkpoint is step-00000002)")
    plain = trainer(tmp_path / "plain")
    plain.train()
    assert same(trained(made.model), trained(plain.model)), "training took no notice"


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_keeps_the_last_good_one_and_is_an_error_at_the_end(
    background: bool, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def second_is_saved() -> bool:
        newest = latest_complete(small_disk)  # None until the first is there, which the background takes its time for
        return newest is not None and newest.name == "step-00000002"

    class Fills(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                deadline = time.monotonic() + 120
                while not second_is_saved() and time.monotonic() < deadline:
                    time.sleep(0.01)
                with (small_disk / "others").open("wb", buffering=0) as stream:
                    try:
                        while stream.write(b"x" * 512):
                            pass
                    except OSError as error:
                        assert "No space left" in str(error)

    checkpoint = LoraCheckpoint(small_disk / "lora", every_steps=1, background=background)
    made = trainer(small_disk.parent / "run", checkpoint, Fills())
    with pytest.raises(CheckpointError, match=r"step 6 could not be saved in .*No space left on device"):
        made.train()
    assert made.state.global_step == 6
    found = latest_complete(small_disk)
    assert found.name == "step-00000002" and verify(found) and checkpoint.saved == found
    assert "the newest good checkpoint is step-00000002" in caplog.text
    assert [path.name for path in (small_disk / "lora").iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    made = trainer(small_disk.parent / "run", LoraCheckpoint(small_disk / "lora"))
    with pytest.raises(OSError, match="Read-only file system"):
        made.train()
    assert made.state.global_step == 0


# --- in the background -------------------------------------------------------------------------------------------


def test_the_background_writes_the_same_bytes_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3_lora_plugin.store import run as checkpoint_run

    events: list[tuple[str, int]] = []
    threads, waiting, second_step = set(), [], threading.Event()
    write = checkpoint_run.write_checkpoint

    def slow(store: Path, step: int, *args: Any, **options: Any) -> Path:
        events.append(("begins", step))
        threads.add(threading.current_thread().name)
        assert step > 1 or second_step.wait(120)  # the first one takes longer than a step, however slow that is
        path = write(store, step, *args, **options)
        events.append(("ends", step))
        return path

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            waiting.append(state.global_step - 1 - len(events) // 2)
            if state.global_step == 2:
                second_step.set()

    trainer(tmp_path / "sync", LoraCheckpoint(every_steps=1, keep_last=9)).train()
    monkeypatch.setattr(checkpoint_run, "write_checkpoint", slow)
    checkpoint = LoraCheckpoint(every_steps=1, keep_last=9, background=True)
    trainer(tmp_path / "background", checkpoint, Looks()).train()
    assert events == [(what, step) for step in range(1, 7) for what in ("begins", "ends")], "one after the other"
    assert len(threads) == 1 and threads.pop().startswith("lora-checkpoint")
    assert 1 <= max(waiting) <= 2, "training goes on, and does not pile up what is not written"
    one, other = (files(tmp_path / name / "lora") for name in ("sync", "background"))
    timed = ("resume/trainer_state.json", "resume/manifest.json")  # run times are in the Trainer's logs
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name] and not name.endswith(timed)] == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lora-checkpoint")]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def slow_run(out: str, how: str, fails: bool) -> None:
    """A run that writes slowly in the background and leaves in its third step."""
    from phi3_lora_plugin.store import run as checkpoint_run

    write = checkpoint_run.write_checkpoint

    def slow(store: Path, step: int, *args: Any, **options: Any) -> Path:
        print("writing", step, flush=True)
        time.sleep(0.4)
        if fails:
            raise OSError(5, "Input/output error", str(store))
        path = write(store, step, *args, **options)
        print("written", step, flush=True)
        return path

    class Leaves(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                if how == "raise":
                    raise ValueError("a user's mistake")
                os.kill(os.getpid(), getattr(signal, how))
                time.sleep(5)

    checkpoint_run.write_checkpoint = slow
    trainer(Path(out), LoraCheckpoint(every_steps=1, keep_last=9, background=True), Leaves()).train()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "raise"])
def test_what_is_being_written_is_finished_however_the_process_leaves(how: str, warm: Warm, tmp_path: Path) -> None:
    code, said = warm.start(tmp_path / "said", slow_run, str(tmp_path), how, False).wait()
    # Python ends by SIGINT itself, unless a library's exit handler evaluates code, as torch._dynamo's does.
    interrupted = warm.run("raise KeyboardInterrupt", cwd=tmp_path).returncode
    assert interrupted in (-signal.SIGINT, 1)
    assert code == {"SIGTERM": -signal.SIGTERM, "SIGINT": interrupted, "raise": 1}[how], said
    assert [line for line in said.splitlines() if line.startswith("writ")] == [
        "writing 1", "written 1", "writing 2", "written 2"
    ]  # fmt: skip
    assert steps(tmp_path / "lora") == [1, 2] and verify(tmp_path)
    assert {"SIGTERM": "", "SIGINT": "KeyboardInterrupt", "raise": "a user's mistake"}[how] in said


def test_what_fails_in_the_background_is_said_even_if_the_process_is_leaving(warm: Warm, tmp_path: Path) -> None:
    _, said = warm.start(tmp_path / "said", slow_run, str(tmp_path), "SIGINT", True).wait()
    for step in (1, 2):
        assert f"step {step} was not saved (no checkpoint yet): OSError: [Errno 5]" in said


def preempted_run(out: str, background: bool) -> None:
    """A run that gets SIGTERM after two steps, and leaves it to the Trainer."""

    class Preempts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {"max_steps": 5000, "logging_steps": 5000, "enable_jit_checkpoint": True}
    made = trainer(Path(out), LoraCheckpoint(background=background), Preempts(), **settings)
    theirs = next(callback for callback in made.callback_handler.callbacks if hasattr(callback, "jit_manager"))
    theirs.jit_manager.kill_wait = 0.1
    made.train()
    print("ended at", made.state.global_step)


if hasattr(TrainingArguments, "enable_jit_checkpoint"):  # since transformers 5

    @pytest.mark.parametrize("background", [False, True])
    def test_preemption_by_the_trainer_s_own_handler_saves_the_last_state(
        background: bool, warm: Warm, tmp_path: Path
    ) -> None:
        """It saves without `on_save`, and ends training."""
        code, said = warm.start(tmp_path / "said", preempted_run, str(tmp_path), background).wait()
        assert code == 0, said
        end = int(said.rpartition("ended at")[2])
        assert 2 < end < 5000
        assert latest_complete(tmp_path).name == f"step-{end:08d}" and verify(tmp_path)
        (theirs,) = tmp_path.glob("checkpoint-*")
        assert int(theirs.name[11:]) in (end - 1, end)
        if theirs.name == f"checkpoint-{end}":
            assert same(load_file(theirs / WEIGHTS), load_file(latest_complete(tmp_path) / WEIGHTS))
