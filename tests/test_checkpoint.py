"""The store: checkpoints appear whole or not at all, damage of any kind is seen, and the last good one stays."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lora_runs import holder

from phi3_lora_plugin.store.checkpoint import best, latest_complete, verify, write_checkpoint
from phi3_lora_plugin.store.disk_writes import write_file
from phi3_lora_plugin.store.layout import entries, sweep
from phi3_lora_plugin.store.lock import StoreBusy, StoreLock
from phi3_lora_plugin.store.manifest import ManifestError, read_manifest, render_manifest
from phi3_lora_plugin.store.retention import Retention, doomed

FILES = {
    "adapter_model.safetensors": bytes(range(256)) * 8,
    "adapter_config.json": b'{"r": 4}\n',
    "tokenizer.json": b"words " * 50,
}
RESUME = {"optimizer.pt": b"moments" * 100, "trainer_state.json": b"{}\n"}
ALL = Retention(last=99)


def write(store: Path, step: int, loss: float | None = None, **options: object) -> Path:
    metric = None if loss is None else {"name": "eval_loss", "value": loss, "greater_is_better": False}
    settings = {"retention": ALL, "resume": RESUME, "facts": {"note": f"of {step}"}} | options
    return write_checkpoint(store, step, FILES, metric=metric, **settings)  # type: ignore[arg-type]


def names(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_checkpoint_is_found_from_the_store_the_run_and_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "run" / "lora", 10)
    assert path == tmp_path / "run" / "lora" / "step-00000010"
    for folder in (path, path.parent, tmp_path / "run", str(tmp_path / "run")):
        assert latest_complete(folder) == path
        assert verify(folder) and not verify(folder).problems
    assert latest_complete(tmp_path) is None and latest_complete(tmp_path / "nowhere") is None
    assert not verify(tmp_path / "nowhere") and "no such folder" in verify(tmp_path / "nowhere").problems[0]
    assert "manifest.json: missing" in verify(tmp_path).problems[0]
    assert (path.parent / "LATEST").read_text() == "step-00000010\n"
    assert names(path.parent) == ["LATEST", "step-00000010"], "leftovers"


def test_equal_content_gives_equal_bytes_and_no_clock_is_in_them(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", 3, 0.5), write(tmp_path / "b", 3, 0.5)
    assert snapshot(one) == snapshot(other)
    manifest = read_manifest(one)
    assert manifest["step"] == 3 and manifest["metric"]["value"] == 0.5 and manifest["note"] == "of 3"
    assert set(manifest["files"]) == set(FILES)


def test_damage_of_any_file_is_seen_named_and_passed_over(tmp_path: Path) -> None:
    store = tmp_path / "lora"
    good, newest = write(store, 10), write(store, 20)
    untouched = snapshot(newest)
    for name, content in untouched.items():
        damages = {f"cut at {tenth} tenths": content[: len(content) * tenth // 10] for tenth in range(10)}
        for place in (0, len(content) // 2, len(content) - 1):
            for bit in (1, 8, 128):
                flipped = bytearray(content)
                flipped[place] ^= bit
                damages[f"bit {bit} of byte {place} flipped"] = bytes(flipped)
        damages["longer"] = content + b"\0"
        for what, damaged in damages.items():
            (newest / name).write_bytes(damaged)
            report = verify(newest)
            assert not report and any(problem.startswith(f"{name}: ") for problem in report.problems), (name, what)
            if not name.startswith("resume/"):
                assert latest_complete(store) == good, (name, what)
            assert not verify(store)
        (newest / name).rename(newest / "elsewhere")
        assert verify(newest).files[name].startswith("missing")
        (newest / "elsewhere").rename(newest / name)
        (newest / name).write_bytes(content)
        assert verify(newest) and latest_complete(store) == newest


def test_empty_unmarked_and_temporary_folders_are_passed_over(tmp_path: Path) -> None:
    store = tmp_path / "lora"
    good = write(store, 10)
    (store / "step-00000099").mkdir()
    shutil.copytree(good, store / "step-00000050")
    (store / "step-00000050" / "manifest.json").unlink()
    shutil.copytree(good, store / ".step-00000060.tmp-1-elsewhere")
    (store / "notes").mkdir()
    (store / "LATEST").write_text("step-00000099\n")
    assert latest_complete(store) == good
    named = [problem.split(":")[0] for problem in verify(store).problems]
    assert named == ["step-00000050/manifest.json", "step-00000099/manifest.json"]


def test_the_newest_is_so_by_step_whatever_the_clock_and_the_names_say(tmp_path: Path) -> None:
    store = tmp_path / "lora"
    newest, older = write(store, 30), write(store, 20)
    os.utime(newest, (1, 1))
    assert latest_complete(store) == newest
    older.rename(store / "step-00000099")
    assert latest_complete(store) == newest


def test_a_manifest_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (tmp_path / "secret").write_bytes(b"x")
    content = read_manifest(path) | {"files": {"../secret": {"bytes": 1, "sha256": "0"}}}
    (path / "manifest.json").write_bytes(render_manifest(content))
    with pytest.raises(ManifestError, match="outside its folder: ../secret"):
        read_manifest(path)
    changed = {**read_manifest(write(tmp_path, 2)), "step": 3}
    (tmp_path / "step-00000002" / "manifest.json").write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n")
    with pytest.raises(ManifestError, match="was changed after it was written"):
        read_manifest(tmp_path / "step-00000002")
    manifest = write(tmp_path, 4, 0.5) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0.5", "NaN"))
    with pytest.raises(ManifestError, match="a finite value"):
        read_manifest(manifest.parent)


@pytest.mark.parametrize("name", ["a/b", "../x", "manifest.json", "resume"])
def test_names_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain names"):
        write_checkpoint(tmp_path, 1, {name: b""})


# --- retention ---------------------------------------------------------------------------------------------------


def test_last_best_and_every_are_kept_and_pointed_at(tmp_path: Path) -> None:
    rule = Retention(last=2, best=1, every=4, resume=1)
    for step, loss in enumerate([0.9, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85], start=1):
        write(tmp_path, step, loss, retention=rule)
    steps = [name for name in names(tmp_path) if name.startswith("step-")]
    assert steps == [f"step-0000000{step}" for step in (2, 4, 6, 7)]
    assert best(tmp_path) == tmp_path / "step-00000002"
    assert (tmp_path / "BEST").read_text() == "step-00000002\n"
    assert (tmp_path / "LATEST").read_text() == "step-00000007\n"
    assert [name for name in steps if (tmp_path / name / "resume").is_dir()] == ["step-00000007"]
    assert all(verify(tmp_path / name) for name in steps), "dropping resume/ must not touch the rest"
    assert [name for name in names(tmp_path) if name.startswith(".")] == []


def test_greater_can_be_better(tmp_path: Path) -> None:
    for step, value in ((1, 0.2), (2, 0.9), (3, 0.4)):
        metric = {"name": "eval_accuracy", "value": value, "greater_is_better": True}
        write_checkpoint(tmp_path, step, FILES, metric=metric, retention=Retention(last=1, best=1))
    assert best(tmp_path) == tmp_path / "step-00000002"


def test_nothing_is_deleted_while_the_newest_is_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / "tokenizer.json", 3)
    assert doomed(entries(tmp_path), Retention(last=1)) == []
    assert latest_complete(tmp_path) == tmp_path / "step-00000002"
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "mine")
    write(tmp_path, 3)
    gone = [path.name for path in doomed(entries(tmp_path), Retention(last=1))]
    assert gone == ["step-00000002", "step-00000001"], "a copy under a person's own name is not ours to delete"


@pytest.mark.parametrize("wrong", [{"last": 0}, {"best": -1}, {"every": 0}, {"last": True}, {"resume": 1.5}])
def test_senseless_retention_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"keep_{next(iter(wrong))}: expected a whole number"):
        Retention(**wrong)  # type: ignore[arg-type]


def test_the_same_step_again_replaces_only_what_is_equal_or_torn(tmp_path: Path) -> None:
    first = snapshot(write(tmp_path, 5))
    assert snapshot(write(tmp_path, 5)) == first and names(tmp_path) == ["LATEST", "step-00000005"]
    os.truncate(tmp_path / "step-00000005" / "tokenizer.json", 3)
    assert snapshot(write(tmp_path, 5)) == first and names(tmp_path) == ["LATEST", "step-00000005"]
    write(tmp_path, 5, facts={"note": "another run"})
    assert read_manifest(tmp_path / "step-00000005")["note"] == "another run"
    assert snapshot(tmp_path / "earlier-1" / "step-00000005") == first
    shutil.rmtree(tmp_path / "step-00000005")
    assert latest_complete(tmp_path) == tmp_path / "earlier-1" / "step-00000005"


@pytest.mark.parametrize("size", [10, 1 << 22])
@pytest.mark.parametrize("how", ["bytes", "pieces", "stream"])
def test_what_is_listed_of_a_file_is_what_lies_on_the_disk(tmp_path: Path, size: int, how: str) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    pieces = [content[:7], memoryview(content)[7:]]
    ways = {"bytes": content, "pieces": pieces, "stream": lambda stream: [stream.write(piece) for piece in pieces]}
    listed = write_file(tmp_path / "file", ways[how])
    assert (tmp_path / "file").read_bytes() == content
    assert listed == {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("large", [False, True])
def test_what_a_content_fails_with_is_raised_and_nothing_is_left(tmp_path: Path, large: bool) -> None:
    before = snapshot(write(tmp_path, 1))

    def content(stream: Any) -> None:
        stream.write(bytes(1 << 21) if large else b"x")
        raise RuntimeError("no such tensor")

    with pytest.raises(RuntimeError, match="no such tensor"):
        write_checkpoint(tmp_path, 2, {**FILES, "odd": content})
    with pytest.raises(RuntimeError, match="no such tensor"):
        write_checkpoint(tmp_path, 2, FILES, resume={"odd": content})
    assert names(tmp_path) == ["LATEST", "step-00000001"] and snapshot(tmp_path / "step-00000001") == before


def test_what_is_deleted_later_is_out_of_sight_at_once(tmp_path: Path) -> None:
    waiting: list[Path] = []
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, FILES, retention=Retention(last=1), delete=waiting.append)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000003"] and len(waiting) == 2
    assert waiting[-1].is_dir() and waiting[-1].name.startswith(".")
    write(tmp_path, 4)
    assert not waiting[-1].exists(), "the next run sweeps what a crash has left"


# --- crashes, full and failing disks -----------------------------------------------------------------------------


def _dies_before_change(number: int, store: Path, step: int) -> int:
    """Write in a forked process that is killed before its change of the disk with this number; its exit status."""
    child = os.fork()
    if child == 0:
        calls = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal calls
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            write(store, step, 0.1, retention=Retention(last=1, best=0))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.slow
def test_killed_before_any_change_of_the_disk_the_last_announced_one_is_there(tmp_path: Path) -> None:
    store, work = tmp_path / "lora", tmp_path / "try"
    write(store, 1)
    call, status = 0, signal.SIGKILL
    while status == signal.SIGKILL:
        call += 1
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(store, work)
        status = _dies_before_change(call, work, 2)
        found = latest_complete(work)
        assert found is not None and verify(found), f"call {call}"
        if status == 0:
            assert found.name == "step-00000002" and names(work) == ["BEST", "LATEST", "step-00000002"]
        else:
            after = write(work, 7)  # the next run sweeps what is left, and writes
            assert latest_complete(work) == after and not [n for n in names(work) if n.startswith(".")], f"call {call}"
    assert status == 0 and call > 25, "the audit hook saw too little"


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut keeps what was synced; the calls go through to the system and are written down."""
    calls: list[tuple[str, Path]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record(what: str, path: object) -> None:
        calls.append((what, Path(str(path))))

    def synced(handle: int) -> None:
        record("sync", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda source, target: (record("name", target), rename(source, target)))
    monkeypatch.setattr(os, "replace", lambda source, target: (record("name", target), replace(source, target)))
    final = write(tmp_path, 1, 0.5)
    named = calls.index(("name", final))
    before = [path for what, path in calls[:named] if what == "sync"]
    (staging,) = {path for path in before if path.name.startswith(".step")}
    inside = {staging / path.relative_to(final) for path in final.rglob("*")}
    assert inside <= set(before), "every file and folder of it"
    assert before[-1] == staging, "the names in it last"
    assert any("LATEST" in path.name for path in before)
    assert calls[named + 1 : named + 3] == [("sync", tmp_path), ("name", tmp_path / "LATEST")], "LATEST after the sync"
    at = calls.index(("name", tmp_path / "BEST"))
    assert at > named and calls[at - 1][0] == "sync" and "BEST" in calls[at - 1][1].name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(small_disk: Path) -> None:
    store = small_disk / "lora"
    first = write(store, 1)
    before = snapshot(store)
    for size in (8_000, 30_000, 60_000, 200_000):
        with pytest.raises(OSError) as caught:
            write_checkpoint(store, 2, {"small": b"x", "big": b"y" * size}, resume={"o": b"z" * (64_000 - size // 2)})
        assert caught.value.errno == errno.ENOSPC and "step-00000002" in str(caught.value.filename)
        assert snapshot(store) == before and latest_complete(store) == first
    assert latest_complete(write(store, 2, resume=None)) is not None


def test_a_read_only_store_is_an_error_that_names_it_and_can_still_be_read(small_disk: Path) -> None:
    first = write(small_disk / "lora", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError) as caught:
        write(small_disk / "lora", 2)
    assert caught.value.errno == errno.EROFS
    assert latest_complete(small_disk / "lora") == first and verify(first)


@pytest.mark.parametrize("error", [errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("where", ["adapter_config.json", "tokenizer.json", "optimizer.pt"])
def test_a_failing_write_leaves_the_previous_checkpoint(tmp_path: Path, error: int, where: str) -> None:
    def fails(stream: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise OSError(error, os.strerror(error))

    write(tmp_path, 1)
    before = snapshot(tmp_path)
    files = {name: fails if name == where else content for name, content in FILES.items()}
    resume = {name: fails if name == where else content for name, content in RESUME.items()}
    with pytest.raises(OSError, match=f"{os.strerror(error)}.*{where}"):
        write_checkpoint(tmp_path, 2, files, resume=resume)
    assert snapshot(tmp_path) == before


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_and_of_others_are_not(tmp_path: Path) -> None:
    import socket

    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [f".step-00000001.tmp-{dead.pid}-{host}", f".step-00000002.old-{dead.pid}-{host}", ".LATEST.tmp-7-elsewhere"]
    stays = [f".step-00000003.tmp-{os.getppid()}-{host}", ".mine", "step-00000004", ".cache-1"]
    for name in (*gone, *stays):
        (tmp_path / name).mkdir()
    (tmp_path / gone[2]).rmdir()
    (tmp_path / gone[2]).write_text("")
    assert sorted(sweep(tmp_path)) == sorted(gone)
    assert names(tmp_path) == sorted(stays)


# --- two runs ----------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_store_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    other = holder(tmp_path)
    with pytest.raises(StoreBusy, match=f"in use by another run .process {other.pid} on "):
        write(tmp_path, 1)
    assert latest_complete(tmp_path) is None
    other.kill()
    other.wait()
    assert write(tmp_path, 1) == latest_complete(tmp_path)


def test_a_copy_does_not_end_the_lock_and_a_forked_worker_does_not_hold_it_on(tmp_path: Path) -> None:
    store, copy = tmp_path / "lora", tmp_path / "copy"
    store.mkdir()
    script = (
        f"import os, shutil, sys, time; sys.path[:0] = {sys.path!r}\n"
        "from phi3_lora_plugin.store.lock import StoreLock; from pathlib import Path\n"
        f"lock = StoreLock(Path({str(store)!r})); shutil.copytree({str(store)!r}, {str(copy)!r})\n"
        "if os.fork() == 0: print(os.getpid(), flush=True); time.sleep(60)\n"  # says so once it is past what forks do
        "sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    child = int(other.stdout.readline())
    try:
        assert (copy / ".lock").is_file()
        with pytest.raises(StoreBusy):
            StoreLock(store)
        other.kill()
        other.wait()
        os.kill(child, 0)  # is alive
        StoreLock(store).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_file_that_cannot_be_deleted_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    lock = StoreLock(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", fails)
        lock.release()
    assert names(tmp_path) == [".lock"]
    StoreLock(tmp_path).release()
    assert names(tmp_path) == []


def test_a_thread_of_this_process_is_another_run_and_a_left_over_lock_is_not(tmp_path: Path) -> None:
    lock, refused = StoreLock(tmp_path, holder="first"), []

    def second() -> None:
        try:
            StoreLock(tmp_path, holder="second")
        except StoreBusy as error:
            refused.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert "another thread" in refused[0]
    again = StoreLock(tmp_path, holder="after an exception")
    lock.release()
    again.release()
    again.release()
    assert names(tmp_path) == []
    StoreLock(tmp_path).release()
