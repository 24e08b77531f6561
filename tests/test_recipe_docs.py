"""What docs/recipes.md shows works as shown."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import peft
import pytest
import tiny
import torch
from pages import blocks, commands, page
from transformers import Trainer

from phi3_lora_plugin.cli.overrides import undashed
from phi3_lora_plugin.lora.inject import add_lora
from phi3_lora_plugin.lora.methods import loraplus_optimizer
from phi3_lora_plugin.recipe import RecipeError, load_recipe
from phi3_lora_plugin.training.arguments import lora_options, training_arguments

DOC = page("recipes")
METHODS = re.findall(r"^\| ([A-Za-z+]+) \| `([^`]+=[^`]+)` \|", DOC, flags=re.MULTILINE)


def test_the_commands_name_recipes_that_exist_and_overrides_that_hold() -> None:
    assert {words[1] for words in commands(DOC)} == {"recipes", "show", "validate", "train"}
    for _, command, *rest in commands(DOC):
        if command != "recipes":
            recipe, *overrides = [word for word in undashed(rest, {"--resolved"}) if word != "--resolved"]
            load_recipe(recipe, overrides)


def test_the_file_loads(tmp_path: Path) -> None:
    (text,) = blocks(DOC, "yaml")
    (tmp_path / "mine.yaml").write_text(text)

    recipe = load_recipe(tmp_path / "mine.yaml")

    assert (recipe.lora.targets, recipe.lora.r, recipe.seed) == (["q_proj", "v_proj"], 16, 7)


def test_the_mistakes_read_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = blocks(DOC, "")
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("extends: tiny-cpu\n\nlora:\n  dropuot: 0.1\ntraining:\n  save_steps: 5\n")

    with pytest.raises(RecipeError) as caught:
        load_recipe("mine.yaml", ["lora.r=many"])

    assert str(caught.value) == shown.rstrip()


def test_the_python_runs() -> None:
    (code,) = blocks(DOC, "python")

    exec(compile(code, "docs/recipes.md", "exec"), {})


def test_the_menu_has_every_method() -> None:
    assert [name for name, _ in METHODS] == ["rsLoRA", "DoRA", "PiSSA", "OLoRA", "EVA", "LoftQ", "LoRA+", "NEFTune"]


@pytest.mark.parametrize("preset", ["phi3-mini-4k-lora", "phi3-mini-4k-modelcard", "tiny-cpu"])
@pytest.mark.parametrize(("name", "overrides"), METHODS)
def test_a_method_is_one_line_over_any_preset(name: str, overrides: str, preset: str, tmp_path: Path) -> None:
    recipe = load_recipe(preset, [*overrides.split(), f"output_dir={tmp_path}", "model.device=cpu"])

    options = lora_options(recipe)
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(options) - {"targets", "r", "alpha", "dropout"} <= known
    training_arguments(recipe)


@pytest.mark.parametrize(("name", "overrides"), [row for row in METHODS if row[0] not in ("EVA", "LoftQ")])
def test_a_method_of_the_menu_trains(name: str, overrides: str, tmp_path: Path) -> None:
    # EVA's pass over data and LoftQ's 4-bit base have tests of their own beside the code that does them.
    recipe = load_recipe("tiny-cpu", [*overrides.split(), f"output_dir={tmp_path}", "training.max_steps=3"])
    model = add_lora(tiny.model(), **lora_options(recipe) | {"r": 4})
    arguments = training_arguments(recipe)
    ratio = recipe.lora.loraplus_lr_ratio
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 500, (8, 16)).tolist()]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]},
        optimizers=(loraplus_optimizer(model, arguments, ratio) if ratio else None, None),
    )

    trainer.train()

    rates = {group["lr"] / group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert len(rates) == 1  # one schedule for all
    initial = sorted({group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]})
    assert initial == ([1e-4, 1.6e-3] if name == "LoRA+" else [2e-3])
