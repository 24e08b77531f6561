"""manifest.json: what a checkpoint folder has to hold, by size and sha256, and whether it does."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.small_file import BadFile, open_regular, parse_json, read_small
from phi3_lora_plugin.wording import shorten

MANIFEST = "manifest.json"
RESUME = "resume"
#: In the manifest of a state to resume from: the hash in the manifest of the checkpoint that it belongs to.
CHECKPOINT = "checkpoint"
FORMAT = 1
#: Bytes that a manifest has at most; one of an adapter has 2,000.
LIMIT = 4_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Facts that others read, and what they are.
_KINDS: Mapping[str, type] = {"base": dict, "chat": dict, "quantize": str, "notes": list}
_SPOKEN: Mapping[type, str] = {dict: "a mapping", str: "text", list: "a list"}


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


def parse_manifest(raw: bytes) -> dict[str, Any]:
    """The content of a manifest's bytes; raises `ManifestError` as `read_manifest` does."""
    try:
        content = parse_json(raw)
    except BadFile as error:
        raise ManifestError(f"{MANIFEST}: {error} (cut off or damaged)") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ManifestError(f"{MANIFEST}: is not the manifest of a checkpoint")
    if content.get("format") != FORMAT or isinstance(content["format"], bool):
        raise ManifestError(
            f"{MANIFEST}: has format {shorten(content.get('format'))}; only {FORMAT} is understood here"
        )
    if problems := list(_misfits(content)):
        raise ManifestError(f"{MANIFEST}: {'; '.join(problems[:3])}")
    try:
        unchanged = render_manifest(content) == raw
    except (ValueError, RecursionError):  # NaN, or half of a character, which Python reads and no manifest has
        unchanged = False
    if not unchanged:
        raise ManifestError(f"{MANIFEST}: was changed after it was written")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ManifestError: there is none, or a byte of it is not as it was written.
    """
    try:
        raw = read_small(folder / MANIFEST, LIMIT)
    except FileNotFoundError as error:
        what = "missing: the save was never finished, or another program wrote the folder"
        raise ManifestError(f"{MANIFEST}: {what}") from error
    except BadFile as error:
        raise ManifestError(f"{MANIFEST}: {error}") from error
    return parse_manifest(raw)


def _misfits(content: Mapping[str, Any]) -> Iterator[str]:
    """What of a manifest is not as every manifest of ours has it."""
    if not _is_count(content.get("step")):
        yield f"step is {shorten(content.get('step'))}, expected a whole number"
    if not content["files"]:
        yield "lists no files"
    for file, entry in content["files"].items():
        if not file or len(file) > 255 or "\0" in file or Path(file).name != file:
            yield f"lists files outside its folder: {shorten(file)[1:-1]}"
        elif (
            not isinstance(entry, dict)
            or not _is_count(entry.get("bytes"))
            or not isinstance(entry.get("sha256"), str)
            or not _SHA256.fullmatch(entry["sha256"])
        ):
            yield f"{shorten(file)} is listed as {shorten(entry)}, expected bytes and sha256"
    metric = content.get("metric")
    if metric is not None and not (
        isinstance(metric, dict)
        and isinstance(metric.get("name"), str)
        and isinstance(metric.get("greater_is_better"), bool)
        and isinstance(metric.get("value"), int | float)
        and not isinstance(metric["value"], bool)
        and abs(metric["value"]) <= sys.float_info.max
    ):
        yield f"metric is {shorten(metric)}, expected name, a finite value and greater_is_better"
    if content.get(CHECKPOINT) is not None and not _SHA256.fullmatch(str(content[CHECKPOINT])):
        yield f"{CHECKPOINT} is {shorten(content[CHECKPOINT])}, expected a sha256"
    for name, kind in _KINDS.items():
        if content.get(name) is not None and not isinstance(content[name], kind):
            yield f"{name} is {shorten(content[name])}, expected {_SPOKEN[kind]}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


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
            state = read_manifest(inside)
            listed = state["files"]
            if state["step"] != content["step"]:
                raise ManifestError(f"{MANIFEST}: is of step {state['step']}, not of step {content['step']}")
            if state.get(CHECKPOINT) not in (None, content["sha256"]):
                raise ManifestError(f"{MANIFEST}: is of another checkpoint of step {state['step']}")
            files |= {f"{RESUME}/{name}": _check_file(inside / name, entry) for name, entry in listed.items()}
        except ManifestError as error:
            files[f"{RESUME}/{MANIFEST}"] = str(error).removeprefix(f"{MANIFEST}: ")
    problems = tuple(f"{name}: {state}" for name, state in files.items() if state != "ok")
    return Report(folder, problems, files, content)


def describe_file(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file, as a manifest lists it."""
    digest = hashlib.sha256()
    size = 0
    with open_regular(path) as stream:
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
