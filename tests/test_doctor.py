"""`phi3-lora doctor` on this machine, and on machines where something is broken in each of its ways."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner
from warm_process import COMMAND, MODULE, Warm

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.doctor import child, plugin_check
from phi3_lora_plugin.doctor.examine import CHECKS, examine
from phi3_lora_plugin.doctor.extras import ADDS, DEVELOPERS, extras
from phi3_lora_plugin.doctor.finding import Finding, Report
from phi3_lora_plugin.doctor.host_check import hosts
from phi3_lora_plugin.doctor.libraries import libraries
from phi3_lora_plugin.doctor.places import places
from phi3_lora_plugin.doctor.self_test import self_test
from phi3_lora_plugin.doctor.versions import tested as known_versions
from phi3_lora_plugin.doctor.versions import versions
from phi3_lora_plugin.hosts.startup import folder

ROOT = Path(__file__).parents[1]
Broken = Callable[[str, str], None]


def problems(findings: Iterable[Finding]) -> dict[str, Finding]:
    found = {finding.name: finding for finding in findings if finding.state == "problem"}
    assert all(finding.remedy for finding in found.values())
    return found


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Writes a module that comes before the real one, here and in every child."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(str(folder))

    def write(name: str, source: str) -> None:
        (folder / f"{name}.py").write_text(source)

    return write


def distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def forked_children(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that examine are forks, in which torch and transformers are imported already."""

    def run(command: list[str], timeout: int, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert command[:3] == [sys.executable, "-P", "-m"]
        done = warm.run(MODULE, *command[3:], cwd=Path.cwd(), timeout=timeout, **env)
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.encode(), done.stderr.encode())

    known = {"TimeoutExpired": subprocess.TimeoutExpired, "DEVNULL": subprocess.DEVNULL}
    monkeypatch.setattr(child, "subprocess", SimpleNamespace(run=run, **known))


@pytest.mark.long  # imports every library twice afresh
def test_all_of_it_in_fresh_processes(warm: Warm, tmp_path: Path) -> None:
    done = warm.command("doctor", "--json", cwd=tmp_path)
    assert_all_of_it(done.stdout, done.returncode, tmp_path)


def test_all_of_it_on_this_machine(forked_children: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert_all_of_it(done.stdout, done.exit_code, tmp_path)


def assert_all_of_it(said: str, code: int, tmp_path: Path) -> None:
    report = json.loads(said)
    found = {(finding["area"], finding["name"]): finding for finding in report["findings"]}
    assert report["ok"] == (code == 0), report["findings"]
    assert found["self-test", "train"]["state"] == "ok", found["self-test", "train"]
    assert "torch" in found["libraries", "imported"]["text"]
    assert (
        "weights" in found["devices", "cpu"]["text"] and "attention sdpa; fast paths" in found["devices", "cpu"]["text"]
    )
    assert "tested with" in found["versions", "transformers"]["text"]
    assert "model loader" in found["plugins", "phi3"]["text"] and ("hosts", "trl") in found
    assert {area for area, _ in found} == {*CHECKS, "devices"}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "source, said",
    [
        ("raise RuntimeError('no kernel image')", "RuntimeError: no kernel image"),
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("print('{\"library\": \"bitsandbytes\"}'); raise OSError('bad')", "OSError: bad"),
    ],
)
def test_a_library_that_raises_at_import(source: str, said: str, library: Broken) -> None:
    library("bitsandbytes", source)
    library("fine_module", "")
    found = list(libraries({"bitsandbytes": "bitsandbytes", "fine": "fine_module"}))
    (problem,) = problems(found).values()
    assert problem.name == "bitsandbytes" and said in problem.text
    assert "pip uninstall bitsandbytes" in problem.remedy
    assert Finding("libraries", "imported", "fine") in found
    if "nowhere" in source:
        assert problem.remedy.startswith("pip install nowhere_to_be_found")


@pytest.mark.parametrize("source", ["import os; os._exit(7)", "import os; os.kill(os.getpid(), 11)"])
def test_a_library_that_takes_the_process_with_it(source: str, library: Broken) -> None:
    library("torch", source)
    (problem,) = problems(libraries({"torch": "torch"})).values()
    assert problem.name == "torch" and ("exit code 7" in problem.text or "SIGSEGV" in problem.text)


def test_a_torch_that_cannot_look_at_its_devices(library: Broken) -> None:
    library("torch", "def __getattr__(name): raise RuntimeError('driver too old')")
    (problem,) = problems(libraries({"torch": "torch"})).values()
    assert problem.area == "devices" and "driver too old" in problem.text and "nvidia-smi" in problem.remedy


def test_versions_that_are_too_old_missing_or_newer(tmp_path: Path, library: Broken) -> None:
    distribution(tmp_path / "site", "transformers", "4.40.0")
    distribution(tmp_path / "site", "peft", "99.0")
    found = list(versions())
    (old,) = problems(found).values()
    assert (old.name, old.remedy) == ("transformers", "pip install 'transformers>=4.56'") and "too old" in old.text
    (newer,) = [finding for finding in found if finding.state == "note"]
    assert newer.name == "peft" and newer.remedy.endswith(f"pip install 'peft=={known_versions()['peft']['newest']}'")


def test_no_token_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/data/hf")
    (environment,) = [finding for finding in versions() if finding.name == "environment"]
    assert "HF_HOME=/data/hf" in environment.text and "secret" not in environment.text


def test_without_torch_every_check_still_ends(library: Broken, tmp_path: Path) -> None:
    for name in ("torch", "transformers", "peft", "datasets", "trl", "accelerate"):
        library(name, f"raise ModuleNotFoundError('No module named {name}', name='{name}')")
    said = list(self_test())
    assert "No module named" in problems(said)["train"].text
    assert not problems(plugin_check.plugins())  # ours needs none of them to be found


@pytest.mark.slow
def test_the_command_ends_with_1_and_names_each_problem_with_its_remedy(library: Broken, tmp_path: Path) -> None:
    library("torch", "raise ImportError('libc10.so: undefined symbol')")
    done = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "80"})
    assert done.exit_code == 1, done.output
    lines = done.stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("! torch: "))
    assert "undefined symbol" in "".join(lines[at : at + 4])
    assert any("-> pip install --force-reinstall --no-deps torch" in line for line in lines[at:])
    assert lines[-1].endswith("problems") and any(line.startswith("! train: failed") for line in lines)


def test_a_command_without_its_libraries_names_the_doctor_and_shows_no_traceback(warm: Warm, tmp_path: Path) -> None:
    broken = "sys.modules['phi3_lora_plugin.plan.feed'] = None"
    program = f"import sys; sys.argv = ['phi3-lora', 'plan', 'tiny-cpu']; {broken}\n{COMMAND}"
    done = warm.run(program, cwd=tmp_path)
    assert done.returncode == 1 and "phi3-lora doctor" in done.stderr and "Traceback" not in done.stderr


def test_plugins_that_raise_exit_or_print(tmp_path: Path, library: Broken) -> None:
    library("loud", "print('hello'); raise RuntimeError('out of order')")
    distribution(tmp_path / "site", "loud-plugin", "1.0", "[phi3_lora_plugin]\nloud = loud\n")
    found = problems(plugin_check.plugins())
    assert list(found) == ["loud"] and "out of order" in found["loud"].text
    assert "PHI3_LORA_BLOCK_PLUGINS=loud" in found["loud"].remedy
    library("loud", "import os; os._exit(9)")
    found = problems(plugin_check.plugins())
    assert "exit code 9" in found["loading"].text and "there are loud" in found["loading"].remedy


def test_a_cache_that_cannot_be_written_and_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/dev/null/hf")
    monkeypatch.setenv("HOME", "/nonexistent")
    found = problems(places())
    assert {"home", "hub cache"} <= set(found)
    assert "/dev/null/hf/hub cannot be written" in found["hub cache"].text and "HF_HOME" in found["hub cache"].remedy


def test_a_full_disk(warm: Warm, tmp_path: Path) -> None:
    """A file that may not grow is what a full disk or a quota is to a program."""
    program = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from phi3_lora_plugin.doctor.places import places
print(*[f.name for f in places() if f.state == "problem"], sep=",")
"""
    done = warm.run(program, cwd=tmp_path)
    assert {"working folder", "temporary files"} <= set(done.stdout.strip().split(",")), done.stderr


def test_bases_in_the_hub_cache_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--microsoft--Phi-3-mini-4k-instruct" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    (snapshot.parents[1] / "blobs").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (bases,) = [finding for finding in places() if finding.name == "bases"]
    assert "microsoft/Phi-3-mini-4k-instruct" in bases.text


def test_a_check_that_fails_is_a_problem_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> list[Finding]:
        raise KeyError("odd")

    for name in CHECKS:
        monkeypatch.setitem(CHECKS, name, lambda: [Finding("hosts", "here", "fine")])
    monkeypatch.setitem(CHECKS, "libraries", failing)
    report = examine()
    assert [problem.area for problem in report.problems] == ["libraries"] and len(report.findings) == len(CHECKS)
    assert json.loads(report.to_json())["ok"] is False and Report(report.findings[2:]).problems == ()


def test_every_extra_says_what_it_adds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]) - set(DEVELOPERS) <= set(ADDS)
    for finding in extras():
        assert finding.remedy.startswith("pip install 'phi3-lora-plugin[") or finding.text


def test_the_table_of_tested_versions_is_the_constraints() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import tested_versions
    finally:
        sys.path.pop(0)
    assert known_versions() == tested_versions.tested()
    assert known_versions()["transformers"]["oldest"] < known_versions()["transformers"]["newest"]


def test_issue_reports_ask_for_it() -> None:
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert forms
    (bug,) = [yaml.safe_load(form.read_text()) for form in forms if form.name == "bug.yml"]
    asked = [field for field in bug["body"] if field.get("id") == "doctor"]
    assert asked and "phi3-lora doctor" in asked[0]["attributes"]["description"]
    assert asked[0]["validations"]["required"]


@pytest.mark.parametrize(
    ("value", "state", "words"),
    [(None, "ok", "not set"), ("0", "ok", "switched off"), ("1", "ok", "no effect"), ("maybe", "problem", "1 or 0")],
)
def test_the_switch_of_hosts_is_told(
    value: str | None, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3_LORA_ACTIVATE", value or "")
    monkeypatch.setenv("PYTHONPATH", "")
    found = next(finding for finding in hosts() if finding.name == "PHI3_LORA_ACTIVATE")
    assert found.state == state and words in found.text
    if value == "1":
        monkeypatch.setenv("PYTHONPATH", str(folder()))
        assert any(finding.text == "1: on in every host" for finding in hosts())
