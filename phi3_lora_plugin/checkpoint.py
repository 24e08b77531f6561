"""The store of LoRA checkpoints on disk: each appears whole or not at all, and says by hashes whether it is whole.

`<store>/step-00000010/` holds the adapter's files and `manifest.json`; `LATEST` and `BEST` name one of them each.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_lora_plugin.manifest import MANIFEST, RESUME, Report, check_folder, describe_file, render_manifest
from phi3_lora_plugin.retention import Retention, by_metric, doomed
from phi3_lora_plugin.store_layout import (
    BEST,
    LATEST,
    Content,
    Entry,
    beside,
    earlier,
    entries,
    put_away,
    replace_file,
    set_aside,
    step_name,
    stores_in,
    sweep,
    sync_folder,
    torn,
    write_file,
)
from phi3_lora_plugin.store_lock import StoreLock, held

log = logging.getLogger(__name__)


def latest_complete(folder: str | Path) -> Path | None:
    """The newest checkpoint, by step, of which every byte is as it was written; None if there is none.

    Args:
        folder: a store, the output folder of a run, or a single checkpoint.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return folder if check_folder(folder, resume=False) else None
    found = newest_complete(folder)
    return None if found is None else found.path


def newest_complete(folder: Path, skipped: list[Report] | None = None) -> Entry | None:
    """As `latest_complete`, of a store or run; the reports of newer ones that are not whole are added to `skipped`."""
    for store in stores_in(folder):
        for place in (store, *earlier(store)):
            for entry in entries(place):
                report = check_folder(entry.path, resume=False)
                if report:
                    return entry
                if skipped is not None:
                    skipped.append(report)
            if skipped is not None:
                skipped.extend(check_folder(path) for path in torn(place))
    return None


def verify(folder: str | Path) -> Report:
    """Compare a checkpoint, or every checkpoint of a store or run, with what was written; never changes anything."""
    folder = Path(folder)
    stores = [] if (folder / MANIFEST).is_file() else [store for store in stores_in(folder) if _all_of(store)]
    if not stores:
        if not folder.is_dir():
            return Report(folder, (f"{folder}: no such folder",))
        return check_folder(folder)
    reports = [check_folder(path) for store in stores for path in _all_of(store)]
    problems = [f"{report.folder.name}/{problem}" for report in reports for problem in report.problems]
    return Report(folder, tuple(problems), checkpoints=tuple(reports))


def write_checkpoint(
    store: str | Path,
    step: int,
    files: Mapping[str, Content],
    facts: Mapping[str, Any] | None = None,
    *,
    metric: Mapping[str, Any] | None = None,
    resume: Mapping[str, Content] | Path | None = None,
    resume_facts: Mapping[str, Any] | None = None,
    retention: Retention = Retention(),  # noqa: B008 - frozen
    delete: Callable[[Path], Any] = shutil.rmtree,
) -> Path:
    """Write `<store>/step-N/` so that at no moment it is half there, point `LATEST` and `BEST` at it, delete old ones.

    Everything is staged beside its final name and synced to the disk, then renamed; the manifest comes last.

    Args:
        step: its number; a checkpoint of the same step with other content is put aside, never overwritten.
        files: name -> bytes, or a function that writes them into a stream.
        facts: what else the manifest says. Equal facts and files give equal bytes.
        metric: {"name", "value", "greater_is_better"}, by which `BEST` is chosen.
        resume: what training needs to go on, as `files`, or a folder inside the store that becomes part of this.
        resume_facts: what the manifest of that says besides.
        delete: how a folder goes that nobody sees any more; what a crash leaves of it is swept by the next run.

    Raises:
        OSError: no space, no permission, a failing disk; the store is as before and holds nothing unfinished.
        StoreBusy: another run is writing into the store.
        ValueError: no files, or names that are paths.
    """
    wrong = [name for name in files if Path(name).name != name or name in (MANIFEST, RESUME)]
    if not files or wrong:
        raise ValueError(f"a checkpoint is made of files with plain names, got {wrong or 'none'}")
    store = Path(store)
    store.mkdir(parents=True, exist_ok=True)
    lock = None if held(store) else StoreLock(store)
    staging = beside(store, step_name(step))
    try:
        if lock is not None:
            sweep(store)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        listed = {name: write_file(staging / name, content) for name, content in files.items()}
        if resume is not None:
            _write_resume(staging / RESUME, resume, {"step": step, **(resume_facts or {})})
        content = {**(facts or {}), "step": step, "files": listed}
        write_file(staging / MANIFEST, render_manifest(content | ({"metric": dict(metric)} if metric else {})))
        sync_folder(staging)
        final = store / step_name(step)
        _publish(store, staging, final)
        replace_file(store / LATEST, f"{final.name}\n".encode())
        found = entries(store)
        goes = doomed(found, retention)
        _point_at_best(store, [entry for entry in found if entry.path not in goes])
        for path in goes:
            _discard(path, store, delete)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()
    return final


def best(store: str | Path) -> Path | None:
    """The best checkpoint of a store by its metric, or None if none has one."""
    ordered = by_metric(entries(Path(store)))
    return ordered[0].path if ordered else None


def _write_resume(folder: Path, resume: Mapping[str, Content] | Path, facts: Mapping[str, Any]) -> None:
    if isinstance(resume, Path):
        os.rename(resume, folder)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        listed = {path.relative_to(folder).as_posix(): describe_file(path) for path in paths}
        for path in paths:
            _sync_file(path)
        for path in folder.rglob("*"):
            if path.is_dir():
                sync_folder(path)
    else:
        folder.mkdir()
        listed = {name: write_file(folder / name, content) for name, content in resume.items()}
    write_file(folder / MANIFEST, render_manifest({**facts, "files": listed}))
    sync_folder(folder)


def _publish(store: Path, staging: Path, final: Path) -> None:
    """Give a finished folder its name. What has that name goes aside first, and stays there if it is worth keeping."""
    aside, worth = None, False
    if final.exists():
        same = (final / MANIFEST).is_file() and _bytes_of(staging) == _bytes_of(final)
        worth = not same and bool(check_folder(final, resume=False))
        aside = set_aside(store, [final])
    os.rename(staging, final)
    sync_folder(store)
    if aside is not None and not worth:
        shutil.rmtree(put_away(aside, store))


def _discard(path: Path, store: Path, delete: Callable[[Path], Any]) -> None:
    try:
        delete(put_away(path, store))
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error)


def _bytes_of(folder: Path) -> bytes:
    return (folder / MANIFEST).read_bytes()


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _point_at_best(store: Path, found: Sequence[Entry]) -> None:
    ordered, pointer = by_metric(found), store / BEST
    if not ordered:
        pointer.unlink(missing_ok=True)
        return
    content = f"{ordered[0].path.name}\n".encode()
    if not pointer.is_file() or pointer.read_bytes() != content:
        replace_file(pointer, content)


def _all_of(store: Path) -> list[Path]:
    return [path for place in (store, *earlier(store)) for path in [e.path for e in entries(place)] + torn(place)]
