"""`phi3-lora render`: every preset in every host's words, and what each host's own parser says to it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from typer.testing import CliRunner
from warm_process import FILE, Warm

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.hosts.render.common import RenderError
from phi3_lora_plugin.hosts.render.render import HOSTS, render
from phi3_lora_plugin.recipe import load_recipe
from phi3_lora_plugin.recipe.layers import shipped_names

ROOT = Path(__file__).parents[1]
NAMES = shipped_names()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and chats."""
    folder = tmp_path_factory.mktemp("render")
    tiny.base(folder / "base")
    tiny.write(folder / "chats.jsonl", [tiny.chat("a", "b")])
    return folder


def config(name: str, host: str, *overrides: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(render(load_recipe(name, overrides), host).text)
    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_has_every_hosts_words_or_is_refused_with_a_reason(name: str) -> None:
    recipe = load_recipe(name)
    for host in HOSTS:
        if recipe.reward or (recipe.preference.on and (host != "trl" or recipe.preference.loss in ("orpo", "simpo"))):
            with pytest.raises(RenderError, match="trains (on preferences|by rewards), which is not rendered"):
                render(recipe, host)
            continue
        text = render(recipe, host).text
        made = yaml.safe_load(text)
        flat = json.dumps(made)
        assert made["learning_rate"] == recipe.training["learning_rate"]
        assert recipe.output_dir in flat and f"{recipe.lora.r}" in flat
        assert not ({"q_proj", "v_proj", "up_proj"} & set(flat.replace('"', ",").split(","))) or "MoE" in flat
        for key, kept in recipe.training.items():  # nothing is lost in silence
            known = "learning_rate activation gradient report_to train_sampling warmup lr_sched eval_strategy".split()
            assert key.startswith(tuple(known)) or kept == -1 or key in text or str(kept) in text, (host, key)


@pytest.mark.parametrize(("host", "key"), [("axolotl", "sequence_len"), ("llamafactory", "cutoff_len"),
                                            ("trl", "max_length"), ("swift", "max_length")])  # fmt: skip
def test_the_row_limit_is_the_one_that_a_run_takes(host: str, key: str, place: Path) -> None:
    for name, wanted in (("phi4-lora", 16384), ("phi4-mini-lora", 4096), ("phi3.5-mini-lora", 4096)):
        assert config(name, host, "data.max_length=")[key] == wanted
        assert config(name, host, "data.max_length=77")[key] == 77
    assert config("phi4-lora", host, f"model.path={place / 'base'}", "data.max_length=")[key] == 256  # by its config
    elsewhere = load_recipe("tiny-cpu", ["model.path=a/b", "data.max_length="])
    assert "is not on this machine" in render(elsewhere, host).text


@pytest.mark.parametrize("host", HOSTS)
def test_no_setting_of_the_adapter_is_lost_in_silence(host: str) -> None:
    given = {"bias": "all", "exclude_modules": "[o_proj]", "rank_pattern": "{o_proj: 3}",
             "loftq_config": "{loftq_iter: 1}", "layers_to_transform": "[1]", "trainable_token_indices": "[7]",
             "modules_to_save": "[lm_head]",
             "init": "loftq", "ensure_weight_tying": "true", "loraplus_lr_ratio": "16"}  # fmt: skip
    overrides = [f"lora.{name}={value}" for name, value in given.items()]
    text = render(load_recipe("phi3-mini-4k-qlora", overrides), host).text
    for name in given:
        kept = [line for line in text.splitlines() if name in line or name.replace("plus", "p") in line]
        assert kept or (name == "init" and "init_weights" in text), (host, name)


def test_what_a_recipe_says_arrives() -> None:
    overrides = ["data.system=fold", "data.train_on=last_turn", "lora.dora=true", "checkpoint.keep_last=5", "seed=7"]
    axolotl = config("phi3-mini-4k-qlora", "axolotl", *overrides)
    assert axolotl["adapter"] == "qlora" and axolotl["load_in_4bit"] and axolotl["peft_use_dora"]
    assert axolotl["phi3_lora"] == {"data": {"train_on": "last_turn", "system": "fold"}, "checkpoint": {"keep_last": 5}}
    swift = config("phi3-mini-4k-qlora", "swift", *overrides)
    assert json.loads(swift["ENV"]["PHI3_LORA_SETTINGS"]) == axolotl["phi3_lora"] and swift["seed"] == 7
    assert Path(swift["external_plugins"][0]).is_file()
    factory = config("phi3-mini-4k-qlora", "llamafactory", *overrides)
    assert factory["phi3_lora"] == axolotl["phi3_lora"] and factory["quantization_bit"] == 4
    trl = config("phi3-mini-4k-qlora", "trl")
    assert trl["assistant_only_loss"] and "generation -%}" in Path(trl["chat_template_path"]).read_text()


def test_slices_become_the_whole_with_a_comment() -> None:
    recipe = load_recipe("phi3-mini-4k-lora", ["lora.targets=[q_proj, v_proj]"])
    text = render(recipe, "axolotl").text
    assert yaml.safe_load(text)["lora_target_modules"] == ["qkv_proj"] and "the recipe names q_proj, v_proj" in text


def test_the_shape_of_rows_is_looked_at(tmp_path: Path) -> None:
    rows = tmp_path / "chats.json"
    rows.write_text(json.dumps([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]))
    made = render(load_recipe("phi3-mini-4k-lora", [f"data.path={rows}"]), "llamafactory")
    entry = json.loads(made.beside["dataset_info.json"])["train"]
    assert entry["file_name"] == str(rows) and entry["columns"] == {"messages": "conversations"}
    unseen = render(load_recipe("phi3-mini-4k-lora", ["data.path=someone/chats"]), "llamafactory")
    assert "were not looked at" in unseen.text


def test_the_command_writes_what_belongs_together_and_overwrites_nothing(tmp_path: Path) -> None:
    out = tmp_path / "lf" / "run.yaml"
    words = ["render", "tiny-cpu", "--host", "llamafactory", "--out", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (out.parent / "dataset_info.json").is_file()
    before = out.read_text()
    again = CliRunner().invoke(app, [*words, "seed=1"])
    assert again.exit_code == 2 and out.read_text() == before
    with pytest.raises(RenderError, match="is not one of axolotl, llamafactory, swift, trl"):
        render(load_recipe("tiny-cpu"), "unsloth")
    assert CliRunner().invoke(app, ["host-path", "swift"]).output.strip().endswith("phi3_lora_swift.py")
    (folder,) = CliRunner().invoke(app, ["host-path", "startup"]).output.split()
    assert [file.name for file in Path(folder).glob("*.py")] == ["sitecustomize.py"]
    assert CliRunner().invoke(app, ["host-path", "axolotl"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_the_hosts_own_parser_accepts_it(host: str, place: Path, tmp_path: Path, warm: Warm) -> None:
    environment = os.environ.get("PHI3_HOST_ENVS")
    python = Path(environment, host, "bin", "python") if environment and host != "trl" else None
    if host != "trl" and (python is None or not python.is_file()):
        pytest.skip(f"no environment for {host}; PHI3_HOST_ENVS=FOLDER names those of tools/host_matrix")
    files = []
    names = ["tiny-cpu", "phi3-mini-4k-lora", "phi3-mini-4k-qlora"]
    names += ["phi3-mini-4k-dpo-lora", "phi3-mini-4k-kto-lora"] if host == "trl" else []
    for name in names:
        words = [f"model.path={place / 'base'}", "data.max_length=128", f"data.path={place / 'chats.jsonl'}"]
        made = render(load_recipe(name, words), host)
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(made.text)
    words = [ROOT / "tools" / "parse_rendered.py", host, *files]
    quiet = {"DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    if python is None:
        done = warm.run(FILE, *map(str, words), cwd=tmp_path, plain=True, **quiet)
    else:
        there: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | quiet, "timeout": 600}
        done = subprocess.run([python, *words], capture_output=True, text=True, **there)
    said = [line for line in done.stdout.splitlines() if ": accepted" in line or ": refused" in line]
    assert done.returncode == 0 and len(said) == len(names), "\n".join([*said, done.stderr[-2000:]])
