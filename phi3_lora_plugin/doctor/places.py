"""Memory, disks and caches: is there room, can they be written, and which bases are here already."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from phi3_lora_plugin.doctor.finding import Finding
from phi3_lora_plugin.wording import human

AREA = "machine"
#: Bytes: what a run of any size writes in a while, and what the weights of Phi-3-mini take.
_LEAST, _BASE = 1_000_000_000, 8_000_000_000


def places() -> Iterator[Finding]:
    """Memory, the home folder, and each folder that is written into."""
    yield memory()
    home = find_home()
    if home is None:
        remedy = "set HOME, or HF_HOME=FOLDER and PHI3_LORA_CACHE=off"
        yield Finding(AREA, "home", "the home folder does not exist, so caches cannot be kept", "problem", remedy)
    yield folder("working folder", Path.cwd(), "runs are written there; cd elsewhere or pass output_dir=FOLDER")
    yield folder("temporary files", _temporary(), "set TMPDIR=FOLDER")
    cache = hub_cache(home)
    if cache is not None:
        yield folder("hub cache", cache, "set HF_HOME=FOLDER", _BASE)
        yield bases(cache)
    if (rows := row_cache(home)) is not None:
        yield folder("cache of rows", rows, "PHI3_LORA_CACHE=off does without it")


def memory() -> Finding:
    """Memory of this machine or container."""
    import psutil

    from phi3_lora_plugin.plan.machine import system_memory

    free = int(psutil.virtual_memory().available)
    return Finding(AREA, "memory", f"{human(system_memory())}, {human(free)} available, {os.cpu_count()} CPU threads")


def find_home() -> Path | None:
    """The home folder; None without one."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_dir() else None


def hub_cache(home: Path | None) -> Path | None:
    """Where huggingface_hub keeps models, by its documented variables."""
    if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named).expanduser()
    if named := os.environ.get("HF_HOME"):
        return Path(named).expanduser() / "hub"
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named).expanduser() / "huggingface" / "hub"
    return None if home is None else home / ".cache" / "huggingface" / "hub"


def row_cache(home: Path | None) -> Path | None:
    """Where encoded rows are kept."""
    from phi3_lora_plugin.chat.cache import cache_folder

    try:
        return cache_folder()
    except RuntimeError:  # no home, which is a finding of its own
        return None


def folder(name: str, path: Path, remedy: str, wanted: int = _LEAST) -> Finding:
    """Whether a folder, there or not yet, can be written, and the free space on its disk; leaves no file."""
    there = next((above for above in (path, *path.parents) if above.exists()), Path(path.anchor or "."))
    try:
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * 100_000)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        said = error.strerror or str(error)
        return Finding(AREA, name, f"{path} cannot be written: {said}", "problem", remedy)
    text = f"{path}, {human(free)} free"
    if free < _LEAST:
        return Finding(AREA, name, f"{text}: the disk is full", "problem", f"free some space, or {remedy}")
    if free < wanted:
        return Finding(AREA, name, f"{text}; the weights of Phi-3-mini take 7.6 GB", "note", remedy)
    return Finding(AREA, name, text)


def bases(cache: Path) -> Finding:
    """The models of the Phi family in the hub's cache."""
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError as error:  # comes with transformers, whose absence is a finding of its own
        return Finding(AREA, "bases", f"not looked at: {error}", "note", "pip install huggingface_hub")
    try:
        repos = scan_cache_dir(cache).repos
    except (CacheNotFound, OSError):
        repos = frozenset()
    models = [repo for repo in repos if repo.repo_type == "model" and "phi" in repo.repo_id.lower()]
    found = sorted(models, key=lambda repo: str(repo.repo_id))
    if not found:
        return Finding(AREA, "bases", "none in the hub cache; a run downloads its base, or hf download MODEL")
    return Finding(AREA, "bases", ", ".join(f"{repo.repo_id} ({human(repo.size_on_disk)})" for repo in found))


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # not even one of the usual folders can be written
        return Path(os.environ.get("TMPDIR", "/tmp"))
