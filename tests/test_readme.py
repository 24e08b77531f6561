"""What README.md and docs/embedded.md show works as shown, on the embedded base where they name one from the hub."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from warm_process import Warm

from phi3_lora_plugin import add_lora, latest_complete, load_model, load_recipe
from phi3_lora_plugin.cli import app
from phi3_lora_plugin.plan.presets import preset_needs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = ["model.path=embedded:tiny-phi3", "model.device=cpu", "training.max_steps=2", "data.max_length=256"]


def blocks(name: str, kind: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [
        block for found, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if found == kind
    ]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def commands(name: str) -> list[list[str]]:
    lines = "\n".join([*blocks(name, "bash"), *blocks(name, "sh")]).splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["phi3-lora"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the files that README.md speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    chat = [{"role": "user", "content": "Where does the otter live?"}, {"role": "assistant", "content": "In a river."}]
    asked = [chat[0] | {"content": f"Where does otter {number} live?"} for number in range(30)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": [one, chat[1]]}) + "\n" for one in asked))
    row = json.dumps({"question": "1 + 1?", "answer": "#### 2"})
    (folder / "gsm8k.jsonl").write_text(f"{row}\n" * 10)
    return folder


def test_the_commands_run_in_their_order(
    place: Path, reload_in_fork: None, warm: Warm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    shown = commands("README.md")
    assert [words[0] for words in shown] == ["doctor", "new", "recipes", "plan", "train", "chat", "verify", "data"]
    for words in shown:
        if words == ["doctor"]:  # imports every library afresh; tests/test_doctor.py runs it, as JSON and as text
            continue
        extra = SMALL if words[0] in ("plan", "train", "data") else []
        if words[0] == "train":  # here, so that the process that checks the adapter can be a fork
            trained = CliRunner().invoke(app, [*words, *extra])
            assert trained.exit_code == 0 and trained.stdout.strip(), (words, trained.output, trained.exception)
            continue
        done = warm.command(*words, *extra, input="Hello\n", cwd=place)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout.strip()


def test_the_table_has_the_figures_of_the_plans() -> None:
    rows = re.findall(r"^\| [^|]+ \| `phi3-lora train ([\w.-]+)[^`]*` \| ([\d.]+) GB \|$", readme(), re.MULTILINE)
    assert len(rows) == 8
    for name, shown in rows:
        load_recipe(name)
        assert abs(preset_needs()[name].peak / 1e9 - float(shown)) <= 0.75, name


def test_the_recipe_loads(tmp_path: Path) -> None:
    (text,) = blocks("README.md", "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.lora.targets == ["q_proj", "v_proj"] and recipe.training["num_train_epochs"] == 2


def test_the_snippets_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer, TrainingArguments

    monkeypatch.chdir(place)
    script, host = blocks("README.md", "python")
    names: dict[str, Any] = {
        "Trainer": Trainer,
        "model": add_lora(load_model("embedded:tiny-phi3", device="cpu"), "all-linear", 4, 8),
        "args": TrainingArguments("out", max_steps=2, report_to="none", use_cpu=True, save_strategy="no"),
        "rows": [{"input_ids": [1, 400, 401], "labels": [-100, 400, 401]}] * 8,
    }
    exec(script, names)
    names["trainer"].train()
    assert latest_complete("out").name == "step-00000002"
    exec(host, names)
    assert names["callbacks"] and names["tokenizer"].pad_token_id == 0


def test_what_is_said_of_the_embedded_model_holds() -> None:
    for words in commands("docs/embedded.md"):
        load_recipe(words[1], [word for word in words[2:] if "=" in word])
    (snippet,) = blocks("docs/embedded.md", "python")
    names: dict[str, Any] = {}
    exec(snippet, names)
    config = names["model"].config
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (6, 128, 2)
    for script in re.findall(r"`(tools/\w+\.py)`", (ROOT / "docs" / "embedded.md").read_text()):
        assert (ROOT / script).is_file()


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)
