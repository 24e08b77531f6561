"""What CONTRIBUTING.md says about make, hooks and the suite is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DEV = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]["dev"]


def made(*arguments: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # Without what an outer `make test` hands down: its own WORKERS, and lines about folders.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_make_help_lists_every_target_with_what_it_does() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    listed = dict(re.findall(r"^  make (\S+) +(\S.*)$", made("help"), re.MULTILINE))
    assert set(listed) == set(phony.split())
    for page in PAGES:
        assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", _code(page))) <= set(listed), page


def test_make_runs_the_whole_suite_or_the_fast_part_on_workers() -> None:
    whole, fast = (made("--dry-run", name, "WORKERS=3").splitlines()[-1] for name in ("test", "test-fast"))
    long = made("--dry-run", "test-long", "WORKERS=3").splitlines()[-1]
    assert "-m pytest -n 3 --dist worksteal" in whole
    assert fast == f'{whole} -m "not slow and not long"'
    assert long == f"{whole} -m long"


def test_hooks_are_local_and_run_what_the_environment_of_developers_has() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    installed = {"ruff": "ruff", "mypy": "mypy", "lint-imports": "import-linter"}
    (repo,) = config["repos"]
    assert repo["repo"] == "local"
    assert all(hook["language"] == "system" for hook in repo["hooks"])
    commands = {hook["entry"].split()[0] for hook in repo["hooks"]}
    assert commands == {f".venv/bin/{tool}" for tool in installed}
    assert all(any(line.startswith(f"{name}>=") for line in DEV) for name in [*installed.values(), "pre-commit"])


def test_pre_commit_takes_the_config() -> None:
    clientlib = pytest.importorskip("pre_commit.clientlib", reason="pre-commit is not installed")
    assert clientlib.load_config(str(ROOT / ".pre-commit-config.yaml"))["repos"]


def test_the_gate_prints_the_summary_of_the_suite_last() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1].startswith("make test ") and ".ci/oldest" in lines


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), (page, link)


def _code(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(
        [*re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL), *re.findall(r"`([^`\n]+)`", text)]
    )
