"""Everything that a run's folder says about the run, read leniently: what is missing is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from phi3_lora_plugin.chat.report import DataReport
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora_files.peft_files import WEIGHTS
from phi3_lora_plugin.recipe.yaml_file import dump_line, read_file
from phi3_lora_plugin.report.updates import Update, largest_updates
from phi3_lora_plugin.small_file import BadFile, read_small
from phi3_lora_plugin.store.layout import BEST, LATEST, entries, stores_in, torn
from phi3_lora_plugin.store.metrics_file import EVAL, METRICS, TRAIN, read_metrics
from phi3_lora_plugin.store.run_file import RUN, read_run

RECIPE, DATA_REPORT = "recipe.yaml", "data_report.json"


class ReportError(Phi3LoraError):
    """A folder that there is nothing to report about."""


class _Sample(TypedDict):
    prompt: str
    before: str
    after: str
    expected: str


class _Result(TypedDict, total=False):
    steps: int
    epochs: float
    tokens: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    eval_reward_before: float | None
    eval_reward_after: float | None
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    reload_difference: float | None
    samples: list[_Sample]


class _Coverage(TypedDict):
    module: str
    layers: list[int]
    shape: list[int]
    rank: int | None
    parameters: int


class _Speed(TypedDict):
    part: str
    on: bool
    why: str


class _Piece(TypedDict):
    text: str
    weight: float
    kind: str


class _Row(TypedDict):
    number: int
    name: str
    tokens: int
    trained: int
    pieces: list[_Piece]


class _Session(TypedDict):
    started: float
    ended: NotRequired[float]


#: Lists in run.json and what is in them, checked as they are read: people edit files.
_PARTS: Mapping[str, Any] = {
    "coverage": list[_Coverage],
    "speed": list[_Speed],
    "rows": list[_Row],
    "sessions": list[_Session],
}


@dataclass(frozen=True)
class Setting:
    """One value of a recipe as YAML, and where it came from ("" where that is not known)."""

    key: str
    value: str
    origin: str


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as its manifest describes it. Sizes are in bytes."""

    name: str
    step: int
    metric: str
    size: int
    sha256: str
    notes: tuple[str, ...]  # "newest", "best", "can be resumed"


@dataclass(frozen=True)
class RunFolder:
    """One run.

    Attributes:
        facts: run.json; {} for a run that was not ours.
        lines: of metrics.jsonl, by step.
        torn: names of checkpoints that are damaged or unfinished.
    """

    folder: Path
    facts: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    data: DataReport | None
    settings: Sequence[Setting]
    checkpoints: Sequence[Checkpoint]
    torn: Sequence[str]
    updates: Sequence[Update]
    adapter: Path | None

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or self.folder.resolve().name)

    @property
    def status(self) -> str:
        return str(self.facts.get("status") or "unknown")

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def result(self) -> Mapping[str, Any]:
        """The `Result` of a run that ended well or was interrupted, as a mapping; else {}."""
        return _checked(_Result, self.facts.get("result")) or {}

    def part(self, name: str) -> list[Mapping[str, Any]]:
        """A part of run.json as its kind has it; [] where it is missing or was changed by hand."""
        return _checked(_PARTS[name], self.facts.get(name)) or []


def read_run_folder(folder: Path) -> RunFolder:
    """Read the folder of a run.

    Raises:
        ReportError: it is not a folder, or nothing in it is of a run.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; pass the output folder of a run")
    try:
        lines = read_metrics(folder)
    except BadFile as error:
        raise ReportError(f"{folder / METRICS} {error}") from error
    facts = read_run(folder)
    stores = stores_in(folder)
    found = [(store, entry) for store in stores for entry in entries(store)]
    if not (facts or lines or found or (folder / RECIPE).is_file()):
        run = next((above for above in list(folder.resolve().parents)[:2] if (above / RUN).is_file()), None)
        raise ReportError(
            f"{folder} has nothing of a run (no {RUN}, {METRICS}, {RECIPE} or checkpoint); "
            + (f"did you mean {run}?" if run else "pass the output folder of a run")
        )
    adapter = max(found, key=lambda pair: pair[1].step)[1].path if found else None
    return RunFolder(
        folder=folder,
        facts=facts,
        lines=lines,
        data=_data_report(folder),
        settings=_settings(folder, facts),
        checkpoints=[_checkpoint(store, entry) for store, entry in found],
        torn=[path.name for store in stores for path in torn(store)],
        updates=largest_updates(adapter) if adapter is not None else [],
        adapter=adapter,
    )


def _checked(kind: Any, value: Any) -> Any:
    """The value if it is of a kind, without what that kind does not have; else None."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return None


def _data_report(folder: Path) -> DataReport | None:
    try:
        return DataReport.from_json(read_small(folder / DATA_REPORT).decode("utf-8"))
    except (OSError, BadFile, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _settings(folder: Path, facts: Mapping[str, Any]) -> list[Setting]:
    try:
        data = read_file(folder / RECIPE).data
    except (OSError, Phi3LoraError, ValueError):
        return []
    provenance = facts.get("provenance")
    origins = provenance if isinstance(provenance, Mapping) else {}
    found: list[Setting] = []

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        else:
            found.append(Setting(key, dump_line(value), str(origins.get(key, ""))))

    walk({name: value for name, value in data.items() if name != "about"}, "")
    return found


def _checkpoint(store: Path, entry: Any) -> Checkpoint:
    files = entry.manifest["files"]
    metric = entry.metric
    notes = [
        note for note, pointer in (("newest", LATEST), ("best", BEST)) if _pointed(store / pointer) == entry.path.name
    ]
    return Checkpoint(
        name=entry.path.name,
        step=entry.step,
        metric="" if metric is None else f"{metric['name']} {metric['value']:.4f}",
        size=sum(int(file["bytes"]) for file in files.values()),
        sha256=str((files.get(WEIGHTS) or next(iter(files.values())))["sha256"]),
        notes=tuple(notes + ["can be resumed"] * entry.has_resume),
    )


def _pointed(pointer: Path) -> str:
    try:
        return read_small(pointer, 1000).decode("utf-8", "replace").strip()
    except (OSError, BadFile):
        return ""


def figures(run: RunFolder) -> dict[str, str]:
    """The figures of a run that a reader looks for first, by name, as text; only those that are known."""
    from phi3_lora_plugin.wording import human

    result, train = run.result, run.of(TRAIN)
    found: dict[str, str] = {}
    # Where answers earn rewards, the loss says little: it compares them with each other.
    name = "reward" if any("eval_reward" in line for line in run.lines) else "loss"
    values = [(line["step"], line[f"eval_{name}"]) for line in run.of(EVAL) if line.get(f"eval_{name}") is not None]
    before, after = result.get(f"eval_{name}_before"), result.get(f"eval_{name}_after")
    before = values[0][1] if before is None and values and values[0][0] == 0 else before
    after = values[-1][1] if after is None and values and values[-1][0] else after
    if after is not None:
        found[f"held-out {name}"] = f"{after:.4f}"
    if before is not None:
        found[f"held-out {name} before"] = f"{before:.4f}"
    if values:
        step, best = (max if name == "reward" else min)(values, key=lambda pair: pair[1])
        found[f"best held-out {name}"] = f"{best:.4f} at step {step:,}"
    if train and train[-1].get("reward") is not None:
        found["training reward"] = f"{train[-1]['reward']:.4f}"
    if train and train[-1].get("loss") is not None:
        found["training loss"] = f"{train[-1]['loss']:.4f}"
    if steps := result.get("steps") or (train[-1]["step"] if train else None):
        found["steps"] = f"{steps:,}"
    if (epochs := result.get("epochs") or (train[-1].get("epoch") if train else None)) is not None:
        found["epochs"] = f"{epochs:.2f}"
    if tokens := result.get("tokens") or (train[-1].get("num_input_tokens_seen") if train else None):
        found["tokens"] = f"{tokens:,}"
    if rates := [line["tokens_per_second"] for line in train if line.get("tokens_per_second")]:
        found["tokens a second"] = f"{sorted(rates)[len(rates) // 2]:,.0f} (median)"
    if peaks := [line["peak_memory_gb"] for line in train if line.get("peak_memory_gb")]:
        found["peak memory"] = f"{max(peaks):.2f} GB"
    if trained := result.get("trainable_parameters"):
        share = 100 * trained / max(1, result.get("total_parameters") or 1)
        found["trained parameters"] = f"{trained:,} ({share:.2f}%)"
    if size := result.get("adapter_bytes"):
        found["adapter"] = human(size)
    if (far := result.get("reload_difference")) is not None:
        found["reloaded with plain PEFT"] = "logits identical" if far == 0 else f"logits differ by at most {far:.1e}"
    return found
