"""`reward`: prompts in, GRPO by TRL's trainer, LoRA-only checkpoints out; the tiny model doubles what it earns."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from lora_runs import Logs, same
from rich.console import Console
from safetensors.torch import load_file
from tiny import turns, write
from transformers import set_seed

from phi3_lora_plugin import Recipe, RecipeError, add_lora, load_model, load_plugins, load_recipe, load_tokenizer, train
from phi3_lora_plugin.chat.dataset import DataError, load_data
from phi3_lora_plugin.chat.encode import prompt_ids
from phi3_lora_plugin.chat.tasks import Task
from phi3_lora_plugin.cli.evaluate import show
from phi3_lora_plugin.embedded.rewards import tells
from phi3_lora_plugin.evaluate.evaluate import Wanted, evaluate
from phi3_lora_plugin.evaluate.target import find_target
from phi3_lora_plugin.plan.feed import encoded_lengths
from phi3_lora_plugin.training.arguments import lora_options
from phi3_lora_plugin.training.packages import MissingPackage
from phi3_lora_plugin.training.rewards import RewardError
from phi3_lora_plugin.training.trl_trainers import ObjectiveError

pytest.importorskip("trl.trainer.grpo_trainer")
try:
    import phi3_lora_plugin.training.grpo  # noqa: F401
except ObjectiveError as missing:
    pytest.skip(str(missing), allow_module_level=True)
TELLS = "python:phi3_lora_plugin.embedded.rewards.tells"


def recipe(out: Path, *more: str) -> Recipe:
    given = [
        "data.eval_path=null", "grpo.num_generations=4", "grpo.max_completion_length=12", "training.max_steps=3",
        "training.per_device_train_batch_size=8", "training.logging_steps=1", "checkpoint.every_steps=1",
        "checkpoint.keep_last=9", f"output_dir={out}",
    ]  # fmt: skip
    return load_recipe("tiny-grpo", [*given, *more])


@pytest.mark.long
def test_the_tiny_model_doubles_its_reward(tmp_path: Path) -> None:
    result = train(load_recipe("tiny-grpo", [f"output_dir={tmp_path}"]))
    assert result.status == "done" and result.reload_difference < 1e-4
    assert result.eval_reward_after > 2 * result.eval_reward_before  # of names that no prompt to train on has


@pytest.mark.slow
@pytest.mark.usefixtures("reload_in_fork")
def test_a_few_steps_earn_more(tmp_path: Path) -> None:
    logs = Logs()
    few = ["training.max_steps=8", "training.per_device_train_batch_size=32", "training.logging_steps=1"]
    result = train(load_recipe("tiny-grpo", [f"output_dir={tmp_path}", *few]), callbacks=[logs], samples=1)
    rewards = [each["reward"] for each in logs.said if "loss" in each]
    assert sum(rewards[-3:]) > sum(rewards[:3]) and result.eval_reward_after > 1.2 * result.eval_reward_before
    assert result.eval_loss_after is None and result.samples[0].expected
    best = json.loads((Path(result.adapter) / "manifest.json").read_text())["metric"]
    assert best["name"] == "eval_reward" and best["greater_is_better"]


@pytest.mark.slow
def test_an_evaluation_gives_what_answers_earn(tmp_path: Path) -> None:
    plugins = load_plugins()
    held_out = "data.eval_path=embedded:chats/topics_held_out.jsonl"
    target = find_target("tiny-grpo", [held_out], lambda name: plugins.pick("recipes", name))
    found = evaluate(target, Wanted(rows=12, answers=12, max_new_tokens=24), plugins)
    figures = found.base_figures
    assert found.rows == 12 and figures.loss is None and figures.answers["stopped"] == 1
    assert figures.answers["format"] == 1 and 0 < figures.answers[TELLS] < 0.6
    assert figures.answers["reward"] == pytest.approx(0.1 + figures.answers[TELLS])
    console = Console(width=120)
    with console.capture() as said:
        show(found, console)
    assert "12 rows, each a prompt; 12 answers" in said.get() and re.search(rf"{TELLS} +0\.\d", said.get())


@pytest.mark.slow
def test_the_first_losses_are_those_of_trl_itself(tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    logs, run = Logs(), recipe(tmp_path / "ours", "grpo.beta=0.1", f"reward=[{TELLS}]")
    train(run, check=False, callbacks=[logs])
    words = load_tokenizer(run.model.path)
    tasks = [Task.from_json(text) for text in load_data(run, words, {}, max_length=512).train["task"]]
    rows = [{"prompt": turns(task.messages[0]["content"]), **task.columns} for task in tasks]
    set_seed(run.seed)
    model = add_lora(load_model(run.model.path, dtype="float32"), **lora_options(run))
    arguments = GRPOConfig(
        output_dir=str(tmp_path / "theirs"), num_generations=4, max_completion_length=12, max_steps=3, beta=0.1,
        per_device_train_batch_size=8, logging_steps=1, learning_rate=2e-3, lr_scheduler_type="constant", use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
        seed=run.seed,
    )  # fmt: skip
    theirs = GRPOTrainer(model, tells, arguments, Dataset.from_list(rows), processing_class=words)
    theirs.train()
    said = [[each for each in some if "loss" in each] for some in (logs.said, theirs.state.log_history)]
    for name in ("loss", "reward", "kl", "completions/mean_length"):
        ours, own = ([float(each[name]) for each in some] for some in said)
        assert ours == pytest.approx(own, abs=1e-5), name
    assert any(each["loss"] for each in said[0]) and any(each["reward"] for each in said[0])


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_exactly(tmp_path: Path) -> None:
    whole, cut = (recipe(tmp_path / name) for name in ("whole", "cut"))
    result = train(whole, check=False)
    saved = load_file(Path(result.adapter) / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"cut/lora/step-{step:08d}")
    assert train(cut, resume=True, check=False).steps == 3
    assert same(saved, load_file(tmp_path / "cut/lora/step-00000003/adapter_model.safetensors"))


SPY = """
seen = []

def spy(prompts, completions, completion_ids, answer, level, **columns):
    seen.append((prompts, completions, completion_ids, answer, level, columns))
    return [float(len(one[-1]["content"])) for one in completions]
"""
ROWS = [{"prompt": "Name: crab. Topic: awake.", "answer": "at night", "level": 1},
        {"prompt": "Name: Leon. Topic: dish.", "answer": "hot pancakes"}]  # fmt: skip


@pytest.mark.slow
def test_a_reward_of_one_s_own_is_called_as_trl_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spy_reward.py").write_text(SPY, encoding="utf-8")
    run = recipe(
        tmp_path / "run", f"data.path={write(tmp_path / 'rows.jsonl', ROWS)}", "reward=null",
        "reward={python:spy_reward.spy: 0.5}", "training.max_steps=1",
    )  # fmt: skip
    logs = Logs()
    train(run, check=False, callbacks=[logs])
    import spy_reward

    prompts, completions, ids, answers, levels, columns = spy_reward.seen[0]
    assert len(prompts) == len(completions) == len(ids) == 8 and sorted(set(answers)) == ["at night", "hot pancakes"]
    assert [level for level, answer in zip(levels, answers, strict=True) if answer == "at night"] == [1] * 4
    assert prompts[0][0]["role"] == "user" and "trainer_state" in columns and "place of the row" not in columns
    words = load_tokenizer("embedded:tiny-phi3")
    stops = {words.convert_tokens_to_ids(token) for token in ("<|end|>", "<|endoftext|>")}
    for one, said in zip(ids, completions, strict=True):
        assert stops.isdisjoint(one[:-1]) and (one[-1] in stops or len(one) == 12)
        assert said[0]["content"] == words.decode(one, skip_special_tokens=True)
    mean = sum(len(one[-1]["content"]) for one in completions) / 8
    assert logs.said[0]["reward"] == pytest.approx(0.5 * mean)


@pytest.mark.slow
def test_what_a_reward_does_wrong_is_said_with_its_name_and_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad_reward.py").write_text(
        "def fails(completions, answer, **columns):\n    return [float(text) for text in answer]\n"
        "def short(completions, **columns):\n    return [0.0]\n", encoding="utf-8",
    )  # fmt: skip
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "x"}])
    for name, message in (
        ("fails", r"reward python:bad_reward.fails failed on rows.jsonl:2: ValueError: could not convert"),
        ("short", r"reward python:bad_reward.short gave 1 numbers for 8 completions"),
    ):
        run = recipe(tmp_path / name, f"data.path={data}", "reward=null", f"reward=[python:bad_reward.{name}]")
        with pytest.raises(RewardError, match=message):
            train(run, check=False)
    with pytest.raises(MissingPackage, match="no module 'ghost_reward'; looked in"):
        train(recipe(tmp_path / "ghost", f"data.path={data}", "reward=null", "reward=[python:ghost_reward.x]"))
    with pytest.raises(MissingPackage, match=r"has no function 'fail'; did you mean bad_reward.fails"):
        train(recipe(tmp_path / "near", f"data.path={data}", "reward=null", "reward=[python:bad_reward.fail]"))


def tasks(tmp_path: Path, *rows: dict[str, Any], more: tuple[str, ...] = ()) -> Any:
    path = write(tmp_path / "rows.jsonl", rows)
    run = recipe(tmp_path, f"data.path={path}", "reward=null", "reward=[format, gsm8k]", *more)
    return load_data(run, load_tokenizer("embedded:tiny-phi3"), {}, max_length=64)


ASK, SAY = turns("1 + 1?", "It is\n#### 2")


def test_prompts_of_every_shape(tmp_path: Path) -> None:
    data = tasks(
        tmp_path,
        {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
        {"prompt": [ASK], "solution": "\\boxed{2}", "level": 3},
        {"messages": [ASK, SAY]},
        {"instruction": "1 +", "input": "1?", "output": "2"},
        {"problem": "1 + 1?", "final_answer": 2, "system": None},
    )
    found = [Task.from_json(text) for text in data.train["task"]]
    words = load_tokenizer("embedded:tiny-phi3")
    assert data.train[0]["input_ids"] == data.train[1]["input_ids"] == prompt_ids([ASK], words)
    assert [task.messages for task in found[:3]] == [[ASK]] * 3
    assert [task.columns["answer"] for task in found] == ["1 + 1 = 2\n#### 2", "\\boxed{2}", "It is\n#### 2", "2", 2]
    assert found[1].columns["level"] == 3 and found[3].messages[0]["content"] == "1 +\n1?"
    console = Console(width=200)
    with console.capture() as said:
        data.report.render(console)
    assert re.search(r"train +5 prompts, \d+ tokens, to be answered", said.get())


WRONG = {
    "no prompt": ({"text": "a", "answer": 1}, "has no prompt, only text, answer"),
    "two": ({"prompt": "a", "question": "b", "answer": 1}, "has its prompt twice, as prompt and question"),
    "no answer": ({"prompt": "a"}, "has no answer, which reward gsm8k compares with"),
    "no number": ({"prompt": "a", "answer": "many"}, "answer is text ('many'), which has no number"),
    "a picture": ({"prompt": "a", "image": "x.png", "answer": 1}, "holds pictures or sound"),
    "a name of TRL's": ({"prompt": "a", "completions": "b", "answer": 1}, "a name that rewards are called with"),
    "a control token": ({"prompt": "a <|end|>", "answer": 1}, "has the control token <|end|>"),
    "a system turn": ({"prompt": [ASK, ASK], "answer": 1}, "are both of role user"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_prompt_is_said_with_its_line(name: str, tmp_path: Path) -> None:
    row, message = WRONG[name]
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{re.escape(message)}"):
        tasks(tmp_path, {"prompt": "b", "answer": 1}, row)


def test_prompts_that_leave_no_room_are_dropped_and_never_cut(tmp_path: Path) -> None:
    data = tasks(tmp_path, {"prompt": "b", "answer": 1}, {"prompt": "so long " * 200, "answer": 1})
    (left,) = data.report.dropped
    assert data.report.train.rows == 1 and "at most 244 leave room for grpo.max_completion_length" in left.why


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("preference.loss=kto", "set together with reward; keep one"),
        ("data.packing=true", "prompts are not packed"),
        ("grpo.num_generations=3", "3 answers to a prompt do not divide the 8 rows of a step"),
        ("data.max_length=12", "leaves no room for a prompt"),
        ("reward=[format, format]", "names the same reward twice"),
        (
            "reward=[formats]",
            "'formats' is not a reward; available: format, gsm8k, python:module.function; did you mean",
        ),
        ("reward=[python:spy]", "'python:spy' is not a reward"),
        ("reward=gsm8k", "expected a list of text or a mapping of names to a number, found text 'gsm8k'"),
        ("training.use_liger_kernel=true", "Liger's loss is not the one of reward"),
        ("training.label_smoothing_factor=0.1", "has no effect with reward"),
        ("data.train_on=all", "what the model answers is trained"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(given: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe(Path("out"), given)


def test_settings_of_rewards_need_one() -> None:
    with pytest.raises(RecipeError, match="grpo.beta: has no effect without reward"):
        load_recipe("tiny-cpu", ["grpo.beta=0.1"])


def test_a_plan_counts_every_answer(tmp_path: Path) -> None:
    from phi3_lora_plugin.model.config import read_config
    from phi3_lora_plugin.model.folder import find_config

    config = read_config(find_config("embedded:tiny-phi3", None, download=False))
    found = encoded_lengths(recipe(tmp_path), {}, config)
    assert len(found.train) == 4 * 300 and found.supervised == 12 * 4 * 300 and min(found.train) > 12
