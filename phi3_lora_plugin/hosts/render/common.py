"""What all renderings share: lines with reasons, a recipe's numbers in neutral words, a look at its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.formats import detect
from phi3_lora_plugin.chat.readers import Row
from phi3_lora_plugin.chat.sources import find_sources
from phi3_lora_plugin.embedded import locate
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.families import WHOLE, linear_names, row_limit
from phi3_lora_plugin.model.folder import ModelError, read_json
from phi3_lora_plugin.model.published import planning_config
from phi3_lora_plugin.recipe.training import AUTO
from phi3_lora_plugin.recipe.yaml_file import dump_line

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe


_LEFT_TO_AUTO = "all layers: auto, which keeps what fits, is of phi3-lora train"
#: Arguments that hosts which extend TrainingArguments have had by these names for years.
SAME = ("eval_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha", "lr_scheduler_kwargs",
        "dataloader_num_workers", "log_level", "data_seed", "per_device_eval_batch_size")  # fmt: skip


class RenderError(Phi3LoraError):
    """A recipe that a host cannot run in any form; the message names what the host lacks."""


@dataclass(frozen=True)
class Line:
    """One key of a host's config; `why` explains our choice. Without a key, `why` is a line of its own."""

    key: str
    value: Any = None
    why: str = ""


@dataclass(frozen=True)
class Rendered:
    """A host's config: its text, and the files that have to be next to it."""

    text: str
    beside: Mapping[str, str] = field(default_factory=dict)


def note(why: str) -> Line:
    """A comment line."""
    return Line("", why=why)


def write(head: Iterable[str], lines: Iterable[Line]) -> str:
    """YAML with a header, one line a key (mappings as blocks), and reasons after `#`."""
    text = [f"# {line}".rstrip() for line in head]
    for line in lines:
        text += _block(line, "")
    return "\n".join(text) + "\n"


def _block(line: Line, indent: str) -> list[str]:
    comment = f"  # {line.why}" if line.why else ""
    if not line.key:
        return [f"{indent}# {line.why}"]
    if isinstance(line.value, dict) and line.value:
        inner = [part for key, value in line.value.items() for part in _block(Line(key, value), indent + "  ")]
        return [f"{indent}{dump_line(line.key)}:{comment}", *inner]
    if isinstance(line.value, list) and line.value and all(isinstance(one, dict) for one in line.value):
        made = [f"{indent}{dump_line(line.key)}:{comment}"]
        for one in line.value:
            parts = [part for key, value in one.items() for part in _block(Line(key, value), indent + "    ")]
            made += [f"{indent}  - {parts[0].strip()}", *parts[1:]]
        return made
    return [f"{indent}{dump_line(line.key)}: {dump_line(line.value)}{comment}"]


@dataclass(frozen=True)
class Numbers:
    """A recipe's training in settings that every host has some name for; `rest` is what only TrainingArguments has."""

    learning_rate: float
    epochs: float
    max_steps: int
    batch: int
    accumulation: int
    scheduler: str
    warmup: float  # a share below 1, or steps
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    logging_steps: float
    checkpointing: bool
    checkpointing_why: str
    by_length: bool
    rest: dict[str, Any]


def some(**values: Any) -> list[Line]:
    """A line for each value that says anything."""
    return [Line(key, value) for key, value in values.items() if value]


# What every host has some name for; a renderer adds the others that its host has.
_LORA = ("r", "alpha", "dropout", "targets", "dora", "rslora")


@dataclass(frozen=True)
class Rows:
    """Where the rows are, and in which shape; `why` explains what was assumed."""

    path: str
    local: bool
    format: str
    columns: dict[str, str]
    split: str
    why: str = ""


#: Where a recipe names no rows.
NO_ROWS = Rows("YOUR_CHATS.jsonl", True, "messages", {}, "train", "the recipe names none")


@dataclass(frozen=True)
class Rendering:
    """A recipe on its way into the config of a host, which notes call `host`."""

    recipe: Recipe
    host: str

    @cached_property
    def base(self) -> str:
        """The model as other programs find it: hub id, or folder."""
        return locate(self.recipe.model.path)

    @cached_property
    def base_config(self) -> dict[str, Any] | None:
        """The base's config.json if it is on this machine, else what is known of the published one."""
        try:
            found = planning_config(self.recipe.model.path, self.recipe.model.revision)
            return found if isinstance(found, dict) else read_json(found)
        except ModelError:
            return None

    @cached_property
    def numbers(self) -> Numbers:
        """The training section, with TrainingArguments' defaults for what is not set."""
        given = dict(self.recipe.training)
        warmup = given.pop("warmup_steps", None) or given.pop("warmup_ratio", None) or 0
        for name in ("eval_strategy", "warmup_ratio", "report_to"):
            given.pop(name, None)
        sampling = given.pop("train_sampling_strategy", None)
        new, old = given.pop("activation_checkpointing", False), given.pop("gradient_checkpointing", False)
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            given.pop(name, None)
        return Numbers(
            learning_rate=given.pop("learning_rate", 5e-5),
            epochs=given.pop("num_train_epochs", 3),
            max_steps=given.pop("max_steps", -1),
            batch=given.pop("per_device_train_batch_size", 8),
            accumulation=given.pop("gradient_accumulation_steps", 1),
            scheduler=given.pop("lr_scheduler_type", "linear"),
            warmup=warmup,
            optimizer=given.pop("optim", "adamw_torch_fused"),
            weight_decay=given.pop("weight_decay", 0.0),
            max_grad_norm=given.pop("max_grad_norm", 1.0),
            logging_steps=given.pop("logging_steps", 10),
            checkpointing=bool(new or old),
            checkpointing_why=_LEFT_TO_AUTO if AUTO in (new, old) else "",
            by_length=sampling == "group_by_length" or bool(given.pop("group_by_length", False)),
            rest=given,
        )

    def left_out(self, section: str, values: Mapping[str, Any]) -> list[Line]:
        """A line for each value that has no place in the host's config, so that nothing is silently lost."""
        return [
            note(f"not supported by {self.host}, left out: {section}.{key}: {dump_line(value)}")
            for key, value in values.items()
        ]

    def lora_left_out(self, *known: str) -> list[Line]:
        """A line for each setting of the adapter that is not at its default and that the host has no place for."""
        lora = self.recipe.lora
        values = {
            name: value
            for name, field in type(lora).model_fields.items()
            if name not in (*_LORA, *known) and (value := getattr(lora, name)) != field.default
        }
        return self.left_out("lora", values)

    def trainer_lines(self, taken: Iterable[str] = SAME, report: str = "") -> list[Line]:
        """What hosts that extend TrainingArguments have under the same names; `taken` of the rest, too."""
        n = self.numbers
        return [
            Line("per_device_train_batch_size", n.batch),
            Line("gradient_accumulation_steps", n.accumulation),
            Line("num_train_epochs", float(n.epochs)),
            *some(max_steps=n.max_steps > 0 and n.max_steps),
            Line("learning_rate", n.learning_rate),
            Line("lr_scheduler_type", n.scheduler),
            Line("optim", n.optimizer),
            Line("weight_decay", n.weight_decay),
            Line("max_grad_norm", n.max_grad_norm),
            Line("logging_steps", n.logging_steps),
            Line("save_steps", self.recipe.checkpoint.every_steps or 500),
            Line("save_total_limit", max(1, self.recipe.checkpoint.keep_last)),
            Line("report_to", "none", report),
            Line("seed", self.recipe.seed),
            Line("output_dir", self.recipe.output_dir),
            *(Line(key, value) for key, value in n.rest.items() if key in taken),
            *([note("left out: grouping by length, whose name differs between versions")] if n.by_length else []),
            *self.left_out("training", {k: v for k, v in n.rest.items() if k not in (*taken, "bf16", "fp16")}),
        ]

    def longest(self, key: str) -> Line:
        """The longest row under a host's `key`: the recipe's, else what `phi3-lora train` would take."""
        asked = self.recipe.data.max_length
        if self.base_config is not None:
            return Line(key, row_limit(asked, self.base_config), "" if asked else "the original context")
        why = f"assumed, because the config of {self.recipe.model.path} is not on this machine"
        return Line(key, asked or 4096, "" if asked else why)

    def targets(self) -> tuple[list[str] | str, str]:
        """(names or one regular expression as plain PEFT takes them, why they are not the recipe's)."""
        asked = self.recipe.lora.targets
        config = self.base_config
        moe = config["model_type"] == "phimoe" if config else "moe" in self.recipe.model.path.lower()
        if asked == "all-linear":
            return linear_names("phimoe" if moe else "phi3"), "every projection of a layer, never the head"
        names = [asked] if isinstance(asked, str) else list(asked)
        if isinstance(asked, str) and not asked.replace("_", "").replace(".", "").isalnum():
            return asked, ""
        if moe or not set(names) & set(WHOLE):
            return names, ""
        whole = list(dict.fromkeys(WHOLE.get(name, name) for name in names))
        slices = ", ".join(name for name in names if name in WHOLE)
        return whole, f"the recipe names {slices}, slices that only `phi3-lora train` adapts alone; these are the whole"

    def rows(self, evaluation: bool = False) -> Rows | None:
        """The rows to train on (or to evaluate on); looks at the first row of a local file. None if none are named.

        Raises:
            RenderError: several paths, which each host writes differently.
        """
        data = self.recipe.data
        named: Any = data.path if not evaluation else data.eval_path
        if evaluation and named is None and data.eval_split is not None:
            named = data.path
        if named is None:
            return None
        if not isinstance(named, str):
            if len(named) > 1:
                raise RenderError(f"data.path: {len(named)} paths; render one of them, and add the others by hand")
            named = named[0]
            if not isinstance(named, str):
                raise RenderError("data.path: a mixture of sources; render one of them, and add the others by hand")
        path = locate(named)
        local = Path(path).exists()
        split = (data.eval_split or data.split) if evaluation else data.split
        kind, why = (data.format, "") if data.format != "auto" else _look(path, local, dict(data.columns))
        return Rows(str(Path(path).absolute()) if local else path, local, kind, dict(data.columns), split, why)


def _look(path: str, local: bool, columns: dict[str, str]) -> tuple[str, str]:
    from phi3_lora_plugin.chat.columns import rename

    if local:
        for source in find_sources(path).sources:
            for item in source.rows():
                if isinstance(item, Row) and len(fits := detect(rename(item.values, columns))) == 1:
                    return fits[0], ""
                break
    return "messages", "the rows were not looked at; chats in a column `messages` are assumed"
