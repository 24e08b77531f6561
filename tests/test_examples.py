"""The stranger's plugin and the stranger's host in examples/, installed and run as a reader would."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from warm_process import COMMAND, FILE, Warm

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that my_plugin is installed into, by pip where this environment can build a wheel offline."""
    folder = tmp_path_factory.mktemp("site")
    # A copy, because building leaves folders beside the sources.
    source = tmp_path_factory.mktemp("source") / "my_plugin"
    shutil.copytree(EXAMPLES / "my_plugin", source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    if all(importlib.util.find_spec(needed) for needed in ("pip", "setuptools", "wheel")):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        done = subprocess.run([*pip, "--target", str(folder), str(source)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return folder
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shutil.copytree(source / "my_plugin", folder / "my_plugin")
    info = folder / f"my_plugin-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    entries = project["entry-points"]["phi3_lora_plugin"]
    lines = "\n".join(f"{name} = {target}" for name, target in entries.items())
    (info / "entry_points.txt").write_text(f"[phi3_lora_plugin]\n{lines}\n")
    return folder


def run(*arguments: str, cwd: Path, site: Path | None = None) -> str:
    """Run a fresh Python in `cwd` with my_plugin on the path, if asked for; return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(site or "")}
    environment.pop("PHI3_LORA_BLOCK_PLUGINS", None)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_warm(warm: Warm, program: str, *arguments: str, cwd: Path, site: Path | None = None) -> str:
    """The same for `python -c program`, forked off a process with its imports done."""
    done = warm.run(program, *arguments, cwd=cwd, PYTHONPATH=str(site or ""), PHI3_LORA_BLOCK_PLUGINS="")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def losses(path: Path) -> list[float]:
    with path.open(newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "loss"]


def test_the_plugin_is_listed_with_what_it_registers(site: Path, tmp_path: Path) -> None:
    report = json.loads(run("-c", COMMAND, "plugins", "--json", "--strict", cwd=tmp_path, site=site))
    row = next(row for row in report["plugins"] if row["name"] == "my_plugin")
    assert (row["distribution"], row["version"], row["callbacks"]) == ("my-plugin", "0.1.0", True)
    registers = {"dataset_adapters": ["tickets"], "recipes": ["support-tickets"], "exporters": ["help-desk"]}
    assert row["registers"] == {"models": [], **registers}
    assert report["failures"] == []


def test_finding_the_plugin_imports_nothing_heavy(site: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from phi3_lora_plugin import load_plugins; p = load_plugins(strict=True)\n"
        "assert p.pick('recipes', 'support-tickets').is_file()\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    assert run("-c", program, cwd=tmp_path, site=site).strip() == "[]"


def test_train_uses_adapter_recipe_and_callback_of_the_plugin(site: Path, tmp_path: Path, warm: Warm) -> None:
    readme = (EXAMPLES / "my_plugin" / "README.md").read_text(encoding="utf-8")
    shown = r"^\$ phi3-lora (train .+) data\.path=\"\$\(python -c '(.+)'\)\"$"
    [(command, program)] = re.findall(shown, readme, re.MULTILINE)
    data = run("-c", program, cwd=tmp_path, site=site).strip()
    arguments = [*command.split(), f"data.path={data}", "--json", "--samples", "0", "--no-check"]
    output = run_warm(warm, COMMAND, *arguments, cwd=tmp_path, site=site)
    result = json.loads(output.splitlines()[-1])
    folder = tmp_path / "runs" / "support-tickets"
    assert result["status"] == "done" and Path(result["output_dir"]) == Path("runs/support-tickets")
    # The adapter read the plugin's own file, the callback wrote, and what was learned shows.
    assert "tickets" in (folder / "data_report.json").read_text(encoding="utf-8")
    logged = losses(folder / "loss_log.csv")
    assert len(logged) >= 3 and logged[-1] < logged[0]
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert (tmp_path / result["adapter"] / "adapter_model.safetensors").is_file()
    # Its export target ships what was trained, proved by the same command that proves the built-in ones.
    [export] = re.findall(r"^\$ phi3-lora (export .+)$", readme, re.MULTILINE)
    words = [*export.split(), "--prompts", "4", "--json"]
    told = json.loads(run_warm(warm, COMMAND, *words, cwd=tmp_path, site=site))
    assert told["comparisons"][0]["holds"] and (tmp_path / "help-desk" / "ask.py").is_file()
    done = warm.run(FILE, "help-desk/ask.py", "Where is my parcel?", cwd=tmp_path, plain=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_host_trains_with_what_it_finds(tmp_path: Path, warm: Warm) -> None:
    from safetensors import safe_open

    overrides = ["training.num_train_epochs=8", "training.logging_steps=1"]
    output = run_warm(warm, FILE, str(EXAMPLES / "host.py"), "tiny-cpu", *overrides, cwd=tmp_path)
    first, last, adapter = re.search(r"loss from ([\d.]+) to ([\d.]+); adapter saved to (.+)", output).groups()
    assert float(last) < float(first)
    with safe_open(tmp_path / adapter / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and all("lora_" in name for name in names)


def test_the_host_finds_the_plugin_too(site: Path, tmp_path: Path, warm: Warm) -> None:
    overrides = ["training.max_steps=2", "training.logging_steps=1"]
    run_warm(warm, FILE, str(EXAMPLES / "host.py"), "support-tickets", *overrides, cwd=tmp_path, site=site)
    assert len(losses(tmp_path / "runs" / "support-tickets" / "loss_log.csv")) == 2


def test_the_host_is_a_script_of_about_forty_lines() -> None:
    lines = (EXAMPLES / "host.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 45
