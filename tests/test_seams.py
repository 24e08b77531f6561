"""The places in other libraries that this package holds on to: all in one table, and what happens when one is gone."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

import phi3_lora_plugin
from phi3_lora_plugin import Phi3LoraError, activate, deactivate, seams
from phi3_lora_plugin.hosts.activate import PARTS, ActivationError, active
from phi3_lora_plugin.recipe.training import fields_of, installed_fields
from phi3_lora_plugin.seams import SEAMS, Seam, look_into, look_up

ROOT = Path(phi3_lora_plugin.__file__).parent
HERE = [name for name, seam in SEAMS.items() if seam.library in ("torch", "transformers", "peft", "trl")]
#: Of hosts' objects, read by their own subclasses.
HOSTS = {"_processor_inited", "_loss_scale"}


@pytest.fixture(autouse=True)
def back() -> Iterator[None]:
    yield
    deactivate()
    seams.require.cache_clear()


@pytest.mark.parametrize("name", HERE)
def test_the_installed_libraries_have_every_place(name: str) -> None:
    look_up(name)


def torn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the place `name` out of its library."""
    module, _, path = SEAMS[name].place.partition(":")
    owner = importlib.import_module(module)
    *parents, last = path.split(".")
    for part in parents:
        above, owner = owner, getattr(owner, part)
    if isinstance(owner, torch._ops.OpOverloadPacket):  # looks a lost operator up again
        monkeypatch.setattr(above, parents[-1], object())
    else:
        monkeypatch.delattr(owner, last)


@pytest.mark.parametrize("name", [name for name in HERE if "()" not in SEAMS[name].place])
def test_a_place_that_is_gone_is_named_with_library_version_and_what_is_off(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn(name, monkeypatch)
    seam = SEAMS[name]
    with pytest.raises(ActivationError) as caught:
        look_up(name)
    assert f"{seam.library} {metadata.version(seam.library)} has no " in str(caught.value)
    assert f"switched off: {seam.off}" in str(caught.value) and isinstance(caught.value, Phi3LoraError)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("peft.targets", "targets"),
        ("transformers.report_to", "report_to"),
        ("transformers.train", "trainers"),
        ("trl.sft_rows", "trl"),
        ("trl.dpo_rows", "trl"),
    ],
)
def test_activation_is_refused_as_a_whole_and_goes_without_that_part(
    name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn(name, monkeypatch)
    with pytest.raises(ActivationError, match=re.escape(SEAMS[name].off)):
        activate(parts=list(PARTS))
    assert active() == ()
    others = [other for other in PARTS if other != part]
    activate(parts=others)
    assert active() == tuple(others)


def test_a_part_that_is_refused_halfway_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import SFTTrainer, chat_template_utils

    def places() -> list[object]:
        return [SFTTrainer._prepare_dataset, getattr(chat_template_utils, "get_training_chat_template", None)]

    before = places()
    torn("trl.dpo_rows", monkeypatch)
    with pytest.raises(ActivationError):
        activate(parts=["trl"])
    assert places() == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Kind:\n    def method(self, rows, args): ...\n", None),
        ("class Kind:\n    def method(self, args, rows): ...\n", r"with other arguments \(self, args, rows\)"),
        ("class Kind:\n    def other(self): ...\n", "has no odd_library.Kind.method"),
        ("class Base:\n    def method(self, rows): ...\nclass Kind(Base): ...\n", None),
    ],
)
def test_a_method_is_looked_at_before_the_user_imports_its_module(
    source: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the error would come out of the user's own import."""
    (tmp_path / "odd_library.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SEAMS, "odd", Seam("odd_library:Kind.method", "odd things", ("self", "rows")))
    try:
        if said is None:
            look_into("odd")
        else:
            with pytest.raises(ActivationError, match=said):
                look_into("odd")
        if "Base" not in source and "other" not in source:
            assert "odd_library" not in sys.modules
    finally:
        sys.modules.pop("odd_library", None)


def test_a_library_that_is_not_there_is_not_looked_at() -> None:
    look_into("swift.encode")


def test_every_private_name_of_another_library_is_in_the_table() -> None:
    """What this package defines or sets itself, on whatever object, is its own."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in ROOT.rglob("*.py")}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    known = HOSTS | set(re.findall(r"_\w+", " ".join(seam.place for seam in SEAMS.values())))
    for _, node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            known.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            known.add(node.attr)
    for file, node in nodes:
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
            assert own or node.attr in known, f"{file}:{node.lineno}: {node.attr}"


@pytest.mark.parametrize("source", ["", "def (", "class TrainingArguments(Parent): pass", "x = 1\0"])
def test_fields_that_cannot_be_read_from_the_source_come_from_the_class(source: str) -> None:
    assert fields_of(source) == installed_fields()


def test_tensors_of_all_kinds_are_finite_or_not_together() -> None:
    import torch

    from phi3_lora_plugin.lora.finite import all_finite

    good = [torch.ones(3), torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16), torch.empty(0)]
    assert all_finite([]) and all_finite(good)
    assert not any(all_finite([*good, torch.tensor([float(bad)])]) for bad in ("nan", "inf"))
