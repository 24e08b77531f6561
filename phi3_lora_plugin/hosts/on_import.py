"""Look at a module right after it was imported, whoever imports it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

Undo = Callable[[], None]


def when_imported(name: str, then: Callable[[Any], Undo]) -> Undo:
    """Call `then(module)` once the module is imported, now if it is already; return how to undo it."""
    if name in sys.modules:
        return then(sys.modules[name])
    undone: list[Undo] = []
    finder = _Finder(name, lambda module: undone.append(then(module)))
    sys.meta_path.insert(0, finder)

    def undo() -> None:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        undo_all(undone)()

    return undo


def undo_all(undone: Sequence[Undo]) -> Undo:
    """One that undoes several, the last first."""

    def undo() -> None:
        for take_back in reversed(undone):
            take_back()

    return undo


class _Finder:
    """Finds one module as the other finders would, and removes itself once that module was executed.

    A library that only asks whether the module exists, by `importlib.util.find_spec`, leaves it in place.
    """

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then, self.asking = name, then, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec that the other finders give, with a look at the finished module."""
        if name != self.name or self.asking:
            return None
        self.asking = True
        try:
            spec = find_spec(name)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
