"""A recipe is one run, checked in full: parent, file and overrides merged, every problem reported at once.

Recipes are plain YAML. A preset is found by name, a file by its path; docs/recipes.md has the rules of merging.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.recipe.layers import (
    Chain,
    Find,
    leave_embedded_evaluation,
    merge,
    normalise,
    read_chain,
    read_overrides,
    shipped_preset,
)
from phi3_lora_plugin.recipe.problems import explain
from phi3_lora_plugin.recipe.sections import (
    REWARD,
    AboutSection,
    CheckpointSection,
    Conflicts,
    DataSection,
    Finite,
    GrpoSection,
    LoraSection,
    ModelSection,
    PreferenceSection,
    Reward,
    Section,
    Switch,
    Text,
)
from phi3_lora_plugin.recipe.training import NEEDS_EVALUATION, OF_WORKERS, translate
from phi3_lora_plugin.recipe.yaml_file import Key, Layer, Problem, dump
from phi3_lora_plugin.wording import first_lines, nearest

_SHOWN = 50  # problems in a message; `RecipeError.problems` has all


class RecipeError(Phi3LoraError):
    """A recipe that cannot be run as it is; `problems` has each thing that is wrong with it."""

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        self.name = name
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{count} in recipe {name}:", *first_lines(self.problems, _SHOWN)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.problems)  # crosses process boundaries whole


SpeedPart = Literal["loss", "attention", "lora", "layers", "last_layer", "masters", "host"]


class Recipe(Section):
    """One run. Frozen; built by `load_recipe`, which also knows where each value came from."""

    model: ModelSection
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    training: dict[str, Any] = {}
    """As `transformers.TrainingArguments` names things, of any version; checked against the one installed."""
    preference: PreferenceSection = PreferenceSection()
    reward: Annotated[list[Reward], Field(min_length=1)] | dict[Reward, Finite] = {}
    """Train on the model's own answers by what these give for them (GRPO, arXiv 2402.03300): format, gsm8k or
    python:module.function, as a list or with weights; rows are prompts, with an `answer` where a reward reads one."""
    grpo: GrpoSection = GrpoSection()
    checkpoint: CheckpointSection = CheckpointSection()
    speed: Literal["auto", "off"] | dict[SpeedPart, Switch] = "auto"
    """Fast paths: auto, off, or one by one (the rest as in auto); losses are the same with and without."""
    output_dir: Text = "runs/recipe"
    """Where checkpoints and reports go, from the working directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    about: AboutSection = AboutSection()

    _name: str = PrivateAttr("recipe")
    _source: Path | None = PrivateAttr(None)
    _provenance: dict[str, str] = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(())

    @field_validator("training")
    @classmethod
    def _known_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        translated = translate(given)
        if translated.problems:
            raise Conflicts(translated.problems)
        return {key: value for key, value in translated.values.items() if value is not None}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Sections that contradict each other."""
        data, training = self.data, self.training
        place = Path(self.output_dir).expanduser().resolve()
        if place in (Path(place.anchor), Path.home().resolve()):
            yield "output_dir", f"{self.output_dir} is {place}; choose a folder for runs only"
        evaluates = data.eval_path is not None or data.eval_split is not None or data.eval_fraction > 0
        if training.get("eval_strategy", "no") != "no" and not evaluates:
            yield "training.eval_strategy", "nothing to evaluate on; set data.eval_path or data.eval_fraction"
        if training.get("eval_on_start") and not evaluates:
            yield "training.eval_on_start", "nothing to evaluate on; set data.eval_path or data.eval_fraction"
        schedule = training.get("lr_scheduler_type")
        if schedule in NEEDS_EVALUATION and (not evaluates or training.get("eval_strategy") == "no"):
            yield "training.lr_scheduler_type", f"{schedule} follows evaluations; evaluate, or choose another schedule"
        for name in OF_WORKERS:
            if training.get(name) and not training.get("dataloader_num_workers"):
                yield f"training.{name}", "needs training.dataloader_num_workers of at least 1"
        grouped = training.get("group_by_length") or training.get("train_sampling_strategy") == "group_by_length"
        if grouped and data.packing:
            yield "data.packing", "packs have no lengths to group by; drop it, or training.train_sampling_strategy"
        if self.preference.on:
            yield from self._preference_conflicts()
        if self.reward:
            yield from self._reward_conflicts()
        else:
            for name in self.grpo.model_fields_set:
                if getattr(self.grpo, name) != GrpoSection.model_fields[name].default:
                    yield f"grpo.{name}", "has no effect without reward; write for example reward: [format, gsm8k]"
        if self.model.device not in ("auto", "cpu") and training.get("use_cpu"):
            yield "training.use_cpu", f"contradicts model.device: {self.model.device}"
        if training.get("bf16") and training.get("fp16"):
            yield "training.fp16", "set together with training.bf16; keep one"

    def _preference_conflicts(self) -> Iterator[tuple[str, str]]:
        data, lora, training, loss = self.data, self.lora, self.training, self.preference.loss
        if data.packing:
            kind = "pairs" if self.preference.rows == "pairs" else "judged rows"
            yield "data.packing", f"{kind} are not packed; write data.packing: false"
        if data.format != "auto" and self.preference.rows == "pairs":
            yield "data.format", "pairs are recognised by their columns chosen and rejected; write data.format: auto"
        if data.train_on != "assistant":
            yield "data.train_on", "preferences compare answers only; write data.train_on: assistant"
        if self.preference.has_reference and lora.init not in ("default", "gaussian"):
            yield "lora.init", f"{lora.init} does not start at the base model, which is the reference; write default"
        yield from self._not_honoured(f"preference.loss: {loss}")
        if loss == "kto":
            if training.get("per_device_train_batch_size", 8) < 2:
                yield "training.per_device_train_batch_size", "kto compares rows of a batch; write at least 2"
            ordered = [name for name in ("train_sampling_strategy", "group_by_length") if training.get(name)]
            if ordered and training[ordered[0]] != "sequential":
                yield f"training.{ordered[0]}", "kto takes rows in their order; leave it out"

    def _reward_conflicts(self) -> Iterator[tuple[str, str]]:
        data, training, many = self.data, self.training, self.grpo.num_generations
        if self.preference.on:
            yield "preference.loss", "set together with reward; keep one"
        for name in self.rewards:
            if not re.fullmatch(REWARD, name):
                near = nearest(name, ("format", "gsm8k"))
                yield "reward", f"{name!r} is not a reward; available: format, gsm8k, python:module.function{near}"
        if len(self.rewards) < len(self.reward):
            yield "reward", "names the same reward twice"
        if unheard := [name for name, weight in self.rewards.items() if not weight]:
            yield "reward", f"{unheard[0]} has the weight 0; leave it out"
        if data.packing:
            yield "data.packing", "prompts are not packed; write data.packing: false"
        if data.format != "auto":
            yield "data.format", "prompts are recognised by their columns; write data.format: auto and data.columns"
        if data.train_on != "assistant":
            yield "data.train_on", "has no effect with reward: what the model answers is trained; leave it out"
        if data.max_length is not None and data.max_length <= self.grpo.max_completion_length:
            longest = f"grpo.max_completion_length: {self.grpo.max_completion_length}"
            yield "data.max_length", f"{data.max_length} leaves no room for a prompt before {longest}"
        if self.grpo.beta and self.lora.init not in ("default", "gaussian"):
            yield "lora.init", f"{self.lora.init} does not start at the base model, which grpo.beta compares with"
        rows, steps = (training.get(name, other) for name, other in
                       (("per_device_train_batch_size", 8), ("gradient_accumulation_steps", 1)))  # fmt: skip
        if rows * steps % many:
            size = "training.per_device_train_batch_size times gradient_accumulation_steps"
            why = f"{many} answers to a prompt do not divide the {rows * steps} rows of a step ({size})"
            yield "grpo.num_generations", why
        for name in ("train_sampling_strategy", "group_by_length", "auto_find_batch_size"):
            if training.get(name):
                yield f"training.{name}", "has no effect with reward: batches are groups of answers; leave it out"
        yield from self._not_honoured("reward")

    @property
    def rewards(self) -> dict[str, float]:
        """Name of each reward -> its weight; empty for a run that learns from answers that are there."""
        return dict(self.reward) if isinstance(self.reward, dict) else dict.fromkeys(self.reward, 1.0)

    @property
    def rows(self) -> Literal["chats", "pairs", "judged", "tasks"]:
        """What rows are: chats to learn, two answers each, one answer with a label, or prompts to answer."""
        return "tasks" if self.reward else self.preference.rows

    def _not_honoured(self, loss: str) -> Iterator[tuple[str, str]]:
        """Settings of the plain loss, which another loss would ignore."""
        if self.training.get("label_smoothing_factor"):
            yield "training.label_smoothing_factor", f"has no effect with {loss}; leave it out"
        if self.training.get("use_liger_kernel"):
            yield "training.use_liger_kernel", f"Liger's loss is not the one of {loss}; leave it out"

    @property
    def name(self) -> str:
        """The preset's name, or the file's without its ending."""
        return self._name

    @property
    def source(self) -> Path | None:
        """The file it was loaded from."""
        return self._source

    @property
    def provenance(self) -> Mapping[str, str]:
        """For each dotted key, where its value came from: `file:line`, `override`, or `default`."""
        return self._provenance

    @property
    def notes(self) -> tuple[str, ...]:
        """What was translated or left out on the way, for people to read."""
        return self._notes

    def resolved(self) -> dict[str, Any]:
        """The whole recipe with every default, as plain data that loads to the same recipe again."""
        return self.model_dump(mode="python")

    def to_yaml(self) -> str:
        """`resolved()` as YAML."""
        return dump(self.resolved())

    def digest(self) -> str:
        """sha256 of what decides the result: everything but `about` and `output_dir`."""
        content = {key: value for key, value in self.resolved().items() if key not in ("about", "output_dir")}
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def load_recipe(name_or_path: str | Path, overrides: str | Sequence[str] = (), find: Find | None = None) -> Recipe:
    """Read a preset by name or a file by path, merge its parents and the overrides, and check all of it.

    Args:
        name_or_path: a preset's name; a path if it holds a `/` or ends in .yaml or .yml.
        overrides: `section.key=value` texts, the value in YAML; an empty value or null takes the default back.
        find: gives a preset's file for its name; the presets in this package if not given.

    Raises:
        RecipeError: with every problem, its file and line, what was expected, and the nearest valid name.
    """
    chain = read_chain(name_or_path, find or shipped_preset)
    for parent in chain.layers[1:]:
        parent.data.pop("about", None)  # a parent's description does not describe its child
    unread = chain.problems or any(layer.problems for layer in chain.layers)
    layers = [*reversed(chain.layers), *read_overrides(overrides)]
    for layer in layers:
        normalise(layer)
    merged = merge(layers)
    leave_embedded_evaluation(layers, merged)
    merged.data.setdefault("output_dir", f"runs/{chain.name}")
    problems = [*chain.problems, *(problem for layer in layers for problem in layer.problems)]
    try:
        recipe = Recipe.model_validate(merged.data)
    except ValidationError as error:
        # What is missing may stand in a file that could not be read, or be there and wrong in another way.
        said = {problem.key for problem in problems}
        found = [problem for problem in explain(error, Recipe, merged) if problem.key not in said]
        problems += [problem for problem in found if not (unread and problem.message.startswith("is required"))]
    if problems:
        file = str(chain.files[0]) if chain.files else ""
        problems = [problem if problem.where else replace(problem, where=file) for problem in problems]
        raise RecipeError(chain.name, sorted(problems, key=lambda problem: _order(problem, chain)))
    recipe._name = chain.name
    recipe._source = Path(str(chain.files[0]))
    recipe._notes = tuple(note for layer in [*layers, merged] for note in layer.notes)
    recipe._provenance.update(_provenance(recipe.resolved(), merged))
    return recipe


def _order(problem: Problem, chain: Chain) -> tuple[int, int, str]:
    """By file from the youngest, then by line; overrides last."""
    file, _, line = problem.where.rpartition(":")
    names = [str(file) for file in chain.files]
    if problem.where.startswith("override "):
        return len(names), 0, ""
    return names.index(file) if file in names else 0, int(line) if line.isdigit() else 0, problem.key


def _provenance(resolved: Mapping[str, Any], merged: Layer) -> Iterator[tuple[str, str]]:
    """(dotted key, origin) for every value of the resolved recipe but `about`."""

    def walk(value: Any, given: Any, key: Key) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                below = given.get(name) if isinstance(given, dict) else None
                yield from walk(inner, below, (*key, str(name)))
        else:
            where = merged.where(key) if given is not None else ""
            yield ".".join(key), "override" if where.startswith("override ") else where or "default"

    for name, section in resolved.items():
        if name != "about":
            yield from walk(section, merged.data.get(name), (name,))
