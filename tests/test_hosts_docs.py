"""What docs/hosts.md shows is as it says: commands run, files and names exist, sections are read."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import yaml
from pages import ROOT, blocks, commands, page
from typer.testing import CliRunner

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.hosts.axolotl_config import prepare
from phi3_lora_plugin.hosts.settings import HostSettings, read_settings

DOC = page("hosts")


def test_the_commands_of_ours_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write(Path("chats.jsonl"), [tiny.chat("a", "b")])
    shown = [words for program, *words in commands(DOC) if program == "phi3-lora"]
    assert len(shown) == 5
    for words in shown:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{words}\n{done.output}"
    assert Path("lf/dataset_info.json").is_file()


def test_the_axolotl_config_is_made_fit() -> None:
    (text,) = blocks(DOC, "yaml axolotl")
    cfg = yaml.safe_load(text)
    (plugin,) = set(re.findall(r"plugins: \[([\w.]+)\]", DOC))
    module, _, name = plugin.rpartition(".")
    # Either way it is one plugin: axolotl writes an entry point as a config does.
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert declared["axolotl.plugins"] == {"phi3-lora": f"{module}:{name}"}
    for target in (declared["axolotl.plugins"]["phi3-lora"], declared["axolotl.model_support"]["phi3-lora"]):
        spec = find_spec(target.partition(":")[0])
        assert spec is not None and spec.origin is not None
        assert f"class {target.partition(':')[2]}(" in Path(spec.origin).read_text(encoding="utf-8")
    said = prepare(cfg, tiny.config().to_dict(), HostSettings(), "<unk>")
    assert cfg["lora_target_modules"] and cfg["datasets"][0]["type"] == "phi3_lora_plugin.hosts.axolotl_rows" and said


def test_the_section_is_read() -> None:
    (text,) = blocks(DOC, "yaml settings")
    settings = read_settings(yaml.safe_load(text))
    assert settings.data.system == "fold" and settings.checkpoint and settings.checkpoint.every_steps == 50


def test_what_is_named_exists() -> None:
    for module in re.findall(r"-m (phi3_lora_plugin[\w.]+)", DOC):
        assert find_spec(module) is not None
    for file in ("tools/host_matrix", "tests/test_host_drift.py", "tests/host_hooks.py"):
        assert file in DOC and (ROOT / file).is_file()
