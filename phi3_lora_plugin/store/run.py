"""The checkpoints of one training run: copied off the model between two steps, written in order into one store."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from phi3_lora_plugin.lora.snapshot import Snapshot
from phi3_lora_plugin.store.adapter_files import adapter_files, reload_files
from phi3_lora_plugin.store.background import Writer
from phi3_lora_plugin.store.checkpoint import newest_complete, recover, write_checkpoint
from phi3_lora_plugin.store.disk_writes import Content, make_folder
from phi3_lora_plugin.store.layout import entries, set_aside
from phi3_lora_plugin.store.lock import StoreLock, holder_of
from phi3_lora_plugin.store.retention import Retention

log = logging.getLogger(__name__)


@dataclass
class CheckpointRun:
    """One run and its store, which it holds locked from `open` to `close`. Lives on the process that writes.

    Attributes:
        began_at: the step that the run resumed from; later checkpoints belong to another run and are put aside.
        saved: the newest checkpoint written.
        failed: the newest step and why it could not be written, if nothing has been written since.
    """

    store: Path
    facts: Mapping[str, Any]
    tokenizer_files: Mapping[str, bytes]
    format: str
    retention: Retention
    began_at: int
    saved: Path | None = None
    failed: tuple[int, Exception] | None = None
    _lock: StoreLock | None = None
    _writer: Writer = field(default_factory=lambda: Writer(False))
    _cleaner: Writer = field(default_factory=lambda: Writer(False))  # deletes what is out of sight already
    _alone: bool = False  # whether checkpoints of other runs are out of the way

    def open(self, background: bool) -> None:
        """Lock the store and sweep it. Raises `StoreBusy` if another run has it, OSError if it cannot be written."""
        make_folder(self.store)
        end_left_over(self.store)
        self._lock = StoreLock(self.store, holder=self)
        recover(self.store)
        self._writer, self._cleaner = Writer(background), Writer(not background)
        self._writer.catch_sigterm()

    def save(
        self, step: int, snapshot: Snapshot, resume: Mapping[str, Content] | None, metric: Mapping[str, Any] | None
    ) -> None:
        """Write a checkpoint, or have it written; what fails is logged and kept in `failed`."""
        self._writer.submit(partial(self._write, step, snapshot, resume, metric))

    def close(self) -> None:
        """Wait for what is being written, then release the store. Doing it twice does no harm."""
        self._writer.close()
        self._cleaner.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write(
        self, step: int, snapshot: Snapshot, resume: Mapping[str, Content] | None, metric: Mapping[str, Any] | None
    ) -> None:
        try:
            self._put_other_runs_aside()
            if resume is not None:
                resume = {**resume, **reload_files(snapshot, self.format)}
            facts = {**self.facts, "notes": list(snapshot.notes)} if snapshot.notes else self.facts
            files = {**adapter_files(snapshot, self.format), **self.tokenizer_files}
            self.saved = write_checkpoint(
                self.store, step, files, facts, metric=metric, resume=resume, retention=self.retention,
                delete=lambda folder: self._cleaner.submit(partial(_delete, folder)),
            )  # fmt: skip
        except Exception as error:
            self.failed = (step, error)
            self._report(step, error)
        else:
            self.failed = None

    def _put_other_runs_aside(self) -> None:
        if self._alone:
            return
        others = [entry.path for entry in entries(self.store) if entry.step > self.began_at or not self.began_at]
        if (aside := set_aside(self.store, others)) is not None:
            log.warning("%d checkpoints of an earlier run are now in %s", len(others), aside)
        self._alone = True

    def _report(self, step: int, error: Exception) -> None:
        newest = newest_complete(self.store)
        kept = f"the newest good checkpoint is {newest.path.name}" if newest else "no checkpoint yet"
        log.error("step %d was not saved (%s): %s: %s", step, kept, type(error).__name__, error)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s could not be deleted: %s", folder, error)


def end_left_over(store: Path) -> None:
    """End a run of this thread that failed and still holds its store: it may still be writing."""
    left = holder_of(store)
    if isinstance(left, CheckpointRun):
        left.close()
