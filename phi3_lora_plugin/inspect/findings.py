"""What `inspect` finds in a folder, as data, and as lines for a person."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.families import Projection
from phi3_lora_plugin.wording import human


class InspectError(Phi3LoraError):
    """Nothing at the path can be inspected."""


LFS = "is a Git LFS pointer, not the weights"
PULL = "run git lfs pull"
AGAIN = "copy it again from where the folder came from"
FETCH = "fetch it again"
OLDER = "take an older checkpoint"


@dataclass(frozen=True)
class Problem:
    """Something that breaks or misleads a host, and how to fix it; `here`: this package works around it by itself."""

    what: str
    fix: str
    here: bool = False

    @property
    def damage(self) -> bool:
        """Whether only another copy fixes it."""
        return self.fix in (PULL, AGAIN, FETCH, OLDER)


@dataclass(frozen=True)
class Trainable:
    """What some presets would train on this model.

    Attributes:
        presets: those that train these targets at this rank on weights held like this.
        targets: and the rank.
        held: how the base's weights are held: bfloat16, float32, nf4.
        parameters: that are trained.
        bytes: of adapter, gradients and AdamW's state.
        base_bytes: of the base's weights. What activations take comes on top; it depends on rows and batch.
    """

    presets: tuple[str, ...]
    targets: str
    held: str
    parameters: int
    bytes: int
    base_bytes: int


@dataclass(frozen=True)
class Findings:
    """Everything that was found in a folder; fields are empty where the folder has nothing of the kind."""

    path: str
    kinds: tuple[str, ...]
    downloaded: bool = True
    """False: nothing of it is here, and sizes are those that were published."""
    family: str | None = None
    max_length: int | None = None
    parameters: int | None = None
    projections: tuple[Projection, ...] = ()
    template: str | None = None
    stop_tokens: tuple[str, ...] = ()
    pad_token: str | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)
    trainable: tuple[Trainable, ...] = ()
    problems: tuple[Problem, ...] = ()


def lines(found: Findings) -> Sequence[str]:
    """The findings as lines for a person."""
    told = [f"{found.path}: {' + '.join(found.kinds)}"]
    if not found.downloaded:
        told += ["not here     sizes as published; to fetch the model:", f"             hf download {found.path}"]
    if found.family:
        told.append(f"family       {found.family}")
    if found.parameters:
        told.append(f"size         {found.parameters:,} parameters")
    if found.max_length:
        told.append(f"rows         up to {found.max_length:,} tokens")
    for each in found.projections:
        shape = f"{f'{each.experts} x ' if each.experts else ''}{each.out_features} x {each.in_features}"
        told.append(f"  {each.path:<24} {shape}")
        if each.slices:
            told += _wrapped(", ".join(f"{part.name} {part.start}:{part.stop}" for part in each.slices), 27)
    if found.template or found.pad_token:
        told.append(f"template     {found.template or 'unknown'}")
        told.append(f"stops at     {', '.join(found.stop_tokens)}; pads with {found.pad_token}")
    for key, value in found.adapter.items():
        told.append(f"{key:<12} {', '.join(value) if isinstance(value, list) else value}")
    if found.trainable:
        told.append("presets would train (without activations)")
        for row in found.trainable:
            told += _wrapped(f"{row.targets}:", 2)
            told.append(f"    {row.parameters:,} parameters, {human(row.bytes)} for them")
            told.append(f"    {human(row.base_bytes)} of weights in {row.held}")
            told += _wrapped(", ".join(row.presets), 4)
    told.append(f"problems     {len(found.problems) or 'none'}")
    for problem in found.problems:
        told.append(f"  - {problem.what}\n    {'handled here; elsewhere' if problem.here else 'fix'}: {problem.fix}")
    return told


def _wrapped(text: str, indent: int) -> Sequence[str]:
    space = " " * indent
    return textwrap.wrap(text, 80, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
