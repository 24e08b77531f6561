"""What all readers share: a config that knows which of its keys were read, and the recipe that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.families import UnsupportedModel, recognise
from phi3_lora_plugin.model.folder import ModelError, read_json
from phi3_lora_plugin.model.published import published_config, why_refused
from phi3_lora_plugin.recipe.training import translate
from phi3_lora_plugin.recipe.yaml_file import dump_line

#: Losses of preference optimisation by the names that hosts have for them.
LOSSES = {"dpo": "sigmoid"} | {
    name: name for name in "sigmoid ipo hinge robust orpo apo_zero apo_down kto simpo".split()
}
#: What transformers calls some attention implementations of hosts.
ATTENTION = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"} | {
    name: name for name in ("flash_attention_2", "flash_attention_3", "sdpa", "eager", "flex_attention", "auto")
}


#: What `render` writes where a recipe names no rows.
PLACEHOLDER = "YOUR_CHATS.jsonl"


class ImportConfigError(Phi3LoraError):
    """A config that cannot become a recipe: of an unknown host, for another model, or for another kind of training."""


@dataclass
class Reading:
    """One config while it is read.

    Attributes:
        given: keys that were not read yet.
        folder: where the config lies; paths in it are relative to that or to the working directory.
        recipe: dotted keys of the recipe.
        partial: the keys are changes to a recipe that is known; the host's defaults do not come with them.
        notes: a sentence for each key that has no equal, or means something else.
    """

    given: dict[str, Any]
    folder: Path
    partial: bool = False
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is read by this; null is as if it were not there."""
        value = self.given.pop(key, None)
        return default if value is None else value

    def put(self, key: str, value: Any) -> None:
        """Set a key of the recipe; of `training`, under the name that the installed transformers has for it."""
        section, _, name = key.partition(".")
        if section == "training":
            translated = translate({name: value}).values or {name: value}
            self.recipe |= {f"training.{present}": found for present, found in translated.items()}
        else:
            self.recipe[key] = value

    def note(self, key: str, why: str, value: Any = None) -> None:
        """Report a key that is left out or changed."""
        said = f": {_short(value)}" if value is not None else ""
        self.notes.append(f"{key}{said} - {why}")

    def by_table(self, table: Mapping[str, str], section: dict[str, Any] | None = None) -> None:
        """Keys that only have another name here, of the config or of a section that was taken from it."""
        values = self.given if section is None else section
        for key, ours in table.items():
            if (value := values.pop(key, None)) is not None:
                self.put(ours, number(value))

    def drop(self, reasons: Mapping[str, str]) -> None:
        """Keys that a recipe has no need of, each with its reason; a name that ends in * stands for several."""
        for name, why in reasons.items():
            for key in [key for key in self.given if key == name or (name[-1] == "*" and key.startswith(name[:-1]))]:
                if (value := self.take(key)) is not None:
                    self.note(key, f"not needed: {why}", value)

    def leave(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Report what has no equal, of the keys in `values`."""
        for key, value in values.items():
            if value is not None:
                self.note(f"{prefix}{key}", "has no equal in a recipe; left out", value)

    def fill(self, defaults: Mapping[str, Any]) -> None:
        """The host's own defaults where they are not ours, for keys that the config leaves out."""
        set_already = dict(self.recipe)
        for key, value in defaults.items():
            self.put(key, value)
        self.recipe |= set_already

    def read_base(self, key: str, name: Any) -> None:
        """Put the base model, if it is one of the family.

        Raises:
            ImportConfigError: it is of another family, or none is named.
        """
        if not isinstance(name, str) or not name:
            raise ImportConfigError(f"{key}: no base model is named; a recipe needs one of the Phi family")
        if name.lower().startswith("unsloth/"):
            plain = f"microsoft/{name.partition('/')[2].removesuffix('-bnb-4bit').removesuffix('-unsloth')}"
            if published_config(plain) is not None:
                self.note(key, f"read as {plain}: unsloth's copy has other module names", name)
                name = plain
        if refused := why_refused(name):
            raise ImportConfigError(f"{key}: {name} is not trained here: {refused}")
        config: Any = published_config(name)
        for folder in (Path(name), self.folder / name):
            if config is None and (folder / "config.json").is_file():
                try:
                    config = read_json(folder / "config.json")
                except ModelError as error:
                    raise ImportConfigError(f"{key}: {error}") from error
                name = str(folder)
        if config is not None:
            try:
                recognise(config)
            except UnsupportedModel as error:
                raise ImportConfigError(
                    f"{key}: {name} is not a Phi model that can be trained here: {error}"
                ) from error
        elif not any(
            word in name.lower() for word in ("phi-3", "phi3", "phi-4", "phi4", "phi-mini-moe", "phi-tiny-moe")
        ):
            raise ImportConfigError(
                f"{key}: {name} is not a Phi model; configs are imported for Phi-3, Phi-3.5, Phi-4-mini, Phi-4 and "
                "Phi-MoE"
            )
        elif "vision" in name.lower():
            raise ImportConfigError(f"{key}: {name} is a model of pictures, which is not trained here")
        else:
            self.note(key, "its config is not on this machine; taken for a Phi by its name", name)
        self.put("model.path", name)

    def read_targets(self, key: str, value: Any, every: tuple[str, ...] = ("all-linear",)) -> None:
        """Put the modules that get LoRA: a list, text with commas, a regular expression, or the host's word for all."""
        if value is None:
            return
        if isinstance(value, str) and "," in value:
            value = [part.strip() for part in value.split(",") if part.strip()]
        names = [value] if isinstance(value, str) else list(value)
        if any(name in every for name in names):
            self.put("lora.targets", "all-linear")
            return
        plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
        self.put("lora.targets", names if plain or len(names) > 1 else names[0])

    def read_optimizer_and_rest(self) -> None:
        """What extends TrainingArguments has the same names: pass on what the installed class knows."""
        for key in list(self.given):
            value = number(self.given[key])
            if value is None:
                continue
            translated = translate({key: value})
            if translated.problems:
                continue
            self.take(key)
            for name, present in translated.values.items():
                self.put(f"training.{name}", present)
            for name, why in translated.notes:
                self.note(name, why, value)

    def read_checkpoints(self) -> None:
        """Put when to save and how many to keep, which hosts have by the names of TrainingArguments."""
        steps, keep, strategy = (self.take(key) for key in ("save_steps", "save_total_limit", "save_strategy"))
        steps = number(steps)
        if strategy not in (None, "steps"):
            self.note("save_strategy", "checkpoints are written at each evaluation and at the end", strategy)
        elif isinstance(steps, int) and steps > 0:
            self.put("checkpoint.every_steps", steps)
        elif steps is not None:
            self.note("save_steps", "a share of the run; write checkpoint.every_steps as a number of steps", steps)
        if keep is not None:
            self.put("checkpoint.keep_last", max(1, int(keep)))

    def read_report_to(self) -> None:
        """Put the trackers, unless there are none."""
        if (report := self.take("report_to", "none")) not in ("none", ["none"]):
            self.put("training.report_to", report)

    def read_own(self) -> None:
        """Put what the section `phi3_lora:` of a host's file says, whose keys are a recipe's."""
        own = self.take("phi3_lora") or {}
        for section in ("data", "checkpoint"):
            for name, value in (own.get(section) or {}).items():
                self.put(f"{section}.{name}", value)

    def holds_out(self) -> bool:
        """Whether the recipe has rows to evaluate on."""
        return bool({"data.eval_fraction", "data.eval_path", "data.eval_split"} & set(self.recipe))

    def read_half(self, bf16: Any, fp16: Any) -> None:
        """Put the type of the weights that the two switches of mixed precision stand for."""
        if fp16 in (True, "true"):
            self.put("model.dtype", "float16")
        elif bf16 in (True, "true", "full"):
            self.put("model.dtype", "bfloat16")
        elif bf16 is False:
            self.put("model.dtype", "float32")

    def read_loss(self, key: str, value: Any) -> None:
        """Put the loss of preference optimisation.

        Raises:
            ImportConfigError: a recipe has no such loss.
        """
        names = value if isinstance(value, list) else [value]
        if len(names) != 1 or (loss := LOSSES.get(str(names[0]))) is None:
            raise ImportConfigError(f"{key}: {_short(value)} is not a loss of recipes; available: {', '.join(LOSSES)}")
        self.put("preference.loss", loss)

    def put_sources(self, sources: list[dict[str, Any]]) -> None:
        """One source as `data.path` and the keys beside it, several as a mixture."""
        sources = [source for source in sources if source.get("path") != PLACEHOLDER]
        if len(sources) == 1:
            for name, value in sources[0].items():
                self.put(f"data.{name}", value)
        elif sources:
            self.put("data.path", sources)

    def flags(self, table: Mapping[str, tuple[str, Any]]) -> None:
        """Switches that stand for a value of ours: key -> (dotted key, value if it is on)."""
        for key, (ours, value) in table.items():
            if self.take(key) in (True, "true", "True"):
                self.put(ours, value)


def _short(value: Any) -> str:
    text = dump_line(value).strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


def number(value: Any) -> Any:
    """`2e-4` is text to PyYAML, and a number to everybody who writes it."""
    if isinstance(value, str):
        try:
            return float(value) if not value.strip().isdigit() else int(value)
        except ValueError:
            return value
    return value


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` -> `{"a": {"b": 1}}`, in the order of a recipe's sections."""
    order = ("model", "data", "lora", "training", "preference", "checkpoint", "speed", "output_dir", "seed")
    made: dict[str, Any] = {}
    for key, value in sorted(dotted.items(), key=lambda item: order.index(item[0].partition(".")[0])):
        section, _, name = key.partition(".")
        if name:
            made.setdefault(section, {})[name] = value
        else:
            made[section] = value
    return made
