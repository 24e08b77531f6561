"""The store of LoRA checkpoints on disk: each appears whole or not at all, and says by hashes whether it is whole.

`<store>/step-00000010/` holds the adapter's files and `manifest.json`; `LATEST` and `BEST` name one of them each.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.store.disk_writes import Content, DiskWrites, sync_folder
from phi3_lora_plugin.store.layout import (
    BEST,
    LATEST,
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
    torn,
)
from phi3_lora_plugin.store.lock import StoreLock, held
from phi3_lora_plugin.store.manifest import MANIFEST, RESUME, Report, check_folder, render_manifest
from phi3_lora_plugin.store.retention import Retention, by_metric, doomed

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
    resume: Mapping[str, Content] | None = None,
    retention: Retention = Retention(),  # noqa: B008 - frozen
    delete: Callable[[Path], Any] = shutil.rmtree,
) -> Path:
    """Write `<store>/step-N/` so that at no moment it is half there, point `LATEST` and `BEST` at it, delete old ones.

    Everything is staged beside its final name and synced to the disk, then renamed.

    Args:
        step: its number; a checkpoint of the same step with other content is put aside, never overwritten.
        files: name -> bytes, pieces of them, or a function that writes them into a stream.
        facts: what else the manifest says. Equal facts and files give equal bytes.
        metric: {"name", "value", "greater_is_better"}, by which `BEST` is chosen.
        resume: what training needs to go on, as `files`, with a manifest of its own.
        delete: how a folder goes that nobody sees any more; what a crash leaves of it is swept by the next run.

    Raises:
        OSError: no space, no permission, a failing disk; the store is as before and holds nothing unfinished.
        StoreBusy: another run is writing into the store.
        ValueError: no files, or names that are paths.
    """
    wrong = [name for name in files if Path(name).name != name or name in (MANIFEST, RESUME)]
    if not files or wrong:
        raise Phi3LoraError(f"a checkpoint is made of files with plain names, got {wrong or 'none'}")
    store = Path(store)
    store.mkdir(parents=True, exist_ok=True)
    lock = None if held(store) else StoreLock(store)
    staging, latest = beside(store, step_name(step)), beside(store, LATEST)
    try:
        if lock is not None:
            sweep(store)
        shutil.rmtree(staging, ignore_errors=True)
        latest.unlink(missing_ok=True)
        final = store / step_name(step)
        facts = {**(facts or {}), "step": step} | ({"metric": dict(metric)} if metric else {})
        _stage(staging, files, facts, resume or {}, latest)
        _publish(store, staging, final, latest)
        found = entries(store)
        goes = doomed(found, retention)
        _point_at_best(store, [entry for entry in found if entry.path not in goes])
        for path in goes:
            _discard(path, store, delete)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            latest.unlink()
        raise
    finally:
        if lock is not None:
            lock.release()
    return final


def best(store: str | Path) -> Path | None:
    """The best checkpoint of a store by its metric, or None if none has one."""
    ordered = by_metric(entries(Path(store)))
    return ordered[0].path if ordered else None


def _stage(
    folder: Path, files: Mapping[str, Content], facts: Mapping[str, Any], resume: Mapping[str, Content], latest: Path
) -> None:
    """Fill a folder, and the file that becomes `LATEST`, down to the disk."""
    inside = folder / RESUME
    folder.mkdir()
    if resume:
        inside.mkdir()
    with DiskWrites() as disk:
        theirs = {name: disk.write(inside / name, content) for name, content in resume.items()}
        ours = {name: disk.write(folder / name, content) for name, content in files.items()}
        disk.write(latest, f"{step_name(facts['step'])}\n".encode())
        disk.write(folder / MANIFEST, _manifest(facts, ours))
        if resume:
            disk.write(inside / MANIFEST, _manifest({"step": facts["step"]}, theirs))
    if resume:
        sync_folder(inside)
    sync_folder(folder)


def _manifest(facts: Mapping[str, Any], files: Mapping[str, Future[dict[str, Any]]]) -> bytes:
    return render_manifest({**facts, "files": {name: file.result() for name, file in files.items()}})


def _publish(store: Path, staging: Path, final: Path, latest: Path) -> None:
    """Give a finished folder its name. What has that name goes aside first, and stays there if it is worth keeping."""
    aside, worth = None, False
    if final.exists():
        same = (final / MANIFEST).is_file() and _bytes_of(staging) == _bytes_of(final)
        worth = not same and bool(check_folder(final, resume=False))
        aside = set_aside(store, [final])
    os.rename(staging, final)
    os.replace(latest, store / LATEST)
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
