"""Fixtures and the environment of the suite: offline, quiet, the same everywhere."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CI", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # common in containers: every process would compile this package anew
# Tests write nothing into a real home, where workers would also find each other's files.
os.environ["PHI3_LORA_CACHE"] = "off"
os.environ["HF_DATASETS_CACHE"] = mkdtemp(prefix="phi3-lora-tests-")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a card, Triton's kernels run in its interpreter
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models are slower on more threads, and other workers have the other cores

import psutil
import pytest
from hypothesis import HealthCheck, settings
from warm_process import Warm

sys.dont_write_bytecode = False

# Importing and collecting makes a million objects to keep. Looking for garbage among them takes a quarter of that time,
# in each worker; `old_objects_out_of_garbage_collections` begins the looking.
gc.disable()

# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and so would be every process of a test.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# How fast examples run depends on who else is on the machine; a test is about what comes out.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

MEMORY = "/dev/shm"
ROOM = 10 * 2**30  # bytes free: a whole suite writes less than one, and its processes take the rest


def has_room(folder: str) -> bool:
    """Whether `tmp_path` of each test can be in this folder of memory; some tests run programs there."""
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        return False
    found = os.statvfs(folder)
    free = min(found.f_bavail * found.f_frsize, psutil.virtual_memory().available)
    return free >= ROOM and not found.f_flag & os.ST_NOEXEC


# Checkpoints are synced 20,000 times. On a disk that others use, that takes minutes, and it proves nothing more:
# what is on a disk after each of these calls is the subject of tests/test_checkpoint_crash.py, which needs no disk.
if has_room(MEMORY):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

MEMORY_OF_A_WORKER = 3 * 2**30  # bytes: torch and its companions twice, here and in the warm process, and models
MOST_WORKERS = 16  # each imports torch first; the longest tests take as long on any number


@pytest.hookimpl(optionalhook=True)  # pytest runs without xdist too
def pytest_xdist_auto_num_workers() -> int:
    """One for each core that this process may use, hyper-threads too, as far as memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST_WORKERS, psutil.virtual_memory().available // MEMORY_OF_A_WORKER))


def pytest_unconfigure() -> None:
    """Delete what this process and its children cached."""
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


SHARED = Path(os.environ.get("PHI3_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real Phi-3 tokenizers, configs, templates and chats; skips where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"real inputs are not here: {SHARED} does not exist (set PHI3_SHARED_DATA)")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def old_objects_out_of_garbage_collections() -> None:
    """Every Trainer collects garbage as it begins: half a second over the modules of torch and transformers."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_stack_with_every_seed() -> None:
    """Without a card, `torch.manual_seed` notes who called it for cards to come: milliseconds, thousands of times."""
    torch = sys.modules.get("torch")
    for name in ("cuda", "xpu", "mtia"):
        kind = getattr(torch, name, None)
        if kind is not None and not kind.is_available():
            kind.traceback = SimpleNamespace(format_stack=list)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what needs the warm process, which takes six seconds to start, or real tokenizers, a second each."""
    for item in items:
        if {"warm", "shared_data"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A process to fork others off, which have torch, transformers, peft and datasets imported already."""
    with Warm() as process:
        yield process


@pytest.fixture(scope="session")
def random_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded model that makes it say something else."""
    from exports import EMBEDDED, adapter

    return adapter(EMBEDDED, tmp_path_factory.mktemp("adapter") / "pirate")


@pytest.fixture
def reload_in_fork(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that reloads an adapter with plain PEFT at the end of a run gets a fork, not a fresh interpreter.

    README.md and `--json` have it in a fresh one, which proves that it needs nothing of ours.
    """
    from phi3_lora_plugin.training import reload_check

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-c"]
        return warm.run(*command[2:], cwd=Path.cwd(), plain=True)

    monkeypatch.setattr(reload_check, "subprocess", SimpleNamespace(run=run))


@pytest.fixture(autouse=True)
def no_mixed_precision_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older transformers leave `bf16=True` of one Trainer in the environment, where the next one finds it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
