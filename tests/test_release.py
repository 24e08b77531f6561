"""What a release is made of: one version, metadata, pages that messages name, and archives that the tools accept."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import phi3_lora_plugin
from phi3_lora_plugin.cli import app
from phi3_lora_plugin.cli.docs import pages
from phi3_lora_plugin.doctor.versions import tested as known_versions

ROOT = Path(__file__).parents[1]
PACKAGE = Path(phi3_lora_plugin.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tools"))
import check_release  # noqa: E402

sys.path.pop(0)


def test_the_version_has_one_owner() -> None:
    assert metadata.version("phi3-lora-plugin") == PROJECT["version"]
    assert PROJECT["version"] in CliRunner().invoke(app, ["--version"]).stdout
    written = re.compile(rf'["\']{PROJECT["version"]}["\']')
    assert not [path for path in PACKAGE.rglob("*.py") if written.search(path.read_text("utf-8"))]


def test_the_metadata_is_whole() -> None:
    assert {"Repository", "Documentation", "Changelog", "Issues"} == set(PROJECT["urls"])
    assert "Typing :: Typed" in PROJECT["classifiers"] and (PACKAGE / "py.typed").is_file()
    known = pytest.importorskip("trove_classifiers", reason="trove-classifiers is not installed").classifiers
    assert set(PROJECT["classifiers"]) <= known


def test_a_release_needs_tag_version_changelog_and_repository_to_agree() -> None:
    repository, version = PROJECT["urls"]["Repository"], PROJECT["version"]
    dated = f"## [{version}] - 2026-12-01\n"
    assert check_release.problems(f"v{version}", repository, PROJECT, dated) == []
    found = check_release.problems("v9.9", "https://example.org/other", PROJECT, "")
    assert len(found) == 3 and f"has version {version}" in found[0]
    assert version in CHANGELOG


def test_the_release_workflow_builds_by_targets_that_exist_and_publishes_without_a_token() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    jobs = flow["jobs"]
    made = [step["run"] for step in jobs["build"]["steps"] if "make" in step.get("run", "")]
    targets = {word for command in made for word in command.split()[1:]}
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"dist", "sbom"} and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert set(jobs["publish"]["needs"]) == {"build", "gate"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and "secrets." not in str(flow)


def test_versions_md_has_what_is_tested() -> None:
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|", text, re.M)
    rows = {name: (oldest, newest) for name, oldest, newest in found}
    both = {name: (ends["oldest"], ends["newest"]) for name, ends in known_versions().items() if len(ends) == 2}
    assert rows == both
    assert f"| {'.'.join(PROJECT['version'].split('.')[:2])} | current |" in text


def test_no_message_names_a_file_of_the_checkout_and_every_page_that_one_names_is_installed() -> None:
    named = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = {
            id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, holders) and ast.get_docstring(node)
        }  # type: ignore[union-attr]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                assert not re.search(r"\bdocs/\w+\.md", node.value), (path, node.value)
                named |= set(re.findall(r"phi3-lora docs ([a-z]\w*)", node.value))
    assert named and named <= set(pages())


def test_docs_lists_and_prints_pages() -> None:
    listed = CliRunner().invoke(app, ["docs"]).stdout
    assert {line.split()[0] for line in listed.splitlines()} == {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert CliRunner().invoke(app, ["docs", "hosts"]).stdout == (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    assert "did you mean 'hosts'" in str(CliRunner().invoke(app, ["docs", "host"]).exception)


@pytest.mark.long
def test_the_archives_are_accepted_and_the_wheel_has_everything(tmp_path: Path) -> None:
    """Built from what git has, as a release is."""
    for module in ("build", "twine", "check_wheel_contents"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[release]'")
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    here = [sys.executable, "-m"]
    subprocess.run([*here, "build", "--no-isolation", "-o", str(tmp_path / "dist"), str(source)], check=True)
    archives = sorted(map(str, (tmp_path / "dist").iterdir()))
    assert len(archives) == 2
    subprocess.run([*here, "twine", "check", "--strict", *archives], check=True)
    wheel = next(name for name in archives if name.endswith(".whl"))
    subprocess.run([*here, "check_wheel_contents", wheel], check=True)
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name for name in tracked if name.startswith("phi3_lora_plugin/")}
    packaged |= {f"phi3_lora_plugin/{name}" for name in tracked if re.match(r"recipes/|docs/[\w.]+$", name)}
    assert packaged <= names
