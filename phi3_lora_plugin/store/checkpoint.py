"""The store of LoRA checkpoints on disk: each appears whole or not at all, and its hashes show whether it is whole.

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
from phi3_lora_plugin.store.disk_writes import Content, DiskWrites, make_folder, sync_folder
from phi3_lora_plugin.store.layout import (
    AGAIN,
    BEST,
    LATEST,
    Entry,
    again,
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
from phi3_lora_plugin.store.manifest import (
    CHECKPOINT,
    MANIFEST,
    RESUME,
    Report,
    check_folder,
    parse_manifest,
    render_manifest,
)
from phi3_lora_plugin.store.retention import Retention, by_metric, doomed

log = logging.getLogger(__name__)


def latest_complete(folder: str | Path) -> Path | None:
    """The newest checkpoint, by step, whose every byte is as it was written; None if there is none.

    Args:
        folder: a store, the output folder of a run, or a single checkpoint.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return folder if check_folder(folder, resume=False) else None
    found = newest_complete(folder)
    return None if found is None else found.path


def newest_complete(folder: Path) -> Entry | None:
    """As `latest_complete`, of a store or run."""
    places = (place for store in stores_in(folder) for place in (store, *earlier(store)))
    found = (entry for place in places for entry in entries(place))
    return next((entry for entry in found if check_folder(entry.path, resume=False)), None)


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

    Everything is staged next to its final name and synced to the disk, then renamed.

    Args:
        step: its number; a checkpoint of the same step with other content is put aside, never overwritten.
        files: name -> bytes, pieces of them, or a function that writes them into a stream.
        facts: what else the manifest records. Equal facts and files give equal bytes.
        metric: {"name", "value", "greater_is_better"}; decides which checkpoint `BEST` names.
        resume: what training needs to resume, as `files`, with a manifest of its own.
        delete: deletes a folder that no reader sees any more; the next run sweeps what a crash leaves of it.

    Raises:
        OSError: no space, no permission, a failing disk, with the path; the store is as before and holds nothing
            unfinished. Failing to update pointers or to delete old checkpoints is only logged.
        StoreBusy: another run is writing into the store.
        Phi3LoraError: no files, names that are paths, or facts that a manifest cannot hold.
    """
    wrong = [name for name in files if Path(name).name != name or name in (MANIFEST, RESUME)]
    if not files or wrong:
        raise Phi3LoraError(f"a checkpoint is made of files with plain names, got {wrong or 'none'}")
    store = Path(store)
    make_folder(store)
    lock = held(store)
    own = StoreLock(store) if lock is None else None
    staging, latest = beside(store, step_name(step)), beside(store, LATEST)
    try:
        if own is not None:
            recover(store)
        elif lock is not None:
            lock.renew()
        shutil.rmtree(staging, ignore_errors=True)
        latest.unlink(missing_ok=True)
        facts = {**(facts or {}), "step": step} | ({"metric": dict(metric)} if metric else {})
        _stage(staging, files, facts, resume or {}, latest)
        final = _publish(store, staging, store / step_name(step))
        try:
            _clean_up(store, latest, retention, delete)
        except OSError as error:  # the checkpoint itself is saved
            log.warning("%s is saved, but updating pointers or deleting old checkpoints failed: %s", final, error)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        with suppress(OSError):
            latest.unlink()
        if own is not None:
            own.release()
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
        manifest = _manifest(facts, ours)
        disk.write(folder / MANIFEST, manifest)
        if resume:
            state = {"step": facts["step"], CHECKPOINT: parse_manifest(manifest)["sha256"]}
            disk.write(inside / MANIFEST, _manifest(state, theirs))
    if resume:
        sync_folder(inside)
    sync_folder(folder)


def _manifest(facts: Mapping[str, Any], files: Mapping[str, Future[dict[str, Any]]]) -> bytes:
    raw = render_manifest({**facts, "files": {name: file.result() for name, file in files.items()}})
    parse_manifest(raw)
    return raw


def _publish(store: Path, staging: Path, final: Path) -> Path:
    """Give a finished folder its name, down to the disk.

    Where another folder has that name, the new one gets a second name first, so that at no moment an older step is the
    newest; the old one is deleted, or kept in `earlier-N/` if it has another adapter.
    """
    first = again(final) if final.exists() else final
    if first != final and first.exists():
        shutil.rmtree(put_away(first, store))
    os.rename(staging, first)
    try:
        sync_folder(store)
        if first != final:
            _take_over(store, first, final)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; {first.name} is written, but may not survive a power cut", str(store)
        ) from error
    return final


def recover(store: Path) -> None:
    """Finish what a dead process left half done, and delete its leftovers. Call it with the store locked."""
    for path in sorted(store.iterdir()) if store.is_dir() else ():
        if path.name.endswith(AGAIN) and path.is_dir() and check_folder(path, resume=False):
            _take_over(store, path, path.with_name(path.name.removesuffix(AGAIN)))
    sweep(store)


def _take_over(store: Path, new: Path, final: Path) -> None:
    """Give `new` the name of `final`, which is a checkpoint of the same step."""
    old = None
    if final.exists():
        if _bytes_of(new) != _bytes_of(final) and check_folder(final, resume=False):
            set_aside(store, [final])
        else:
            old = put_away(final, store)
    os.rename(new, final)
    sync_folder(store)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _bytes_of(folder: Path) -> bytes | None:
    return (folder / MANIFEST).read_bytes() if (folder / MANIFEST).is_file() else None


def _clean_up(store: Path, latest: Path, retention: Retention, delete: Callable[[Path], Any]) -> None:
    """Point `LATEST` and `BEST`, and then delete old checkpoints."""
    os.replace(latest, store / LATEST)
    found = entries(store)
    goes = doomed(found, retention)
    _point_at_best(store, [entry for entry in found if entry.path not in goes])
    if goes:  # or a power cut could leave a pointer to what is deleted
        sync_folder(store)
    for path in goes:
        _discard(path, store, delete)


def _discard(path: Path, store: Path, delete: Callable[[Path], Any]) -> None:
    try:
        delete(put_away(path, store))
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error)


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
