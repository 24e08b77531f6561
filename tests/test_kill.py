"""SIGKILL at random moments of runs that save every step, and what else can happen to a store behind a run's back.

`python tests/test_kill.py 200` kills that many runs, half of which write in the background, and says what came of it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tiny
from lora_runs import trainer
from peft import PeftModel
from warm_process import Warm

from phi3_lora_plugin import LoraCheckpoint, latest_complete, verify
from phi3_lora_plugin.store import run as checkpoint_run
from phi3_lora_plugin.store.lock import StoreBusy
from phi3_lora_plugin.store.manifest import read_manifest
from phi3_lora_plugin.training.resume import newest_resumable, resumable

pytestmark = pytest.mark.slow

STEPS = 12
ENDS = ("adapter_model.safetensors", "resume/optimizer.pt", "resume/scheduler.pt", "resume/rng_state.pth")


def run(out: str, background: bool, steps: int = STEPS) -> None:
    """Train from where `out` stands, saving every step; announces each checkpoint once it is written."""
    write = checkpoint_run.write_checkpoint

    def announcing(*arguments: Any, **options: Any) -> Path:
        path = write(*arguments, **options)
        os.write(1, f"announced {path.name}\n".encode())
        return path

    checkpoint_run.write_checkpoint = announcing
    made = trainer(Path(out), LoraCheckpoint(every_steps=1, background=background), max_steps=steps, logging_steps=4)
    os.write(1, b"begun\n")
    with resumable(made, say=lambda _: None) as checkpoint:
        made.train(resume_from_checkpoint=checkpoint)


def _ends(out: Path) -> dict[str, bytes]:
    found = latest_complete(out)
    assert found is not None and found.name == f"step-{STEPS:08d}"
    return {name: (found / name).read_bytes() for name in ENDS}


@dataclass(frozen=True)
class Whole:
    """What a run without a break comes to, and how long it takes."""

    ends: dict[str, bytes]
    seconds: float


def whole(warm: Warm, folder: Path) -> Whole:
    child = warm.start(folder / "said", run, str(folder / "whole"), False)
    child.wait_for("begun")
    began = time.monotonic()
    child.wait_for(f"announced step-{STEPS:08d}")
    seconds = time.monotonic() - began  # without the end of the process, where a kill would prove nothing
    code, said = child.wait()
    assert code == 0, said
    return Whole(_ends(folder / "whole"), seconds)


def kill_and_resume(warm: Warm, folder: Path, expected: Whole, background: bool, chance: random.Random) -> str:
    """Kill a run at a random moment, and half of the time what resumes it; look at what is left, and finish it.

    Returns what happened, in a word or two.
    """
    out, within = folder / "run", 0
    shutil.rmtree(out, ignore_errors=True)
    for attempt in range(2 if chance.random() < 0.5 else 1):
        child = warm.start(folder / "said", run, str(out), background)
        handle = os.pidfd_open(child.pid)
        child.wait_for("begun")
        time.sleep(chance.uniform(0, expected.seconds))
        with suppress(ProcessLookupError):  # it was over
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
        code, said = child.wait()
        assert code in (0, -signal.SIGKILL), said
        announced = [line.split()[1] for line in said.splitlines() if line.startswith("announced")]
        found = latest_complete(out)
        within += code != 0 and (found is None or found.name < f"step-{STEPS:08d}")
        if announced:
            assert found is not None, f"attempt {attempt}: {announced[-1]} was announced and there is nothing"
            assert found.name >= announced[-1], f"{announced[-1]} was announced, {found.name} is there"
        if found is not None:
            assert verify(found), verify(found).problems
            PeftModel.from_pretrained(tiny.model(hidden_size=16, intermediate_size=32), found)
            assert newest_resumable(out, print).path == found
    code, said = warm.start(folder / "said", run, str(out), background).wait()
    assert code == 0, said
    assert _ends(out) == expected.ends, "the end is another one"
    assert verify(out), verify(out).problems
    left = [path.name for path in (out / "lora").iterdir() if path.name.startswith(".")]
    assert left == [], "what dead runs left behind is swept"
    return f"killed {within} times before the last step was saved"


@pytest.fixture(scope="module")
def expected(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole(warm, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_any_moment_the_last_announced_is_there_and_the_end_is_the_same(
    seed: int, background: bool, warm: Warm, expected: Whole, tmp_path: Path
) -> None:
    kill_and_resume(warm, tmp_path, expected, background, random.Random(seed))


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(warm: Warm, tmp_path: Path) -> None:
    child = warm.start(tmp_path / "said", run, str(tmp_path), False, 5000)
    handle = os.pidfd_open(child.pid)
    try:
        child.wait_for("announced")
        made = trainer(tmp_path, LoraCheckpoint())
        with pytest.raises(StoreBusy, match=f"process {child.pid} on "):
            made.train()
        assert made.state.global_step == 0
    finally:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
    assert child.wait()[0] == -signal.SIGKILL
    trainer(tmp_path, LoraCheckpoint()).train()
    assert latest_complete(tmp_path).name == "step-00000006" and verify(tmp_path)


def test_what_dead_runs_left_unfinished_is_swept_when_the_next_one_begins(tmp_path: Path) -> None:
    trainer(tmp_path, LoraCheckpoint(), max_steps=1).train()
    gone = tmp_path / "lora" / f".step-00000009.tmp-{2**22 + 1}-{socket.gethostname()}"
    shutil.copytree(tmp_path / "lora" / "step-00000001", gone)
    made = trainer(tmp_path, LoraCheckpoint(every_steps=1))
    with resumable(made, say=lambda _: None, allow_drift=["training.max_steps"]) as checkpoint:
        made.train(resume_from_checkpoint=checkpoint)
    assert not gone.exists() and verify(tmp_path)


# --- what happens to files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a real run, with a tokenizer and both formats."""
    out = tmp_path_factory.mktemp("store")
    made = trainer(out, LoraCheckpoint(every_steps=1, format="both"), max_steps=2)
    made.processing_class = made.callback_handler.processing_class = tiny.tokenizer()
    made.train()
    return out / "lora"


def _flip(path: Path, content: bytes, chance: random.Random) -> None:
    damaged = bytearray(content)
    place = chance.randrange(len(content))
    damaged[place] ^= 1 << chance.randrange(8)
    path.write_bytes(damaged)


def _cut(tenth: int, path: Path, content: bytes, chance: random.Random) -> None:
    path.write_bytes(content[: len(content) * tenth // 10])


DAMAGES: dict[str, Callable[[Path, bytes, random.Random], Any]] = {
    "a bit flipped": _flip,
    "another bit flipped": _flip,
    **{f"cut at {tenth} tenths": partial(_cut, tenth) for tenth in range(1, 10)},
    "emptied": lambda path, content, _: path.write_bytes(b""),
    "renamed": lambda path, content, _: path.rename(path.with_name("elsewhere")),
    "made a folder": lambda path, content, _: (path.unlink(), path.mkdir()),
}


def test_whatever_happens_to_a_file_the_one_before_is_taken(store: Path) -> None:
    newest, before = store / "step-00000002", store / "step-00000001"
    names = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]
    assert len(names) >= 12
    chance = random.Random(5)
    for name in names:
        path = newest / name
        content = path.read_bytes()
        for what, damage in DAMAGES.items():
            damage(path, content, chance)
            said: list[str] = []
            assert newest_resumable(store, said.append).path == before, (name, what)
            assert any(f"{newest}: " in line and name in line for line in said), (name, what, said)
            assert not verify(store), (name, what)
            assert latest_complete(store) == (newest if name.startswith("resume/") else before), (name, what)
            if path.is_dir():
                path.rmdir()
            path.with_name("elsewhere").unlink(missing_ok=True)
            path.write_bytes(content)
    assert verify(store) and newest_resumable(store, print).path == newest


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))

    class Touched(LoraCheckpoint):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, **kwargs)
            for path in (Path(args.output_dir) / "lora").glob("step-*"):
                os.utime(path, (1.0, 2_000_000_000.0 - read_manifest(path)["step"]))

    trainer(tmp_path, Touched(every_steps=1)).train()
    assert latest_complete(tmp_path).name == "step-00000006" and verify(tmp_path)
    assert sorted(path.name for path in (tmp_path / "lora").glob("step-*")) == ["step-00000005", "step-00000006"]


def main(kills: int) -> None:
    chance, counts = random.Random(), {}
    with TemporaryDirectory() as name, Warm() as warm:
        expected = whole(warm, Path(name))
        print(f"a run of {STEPS} steps takes {expected.seconds:.2f} s")
        began = time.monotonic()
        for number in range(kills):
            background = bool(number % 2)
            what = kill_and_resume(warm, Path(name), expected, background, chance)
            what = f"{what}, {'in the background' if background else 'at once'}"
            counts[what] = counts.get(what, 0) + 1
            if number % 20 == 19:
                print(f"{number + 1} runs in {time.monotonic() - began:.0f} s, every one whole and to the same end")
    for what, count in sorted(counts.items()):
        print(f"{count:4} {what}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
