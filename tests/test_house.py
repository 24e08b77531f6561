"""The picture of the house in docs/design.md is the house: its rooms, their order, and every import between them."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path

from pages import blocks, page
from test_imports import MODULES, ROOT

import phi3_lora_plugin

CHECKOUT = Path(__file__).parents[1]


def picture() -> list[set[str]]:
    """The rooms of the picture, line by line from the top: each arrow leads from one line to the next."""
    [drawn] = blocks(page("design"), "mermaid")
    lines: list[set[str]] = []
    for arrow in drawn.splitlines()[1:]:
        ends = [{re.match(r"\w+", box.strip())[0] for box in end.split(" & ")} for end in arrow.split(" --> ")]  # type: ignore[index]
        assert len(ends) == 2 and (not lines or lines[-1] == ends[0]), f"{arrow!r} starts elsewhere"
        lines += ends if not lines else ends[1:]
    return lines


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports anywhere but for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in MODULES else node.module for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@cache  # not at import, which every worker does
def all_imports() -> dict[str, set[str]]:
    return {module: imports(path) - {module} for module, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_picture_has_every_room_and_no_other() -> None:
    drawn = set().union(*picture())
    assert drawn == {room(module) for module in MODULES} - {""}


def test_the_picture_is_the_contract() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = project["tool"]["importlinter"]["contracts"]
    assert [set(re.split(r" [|:] ", line)) for line in contract["layers"]] == picture()


def test_every_import_between_rooms_points_down_in_the_picture() -> None:
    level = {name: number for number, line in enumerate(picture()) for name in line}
    up = [
        f"{module} imports {other}"
        for module, others in all_imports().items()
        for other in others
        if room(module) and room(other) not in ("", room(module)) and level[room(other)] <= level[room(module)]
    ]
    assert up == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    done: set[str] = set()
    circles = []

    def walk(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            circles.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in all_imports()[module]:
                walk(other, (*path, module))
            done.add(module)

    for module in MODULES:
        walk(module, ())
    assert circles == []


def test_every_room_says_what_comes_in_what_goes_out_and_what_it_never_does() -> None:
    for package in [path.parent for path in ROOT.glob("*/__init__.py")]:
        text = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
        if package.name not in ("cli", "embedded"):  # which hold code of their own
            said = [text.find(word) for word in ("In: ", "Out: ", "Never: ")]
            assert -1 not in said and all(a < b for a, b in pairwise(said)), package.name


def test_no_module_at_the_top_bears_the_name_of_a_public_function() -> None:
    assert not {path.stem for path in ROOT.glob("*.py")} & set(phi3_lora_plugin.__all__)
    assert not {path.parent.name for path in ROOT.glob("*/__init__.py")} & set(phi3_lora_plugin.__all__)
