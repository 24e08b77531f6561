"""One base class for every error of ours, and one sentence for each on the command line."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from pathlib import Path

import pytest
from commands import phi3_lora

import phi3_lora_plugin
from phi3_lora_plugin import Phi3LoraError

ROOT = Path(phi3_lora_plugin.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
#: Importable only in a host, of whose classes they define subclasses, or where Triton is.
FOREIGN = (
    "hosts/axolotl.py",
    "hosts/axolotl_model.py",
    "hosts/axolotl_rows.py",
    "hosts/llamafactory_template.py",
    "hosts/swift/",
    "speed/triton_kernels.py",
)


def test_every_error_class_derives_from_one() -> None:
    checked = 0
    for file in FILES:
        name = file.relative_to(ROOT).as_posix()
        if name.startswith(FOREIGN):
            continue
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        module = importlib.import_module(".".join(part for part in parts if part not in ("__init__", "__main__")))
        for kind in vars(module).values():
            ours = inspect.isclass(kind) and kind.__module__ == module.__name__
            if ours and issubclass(kind, BaseException) and not issubclass(kind, Warning):
                assert issubclass(kind, Phi3LoraError), f"{name}: {kind.__name__}"
                checked += 1
    assert checked > 40


def test_no_class_anywhere_is_built_on_a_plain_exception() -> None:
    plain = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            bases = [base.id for base in getattr(node, "bases", ()) if isinstance(base, ast.Name)]
            if isinstance(node, ast.ClassDef) and plain & set(bases) and "error" not in file.stem:
                assert "Phi3LoraError" in bases or node.name.endswith("Warning"), f"{file}: {node.name}"


def test_nobody_asks_where_an_error_class_was_defined() -> None:
    for file in FILES:
        assert '__module__.startswith("phi3_lora_plugin' not in file.read_text(encoding="utf-8"), file


def test_a_failed_run_and_wrong_input_have_exit_codes_of_their_own() -> None:
    from phi3_lora_plugin.pipeline import TrainingError
    from phi3_lora_plugin.recipe import RecipeError
    from phi3_lora_plugin.training.callbacks import CheckpointError

    assert issubclass(TrainingError, RuntimeError) and TrainingError("x").exit_code == 1
    assert issubclass(CheckpointError, RuntimeError) and CheckpointError("x").exit_code == 1
    assert issubclass(RecipeError, ValueError) and RecipeError("x", []).exit_code == 2


@pytest.mark.parametrize("words", [["train", "nope", "--debug"], ["--debug", "train", "nope"], ["train", "nope"]])
def test_debug_adds_the_traceback_and_nothing_else(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert phi3_lora(*words) == 2
    said = capsys.readouterr().err
    assert "no recipe is named 'nope'" in said
    assert ("Traceback" in said) == ("--debug" in words)


def test_debug_behind_a_script_is_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3_lora_plugin.cli import _without_debug

    assert _without_debug(["run", "s.py", "--debug"]) == (["run", "s.py", "--debug"], False)
    assert _without_debug(["--debug", "run", "s.py", "--debug"]) == (["run", "s.py", "--debug"], True)
    assert _without_debug(["train", "run", "--debug"]) == (["train", "run"], True)
    assert _without_debug(["train", "--", "--debug"]) == (["train", "--", "--debug"], False)
