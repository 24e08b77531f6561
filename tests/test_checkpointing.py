"""`training.activation_checkpointing: auto`: the fastest setting that fits by the plan, said, recorded and kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from benchmarks.cards import CARDS
from benchmarks.roofline import Step, price
from phi3_lora_plugin.pipeline import train
from phi3_lora_plugin.plan import at_start
from phi3_lora_plugin.plan.checkpointing import ALL, candidates, choose_checkpointing
from phi3_lora_plugin.plan.dry_run import Batch, dry_runs
from phi3_lora_plugin.plan.extend import Footprint
from phi3_lora_plugin.plan.fit import fit
from phi3_lora_plugin.plan.plan import Plan, plan
from phi3_lora_plugin.plan.view import lines
from phi3_lora_plugin.recipe import RecipeError, load_recipe
from phi3_lora_plugin.recipe.training import translate
from phi3_lora_plugin.training.arguments import training_arguments
from phi3_lora_plugin.training.checkpointing import (
    Checkpointing,
    checkpointing_of,
    offers_some_layers,
    set_checkpointing,
    setting_name,
)

pytestmark = pytest.mark.skipif(
    not offers_some_layers(), reason="transformers before 5.23 recomputes all layers or none"
)

KEY = f"training.{setting_name()}"
LAYERS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base"), num_hidden_layers=LAYERS)


def recipe(base: Path, *overrides: str) -> Any:
    return load_recipe("tiny-cpu", [f"model.path={base}", "data.max_length=256", f"{KEY}=auto", *overrides])


def test_a_recipe_may_say_auto_under_either_name_and_nothing_beside_it() -> None:
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert translate({name: "auto"}).values == {setting_name(): "auto"}
    with pytest.raises(RecipeError, match="expected true or false or auto, found text 'automatic'"):
        load_recipe("tiny-cpu", [f"{KEY}=automatic"])
    with pytest.raises(
        RecipeError, match="every_n_layers is what activation_checkpointing: auto chooses; leave it out"
    ):
        load_recipe("tiny-cpu", [f"{KEY}=auto", f"{KEY}_kwargs={{every_n_layers: 2}}"])
    kept = load_recipe("tiny-cpu", [f"{KEY}=auto", f"{KEY}_kwargs={{determinism_check: none}}"])
    assert checkpointing_of(training_arguments(kept)) == ALL  # until it is known what fits


def test_arguments_say_what_was_set() -> None:
    arguments = training_arguments(load_recipe("tiny-cpu"))
    for setting in (Checkpointing(), ALL, Checkpointing(3), Checkpointing(1, offload=True), Checkpointing()):
        set_checkpointing(arguments, setting)
        assert checkpointing_of(arguments) == setting
        assert arguments.activation_checkpointing == arguments.gradient_checkpointing == (setting.every > 0)


def test_candidates_are_all_that_transformers_offers_fastest_first() -> None:
    for layers in (1, 2, 5, 32, 40):
        found = list(candidates(layers, "cpu"))
        counts = [sum(each.layers(layers)) for each in found]
        offered = {0, *(sum(Checkpointing(every).layers(layers)) for every in range(1, layers + 1))}
        assert counts == sorted(offered) and found[0] == Checkpointing() and found[-1] == ALL
    on_card = list(candidates(32, "cuda"))
    assert [each for each in on_card if not each.offload] == list(candidates(32, "cpu"))
    half, offloaded = Checkpointing(2, offload=True), Checkpointing(1, offload=True)
    assert on_card.index(Checkpointing(2)) < on_card.index(half) < on_card.index(ALL) and on_card[-1] == offloaded
    assert list(candidates(1, "cuda")) == [Checkpointing(), ALL, offloaded]
    assert half.wording(5).endswith("(every_n_layers: 2), their inputs offloaded to host memory")


@pytest.mark.long
def test_every_setting_is_extended_from_short_models_to_the_byte() -> None:
    given = load_recipe("tiny-cpu", [f"model.path={Path('nowhere')}", "data.path=null", "data.eval_path=null"])
    batch = Batch((64,) * 4, 0.5)

    def runs(whole: bool) -> Callable[[Checkpointing], Footprint]:
        return dry_runs(
            tiny.config(num_hidden_layers=5), {"targets": "all-linear", "r": 4, "alpha": 8}, training_arguments(given),
            batch, dtype=torch.bfloat16, mixed="bf16", whole=whole,
        )  # fmt: skip

    short, whole = runs(False), runs(True)
    # The last layer is recomputed, and kept; and what is kept for recomputing is elsewhere.
    settings = Checkpointing(2), Checkpointing(3), Checkpointing(1, offload=True)
    for setting in (*settings, Checkpointing(2, offload=True)):
        assert short(setting) == whole(setting), setting
    peaks = [max(each.total for each in short(setting).moments) for setting in (*settings, ALL)]
    assert peaks[1] > peaks[0] > peaks[3] > peaks[2]


def test_it_takes_the_fastest_that_fits(base: Path) -> None:
    taken = {setting: 1000 - number for number, setting in enumerate(candidates(32, "cuda"))}
    for setting, peak in taken.items():
        choice = choose_checkpointing(recipe(base), 32, "cuda", taken.__getitem__, peak, 0.0)
        assert choice.checkpointing == setting
        choice = choose_checkpointing(recipe(base), 32, "cuda", taken.__getitem__, int(peak / 0.96) + 1, 0.04)
        assert choice.checkpointing == setting and "4% of it left free" in choice.why
    tight = choose_checkpointing(recipe(base), 32, "cuda", taken.__getitem__, 5, 0.0)
    assert tight.checkpointing == Checkpointing(1, offload=True) and "nothing fits: even this takes" in tight.why


@pytest.mark.slow
def test_a_plan_shows_what_auto_chooses_and_fit_leaves_it_to_auto(base: Path) -> None:
    given = ["data.path=null", "data.eval_path=null", "training.per_device_train_batch_size=2"]
    second = [*given, f"{KEY}=true", f"{KEY}_kwargs={{every_n_layers: 2}}"]
    limit = plan(recipe(base, *second), 10**12, program=0).peak

    @cache
    def planned(*more: str) -> Plan:
        return plan(recipe(base, *given, *more), limit, program=0)

    made = planned()
    assert made.peak == limit and made.fits and made.every_n_layers == 2 and made.recomputed_share == 0.5
    assert any("2 of 4 layers recomputed (every_n_layers: 2) (auto: " in line for line in lines(made))
    assert "1 of 4 layers recomputed (every_n_layers: 4) would take" in str(made.chosen)
    found = fit(made, lambda more: planned(*more), limit)
    assert found is not None and not any("checkpointing=true" in one for one in found.overrides)


def test_what_a_plan_does_not_know_gets_all_layers_and_a_reason(base: Path) -> None:
    def never(setting: Checkpointing) -> int:
        raise AssertionError

    for name, reason in (("phi3-mini-4k-dpo-lora", "every pass of preference.loss: sigmoid"),
                         ("tiny-grpo", "every pass of reward")):  # fmt: skip
        choice = choose_checkpointing(load_recipe(name), 8, "cuda", never, 10**9, 0.0)
        assert choice.checkpointing == ALL and reason in choice.why
    choice = choose_checkpointing(recipe(base), 8, "cuda", never, None, 0.0)
    assert choice.checkpointing == ALL and "not known" in choice.why


@pytest.mark.long
def test_no_manual_setting_that_fits_is_faster_by_the_computed_figures() -> None:
    """Time by the roofline, memory by the plan, of Phi-3-mini's default preset with settings by hand."""
    given = load_recipe("phi3-mini-4k-lora")
    rows = int(given.training["per_device_train_batch_size"])
    step = Step(given.model.path, CARDS["4090"], (2040,) * rows, supervised=1.0)
    kept, again = (price(replace(step, checkpointing=on), "ours").tokens_per_second for on in (False, True))

    def speed(setting: Checkpointing) -> float:
        share = sum(setting.layers(32)) / 32
        return 1 / ((1 - share) / kept + share / again)

    manual = {}
    for setting in (Checkpointing(), *(Checkpointing(every) for every in (1, 2, 3, 6, 7, 8))):
        more = [f"{KEY}_kwargs={{every_n_layers: {setting.every}}}"] if setting.every > 1 else []
        overrides = [f"{KEY}={str(setting.every > 0).lower()}", *more]
        manual[setting] = plan(load_recipe("phi3-mini-4k-lora", overrides), 10**12, "cuda")
    for size in (24, 32):
        chosen = plan(given, size * 10**9, "cuda")
        best = max(speed(setting) for setting, made in manual.items() if made.fits_into(size * 10**9))
        assert chosen.fits and speed(Checkpointing(chosen.every_n_layers, chosen.offload)) >= 0.95 * best


class Seen(TrainerCallback):
    """Which layers are recomputed once training has begun."""

    layers: tuple[bool, ...] = ()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.layers = tuple(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


def run(given: Any, resume: bool = False) -> tuple[Seen, str, list[float]]:
    from rich.console import Console

    seen, out = Seen(), io.StringIO()
    train(given, resume=resume, check=False, callbacks=[seen], console=Console(file=out, width=400))
    lines = (Path(given.output_dir) / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    return seen, next((line for line in out.getvalue().splitlines() if "activation checkpointing" in line), ""), losses


@pytest.mark.slow
def test_a_run_chooses_says_records_and_keeps_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as much memory as every second layer takes; resumed where there would be more."""
    given = ["training.max_steps=2", "training.logging_steps=1", "data.eval_path=null",
             "checkpoint.every_steps=1", "training.lr_scheduler_type=constant"]  # fmt: skip
    first = recipe(base, *given, f"output_dir={tmp_path / 'auto'}")
    monkeypatch.setattr(at_start, "free_memory", lambda kind, held: 10**12)
    seen, line, kept = run(recipe(base, *given, f"output_dir={tmp_path / 'much'}"))
    assert not any(seen.layers) and "all activations kept (auto: " in line

    whole = at_start._planned

    def room_for_half(recipe_: Any, arguments: Any, kind: str, data: Any, memory: Any) -> Any:
        half = recipe(base, *given, f"{KEY}=true", f"{KEY}_kwargs={{every_n_layers: 2}}")
        room = plan(half, 10**12, kind, lengths=at_start.lengths_of(data.train, data.eval), program=0).peak
        return whole(recipe_, arguments, kind, data, room)

    monkeypatch.setattr(at_start, "_planned", room_for_half)
    seen, line, losses = run(first)
    assert seen.layers == (True, False) * 2 and losses == kept
    assert "2 of 4 layers recomputed (every_n_layers: 2) (auto: " in line and "would take" in line
    recorded = json.loads((tmp_path / "auto" / "run.json").read_text())["checkpointing"]
    assert recorded["checkpointing"] == {"every": 2, "offload": False}

    monkeypatch.setattr(at_start, "_planned", whole)
    longer = recipe(base, *given, "training.max_steps=3", f"output_dir={tmp_path / 'auto'}")
    seen, line, _ = run(longer, resume=True)
    assert seen.layers == (True, False) * 2 and "(auto: as when this run began)" in line


@pytest.mark.slow
def test_a_run_that_cannot_be_planned_trains_with_all_layers_recomputed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import phi3_lora_plugin.plan.plan as module

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such layers\nsecond line")

    monkeypatch.setattr(module, "plan", fails)
    seen, line, _ = run(recipe(base, "training.max_steps=1", "data.eval_path=null", f"output_dir={tmp_path}"))
    assert all(seen.layers) and line.endswith("all 4 layers recomputed (auto: cannot be planned: no such layers)")
