"""What docs/objectives.md shows works as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from pages import blocks, commands, page

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.chat.dataset import load_data
from phi3_lora_plugin.model.tokenizer import load_tokenizer
from phi3_lora_plugin.recipe.sections import PreferenceSection
from phi3_lora_plugin.training.rewards import rewards_of

PAGE = page("objectives")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"{at}?", "chosen": "Yes.", "rejected": "No."} for at in range(24)]
    judged = [{"prompt": f"{at}?", "completion": "Yes.", "label": bool(at % 2)} for at in range(24)]
    gsm8k = [{"question": f"{at} + 1?", "answer": f"{at} + 1 = {at + 1}\n#### {at + 1}"} for at in range(24)]
    for name, rows in (("pairs", pairs), ("judged", judged), ("gsm8k", gsm8k)):
        tiny.write(Path(f"{name}.jsonl"), rows)
    return tmp_path


def test_every_command_names_a_recipe_that_reads_its_data(place: Path) -> None:
    assert len(commands(PAGE)) >= 10
    tokenizer = load_tokenizer("embedded:tiny-phi3")
    for program, command, *words in commands(PAGE):
        assert program == "phi3-lora" and (command == "train" or [command, words.pop(0)] == ["data", "check"])
        name, *overrides = words
        small = [] if name == "tiny-grpo" else ["data.max_length=64", "grpo.max_completion_length=8"]
        run = load_recipe(name, [*overrides, *(small if "grpo" in name else small[:1])])
        assert load_data(run, tokenizer, {}).report.train.rows >= 20


def test_the_table_has_every_loss() -> None:
    known = set(PreferenceSection.model_fields["loss"].annotation.__args__) - {"none"}
    rows = re.findall(r"^\| (`.*?) \|", PAGE.partition("## What answers earn")[0], re.M)
    assert known == {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"preference"}


def test_the_reward_of_the_page_is_one(place: Path) -> None:
    (snippet,) = blocks(PAGE, "python")
    (place / "my_rewards.py").write_text(snippet, encoding="utf-8")
    (reward,) = rewards_of(["python:my_rewards.short"], [], [place])
    said = [[{"role": "assistant", "content": text}] for text in ("a", "b" * 300)]
    assert reward(prompts=[[]] * 2, completions=said, completion_ids=[[1]] * 2, answer=["1"] * 2) == [1.0, 0.0]


def test_the_table_of_rewards_holds() -> None:
    form, gsm8k = rewards_of(["format", "gsm8k"], [7])
    said = ["#### $1,000.00", "\\boxed{-3}", "it is 3/4", "12 apples", "<think>9", "<think>9</think> 8"]
    right = ["1000", "-3", "0.75", "#### 12", "9", "#### 8"]
    assert gsm8k(completions=said, answer=right) == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    ids = [[1, 7], [7, 1], [7], [7], [1], [7]]
    scores = form(completions=said, completion_ids=ids, answer=right)
    assert scores == pytest.approx([1, 2 / 3, 1, 2 / 3, 0, 2 / 3])
