"""Installed versions against the bounds of this package and against what its tests run with."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from importlib.resources import files

from phi3_lora_plugin.doctor.finding import Finding

NAME = "phi3-lora-plugin"
AREA = "versions"
#: Beginnings of the environment variables that change what a run does; tokens are never shown.
_VARIABLES = ("PHI3_LORA_", "HF_", "HUGGINGFACE_", "CUDA_VISIBLE", "PYTORCH_", "TRANSFORMERS_", "ACCELERATE_", "TORCH")


@cache
def tested() -> dict[str, dict[str, str]]:
    """Library -> {"oldest", "newest"}: the versions that the suite runs with; either may be missing.

    `tools/tested_versions.py` writes the table from constraints.txt and .ci/constraints-oldest.txt.
    """
    table: dict[str, dict[str, str]] = json.loads((files(__package__) / "tested.json").read_text(encoding="utf-8"))
    return table


def installed(name: str) -> str | None:
    """The version of a distribution, or None; a damaged one counts as absent."""
    try:
        return metadata.version(name) or None
    except Exception:
        return None


def versions() -> Iterator[Finding]:
    """Python, this package and each of its requirements."""
    from packaging.requirements import Requirement

    yield Finding(AREA, "python", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")
    yield Finding(AREA, NAME, f"{installed(NAME)}")
    known = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(_VARIABLES)]
    ours = "HF_HUB_DISABLE_PROGRESS_BARS"  # the command itself sets it
    shown = [text for text in known if "TOKEN" not in text.partition("=")[0] and not text.startswith(ours)]
    yield Finding(AREA, "environment", ", ".join(shown) or "nothing set that matters here")
    for line in metadata.requires(NAME) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield version_of(requirement.name, str(requirement.specifier))


def _tested(known: Mapping[str, str]) -> str:
    oldest, newest = known.get("oldest"), known.get("newest")
    if newest is None:
        return f"; tested from {oldest}" if oldest else ""
    return f"; tested with {newest}" if oldest in (None, newest) else f"; tested with {oldest} to {newest}"


def version_of(name: str, bounds: str) -> Finding:
    """One requirement: its version, whether it is within `bounds`, and what the tests run with."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    found = installed(name)
    pip = f"pip install '{name}{bounds}'"
    if found is None:
        return Finding(AREA, name, f"not installed; {bounds or 'any version'} is required", "problem", pip)
    known = tested().get(name, {})
    about = _tested(known)
    if not SpecifierSet(bounds, prereleases=True).contains(found):
        return Finding(AREA, name, f"{found} is too old: {bounds} is required", "problem", pip)
    if "newest" in known and Version(found).release[:2] > Version(known["newest"]).release[:2]:
        remedy = f"if something fails: pip install '{name}=={known['newest']}'"
        return Finding(AREA, name, f"{found}, newer than tested{about}", "note", remedy)
    return Finding(AREA, name, f"{found}{about}")
