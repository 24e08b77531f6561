"""manifest.json: what a checkpoint folder has to hold, by size and sha256, and whether it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError

MANIFEST = "manifest.json"
RESUME = "resume"
FORMAT = 1


class ManifestError(Phi3LoraError):
    """A manifest that is missing, cut off, changed by hand or of a format that is not known here."""


@dataclass(frozen=True)
class Report:
    """What `verify` found; true if everything is as it was written.

    Attributes:
        folder: what was looked at.
        problems: one sentence each, naming the file.
        files: every listed file -> "ok" or what is wrong with it.
        manifest: of a single checkpoint, its content; {} where it cannot be read.
        checkpoints: of a store, the reports of what is in it, newest first.
    """

    folder: Path
    problems: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[Report, ...] = ()

    def __bool__(self) -> bool:
        return not self.problems

    @property
    def step(self) -> int | None:
        return self.manifest.get("step")


def render_manifest(content: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest: sorted, one value a line, with the hash of all the rest in it. No clock takes part."""
    body = {"format": FORMAT, **{key: value for key, value in content.items() if key not in ("format", "sha256")}}
    digest = hashlib.sha256(_dump(body).encode()).hexdigest()
    return _dump({**body, "sha256": digest}).encode()


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ManifestError: there is none, or a byte of it is not as it was written.
    """
    path = folder / name
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise ManifestError(f"{name}: missing, so the folder was never finished, or is none of ours") from error
    except OSError as error:
        raise ManifestError(f"{name}: cannot be read: {error.strerror or error}") from error
    _check(name, raw)
    return dict(json.loads(raw))


@lru_cache(maxsize=256)
def _check(name: str, raw: bytes) -> None:
    """Raise what is wrong with the bytes of a manifest; a run asks at each save, of all that it keeps."""
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise ManifestError(f"{name}: is not JSON (cut off or damaged): {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ManifestError(f"{name}: is not the manifest of a checkpoint")
    if content.get("format") != FORMAT:
        raise ManifestError(f"{name}: has format {content.get('format')!r}, and {FORMAT} is what is understood here")
    outside = [file for file in content["files"] if Path(file).is_absolute() or ".." in Path(file).parts]
    if outside:
        raise ManifestError(f"{name}: lists files outside its folder: {', '.join(outside[:3])}")
    try:
        unchanged = render_manifest(content) == raw
    except ValueError:  # NaN, which Python reads and no manifest has
        unchanged = False
    if not unchanged:
        raise ManifestError(f"{name}: was changed after it was written")


def check_folder(folder: Path, resume: bool = True) -> Report:
    """Compare a checkpoint folder with its manifest, every byte; with `resume/` inside it if asked."""
    try:
        content = read_manifest(folder)
    except ManifestError as error:
        return Report(folder, (str(error),), {MANIFEST: str(error).removeprefix(f"{MANIFEST}: ")})
    files = {MANIFEST: "ok"} | {name: _check_file(folder / name, entry) for name, entry in content["files"].items()}
    inside = folder / RESUME
    if resume and inside.is_dir():
        try:
            listed = read_manifest(inside)["files"]
            files |= {f"{RESUME}/{name}": _check_file(inside / name, entry) for name, entry in listed.items()}
        except ManifestError as error:
            files[f"{RESUME}/{MANIFEST}"] = str(error).removeprefix(f"{MANIFEST}: ")
    problems = tuple(f"{name}: {state}" for name, state in files.items() if state != "ok")
    return Report(folder, problems, files, content)


def describe_file(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file, as a manifest lists it."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _check_file(path: Path, entry: Mapping[str, Any]) -> str:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes, expected {entry['bytes']}"
        found = describe_file(path)["sha256"]
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "ok" if found == entry["sha256"] else f"sha256 is {found[:12]}..., expected {entry['sha256'][:12]}..."


def _dump(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
