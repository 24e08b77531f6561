"""Every state that a power cut may leave: one run of file operations, recorded, and what file systems allow of it.

Recorded are the calls of `os` by which the store changes the disk. A file keeps for certain what was in it at its last
`fsync`; a folder keeps for certain the names that it had at its last `fsync`. Of everything after that

- POSIX promises nothing: each change of a name lasts or not, whatever the others do (a rename in one folder is one
  change), and a file has any of its bytes;
- ext4 keeps the order of names: its journal holds a beginning of all changes, and whatever was synced is in it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: A state: path under the store -> bytes of a file, or None for a folder.
State = Mapping[str, bytes | None]


@dataclass
class Node:
    """A file or a folder, whatever it is called: what it holds for certain once it was synced."""

    folder: bool
    content: bytes = b""
    synced: bytes | None = None  # of a file, at its last sync


@dataclass
class Change:
    """One change of names: what goes and what comes, in the order in which they were asked for."""

    gone: list[tuple[Node, str]]
    come: list[tuple[Node, str, Node]]
    lasting: bool = False  # synced by now


@dataclass
class Recorder:
    """What happened below one folder, and the states that it may leave.

    Attributes:
        promised: how much the test was told to be saved by now.
        states: each state with the most that was promised before it.
    """

    root: Path
    top: Node = field(default_factory=lambda: Node(True))
    names: dict[tuple[int, str], Node] = field(default_factory=dict)  # (folder, name) -> what every call sees
    changes: list[Change] = field(default_factory=list)
    promised: int = 0
    states: dict[tuple[tuple[str, bytes | None], ...], int] = field(default_factory=dict)

    def place(self, path: Any) -> tuple[Node, str] | None:
        """The folder and the name of a path; None outside the root."""
        path = Path(os.path.abspath(path))
        if self.root not in path.parents:
            return None
        node = self.top
        for part in path.relative_to(self.root).parts[:-1]:
            node = self.names[id(node), part]
        return node, path.name

    def at(self, path: Any) -> Node | None:
        if Path(path) == self.root:
            return self.top
        place = self.place(path)
        return None if place is None else self.names.get((id(place[0]), place[1]))

    def link(self, path: Any, node: Node) -> None:
        if (place := self.place(path)) is not None:
            self.names[id(place[0]), place[1]] = node
            self.changes.append(Change([], [(*place, node)]))

    def move(self, source: Any, target: Any = None) -> None:
        """Rename, or unlink where there is no target."""
        old, new = self.place(source), None if target is None else self.place(target)
        node = None if old is None else self.names.pop((id(old[0]), old[1]), None)
        if old is None or node is None:
            return
        if new is not None:
            self.names[id(new[0]), new[1]] = node
        self.changes.append(Change([old], [] if new is None else [(*new, node)]))

    def sync(self, path: str) -> None:
        node = self.at(path)
        if node is not None and not node.folder:
            node.synced = Path(path).read_bytes()
        for change in self.changes if node is not None and node.folder else ():
            change.lasting |= any(place[0] is node for place in [*change.gone, *change.come])

    def cut(self) -> None:
        """Add all states that a power cut at this moment leaves."""
        for path in self.root.rglob("*"):
            if path.is_file() and (node := self.at(path)) is not None:
                node.content = path.read_bytes()
        pending = [index for index, change in enumerate(self.changes) if not change.lasting]
        assert len(pending) < 13, "too much is not synced for all states to be looked at"
        subsets = (set(some) for size in range(len(pending) + 1) for some in itertools.combinations(pending, size))
        last = max((index for index, change in enumerate(self.changes) if change.lasting), default=-1)
        journals = (set(range(end)) for end in range(last + 1, len(self.changes) + 1))
        for lasting in itertools.chain(subsets, journals):
            for damage in ("as written", "empty", "half"):
                key = tuple(sorted(self._state(lasting, damage).items()))
                self.states[key] = max(self.states.get(key, 0), self.promised)

    def _state(self, lasting: set[int], damage: str) -> dict[str, bytes | None]:
        inside: dict[int, dict[str, Node]] = {}
        for index, change in enumerate(self.changes):
            if change.lasting or index in lasting:
                for folder, name in change.gone:
                    inside.get(id(folder), {}).pop(name, None)
                for folder, name, node in change.come:
                    inside.setdefault(id(folder), {})[name] = node
        state: dict[str, bytes | None] = {}
        reached = [("", self.top)]
        for prefix, folder in reached:
            for name, node in inside.get(id(folder), {}).items():
                whole = node.content if node.synced == node.content or damage == "as written" else b""
                part = node.content[: len(node.content) // 2] if damage == "half" and not whole else whole
                state[prefix + name] = None if node.folder else part
                if node.folder:
                    reached.append((f"{prefix}{name}/", node))
        return state


@contextmanager
def recorded(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Record what the block does below `root`, an existing empty folder; power may be cut after each call."""
    recorder = Recorder(root)
    real = {name: getattr(os, name) for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync")}
    opened = Path.open

    def mkdir(path: Any, *rest: Any, **named: Any) -> None:
        real["mkdir"](path, *rest, **named)
        recorder.link(path, Node(True))
        recorder.cut()

    def rename(source: Any, target: Any, *rest: Any, **named: Any) -> None:
        real["rename"](source, target, *rest, **named)
        recorder.move(source, target)
        recorder.cut()

    def unlink(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> None:
        if dir_fd is not None:
            path = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / path
        real["unlink"](path, *rest, **named)
        recorder.move(path)
        recorder.cut()

    def rmdir(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> None:
        if dir_fd is not None:
            path = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / path
        real["rmdir"](path, *rest, **named)
        recorder.move(path)
        recorder.cut()

    def fsync(handle: int) -> None:
        real["fsync"](handle)
        recorder.sync(os.readlink(f"/proc/self/fd/{handle}"))
        recorder.cut()

    def open_file(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        new = not path.exists()
        file = opened(path, mode, *rest, **named)
        if new and set(mode) & set("wxa"):
            recorder.link(path, Node(False))
            recorder.cut()
        return file

    with monkeypatch.context() as patch:
        for name, function in (("mkdir", mkdir), ("rename", rename), ("replace", rename), ("unlink", unlink),
                               ("remove", unlink), ("rmdir", rmdir), ("fsync", fsync)):  # fmt: skip
            patch.setattr(os, name, function)
        patch.setattr(Path, "open", open_file)
        recorder.cut()
        yield recorder


def laid_out(state: State, place: Path) -> None:
    """Make the folder that a state describes."""
    place.mkdir()
    for name, content in sorted(state.items()):
        if content is None:
            (place / name).mkdir(parents=True, exist_ok=True)
        else:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
