"""Power cuts: whatever POSIX and ext4 leave of the disk at any moment of a save, the right checkpoint is read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from crash_states import laid_out, recorded

from phi3_lora_plugin.store.checkpoint import latest_complete, recover, verify, write_checkpoint
from phi3_lora_plugin.store.layout import again
from phi3_lora_plugin.store.manifest import read_manifest
from phi3_lora_plugin.store.retention import Retention

pytestmark = pytest.mark.slow

State = tuple[tuple[str, bytes | None], ...]  # path -> content, None of a folder
Save = tuple[int, bytes]  # step, what its adapter holds


def write(store: Path, save: Save, keep: int = 9) -> Path:
    step, content = save
    metric = {"name": "eval_loss", "value": 1 / (step + len(content)), "greater_is_better": False}
    files, resume = {"adapter_model.safetensors": content, "adapter_config.json": b"{}"}, {"optimizer.pt": content * 2}
    return write_checkpoint(store, step, files, metric=metric, resume=resume, retention=Retention(last=keep, best=0))


SAVES: dict[str, tuple[list[Save], int]] = {
    "two steps": ([(10, b"ten"), (20, b"twenty")], 9),
    "the older one is deleted": ([(10, b"ten"), (20, b"twenty")], 1),
    "the same step again, equal": ([(10, b"ten"), (20, b"twenty"), (20, b"twenty")], 9),
    "the same step again, another": ([(10, b"ten"), (20, b"twenty"), (20, b"other")], 9),
}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of stores are made, and none has to last."""
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


@pytest.mark.parametrize("what", SAVES)
def test_whenever_the_power_fails_what_was_saved_is_there(
    what: str, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves, keep = SAVES[what]
    root = memory / "root"
    root.mkdir()
    with recorded(root, monkeypatch) as recorder:
        for number, save in enumerate(saves):
            write(root / "run" / "lora", save, keep)
            recorder.promised = number + 1
            recorder.cut()
    assert len(recorder.states) > 500
    for number, (state, promised) in enumerate(worst(recorder.states)):
        place = memory / f"state-{number}"
        laid_out(dict(state), place)
        store = place / "run" / "lora"
        assert newest(store, saves) >= promised, f"state {number}: {[name for name, _ in state]}"
        pointer = store / "LATEST"
        if pointer.is_file() and promised:
            named = store / pointer.read_text().strip()
            assert verify(named) or verify(again(named)), "LATEST names what is not there"
        if store.is_dir():  # the next run finds its way from there
            recover(store)
            assert newest(store, saves) >= promised and not [*store.glob(".*tmp*"), *store.glob("*.again")]
        assert latest_complete(write(store, (30, b"next"))) == store / "step-00000030"
        shutil.rmtree(place)


def worst(states: Mapping[State, int]) -> Iterator[tuple[State, int]]:
    """Of states that look the same to readers, who do not see hidden names, one; with the most that any has to hold."""
    seen: dict[State, tuple[State, int]] = {}
    for state, promised in states.items():
        visible = tuple(item for item in state if "/." not in item[0])
        kept, most = seen.get(visible, (state, 0))
        seen[visible] = max(kept, state, key=len), max(promised, most)
    yield from seen.values()


def newest(store: Path, saves: list[Save]) -> int:
    """How many of the saves it takes to have the checkpoint that is read from a store; 0: there is none."""
    found = latest_complete(store)
    if found is None:
        return 0
    read = read_manifest(found)["step"], (found / "adapter_model.safetensors").read_bytes()
    return len(saves) - saves[::-1].index(read)


def test_the_model_sees_a_store_that_forgets_to_sync(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above could not fail."""
    from phi3_lora_plugin.store import checkpoint

    root = memory / "root"
    root.mkdir()
    for name in ("sync_folder", "make_folder"):
        nothing: Callable[[Path], None] = lambda folder: folder.mkdir(parents=True, exist_ok=True)  # noqa: E731
        monkeypatch.setattr(checkpoint, name, nothing)
    with recorded(root, monkeypatch) as recorder:
        write(root, (10, b"ten"))
        recorder.promised = 1
        recorder.cut()
    lost = 0
    for state, promised in worst(recorder.states):
        laid_out(dict(state), memory / "state")
        lost += newest(memory / "state", [(10, b"ten")]) < promised
        shutil.rmtree(memory / "state")
    assert lost
