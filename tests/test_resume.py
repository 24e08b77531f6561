"""A run that is killed and resumed ends where one without a break does, or says before its first step why it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import tiny
import torch
from lora_runs import peft_model, rows, same, trained, trainer
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from warm_process import Warm

from phi3_lora_plugin import LoraCheckpoint, latest_complete, verify
from phi3_lora_plugin.cli import main
from phi3_lora_plugin.training.callbacks import CheckpointError
from phi3_lora_plugin.training.resume import ResumeError, newest_resumable, resumable
from phi3_lora_plugin.training.run_facts import DriftError, base_facts

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """What a kill is to a Trainer: nothing runs afterwards."""


class Kill(TrainerCallback):
    """Ends the run after the first micro-batch behind a step, without any of the Trainer's own endings."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_pre_optimizer_step(args, state, control)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


class Steps(TrainerCallback):
    """Counts the steps that were begun."""

    begun = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun += 1


def go(build: Callable[..., Trainer], out: Path, said: list[str] | None = None, **options: Any) -> Trainer:
    """Build a Trainer and train it from where `out` stands."""
    made = build(out)
    with resumable(made, say=(said if said is not None else []).append, **options) as checkpoint:
        made.train(resume_from_checkpoint=checkpoint)
    return made


def killed(build: Callable[..., Trainer], out: Path, step: int) -> None:
    made = build(out)
    made.add_callback(Kill(step))
    with pytest.raises(Killed):
        made.train()


def assert_same_end(one: Trainer, other: Trainer) -> None:
    assert same(trained(one.model), trained(other.model)), "weights"
    assert same(one.optimizer.state_dict(), other.optimizer.state_dict()), "optimizer"
    assert same(one.lr_scheduler.state_dict(), other.lr_scheduler.state_dict()), "schedule"
    assert one.state.global_step == other.state.global_step
    # TRL counts the tokens that this process has seen.
    other_things = ("runtime", "per_second", "num_tokens")
    losses = [
        [
            {k: v for k, v in log.items() if not any(word in k for word in other_things)}
            for log in made.state.log_history
        ]
        for made in (one, other)
    ]
    assert losses[0][:-1] == losses[1][:-1], "logs; the last one is the mean of what this process trained"


class Noisy:
    """A collator that draws random numbers, as those for masked words do."""

    def __call__(self, batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": torch.where(torch.rand(ids.shape) < 0.2, 5, ids), "labels": ids}


class Lazy(Dataset):
    """Rows that are made when they are asked for."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return rows()[index]


SETTINGS: dict[str, dict[str, Any]] = {
    "mid-epoch": {},
    "epoch boundary": {"kill": 4},
    "in the second epoch": {"kill": 6, "max_steps": 7},
    "first step": {"kill": 1},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "accumulation that does not divide": {
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 2,
        "kill": 3,
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
    "evaluation by epochs": {"eval_strategy": "epoch", "kill": 4},
    "the Trainer saves too": {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
    "the Trainer saves by epochs": {"save_strategy": "epoch", "kill": 4},
    "workers": {"dataloader_num_workers": 1},
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "no gradient clipping": {"max_grad_norm": 0.0},
    "another optimizer": {"optim": "adafactor"},
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_killed_and_resumed_run_ends_as_if_it_had_not_been(what: str, tmp_path: Path) -> None:
    settings = {"max_steps": 5, **SETTINGS[what]}
    kill = settings.pop("kill", 3)

    def build(out: Path) -> Trainer:
        return trainer(out, LoraCheckpoint(every_steps=1), **settings)

    whole = build(tmp_path / "whole")
    whole.train()
    killed(build, tmp_path / "broken", kill)
    assert latest_complete(tmp_path / "broken").name == f"step-{kill:08d}"
    said: list[str] = []
    resumed = go(build, tmp_path / "broken", said)
    assert said == [f"resuming from {tmp_path / 'broken' / 'lora' / f'step-{kill:08d}'}, step {kill}"]
    assert_same_end(resumed, whole)
    ends = [latest_complete(tmp_path / name) for name in ("whole", "broken")]
    for name in ("adapter_model.safetensors", "adapter_config.json", "resume/optimizer.pt", "resume/scheduler.pt"):
        assert ends[0].joinpath(name).read_bytes() == ends[1].joinpath(name).read_bytes(), name
    assert verify(tmp_path / "broken")


def test_random_numbers_of_the_collator_are_the_same_ones_from_an_epoch_s_end_on(tmp_path: Path) -> None:
    def build(out: Path) -> Trainer:
        made = trainer(out, LoraCheckpoint(every_steps=1))
        made.data_collator = Noisy()
        return made

    whole = build(tmp_path / "whole")
    whole.train()
    killed(build, tmp_path / "broken", 4)
    assert_same_end(go(build, tmp_path / "broken"), whole)


def _sft(out: Path, **settings: Any) -> Trainer:
    """An SFTTrainer over chats with a column that nobody needs."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    words = "fox dog apples basket paris france jumps lazy".split()
    chats = [[{"role": "user", "content": f"what {w}?"}, {"role": "assistant", "content": w}] for w in words]
    config = SFTConfig(
        output_dir=str(out), max_steps=5, per_device_train_batch_size=2, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, max_length=32, logging_steps=1, bf16=False,
        learning_rate=1e-2, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return SFTTrainer(
        model=tiny.model(hidden_size=16, intermediate_size=32),
        args=config,
        train_dataset=Dataset.from_dict({"messages": chats, "source": words}),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1),
        callbacks=[LoraCheckpoint(every_steps=1)],
    )


def _plain(out: Path) -> Trainer:
    """A Trainer that drops a column of its data set."""
    from datasets import Dataset

    data = Dataset.from_list([{**row, "source": str(number)} for number, row in enumerate(rows())])
    return trainer(out, LoraCheckpoint(every_steps=1), data=data, max_steps=5, remove_unused_columns=True)


SCRIPTS: dict[str, Callable[[Path], Trainer]] = {
    "SFTTrainer": _sft,
    "SFTTrainer, packing": lambda out: _sft(out, packing=True, padding_free=False, eval_strategy="no"),
    "Trainer with a data set": _plain,
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_scripts_of_other_people_go_on_exactly(what: str, tmp_path: Path) -> None:
    whole = SCRIPTS[what](tmp_path / "whole")
    whole.train()
    killed(SCRIPTS[what], tmp_path / "broken", 2)
    said: list[str] = []
    resumed = go(SCRIPTS[what], tmp_path / "broken", said)
    assert "step-00000002, step 2" in said[0]
    assert_same_end(resumed, whole)


def _added() -> Any:
    model = tiny.model(hidden_size=16, intermediate_size=32)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"), "mine")
    return model


def _named() -> Any:
    model = peft_model()
    torch.manual_seed(1)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.set_adapter("second")
    return model


def _loralib() -> Any:
    model = tiny.model(hidden_size=16, intermediate_size=32)
    torch.manual_seed(0)
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            old = getattr(parent, name)
            new = loralib.Linear(old.in_features, old.out_features, r=4, lora_alpha=8, lora_dropout=0.1, bias=False)
            new.weight.data.copy_(old.weight)
            setattr(parent, name, new)
    loralib.mark_only_lora_as_trainable(model)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: peft_model(use_dora=True),
    "PiSSA": lambda: peft_model(init_lora_weights="pissa"),
    "head saved": lambda: peft_model(target_modules=["qkv_proj"], modules_to_save=["lm_head"]),
    "biases and tokens": lambda: peft_model(target_modules=["qkv_proj"], bias="all", trainable_token_indices=[5, 6]),
    "add_adapter": _added,
    "second of two": _named,
    "loralib": _loralib,
    "bfloat16 base": lambda: get_peft_model(
        tiny.model(hidden_size=16, intermediate_size=32).bfloat16(),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1),
    ),
}


@pytest.mark.parametrize("format", ["peft", "loralib"])
@pytest.mark.parametrize("what", MODELS)
def test_models_of_every_kind_go_on_exactly(what: str, format: str, tmp_path: Path) -> None:
    if format == "loralib" and what in ("DoRA", "PiSSA", "head saved", "biases and tokens", "second of two"):
        format = "both" if what == "second of two" else "peft"  # loralib has no such thing

    def build(out: Path) -> Trainer:
        torch.manual_seed(3)
        checkpoint = LoraCheckpoint(every_steps=1, format=format, background=format != "peft")
        return trainer(out, checkpoint, model=MODELS[what](), max_steps=4, eval_strategy="steps", eval_steps=2)

    whole = build(tmp_path / "whole")
    whole.train()
    killed(build, tmp_path / "broken", 2)
    assert_same_end(go(build, tmp_path / "broken"), whole)


def test_early_stopping_remembers_how_patient_it_has_been(tmp_path: Path) -> None:
    def build(out: Path) -> Trainer:
        settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "max_steps": 30}
        stopping = EarlyStoppingCallback(early_stopping_patience=4)
        # Held-out rows that the trained ones are no help for, so that it does stop.
        settings |= {"learning_rate": 0.3, "restore_callback_states_from_checkpoint": True}
        return trainer(out, stopping, LoraCheckpoint(), **settings)

    whole = go(build, tmp_path / "whole")
    end = whole.state.global_step
    assert 5 < end < 30
    made = build(tmp_path / "broken")
    made.add_callback(Kill(end - 2))
    with pytest.raises(Killed), resumable(made, say=[].append) as nothing:
        made.train(resume_from_checkpoint=nothing)
    resumed = go(build, tmp_path / "broken")
    assert resumed.state.global_step == end and same(trained(resumed.model), trained(whole.model))


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 0.75}])
def test_resuming_a_run_that_was_over_changes_nothing(length: dict[str, Any], tmp_path: Path) -> None:
    """The Trainer itself makes one step more where the end lies within an epoch."""

    def build(out: Path) -> Trainer:
        return trainer(out, LoraCheckpoint(), lr_scheduler_type="constant", **length)

    first = build(tmp_path)
    first.train()
    before = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = go(build, tmp_path)
    assert same(trained(first.model), trained(again.model)) and again.state.global_step == first.state.global_step
    assert before == {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    longer = build(tmp_path)
    longer.args.max_steps = 6
    with resumable(longer, say=[].append) as checkpoint:
        longer.train(resume_from_checkpoint=checkpoint)
    assert longer.state.global_step == 6 and latest_complete(tmp_path).name == "step-00000006"


@pytest.mark.parametrize(
    "change",
    [{"r": 2}, {"use_dora": True}, {"target_modules": ["qkv_proj"]}, {"modules_to_save": ["lm_head"]},
     {"rank_pattern": {"o_proj": 1}}, {"layers_to_transform": [1], "target_modules": ["qkv_proj"]}],
)  # fmt: skip
def test_an_allowed_change_that_makes_other_tensors_is_refused(
    change: dict[str, Any], broken: Path, tmp_path: Path
) -> None:
    shutil.copytree(broken, tmp_path / "copy")
    made = trainer(tmp_path / "copy", LoraCheckpoint(), model=peft_model(**change))
    with (
        pytest.raises(ResumeError, match="its adapter has other tensors"),
        resumable(made, say=[].append, allow_drift=["lora", "base", "data", "training", "optimizer"]),
    ):
        raise AssertionError("it was let through")


def test_resuming_a_run_that_was_over_needs_no_schedule(tmp_path: Path) -> None:
    """A polynomial divides by the steps behind the warm-up, of which a run that is over has none."""

    def build(out: Path) -> Trainer:
        return trainer(out, LoraCheckpoint(), lr_scheduler_type="polynomial", warmup_steps=0.5, max_steps=3)

    first, again = go(build, tmp_path), go(build, tmp_path)
    assert again.state.global_step == 3 and same(trained(first.model), trained(again.model))
    assert again.args.warmup_steps == 0.5


def test_a_signal_in_the_last_step_does_not_take_its_evaluation_away(tmp_path: Path) -> None:
    from phi3_lora_plugin.training.interrupt import StopOnSignal

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    stop = StopOnSignal()
    made = trainer(tmp_path, Interrupt(), stop, LoraCheckpoint(), max_steps=3, eval_strategy="epoch")
    with stop:
        made.train()
    assert [log["step"] for log in made.state.log_history if "eval_loss" in log] == [3]
    assert (tmp_path / "lora" / "BEST").exists()


def test_without_a_checkpoint_it_begins_at_the_start_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    made = go(lambda out: trainer(out, LoraCheckpoint(every_steps=2), max_steps=2), tmp_path, said)
    assert made.state.global_step == 2
    assert said == [f"{tmp_path}: no checkpoint to resume from; starting at step 0"]


def test_what_a_failed_run_of_this_process_is_still_writing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3_lora_plugin.store import run as checkpoint_run

    write = checkpoint_run.write_checkpoint

    def slow(*args: Any, **options: Any) -> Path:
        time.sleep(0.3)
        return write(*args, **options)

    def build(out: Path) -> Trainer:
        return trainer(out, LoraCheckpoint(every_steps=1, background=True), max_steps=4)

    monkeypatch.setattr(checkpoint_run, "write_checkpoint", slow)
    killed(build, tmp_path, 2)
    monkeypatch.setattr(checkpoint_run, "write_checkpoint", write)
    said: list[str] = []
    go(build, tmp_path, said)
    assert "step-00000002" in said[0] and latest_complete(tmp_path).name == "step-00000004" and verify(tmp_path)


def test_a_store_elsewhere_is_found_through_the_callback(tmp_path: Path) -> None:
    def build(out: Path) -> Trainer:
        return trainer(out, LoraCheckpoint(tmp_path / "elsewhere", every_steps=1), max_steps=4)

    killed(build, tmp_path / "run", 2)
    said: list[str] = []
    go(build, tmp_path / "run", said)
    assert "elsewhere/step-00000002" in said[0]
    assert latest_complete(tmp_path / "elsewhere").name == "step-00000004"


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: os.truncate(path / "adapter_model.safetensors", 100),
    "emptied": lambda path: os.truncate(path / "resume" / "optimizer.pt", 0),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "no folder content": lambda path: [file.unlink() for file in path.rglob("*") if file.is_file()],
    "a file renamed": lambda path: (path / "resume" / "scheduler.pt").rename(path / "resume" / "schedule.pt"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_torn_checkpoints_are_passed_over_and_named(how: str, tmp_path: Path) -> None:
    def build(out: Path) -> Trainer:
        return trainer(out, LoraCheckpoint(every_steps=1, keep_last=3), max_steps=5)

    whole = build(tmp_path / "whole")
    whole.train()
    killed(build, tmp_path / "broken", 4)
    store = tmp_path / "broken" / "lora"
    DAMAGE[how](store / "step-00000004")
    (store / "step-00000099").mkdir()  # unmarked
    (store / ".step-00000098.tmp-1-elsewhere").mkdir()
    said: list[str] = []
    resumed = go(build, tmp_path / "broken", said)
    assert said[-1] == f"resuming from {store / 'step-00000003'}, step 3"
    passed = " ".join(said[:-1])
    assert f"skipped {store / 'step-00000004'}: " in passed and "step-00000099: manifest.json: missing" in passed
    assert_same_end(resumed, whole)
    assert latest_complete(store).name == "step-00000005"


def test_a_checkpoint_without_optimizer_is_passed_over_and_named(tmp_path: Path) -> None:
    def build(out: Path, resume: bool = True) -> Trainer:
        return trainer(out, LoraCheckpoint(every_steps=1, resume=resume), max_steps=4)

    killed(build, tmp_path, 2)
    killed(lambda out: build(out, resume=False), tmp_path / "other", 3)
    (tmp_path / "other" / "lora" / "step-00000003").rename(tmp_path / "lora" / "step-00000003")
    said: list[str] = []
    assert newest_resumable(tmp_path, said.append).step == 2
    path = tmp_path / "lora" / "step-00000003"
    assert said == [f"skipped {path}: has the adapter only, not the optimizer and random state"]
    assert verify(tmp_path) and latest_complete(tmp_path) == path


# --- drift -------------------------------------------------------------------------------------------------------


def _chat(**changes: Any) -> Any:
    words = tiny.tokenizer(template=changes.get("template", tiny.MINI_4K_TEMPLATE))
    if "token" in changes:
        words.add_tokens([changes["token"]])
    return words


def build_with(out: Path, **changes: Any) -> Trainer:
    """A run of six steps of which one thing is changed."""
    settings = dict(r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj"]) | changes.pop("lora", {})
    of_base = {"hidden_size": 16, "intermediate_size": 32} | changes.pop("base", {})
    nudge = of_base.pop("nudge", False)
    base = tiny.model(**of_base)
    if nudge:
        base.lm_head.weight.data[7, 3] += 1e-3
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    made = trainer(
        out,
        LoraCheckpoint(every_steps=1),
        model=model,
        data=changes.pop("data", None),
        **changes.pop("training", {}),
    )
    made.processing_class = changes.pop("words", None) or _chat()
    made.callback_handler.processing_class = made.processing_class
    assert not changes
    return made


DRIFT: dict[str, tuple[Callable[[], dict[str, Any]], list[str]]] = {
    "lora.r": (lambda: {"lora": {"r": 8}}, ["lora.r"]),
    "lora.alpha": (lambda: {"lora": {"lora_alpha": 64}}, ["lora.alpha"]),
    "lora.targets": (lambda: {"lora": {"target_modules": ["qkv_proj", "down_proj"]}}, ["lora.targets"]),
    "lora.dropout": (lambda: {"lora": {"lora_dropout": 0.5}}, ["lora.dropout"]),
    "lora.rslora": (lambda: {"lora": {"use_rslora": True}}, ["lora.rslora"]),
    "lora.dora": (lambda: {"lora": {"use_dora": True}}, ["lora.dora"]),
    "base": (lambda: {"base": {"seed": 5}}, ["base"]),
    "template": (lambda: {"words": _chat(template=tiny.MINI_4K_TEMPLATE + " ")}, ["template"]),
    "tokenizer": (lambda: {"words": _chat(token="<new>")}, ["tokenizer"]),
    "data": (lambda: {"data": rows(seed=4)}, ["data.fingerprint"]),
    "data.rows": (lambda: {"data": rows() + rows()[:4]}, ["data.fingerprint", "data.rows"]),
    "data.batch": (
        lambda: {"training": {"per_device_train_batch_size": 2}},
        ["data.batch", "training.per_device_train_batch_size"],
    ),
    "data.seed": (lambda: {"training": {"seed": 8}}, ["data.seed"]),
    "one row of many": (lambda: {"data": [*rows()[:-1], rows(seed=4)[-1]]}, ["data.fingerprint"]),
    "one value of the base": (lambda: {"base": {"nudge": True}}, ["base"]),
    "dropout of the base": (lambda: {"base": {"attention_dropout": 0.1}}, ["model.attention_dropout"]),
    "learning rate": (lambda: {"training": {"learning_rate": 1e-3}}, ["training.learning_rate"]),
    "schedule": (lambda: {"training": {"lr_scheduler_type": "cosine"}}, ["training.lr_scheduler_type"]),
    "warm-up": (lambda: {"training": {"warmup_steps": 3}}, ["training.warmup_steps"]),
    "steps": (lambda: {"training": {"max_steps": 9}}, ["training.max_steps"]),
    "epochs": (lambda: {"training": {"max_steps": -1, "num_train_epochs": 2}}, ["training.max_steps"]),
    "weight decay": (lambda: {"training": {"weight_decay": 0.1}}, ["training.weight_decay"]),
    "clipping": (lambda: {"training": {"max_grad_norm": 0.1}}, ["training.max_grad_norm"]),
    "smoothing": (lambda: {"training": {"label_smoothing_factor": 0.1}}, ["training.label_smoothing_factor"]),
    "NEFTune": (lambda: {"training": {"neftune_noise_alpha": 5.0}}, ["training.neftune_noise_alpha"]),
    "precision": (lambda: {"training": {"bf16": True}}, ["training.bf16"]),
    "momentum": (lambda: {"training": {"adam_beta1": 0.8}}, ["training.adam_beta1"]),
    "accumulation": (
        lambda: {"training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
        ["training.gradient_accumulation_steps", "training.per_device_train_batch_size"],
    ),
    "another optimizer": (lambda: {"training": {"optim": "adafactor"}}, ["optimizer.class", "training.optim"]),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drift")
    killed(build_with, out, 2)
    return out


@pytest.mark.parametrize("what", DRIFT)
def test_other_settings_are_refused_before_the_first_step(what: str, broken: Path) -> None:
    changes, fields = DRIFT[what]
    made, steps = build_with(broken, **changes()), Steps()
    made.add_callback(steps)
    before = trained(made.model)
    with pytest.raises(DriftError) as caught, resumable(made, say=[].append) as checkpoint:
        made.train(resume_from_checkpoint=checkpoint)
    assert sorted(caught.value.fields) == fields
    assert all(f"{field}: " in str(caught.value) for field in fields) and "in the checkpoint, " in str(caught.value)
    allowable = [field for field in caught.value.fields if field not in ("optimizer.class", "training.optim")]
    assert f"--allow-drift {allowable[0]}" in str(caught.value) if allowable else "--allow" not in str(caught.value)
    assert steps.begun == 0 and same(trained(made.model), before)


def test_the_callback_itself_refuses_what_a_script_resumes_by_hand(broken: Path, tmp_path: Path) -> None:
    made, steps = build_with(broken, lora={"lora_alpha": 64}), Steps()
    made.add_callback(steps)
    good = build_with(broken)
    with resumable(good, say=[].append) as checkpoint, pytest.raises(DriftError, match=r"lora.alpha: 8 in .*, 64 now"):
        made.train(resume_from_checkpoint=checkpoint)
    assert steps.begun == 0


def test_drift_that_is_allowed_is_let_through_and_no_other(broken: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(broken, copy)

    def changed(out: Path) -> Trainer:
        return build_with(out, lora={"lora_alpha": 64}, data=rows(seed=4))

    with pytest.raises(DriftError) as caught:
        go(changed, copy, allow_drift=["data"])
    assert caught.value.fields == ["lora.alpha"]
    resumed = go(changed, copy, allow_drift=["data", "lora.alpha"])
    assert resumed.state.global_step == 6
    manifest = json.loads((latest_complete(copy) / "manifest.json").read_text())
    assert manifest["lora"]["alpha"] == 64, "what was trained with last is what the checkpoint says"


NEW: dict[str, dict[str, Any]] = {
    "learning_rate": {"learning_rate": 1e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "weight_decay": {"weight_decay": 0.1},
    "adam_beta1": {"adam_beta1": 0.5},
    "max_steps": {"max_steps": 9},
}


@pytest.mark.parametrize("what", NEW)
def test_a_setting_that_is_allowed_to_change_takes_effect_and_is_announced(
    what: str, broken: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(broken, copy)
    said: list[str] = []
    seen: list[dict[str, Any]] = []

    class See(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            seen.append({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})

    def build(out: Path) -> Trainer:
        made = build_with(out, training=NEW[what])
        made.add_callback(See())
        return made

    resumed = go(build, copy, said, allow_drift=[f"training.{what}"])
    old = json.loads((broken / "lora" / "step-00000002" / "manifest.json").read_text())["training"][what]
    new = NEW[what][what]
    assert said[-1] == f"training.{what}: {old!r} in the checkpoint; {new!r} from step 3 on"
    # what a run that had these settings from the start has in the same steps
    whole = build(tmp_path / "whole")
    fresh = seen[:]
    seen.clear()
    whole.train()
    assert fresh == seen[2:], "the settings of the optimizer, learning rate included, step by step"
    assert resumed.state.global_step == NEW[what].get("max_steps", 6)
    manifest = json.loads((latest_complete(copy) / "manifest.json").read_text())
    assert manifest["training"][what] == new


def test_a_longer_run_whose_rate_does_not_depend_on_its_length_is_announced_and_resumed(tmp_path: Path) -> None:
    def build(out: Path, steps: int = 4) -> Trainer:
        return trainer(out, LoraCheckpoint(every_steps=1), lr_scheduler_type="constant", max_steps=steps)

    killed(build, tmp_path / "broken", 2)
    said: list[str] = []
    resumed = go(lambda out: build(out, 6), tmp_path / "broken", said)
    whole = build(tmp_path / "whole", 6)
    whole.train()
    assert "training.max_steps: 4 in the checkpoint; 6 from step 3 on" in said
    assert same(trained(resumed.model), trained(whole.model))


def test_rows_of_a_data_set_are_compared_by_what_they_hold_not_by_how_they_lie(tmp_path: Path) -> None:
    from datasets import Dataset as Rows
    from datasets import concatenate_datasets

    from phi3_lora_plugin.training.run_facts import data_facts

    def digest(data: Any) -> str:
        return data_facts(data, trainer(tmp_path, data=rows()).args)["fingerprint"]

    whole = Rows.from_list(rows(2000))
    parts = concatenate_datasets([whole.select(range(700)), whole.select(range(700, 2000))])
    whole.save_to_disk(str(tmp_path / "saved"))
    backwards = whole.select(range(1999, -1, -1))
    assert digest(whole) == digest(parts) == digest(Rows.load_from_disk(str(tmp_path / "saved")))
    assert digest(whole) == digest(backwards.select(range(1999, -1, -1))) != digest(backwards)
    other = rows(2000)
    other[1234]["labels"][3] += 1
    assert digest(Rows.from_list(other)) != digest(whole)


@pytest.mark.parametrize("saves", ["no", "steps", "epoch"])
@pytest.mark.parametrize("evaluates", ["no", "steps", "epoch"])
@pytest.mark.parametrize("how", ["signal", "exception"])
def test_a_run_that_is_stopped_within_an_epoch_ends_as_if_it_had_not_been(
    how: str, evaluates: str, saves: str, tmp_path: Path
) -> None:
    from phi3_lora_plugin.training.interrupt import StopOnSignal

    strategies: dict[str, Any] = {"eval_strategy": evaluates, "save_strategy": saves, "eval_steps": 2, "save_steps": 2}

    def build(out: Path, *callbacks: Any) -> Trainer:
        return trainer(
            out, *callbacks, LoraCheckpoint(every_steps=1), max_steps=9, evaluated=rows(8, seed=1), **strategies
        )

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5 and how == "signal":
                os.kill(os.getpid(), signal.SIGINT)
            if state.global_step == 6:
                raise Killed

    whole = build(tmp_path / "whole")
    whole.train()
    stop = StopOnSignal()
    stopped = build(tmp_path / "broken", Interrupt(), stop)
    with stop:
        if how == "signal":
            stopped.train()
            assert stopped.state.global_step == 5
        else:
            with pytest.raises(Killed):
                stopped.train()
    resumed = go(build, tmp_path / "broken")
    assert_same_end(resumed, whole)
    for pointer in ("LATEST", "BEST"):
        ends = [tmp_path / name / "lora" / pointer for name in ("whole", "broken")]
        assert [end.read_text() if end.exists() else None for end in ends] == [
            ends[0].read_text() if ends[0].exists() else None
        ] * 2


def test_the_best_weights_of_an_adapter_with_a_name_of_its_own_are_loaded_at_the_end(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = peft_model(dropout=0.0)
    model.add_adapter("chat", model.peft_config["default"])
    model.set_adapter("chat")
    options: dict[str, Any] = dict(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True
    )
    made = trainer(tmp_path, LoraCheckpoint(adapter="chat"), model=model, learning_rate=1.0, **options)
    made.train()
    best = Path(made.state.best_model_checkpoint)
    assert best.name != "checkpoint-6", "a rate this high ends worse than it was"
    saved = load_file(best / "chat" / "adapter_model.safetensors")
    now = {name.replace(".chat.", "."): value for name, value in trained(model).items() if ".chat." in name}
    assert saved.keys() == now.keys() and same(saved, now)

    shutil.rmtree(best / "chat")
    callback = LoraCheckpoint(adapter="chat")
    with pytest.raises(CheckpointError, match=r"load_best_model_at_end: .*chat has no adapter_model.safetensors"):
        callback._training, callback._began_at = True, 6
        callback.on_train_end(made.args, made.state, made.control, model=model)


def resume_only(place: str) -> None:
    """Compare with what is there, and leave."""
    with resumable(build_with(Path(place)), say=print):
        pass


def test_the_same_settings_in_another_process_are_no_drift(broken: Path, warm: Warm, tmp_path: Path) -> None:
    """Hashes, sets and orders that depend on the process would show here: the other one has another hash seed."""
    code, said = warm.start(tmp_path / "said", resume_only, str(broken)).wait()
    assert code == 0 and "resuming from" in said, said


# --- the command line --------------------------------------------------------------------------------------------


def test_the_command_goes_on_with_a_killed_run_and_says_what_it_passed_over(
    tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.base(tmp_path / "base", hidden_size=16, intermediate_size=32)
    words = "fox dog apples basket paris france jumps lazy".split()
    chats = [[{"role": "user", "content": f"what {w}?"}, {"role": "assistant", "content": w}] for w in words]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    settings = [
        "tiny-cpu", f"model.path={tmp_path / 'base'}", f"data.path={tmp_path / 'chats.jsonl'}", "data.eval_path=null",
        "training.num_train_epochs=null", "training.max_steps=9", "training.per_device_train_batch_size=2",
        "lora.dropout=0.1", "checkpoint.every_steps=1", "checkpoint.keep_last=3", "--samples=0", "--no-check",
    ]  # fmt: skip

    def run(out: str, *more: str) -> subprocess.CompletedProcess[str]:
        return warm.command("train", *settings, f"output_dir={tmp_path / out}", *more, cwd=tmp_path)

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr
    # The two newest are lost, as by a disk that failed.
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    store = tmp_path / "broken" / "lora"
    for name in ("step-00000008", "step-00000009"):
        os.truncate(store / name / "adapter_model.safetensors", 60)
    resumed = run("broken", "--resume")
    said = resumed.stdout.replace("\n", "")
    assert resumed.returncode == 0, resumed.stderr
    assert "skipped " in said and "step-00000009: adapter_model.safetensors: has 60 bytes, expected" in said
    assert "step-00000007, step 7" in said
    ends = [latest_complete(tmp_path / name) for name in ("whole", "broken")]
    assert ends[1].name == "step-00000009"
    for name in ("adapter_model.safetensors", "resume/optimizer.pt"):
        assert ends[0].joinpath(name).read_bytes() == ends[1].joinpath(name).read_bytes(), name
    arguments = [*settings, f"output_dir={tmp_path / 'broken'}", "--resume", "lora.alpha=4"]
    monkeypatch.setattr(sys, "argv", ["phi3-lora", "train", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err.replace("\n", " ")
    assert left.value.code == 2 and "lora.alpha: 32 in the checkpoint, 4 now" in said and "Traceback" not in said


def test_a_base_in_memory_of_any_size_has_a_fingerprint_that_sees_its_last_number() -> None:
    def of(size: int, last: float = 0.0) -> Any:
        model = torch.nn.Module()
        values = torch.zeros(1).expand(size)  # as long as Phi-3's head, and no memory
        model.weight = torch.nn.Parameter(torch.cat([values, torch.tensor([last])]) if last else values, False)
        return base_facts(model)["fingerprint"]

    assert of(32064 * 3072) is not None and of(1) != of(2)
    assert of(1000, last=1.0) != of(1001)


def test_numbers_of_other_libraries_in_the_logs_stay_numbers(tmp_path: Path) -> None:
    import numpy as np

    class Measures(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.log_history.append({"numpy": np.float32(0.5), "torch": torch.tensor(2.0), "step": state.global_step})

    trainer(tmp_path, LoraCheckpoint(), Measures(), max_steps=1).train()
    content = json.loads((latest_complete(tmp_path) / "resume" / "trainer_state.json").read_text())
    assert {"numpy": 0.5, "torch": 2.0, "step": 1} in content["log_history"]
