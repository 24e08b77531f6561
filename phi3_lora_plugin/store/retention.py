"""Which checkpoints of a store stay, and which is the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.store.layout import Entry, step_name
from phi3_lora_plugin.store.manifest import RESUME


@dataclass(frozen=True)
class Retention:
    """How many checkpoints a store keeps; one that any rule keeps is kept.

    Attributes:
        last: the newest ones; at least one.
        best: the best ones by their metric.
        every: those whose step divides by this, for good.
        resume: how many of the newest ones keep what is needed to resume (optimizer, schedule, random state).
    """

    last: int = 2
    best: int = 1
    every: int | None = None
    resume: int = 2

    def __post_init__(self) -> None:
        for name, value, least in (("last", self.last, 1), ("best", self.best, 0), ("resume", self.resume, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise Phi3LoraError(f"keep_{name}: expected a whole number of at least {least}, got {value!r}")
        if self.every is not None and (not isinstance(self.every, int) or self.every < 1):
            raise Phi3LoraError(f"keep_every: expected a whole number of at least 1 or None, got {self.every!r}")


def kept(found: Sequence[Entry], rule: Retention) -> list[Entry]:
    """The checkpoints that stay, newest first."""
    newest = sorted(found, key=lambda entry: entry.step, reverse=True)
    stays = {entry.step for entry in newest[: rule.last]}
    stays |= {entry.step for entry in by_metric(newest)[: rule.best]}
    stays |= {entry.step for entry in newest if rule.every and entry.step % rule.every == 0}
    return [entry for entry in newest if entry.step in stays]


def by_metric(found: Sequence[Entry]) -> list[Entry]:
    """Those that have a metric, best first; of equals the earlier one. Only the metric of the newest counts."""
    measured = sorted((entry for entry in found if entry.metric), key=lambda entry: entry.step)
    if not measured:
        return []
    metric = measured[-1].metric or {}
    alike = [entry for entry in measured if (entry.metric or {})["name"] == metric["name"]]
    sign = -1 if metric.get("greater_is_better") else 1
    return sorted(alike, key=lambda entry: sign * float((entry.metric or {})["value"]))


def doomed(found: Sequence[Entry], rule: Retention) -> list[Path]:
    """What no rule keeps, of the `entries` of a store.

    Nothing is deleted unless the newest checkpoint has all its bytes: there is always a good one.
    """
    ours = [entry for entry in found if entry.path.name == step_name(entry.step)]  # not what people named
    if not ours or not _has_its_bytes(ours[0]):
        return []
    stays = kept(ours, rule)
    resumable = [entry.path / RESUME for entry in stays if entry.has_resume]
    return [entry.path for entry in ours if entry not in stays] + resumable[rule.resume :]


def _has_its_bytes(entry: Entry) -> bool:
    listed = entry.manifest["files"]
    try:
        return all((entry.path / name).stat().st_size == listed[name]["bytes"] for name in listed)
    except OSError:
        return False
