"""What docs/objectives.md shows works as shown."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.chat.dataset import load_data
from phi3_lora_plugin.model.tokenizer import load_tokenizer
from phi3_lora_plugin.recipe.sections import PreferenceSection

PAGE = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"{at}?", "chosen": "Yes.", "rejected": "No."} for at in range(24)]
    judged = [{"prompt": f"{at}?", "completion": "Yes.", "label": bool(at % 2)} for at in range(24)]
    for name, rows in (("pairs", pairs), ("judged", judged)):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def test_every_command_names_a_recipe_that_reads_its_data(place: Path) -> None:
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
    assert len(lines) >= 6
    words = load_tokenizer("embedded:tiny-phi3")
    for line in lines:
        assert line.startswith(("phi3-lora train ", "phi3-lora data check "))
        name, *overrides = shlex.split(line.removeprefix("phi3-lora data check ").removeprefix("phi3-lora train "))
        run = load_recipe(name, [*overrides, "data.max_length=64"])
        assert load_data(run, words, {}).report.train.rows >= 20


def test_the_table_has_every_loss() -> None:
    known = set(PreferenceSection.model_fields["loss"].annotation.__args__) - {"none"}
    table = {name for row in re.findall(r"^\| (`.*?) \|", PAGE, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert known == table - {"preference"}
