"""Manifests that somebody forged, cut or replaced: each costs its own folder, and never the good one beside it."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3_lora_plugin.store import disk_writes
from phi3_lora_plugin.store.checkpoint import latest_complete, recover, verify, write_checkpoint
from phi3_lora_plugin.store.lock import NAME, StoreBusy, StoreLock
from phi3_lora_plugin.store.manifest import LIMIT, ManifestError, read_manifest, render_manifest

FILES = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}


def write(store: Path, step: int, **options: Any) -> Path:
    return write_checkpoint(store, step, FILES, **({"resume": {"optimizer.pt": b"of %d" % step}} | options))


def forged(**changes: Any) -> Callable[[Path], Any]:
    """A manifest with a hash that is right for what it says."""

    def forge(manifest: Path) -> None:
        content = json.loads(manifest.read_bytes()) | changes
        manifest.write_bytes(render_manifest({key: value for key, value in content.items() if value is not ...}))

    return forge


def replaced(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def replace(manifest: Path) -> None:
        manifest.unlink()
        make(manifest)

    return replace


A_FILE = {"bytes": 1, "sha256": "0" * 64}
FORGED: dict[str, Callable[[Path], Any]] = {
    "no step": forged(step=...),
    "step is text": forged(step="99"),
    "step is true": forged(step=True),
    "step is below 0": forged(step=-1),
    "step is a fraction": forged(step=99.5),
    "step is null": forged(step=None),
    "step is a list": forged(step=[99]),
    "step is enormous": forged(step=10**400),
    "format is true": lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": true')),
    "files is a list": forged(files=["adapter_model.safetensors"]),
    "no files": forged(files={}),
    "a file is text": forged(files={"adapter_config.json": "2 bytes"}),
    "a file is null": forged(files={"adapter_config.json": None}),
    "a file without bytes": forged(files={"adapter_config.json": {"sha256": "0" * 64}}),
    "a file without a hash": forged(files={"adapter_config.json": {"bytes": 2}}),
    "bytes is text": forged(files={"adapter_config.json": {"bytes": "2", "sha256": "0" * 64}}),
    "bytes is below 0": forged(files={"adapter_config.json": {"bytes": -2, "sha256": "0" * 64}}),
    "a hash is a number": forged(files={"adapter_config.json": {"bytes": 2, "sha256": 5}}),
    "a hash is null": forged(files={"adapter_config.json": {"bytes": 2, "sha256": None}}),
    "a file outside": forged(files={"../x": A_FILE}),
    "an absolute file": forged(files={"/etc/passwd": A_FILE}),
    "a file without a name": forged(files={"": A_FILE}),
    "the folder itself": forged(files={".": A_FILE}),
    "a NUL in a name": forged(files={"a\0b": A_FILE}),
    "a name that no disk takes": forged(files={"x" * 5000: A_FILE}),
    "metric is text": forged(metric="0.5"),
    "metric is a list": forged(metric=[1]),
    "metric without a value": forged(metric={"name": "eval_loss", "greater_is_better": False}),
    "a metric's value is text": forged(metric={"name": "eval_loss", "value": "low", "greater_is_better": False}),
    "a metric's value is null": forged(metric={"name": "eval_loss", "value": None, "greater_is_better": False}),
    "a metric's value is too large": forged(metric={"name": "x", "value": 10**400, "greater_is_better": False}),
    "a metric's sense is text": forged(metric={"name": "eval_loss", "value": 1, "greater_is_better": "no"}),
    "chat is a list": forged(chat=["phi3"]),
    "base is text": forged(base="phi-3"),
    "checkpoint is a number": forged(checkpoint=5),
    "half a character": lambda path: path.write_text(path.read_text().replace('"step"', '"\\ud800": 1, "step"')),
    "NaN": lambda path: path.write_text(path.read_text().replace('"step": 99', '"step": NaN')),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "nothing": lambda path: path.write_text(""),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "deep": lambda path: path.write_text('{"files":' + "[" * 100_000),
    "deep and whole": lambda path: path.write_text('{"files":' + "[" * 50_000 + "]" * 50_000 + "}"),
    "a number of a million digits": lambda path: path.write_text('{"step":' + "9" * 1_000_000 + "}"),
    "larger than any": lambda path: path.write_bytes(b" " * (LIMIT + 1)),
    "a folder": replaced(lambda path: path.mkdir()),
    "a link into nothing": replaced(lambda path: path.symlink_to("nowhere")),
    "a link to itself": replaced(lambda path: path.symlink_to(path)),
    "a pipe": replaced(lambda path: os.mkfifo(path)),
    "a device without an end": replaced(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_manifest_costs_its_own_folder_only(what: str, tmp_path: Path) -> None:
    good = write(tmp_path, 10)
    bad = write(tmp_path, 99)
    FORGED[what](bad / "manifest.json")
    assert latest_complete(tmp_path) == good
    report = verify(tmp_path)
    assert not report and any("step-00000099" in problem for problem in report.problems)
    assert all(len(problem) < 500 and "\n" not in problem for problem in report.problems)
    assert not verify(bad)
    assert latest_complete(bad) is None
    assert latest_complete(write(tmp_path, 20)) == tmp_path / "step-00000020"


def test_a_listed_file_that_is_a_pipe_is_damage(tmp_path: Path) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    (bad / "adapter_config.json").unlink()
    os.mkfifo(bad / "adapter_config.json")
    forged(files={"adapter_config.json": {"bytes": 0, "sha256": "0" * 64}})(bad / "manifest.json")
    assert latest_complete(tmp_path) == good and "not a regular file" in verify(bad).problems[0]


def test_facts_that_readers_would_refuse_are_not_written(tmp_path: Path) -> None:
    good = write(tmp_path, 1)
    with pytest.raises(ManifestError, match="chat is 'phi3', expected a mapping"):
        write(tmp_path, 2, facts={"chat": "phi3"})
    assert latest_complete(tmp_path) == good and sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", good.name]


def test_verify_binds_the_state_of_training_to_its_checkpoint(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", 1), write(tmp_path / "a", 2)
    for first, second in ((one / "resume", tmp_path / "kept"), (two / "resume", one / "resume"),
                          (tmp_path / "kept", two / "resume")):  # fmt: skip
        first.rename(second)
    assert "resume/manifest.json: is of step 2, not of step 1" in verify(one).problems[0]
    assert not verify(tmp_path / "a")
    other = write(tmp_path / "b", 1, facts={"seed": 2})
    shutil.rmtree(one / "resume")
    shutil.copytree(other / "resume", one / "resume")
    assert "resume/manifest.json: is of another checkpoint of step 1" in verify(one).problems[0]
    shutil.rmtree(one / "resume")
    assert verify(one), "old checkpoints lose theirs on purpose"


def test_a_state_of_training_that_differs_does_not_make_another_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 1, resume={"optimizer.pt": b"other"})
    assert verify(tmp_path) and sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000001"]
    assert (tmp_path / "step-00000001" / "resume" / "optimizer.pt").read_bytes() == b"other"


# ---- the store


def test_a_deleted_lock_is_taken_again_before_the_next_write(tmp_path: Path) -> None:
    lock = StoreLock(tmp_path)
    (tmp_path / NAME).unlink()
    write(tmp_path, 1)
    assert (tmp_path / NAME).exists()
    lock.release()
    assert not (tmp_path / NAME).exists()


def test_whoever_took_the_store_after_the_lock_was_deleted_keeps_it(tmp_path: Path) -> None:
    import fcntl

    lock = StoreLock(tmp_path)
    (tmp_path / NAME).unlink()
    handle = os.open(tmp_path / NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(StoreBusy, match="in use by another run"):
            write(tmp_path, 1)
        lock.release()
        assert (tmp_path / NAME).exists(), "theirs"
        assert latest_complete(tmp_path) is None
    finally:
        os.close(handle)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, when: Callable[[str], bool]) -> None:
    """Have a call of `os` fail with EIO for some paths."""
    real = getattr(os, name)

    def call(first: Any, *rest: Any, **named: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(rest[0] if rest else first)
        if when(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(first, *rest, **named)

    monkeypatch.setattr(os, name, call)


def test_a_sync_that_fails_names_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    for ending in ("adapter_config.json", "optimizer.pt", "resume"):
        with monkeypatch.context() as patch:
            failing(patch, "fsync", lambda path, ending=ending: path.endswith(ending))
            with pytest.raises(OSError) as caught:
                write(tmp_path, 2)
        assert str(caught.value.filename).endswith(ending)
        assert latest_complete(tmp_path) == tmp_path / "step-00000001"
    with monkeypatch.context() as patch:
        failing(patch, "fsync", lambda path: path == str(tmp_path))
        with pytest.raises(OSError, match="step-00000002 is written, but may not survive a power cut") as caught:
            write(tmp_path, 2)
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("pointer", ["LATEST", "BEST"])
def test_a_clean_up_that_fails_is_not_a_checkpoint_that_was_not_saved(
    pointer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metric = {"name": "eval_loss", "value": 1.0, "greater_is_better": False}
    failing(monkeypatch, "replace", lambda path: path.endswith(pointer))
    with caplog.at_level(logging.WARNING):
        path = write(tmp_path, 1, metric=metric)
    assert latest_complete(tmp_path) == path and verify(path)
    assert "is saved, but updating pointers or deleting old checkpoints failed" in caplog.text
    assert not [*tmp_path.glob(".*")]


def test_new_parents_are_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = disk_writes.sync_folder
    monkeypatch.setattr(disk_writes, "sync_folder", lambda path: (synced.append(path), real(path)))
    write(tmp_path / "a" / "b" / "lora", 1)
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    write(tmp_path / "a" / "b" / "lora", 2)
    assert len(synced) == 3


def test_a_checkpoint_saved_again_is_found_where_the_power_failed_in_between(tmp_path: Path) -> None:
    write(tmp_path, 1)
    old = write(tmp_path, 2)
    new = write_checkpoint(tmp_path / "other", 2, FILES | {"adapter_config.json": b'{"r": 8}'})
    new.rename(tmp_path / "step-00000002.again")
    assert latest_complete(tmp_path) == tmp_path / "step-00000002.again"
    recover(tmp_path)
    assert latest_complete(tmp_path) == old and (old / "adapter_config.json").read_bytes() == b'{"r": 8}'
    assert read_manifest(tmp_path / "earlier-1" / old.name)["step"] == 2
