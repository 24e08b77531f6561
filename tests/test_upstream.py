"""docs/upstream.md: patches apply to copies of the installed libraries; their tests fail without and pass with them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parents[1] / "docs" / "upstream"
PAGE = FOLDER.with_suffix(".md").read_text(encoding="utf-8")
NAMES = ("peft", "trl", "transformers")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """A library in the version that its patch is against."""
    wanted = re.search(rf"^\| {request.param} ([\d.]+) \|", PAGE, re.MULTILINE | re.IGNORECASE)
    assert wanted, f"docs/upstream.md has no row for {request.param}"
    pytest.importorskip(request.param)
    if version(request.param) != wanted[1]:
        pytest.skip(f"the patch is against {request.param} {wanted[1]}, not {version(request.param)}")
    return str(request.param)


def patched_copy(name: str, into: Path) -> Path:
    """The installed library below `into`, all of it links but for the files that its patch changes."""
    patch = FOLDER / f"{name}.patch"
    home = Path(str(import_module(name).__file__)).parent.parent
    for file in re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(encoding="utf-8"), re.MULTILINE):
        for parent in reversed(list((Path(file)).parents)[:-1]):
            (into / parent).mkdir(exist_ok=True)
            for beside in (home / parent).iterdir():
                link = into / parent / beside.name
                if not link.exists() and not Path(file).is_relative_to(parent / beside.name):
                    link.symlink_to(beside)
        shutil.copyfile(home / file, into / file)
    done = subprocess.run(["git", "apply", str(patch)], cwd=into, capture_output=True, text=True)
    assert done.returncode == 0, f"{patch.name} does not apply: is {name} mended, or changed?\n{done.stderr}"
    return into


def test_a_patch_mends_what_its_test_shows(name: str, tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("git applies the patches, and is not installed")
    file = FOLDER / f"{name}_test.py"
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [found for called, found in vars(module).items() if called.startswith("test_")]
    assert len(tests) == 1
    with pytest.raises(
        Exception, match="specify `target_modules`|not supported for this template|original_max_position"
    ):
        tests[0]()
    patched = patched_copy(name, tmp_path)
    call = f"import {file.stem} as t; t.{tests[0].__name__}(); import {name}; print({name}.__file__)"
    alone = os.environ | {"PYTHONPATH": os.pathsep.join([str(patched), str(FOLDER)])}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith(str(patched))
