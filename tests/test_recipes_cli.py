"""`phi3-lora recipes | show | validate | schema`, as a shell sees them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.plan.presets import preset_needs
from phi3_lora_plugin.recipe import load_recipe
from phi3_lora_plugin.recipe.layers import shipped_names
from phi3_lora_plugin.wording import human


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_recipes_is_a_table_with_headings_that_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("recipes")

    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["recipe", "method", "memory", "peak", "needs"]
    assert max(map(len, lines)) <= 80
    for name in shipped_names():
        assert any(line.startswith(f"{name} ") for line in lines), name
    assert lines[2] == "try it" and lines.index("Phi-4 (14B)") < lines.index("published")
    (qlora,) = [line for line in lines if line.startswith("phi4-qlora ")]
    need = preset_needs()["phi4-qlora"]
    assert re.split("  +", qlora) == ["phi4-qlora", "QLoRA", "24 GB", human(need.peak), "qlora, data"]
    assert "qlora: pip install 'phi3-lora-plugin[qlora]'" in lines


def test_recipes_for_a_memory_are_those_that_plan_says_fit() -> None:
    rows = json.loads(run("recipes", "--for", "16GB", "--json").stdout)
    names = {row["name"] for row in rows}

    assert {"phi3-mini-4k-lora-16gb", "phi4-qlora"} <= names
    assert not names & {"phi3-mini-4k-lora-80gb", "phi4-lora"}
    assert all(row["peak"] < 16e9 for row in rows)
    assert "phi3-mini-4k-lora " not in run("recipes", "--for", "8 GB").stdout
    none = run("recipes", "--for", "500MB")
    assert none.exit_code == 1 and "the smallest is tiny-cpu" in none.stderr
    for wrong in ("huge", "8"):
        assert "write 24GB" in str(run("recipes", "--for", wrong).exception)


def test_recipes_as_json() -> None:
    rows = {row["name"]: row for row in json.loads(run("recipes", "--json").stdout)}

    assert set(shipped_names()) <= set(rows)
    assert rows["phi3-mini-4k-qlora"]["base"] == "microsoft/Phi-3-mini-4k-instruct"
    assert rows["phi3-mini-4k-qlora"]["needs"] == ["phi3-lora-plugin[qlora]", "data.path"]
    assert Path(rows["tiny-cpu"]["file"]).is_file() and rows["tiny-cpu"]["plugin"] == "phi3"


def test_show_prints_the_file_as_it_is() -> None:
    source = load_recipe("phi4-qlora").source
    assert source is not None

    assert run("show", "phi4-qlora").stdout == source.read_text(encoding="utf-8")


def test_show_resolved_is_the_recipe_again_and_says_where_from(tmp_path: Path) -> None:
    overrides = ["lora.r=3", "data.columns={prompt: 'q #1'}", "model.revision='1e5'", "lora.rank_pattern={a.b: 2}"]
    shown = run("show", "phi3-script", *overrides, "--resolved").stdout
    (tmp_path / "again.yaml").write_text(shown)

    expected = load_recipe("phi3-script", overrides)
    assert load_recipe(tmp_path / "again.yaml").digest() == expected.digest()
    origin = {line.split(":")[0].strip(): line.partition("  # ")[2] for line in shown.splitlines() if "  # " in line}
    assert origin["r"] == "override" and origin["bias"] == "default"
    line = expected.provenance["training.learning_rate"].rpartition(":")[2]
    assert origin["learning_rate"].strip().endswith(f"phi3-mini-4k-inference-finetuning.yaml:{line}")
    assert run("show", "phi3-script", *overrides).stdout == shown  # overrides show only in the resolved form


def test_show_as_json() -> None:
    shown = json.loads(run("show", "tiny-cpu", "lora.r=3", "--json").stdout)

    assert shown["recipe"]["lora"]["r"] == 3 and shown["provenance"]["lora.r"] == "override"
    assert shown["digest"] == load_recipe("tiny-cpu", ["lora.r=3"]).digest()


@pytest.mark.parametrize("command", ["show", "validate"])
def test_wrong_input_is_exit_code_2_with_every_problem(command: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("extends: tiny-cpu\nlora: {r: 0, dropuot: 1}\nseeed: 3\n")

    done = run(command, str(path))

    assert done.exit_code == 2
    for part in (f"{path}:2: lora.r", f"{path}:2: lora.dropuot", f"{path}:3: seeed", "did you mean 'dropout'"):
        assert part in done.stderr
    assert run(command, "no-such-recipe").exit_code == 2
    assert run(command, str(tmp_path / "nowhere.yaml")).exit_code == 2


def test_validate_takes_several_and_goes_on_after_a_bad_one(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {path: x}\nlora: {r: 0}\n")
    (tmp_path / "good.yaml").write_text("model: {path: x}\ntraining: {no_cuda: true}\n")

    done = run("validate", str(tmp_path / "bad.yaml"), str(tmp_path / "good.yaml"), "tiny-cpu")

    assert done.exit_code == 2
    bad, good, shipped = done.stdout.splitlines()
    assert bad == f"{tmp_path / 'bad.yaml'}: 1 problem"
    assert good.startswith(f"{tmp_path / 'good.yaml'}: fine (") and shipped.startswith("tiny-cpu: fine (")
    assert "read as use_cpu" in done.stderr
    assert run("validate", *shipped_names()).exit_code == 0
    assert run("validate", "lora.r=8").exit_code == 2  # overrides of nothing


def test_validate_knows_what_is_registered() -> None:
    done = run("validate", "tiny-cpu", "data.format=sharegtp", "model.loader=phi4")

    assert done.exit_code == 2
    assert "data.format" in done.stderr and "did you mean 'sharegpt'" in done.stderr
    assert "model.loader" in done.stderr


def test_validate_looks_for_the_data(tmp_path: Path) -> None:
    done = run("validate", "tiny-cpu", "data.path=nowhere.jsonl", "data.eval_path=owner/name")
    assert done.exit_code == 2 and "data.path: nowhere.jsonl: no such file or folder" in done.stderr
    done = run("validate", "phi3-mini-4k-lora")
    assert done.exit_code == 0 and "data.path is not set; a run needs it: data.path=FILE" in done.stderr


def test_validate_as_json(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {path: x}\nlora: {r: 0}\n")

    bad, good = json.loads(run("validate", str(tmp_path / "bad.yaml"), "tiny-cpu", "--json").stdout)

    assert not bad["valid"] and bad["problems"][0]["key"] == "lora.r"
    assert bad["problems"][0]["where"] == f"{tmp_path / 'bad.yaml'}:2"
    assert good["valid"] and good["problems"] == []


def test_the_schema_is_one() -> None:
    schema = json.loads(run("schema").stdout)

    jsonschema.Draft202012Validator.check_schema(schema)
    sections = {"model", "data", "lora", "training", "checkpoint", "output_dir", "seed", "extends"}
    assert sections <= set(schema["properties"])
