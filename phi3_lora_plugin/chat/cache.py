"""Encoded rows kept by content: the same files, settings, tokenizer and code give the same rows, so they are kept once.

An entry is a folder of Arrow files, the report and the sha256 of each. It appears whole, by renaming, and is checked
whenever it is read; what is damaged counts as absent. Only local files are kept, never what a hub may change.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.formats import ADAPTERS, Adapter
from phi3_lora_plugin.chat.mixture import sources_of
from phi3_lora_plugin.chat.report import DataReport
from phi3_lora_plugin.chat.sources import Found
from phi3_lora_plugin.model.new_files import new_folder

if TYPE_CHECKING:
    import pyarrow

    from phi3_lora_plugin.recipe import Recipe

log = logging.getLogger(__name__)

WORTH = 256 * 1024  # bytes of data; fewer are encoded sooner than an entry is found
LIMIT = 4 * 1024**3  # bytes of all entries; those not used for the longest time go first
_ABANDONED = 24 * 3600  # seconds after which a half-written entry belongs to a process that has ended


def cache_folder() -> Path | None:
    """Return the folder of the entries, `$XDG_CACHE_HOME/phi3_lora_plugin/data`; None if `PHI3_LORA_CACHE=off`."""
    if os.environ.get("PHI3_LORA_CACHE", "").lower() in ("off", "no", "false", "0"):
        return None
    home = os.environ.get("XDG_CACHE_HOME", "")  # to be ignored unless absolute, says the XDG specification
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "phi3_lora_plugin" / "data"


def find_entry(
    recipe: Recipe, tokenizer: Any, adapters: Mapping[str, Adapter], limit: int | None, found: Sequence[Found]
) -> Path | None:
    """Return the folder that the rows of these sources belong in, there or not; None if they are not to be kept.

    Its name is a sha256 over everything that decides the rows and the report.
    """
    folder = cache_folder()
    files = [_files(source.name) for one in found for source in one.sources]
    here = [file for some in files for file in some or ()]
    if folder is None or not all(files) or sum(file.stat().st_size for file in here) < WORTH:
        return None
    used = []
    for wanted in sorted({settings.format for _, settings, _ in sources_of(recipe.data)} | {recipe.data.format}):
        some = _adapters(wanted, adapters)
        if some is None:
            return None
        used += some
    from phi3_lora_plugin.chat.templates import template_fingerprint
    from phi3_lora_plugin.model.tokenizer import tokenizer_fingerprint

    decisive = {
        "data": recipe.data.model_dump(mode="json"),
        "rows": recipe.rows,
        "seed": recipe.seed,
        "max_length": limit,
        "sources": [[source.name for source in one.sources] for one in found],
        "left_out": [one.left_out for one in found],
        "files": [[str(file), _sha256(file)] for file in here],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template_fingerprint(tokenizer),
        "tokens": [tokenizer.bos_token, tokenizer.eos_token],
        "adapters": used,
        "code": [[str(file.relative_to(Path(__file__).parent)), _sha256(file)] for file in _code()],
        "versions": {name: version(name) for name in ("phi3-lora-plugin", "tokenizers", "transformers", "jinja2")},
    }
    return folder / hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def read_entry(entry: Path) -> tuple[dict[str, pyarrow.Table], DataReport] | None:
    """Return tables by part ("train", "eval") and the report; None if the entry is missing or damaged."""
    import pyarrow

    if not entry.is_dir():
        return None
    try:
        sums = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        if not {"train.arrow", "report.json"} <= set(sums) <= {"train.arrow", "eval.arrow", "report.json"}:
            raise ValueError(f"lists {', '.join(sums)}")
        content = {name: (entry / name).read_bytes() for name in sums}
        if wrong := [name for name, data in content.items() if hashlib.sha256(data).hexdigest() != sums[name]]:
            raise ValueError(f"{', '.join(wrong)} is not what was written")
        report = DataReport.from_json(content["report.json"].decode())
        tables = {
            name.removesuffix(".arrow"): pyarrow.ipc.open_file(pyarrow.BufferReader(data)).read_all()
            for name, data in content.items()
            if name.endswith(".arrow")
        }
        if ("eval" in tables) != (report.eval is not None):
            raise ValueError("its report and its tables differ in what they evaluate on")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        log.warning("%s: damaged, so the data is encoded again (%s)", entry, error)
        return None
    os.utime(entry)
    return tables, report


def write_entry(entry: Path, tables: Mapping[str, pyarrow.Table], report: DataReport) -> None:
    """Put an entry in its place as a whole; a disk that has no room for it costs a warning, not the run."""
    import pyarrow

    staging = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        staging = new_folder(entry.parent, ".writing-")
        for name, table in tables.items():
            with pyarrow.ipc.new_file(str(staging / f"{name}.arrow"), table.schema) as file:
                file.write_table(table)
        (staging / "report.json").write_text(report.to_json(), encoding="utf-8")
        sums = {file.name: _sha256(file) for file in sorted(staging.iterdir())}
        (staging / "manifest.json").write_text(json.dumps(sums), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)  # damaged, or it would have been read
        staging.rename(entry)
        _prune(entry)
    except OSError as error:
        log.warning("%s: encoded data is not kept for the next run (%s)", entry.parent, error)
    finally:
        if staging is not None:  # gone if it became the entry
            shutil.rmtree(staging, ignore_errors=True)


def _files(name: str) -> list[Path] | None:
    """Return the files of a local source; None for a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else None


def _adapters(wanted: str, adapters: Mapping[str, Adapter]) -> list[list[str]] | None:
    """Return the formats that may be used, each with the sha256 of its source if it is a stranger's.

    None if one of them is anything but a function of a module: what it depends on cannot be told.
    """
    used = []
    for name in sorted(ADAPTERS) if wanted == "auto" else [wanted]:
        adapt = adapters.get(name) or ADAPTERS.get(name)
        if adapt is ADAPTERS.get(name):
            used.append([name, "ours"])
            continue
        adapt = inspect.unwrap(adapt) if callable(adapt) else adapt
        if not inspect.isfunction(adapt) or adapt.__closure__ or adapt.__defaults__ or adapt.__kwdefaults__:
            return None
        file = inspect.getsourcefile(adapt)
        if file is None or not Path(file).is_file():
            return None
        used.append([name, adapt.__qualname__, file, _sha256(Path(file))])
    return used


def _code() -> list[Path]:
    """Return what turns rows into ids: an entry written by other code of the same version is not the same."""
    here = Path(__file__).parent
    return sorted([*here.rglob("*.py"), *here.glob("templates/*.jinja")])


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _prune(written: Path) -> None:
    """Remove the entries that were not used for the longest time, so that all together stay below `LIMIT`."""
    total = 0
    entries = [(folder.stat().st_mtime, folder) for folder in written.parent.iterdir() if folder.is_dir()]
    for used, folder in sorted(entries, reverse=True):
        if folder.name.startswith("."):
            if time.time() - used > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        total += sum(file.stat().st_size for file in folder.iterdir())
        if total > LIMIT and folder != written:
            shutil.rmtree(folder, ignore_errors=True)
