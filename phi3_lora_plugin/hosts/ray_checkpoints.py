"""Checkpoints from where Ray keeps them, or from another machine: checked byte for byte before they are used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import gethostname
from typing import Any

from phi3_lora_plugin.hosts.ray_settings import RayError
from phi3_lora_plugin.store.layout import FOLDER, LATEST, Entry, beside, replace_file, step_name
from phi3_lora_plugin.store.manifest import MANIFEST, check_folder
from phi3_lora_plugin.training.resume import newest_resumable


def newest_step(output_dir: Path) -> int:
    """The step that this machine could resume a run from; -1 if there is none."""
    entry = _newest(output_dir)
    return -1 if entry is None else entry.step


def claim(output_dir: Path, run: str) -> None:
    """Mark a run's folder on this machine as that of `run`, where it may be left over from another one.

    Raises:
        RayError: it has checkpoints of another run, which would be resumed instead.
    """
    mark = output_dir / ".ray-run"
    if mark.is_file() and mark.read_text(encoding="utf-8") == run:
        return
    if newest_step(output_dir) >= 0:
        raise RayError(
            f"{output_dir} on {gethostname()} has checkpoints of another run; pass --resume, or another output_dir"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    mark.write_text(run, encoding="utf-8")


def bring(kept: Sequence[Any], output_dir: Path, say: Callable[[str], Any]) -> Path | None:
    """Put the newest good checkpoint that Ray keeps into the run's folder; None if that has one as new.

    Args:
        kept: `ray.train.Checkpoint`s of whatever file system, newest first.
        say: called with a sentence for each that is damaged and skipped.

    Raises:
        RayError: none of them is what was written; the run's folder is as before.
        OSError: the storage cannot be read.
    """
    store = output_dir / FOLDER
    problems = []
    for one in kept:
        staged = _staging(store)
        try:
            one.to_directory(staged)
            report = check_folder(staged)
            if report:
                step = int(report.manifest["step"])
                return None if newest_step(output_dir) >= step else _put(staged, store / step_name(step))
            problems.append(f"{one.path}: {'; '.join(report.problems)}")
            say(f"skipped {problems[-1]}")
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    if kept and newest_step(output_dir) < 0:
        raise RayError(f"every checkpoint that Ray keeps of this run is damaged: {'; '.join(problems)}")
    return None


def share(output_dir: Path, writes: bool) -> None:
    """Give every machine of a group the newest checkpoint of the first process. Collective.

    A worker that died may have written one that Ray has not got, and machines without a common disk do not see it.

    Args:
        writes: whether this process writes for its machine.

    Raises:
        RayError: a copy is not what was sent.
    """
    import torch.distributed as dist

    entry = _newest(output_dir) if dist.get_rank() == 0 else None
    newest = None if entry is None else entry.path
    wanted = of_the_first(None if newest is None else (newest.name, (newest / MANIFEST).read_bytes()))
    if wanted is None:
        return
    name, manifest = wanted
    target = output_dir / FOLDER / name
    there = (
        (target / MANIFEST).is_file() and (target / MANIFEST).read_bytes() == manifest and bool(check_folder(target))
    )
    have: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(have, there)
    if all(have):
        return
    content = of_the_first(None if newest is None else _content(newest))
    if writes and not there:
        staged = _staging(output_dir / FOLDER)
        try:
            for path, data in content.items():
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                (staged / path).write_bytes(data)
            if not (report := check_folder(staged)):
                raise RayError(f"the checkpoint sent by the first worker is damaged: {'; '.join(report.problems)}")
            _put(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    dist.barrier()


def _put(staged: Path, target: Path) -> Path:
    """Give a checked folder its name; what has that name is damaged, or of a run that is not resumed."""
    if target.exists():
        shutil.rmtree(target)
    staged.rename(target)
    replace_file(target.parent / LATEST, f"{target.name}\n".encode())
    return target


def _staging(store: Path) -> Path:
    """An empty folder in a store that readers do not look at, and that the next run sweeps."""
    staged = beside(store, "arriving")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return staged


def _newest(output_dir: Path) -> Entry | None:
    return newest_resumable(output_dir, lambda _: None)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def first_of_all(problem: str | None) -> str | None:
    """The problem of the first process that has one, for all. Collective."""
    import torch.distributed as dist

    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next((one for one in found if one is not None), None)


def of_the_first(value: Any) -> Any:
    """What the first process of a group passes, for all. Collective."""
    import torch.distributed as dist

    said = [value]
    dist.broadcast_object_list(said)
    return said[0]
