"""What may import what: discovery stays light for every host, and knowledge flows one way."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from warm_process import Warm

import phi3_lora_plugin

ROOT = Path(phi3_lora_plugin.__file__).parent
HEAVY = tuple("torch transformers peft trl datasets accelerate bitsandbytes safetensors tokenizers ray".split())
MODULES = {
    ".".join(["phi3_lora_plugin", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
# Who must stay light whatever happens; a module outside this list is light too unless its header says why not.
LIGHT = (
    "", ".error", ".hookspecs", ".wording", ".plugins.registry", ".plugins.discovery", ".plugins.builtin", ".plugin",
    ".recipe", ".model.families", ".chat.formats", ".cli.plugins",
)  # fmt: skip


def run(program: str, **environment: str) -> Any:
    """Run `program` in a fresh interpreter and return the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded_after(statement: str, watched: tuple[str, ...]) -> list[str]:
    return run(f"{statement}\nimport json, sys\nprint(json.dumps([m for m in {watched!r} if m in sys.modules]))")


def test_importing_the_package_is_light() -> None:
    assert loaded_after("import phi3_lora_plugin", (*HEAVY, "pydantic", "pluggy", "yaml", "jinja2", "typer")) == []


def test_loading_plugins_is_light() -> None:
    statement = "from phi3_lora_plugin import hookimpl, load_plugins; assert load_plugins().plugins"
    assert loaded_after(statement, (*HEAVY, "pydantic", "yaml", "jinja2", "rich", "numpy", "email.mime")) == []


def test_asking_our_plugin_for_everything_it_registers_is_light() -> None:
    statement = (
        "from phi3_lora_plugin import load_plugins; p = load_plugins(strict=True)\n"
        "assert p.pick('models', 'phi3') and p.named('recipes') and p.named('dataset_adapters')"
    )
    assert loaded_after(statement, HEAVY) == []


def test_discovery_works_where_the_heavy_libraries_cannot_be_imported() -> None:
    program = f"""
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from phi3_lora_plugin import load_plugins
plugins = load_plugins(strict=True)
try:
    plugins.callbacks(None)
    said = ""
except Exception as error:
    said = str(error)
names = [sorted(plugins.named(kind)) for kind in ("models", "dataset_adapters", "recipes")]
print(json.dumps([names, said]))
"""
    (models, adapters, recipes), said = run(program)
    assert models == ["phi3"] and "messages" in adapters and recipes
    # What does need them says whose callback it was and what is missing.
    assert "plugin 'phi3' (phi3-lora-plugin" in said and "ModuleNotFoundError: No module named" in said


@pytest.mark.parametrize("module", [f"phi3_lora_plugin{name}" for name in LIGHT])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    assert loaded_after(f"import {module}", HEAVY) == []


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """Return (imported module, line, at the top level and not only for type checkers) for each import in a file."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.lineno, top))
            found.extend((f"{node.module}.{alias.name}", node.lineno, top) for alias in node.names)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not typing_only and not inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def test_heavy_libraries_are_imported_at_the_top_only_where_the_line_says_why() -> None:
    wrong = []
    for module, path in MODULES.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for name, line, top in imports(path):
            if top and name.split(".")[0] in HEAVY and "TID253" not in lines[line - 1]:
                wrong.append(f"{module}:{line} imports {name}")
    assert wrong == []


# module: what of ours it may import at its top; "" stands for the whole package
DIRECTION = {
    "phi3_lora_plugin": (),
    "phi3_lora_plugin.hookspecs": (),
    "phi3_lora_plugin.plugins.registry": ("error", "plugins.contain", "wording"),
    "phi3_lora_plugin.plugins.discovery": ("hookspecs", "plugins", "wording"),
    "phi3_lora_plugin.plugins.builtin": ("hookspecs",),
}


@pytest.mark.parametrize("module", DIRECTION)
def test_discovery_knows_nothing_of_what_it_discovers(module: str) -> None:
    ours = {name for name, _, top in imports(MODULES[module]) if top and name.startswith("phi3_lora_plugin.")}
    allowed = tuple(f"phi3_lora_plugin.{name}" for name in DIRECTION[module])
    assert [name for name in ours if not name.startswith(allowed or ("-",))] == []


@pytest.mark.slow
def test_every_public_name_resolves_to_something_that_is_no_module(warm: Warm, tmp_path: Path) -> None:
    program = (
        "import json, sys\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'phi3_lora_plugin']:\n"
        "    del sys.modules[name]\n"  # only the libraries are imported already
        "import phi3_lora_plugin as p\nprint(json.dumps({n: type(getattr(p, n)).__name__ for n in p.__all__}))"
    )
    done = warm.run(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kinds = json.loads(done.stdout)
    assert set(kinds) == set(phi3_lora_plugin.__all__) and "module" not in kinds.values()


@pytest.mark.parametrize(
    "statement",
    [
        "from phi3_lora_plugin import train",
        "import phi3_lora_plugin.pipeline; from phi3_lora_plugin import train",
        "from phi3_lora_plugin import attach, train",
        "from phi3_lora_plugin.pipeline import train as a\nfrom phi3_lora_plugin import train; assert a is train",
    ],
)
def test_train_is_the_function_whatever_was_imported_before(statement: str) -> None:
    assert run(f"{statement}\nprint(int(callable(train) and train.__name__ == 'train'))") == 1


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'"):
        phi3_lora_plugin.load_modle  # noqa: B018
    assert set(phi3_lora_plugin.__all__) <= set(dir(phi3_lora_plugin))
