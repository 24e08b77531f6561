"""The page about a run: of one that ended well, was interrupted, failed or was killed, of DPO and of tools."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import lora_runs
import pytest
import tiny
from commands import phi3_lora
from transformers import TrainerCallback

pytest.importorskip("pygal", reason="pygal draws the charts of reports and is not installed: pip install pygal")

from phi3_lora_plugin import LoraCheckpoint, load_recipe, load_tokenizer, train
from phi3_lora_plugin.chat.marked import mark
from phi3_lora_plugin.pipeline import TrainingError
from phi3_lora_plugin.report.charts import charts_of, thin
from phi3_lora_plugin.report.page import render_data, render_runs, try_report, write_report
from phi3_lora_plugin.report.run_folder import figures, read_run_folder
from phi3_lora_plugin.report.updates import largest_updates
from phi3_lora_plugin.store.metrics_file import METRICS, read_lines
from phi3_lora_plugin.store.run_file import RUN

pytestmark = pytest.mark.slow

EVIL = "<script>alert(1)</script> & \x1b[31m \u202egnp.exe"
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "paris"}}}
LIMIT = 2_000_000


class Interrupt(TrainerCallback):
    """Ctrl-C at the end of the second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def chats(kind: str) -> list[dict[str, Any]]:
    if kind == "dpo":
        said = {word: tiny.turns("", word)[1:] for word in ("yes", "no")}
        return [{"prompt": tiny.turns(f"{n}?"), "chosen": said["yes"], "rejected": said["no"]} for n in range(12)]
    if kind == "tools":
        result = [{"role": "tool", "content": "three apples"}, {"role": "assistant", "content": "there are three"}]
        called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        calls = [{"messages": [*tiny.turns(f"how many, {n}?"), called, *result]} for n in range(4)]
        thoughts = [tiny.chat(f"what is {n}?", "<think>the fox</think>a fox") for n in range(4)]
        return [*(tiny.chat(f"{n}?", "hello") for n in range(8)), *calls, *thoughts]
    return [tiny.chat(f"{n}? {EVIL}", f"the fox {n} {EVIL}") for n in range(24)]


def start(place: Path, out: Path, kind: str = "chats", *overrides: str, **options: Any) -> Any:
    file = place / f"{kind}.jsonl"
    if not file.exists():
        tiny.write(file, chats(kind))
    settings = [
        f"model.path={place / 'base'}", f"data.path={file}", "data.eval_path=null", "data.eval_fraction=0.3",
        "data.max_length=240", "training.num_train_epochs=null", "training.max_steps=4", "training.logging_steps=1",
        "training.eval_strategy=steps", "training.eval_steps=2", f"output_dir={out}",
    ]  # fmt: skip
    return train(load_recipe("tiny-cpu", [*settings, *overrides]), check=False, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of each kind."""
    place = tmp_path_factory.mktemp("runs")
    tiny.base(place / "base")
    start(place, place / "done", samples=2)
    assert start(place, place / "interrupted", callbacks=[Interrupt()]).status == "interrupted"
    wild = ("training.learning_rate=1.0e+30", "training.lr_scheduler_type=constant", "training.max_grad_norm=0")
    with pytest.raises(TrainingError):
        start(place, place / "failed", "chats", *wild)
    start(place, place / "dpo", "dpo", "preference.loss=sigmoid")
    start(place, place / "tools", "tools", "data.tools=text", "data.thoughts=train", "data.eval_fraction=0.2")
    shutil.copytree(place / "done", place / "killed")
    facts = json.loads((place / "killed" / RUN).read_text())
    facts |= {"status": "running", "result": None}
    facts["sessions"][0]["pid"] = 2**22 + 1  # no such process
    (place / "killed" / RUN).write_text(json.dumps(facts))
    write_report(place / "killed")
    return place


class Tags(HTMLParser):
    """The tags of a page, which have to close in order; ids, and links to them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "link", "br", "input"):
            self.open.append(tag)
        given = dict(attrs)
        assert tag != "script" and not any(name.startswith("on") for name in given)
        self.ids += [given["id"]] if given.get("id") else []
        self.links += [given["href"]] if tag == "a" else []
        assert tag != "th" or given["scope"] in ("row", "col")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(run: Path) -> str:
    text = (run / "report.html").read_text(encoding="utf-8")
    tags = Tags(text)
    assert len(tags.ids) == len(set(tags.ids))
    assert all(link[1:] in tags.ids for link in tags.links)
    assert len(text.encode()) < LIMIT
    assert "http://" not in text.replace("http://www.w3.org/", "") and "https://" not in text
    assert all(f'<h2 id="{name}-title">' in text for name in ("curves", "data", "lora", "speed", "recipe", "next"))
    return text


@pytest.mark.parametrize("kind", ["done", "interrupted", "failed", "killed", "dpo", "tools"])
def test_every_run_leaves_a_whole_page(kind: str, place: Path) -> None:
    text = page(place / kind)
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    shown = {"dpo": "finished", "tools": "finished", "done": "finished"}.get(kind, kind)
    assert re.search(rf'<span class="badge[^>]*>{shown}</span>', text)
    for part in ("Learning rate", "qkv_proj", "cross-entropy", "tiny-cpu.yaml:", "override"):
        assert part in text or (kind == "dpo" and part == "cross-entropy")


def test_a_page_shows_what_the_run_did(place: Path) -> None:
    text, run = page(place / "done"), read_run_folder(place / "done")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "\\x1b[31m" in text
    for step in (2, 4):
        [loss] = [line["eval_loss"] for line in run.lines if line["kind"] == "eval" and line["step"] == step]
        assert f"{loss:.4g}" in text
    assert [one.step for one in run.checkpoints] == [4, 2] and run.checkpoints[0].sha256 in text
    assert run.updates and run.updates[0].module in text
    assert text.count("Answers before and after training") and "phi3-lora export" in text and "--resume" not in text
    assert "≤ 128" in text or "≤ 256" in text


def test_what_went_wrong_stands_on_the_page(place: Path) -> None:
    failed = page(place / "failed")
    assert "The run failed." in failed and "TrainingError" in failed and "not finite" in failed
    assert "--resume" in page(place / "interrupted") and "resume it" in page(place / "interrupted")
    assert "ended without a word" in page(place / "killed")


def test_tools_and_thoughts_and_pairs_have_their_colours(place: Path) -> None:
    tools = page(place / "tools")
    assert '<mark class="thoughts">&lt;think&gt;the fox&lt;/think&gt;</mark>' in tools
    assert "Preferred answers" not in tools
    assert re.search(r'<mark class="calls">[^<]*look', tools)
    dpo = page(place / "dpo")
    assert "Preferred answers" in dpo and "the chosen answer" in dpo and "the rejected answer" in dpo


def test_the_command_it_names_resumes_the_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "interrupted"
    shutil.copytree(place / "interrupted", run)
    monkeypatch.setattr("shutil.which", lambda name: None)
    [command] = re.findall(r"<code>(phi3-lora train .*?)</code>", render_runs([read_run_folder(run)]))
    assert phi3_lora(*command.split()[1:], "--no-check", "--quiet") == 0
    assert [line["step"] for line in read_lines(run / METRICS) if line["kind"] == "train"] == [1, 2, 3, 4]
    text = page(run)
    assert "resumed 1 time" in text and '<span class="badge good">finished</span>' in text


def test_several_runs_stand_side_by_side(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.html"
    assert phi3_lora("report", place / "done", place / "failed", place / "dpo", "--output", out) == 0
    text = out.read_text(encoding="utf-8")
    tags = Tags(text)
    assert len(tags.ids) == len(set(tags.ids)) and len(text.encode()) < LIMIT
    assert "3 runs side by side" in text and "training.learning_rate" in text and "preference.loss" in text
    assert all(f"<summary>{name}</summary>" in text for name in ("done", "failed", "dpo"))


def test_folders_without_a_run_are_named(place: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = place / "done" / "lora" / "step-00000004"
    for folder, said in (
        (tmp_path / "none", "is not a folder"),
        (tmp_path, "nothing of a run"),
        (adapter, f"did you mean {place / 'done'}?"),
    ):
        assert phi3_lora("report", folder) == 2 and said in capsys.readouterr().err


def test_damaged_files_are_left_out(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "done", run)
    for name, content in ((RUN, "{"), ("recipe.yaml", "a: ["), ("data_report.json", '{"sources": 1}')):
        (run / name).write_text(content)
    for weights in run.rglob("adapter_model.safetensors"):
        weights.write_bytes(b"x")
    text = render_runs([read_run_folder(run)])
    assert Tags(text) and "Checkpoints" in text and "Learning rate" in text
    (run / RUN).write_text('{"status": 3, "sessions": {}, "rows": 1, "speed": [1], "result": []}')
    (run / METRICS).write_text('{"step": 1, "kind": "train", "loss": "x", "marks": "spike"}\n')
    assert Tags(render_runs([read_run_folder(run)]))
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    assert "was not written" in (try_report(run) or "")


def test_updates_are_the_norms_of_what_is_added(place: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = place / "done" / "lora" / "step-00000004"
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    model = PeftModel.from_pretrained(base, adapter)
    for update in largest_updates(adapter, 4):
        layer = model.get_base_model().get_submodule(update.module)
        assert update.norm == pytest.approx(float(torch.linalg.norm(layer.get_delta_weight("default"))), rel=1e-4)


def test_a_row_is_cut_where_training_and_kinds_change(place: Path) -> None:
    tokenizer = load_tokenizer(place / "base")
    ids = tokenizer("<think>the fox</think>hello", add_special_tokens=False)["input_ids"]
    labels = [-100] * 3 + ids[3:]
    [row] = mark({"input_ids": ids, "labels": labels}, tokenizer, 1)
    assert "".join(piece.text for piece in row.pieces).endswith("</think>hello")
    assert {piece.kind for piece in row.pieces} == {"thoughts", "text"} and row.trained == len(ids) - 3
    assert {piece.weight for piece in row.pieces if piece.kind == "thoughts"} == {0.0, 1.0}


def test_long_curves_keep_their_peaks() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[4321] = (4321.0, 9.0)
    kept = thin(points)
    assert len(kept) <= 250 and (4321.0, 9.0) in kept and kept[0] == points[0] and kept[-1] == points[-1]


def test_the_data_page_stands_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"model.path={place / 'base'}", f"data.path={place / 'chats.jsonl'}", "data.eval_path=null"]
    assert phi3_lora("data", "check", "tiny-cpu", *words, "--html") == 0
    assert "wrote data.html" in capsys.readouterr().out
    text = (tmp_path / "data.html").read_text(encoding="utf-8")
    assert Tags(text) and "&lt;script&gt;" in text and "Length of training rows" in text and "<mark>" in text


def test_runs_of_other_hosts_have_a_page_too(tmp_path: Path) -> None:
    trainer = lora_runs.trainer(tmp_path, LoraCheckpoint(every_steps=2), eval_strategy="steps", eval_steps=3)
    trainer.train()
    text = render_runs([read_run_folder(tmp_path)])
    assert Tags(text) and "<h3>Loss</h3>" in text and "step-00000006" not in text.split("<main")[0]
    assert "Largest updates" in text and "phi3-lora chat" in text and 'class="badge' not in text


def test_of_rewards_the_page_shows_rewards(place: Path) -> None:
    earned = [(0, "eval", 0.25), (2, "train", 0.5), (2, "eval", 0.75), (4, "eval", 0.625)]
    lines = [
        {"step": step, "kind": kind, "eval_loss" if kind == "eval" else "loss": 0.0}
        | {"eval_reward" if kind == "eval" else "reward": value}
        for step, kind, value in earned
    ]
    shown = figures(replace(read_run_folder(place / "failed"), lines=lines))
    assert (shown["held-out reward"], shown["held-out reward before"]) == ("0.6250", "0.2500")
    assert shown["best held-out reward"] == "0.7500 at step 2" and "held-out loss" not in shown
    assert charts_of([replace(read_run_folder(place / "failed"), lines=lines)], ["x"])[0].title == "Reward"


def test_pages_stay_below_two_megabytes(place: Path, tmp_path: Path) -> None:
    done = read_run_folder(place / "done")
    figures = {"learning_rate": 1e-4, "grad_norm": 0.5, "tokens_per_second": 1e4, "peak_memory_gb": 7.5}
    lines = [
        {"step": step, "kind": kind, "loss": 1.5, "eval_loss": 1.25, **figures}
        for step in range(1, 301)
        for kind in ("train", "eval")
    ]
    many = [replace(done, folder=place / f"run-{number}", lines=lines) for number in range(15)]
    page = render_runs(many)
    assert len(page.encode()) < LIMIT and Tags(page) and "15 runs side by side" in page
    tokenizer = load_tokenizer(place / "base")
    ids = tokenizer("<the fox> & the dog " * 4_000, add_special_tokens=False)["input_ids"]
    labels = [token if at // 5 % 2 else -100 for at, token in enumerate(ids)]  # a piece every five tokens
    [row] = mark({"input_ids": ids, "labels": labels}, tokenizer, 1)
    assert row.tokens == len(ids) and "more characters" in row.pieces[-1].text
    page = render_data(done.data, [row] * 200, "long")
    assert len(page.encode()) < LIMIT and Tags(page)


@pytest.mark.long
@pytest.mark.skipif(chromium.FOUND is None, reason="no Chromium here: apt install chromium")
def test_a_real_browser_shows_the_page_at_two_widths(place: Path, tmp_path: Path) -> None:
    side_by_side = tmp_path / "both.html"
    side_by_side.write_text(render_runs([read_run_folder(place / kind) for kind in ("done", "dpo")]), encoding="utf-8")
    with chromium.Chromium() as browser:
        for file in (*(place / kind / "report.html" for kind in ("done", "failed", "dpo", "tools")), side_by_side):
            for width in (1280, 390):
                shown = browser.open(file, width, dark=width == 390)
                nodes = shown.nodes()
                assert shown.complaints() == []
                assert shown.value("document.documentElement.scrollWidth") <= width  # nothing beside the page
                assert shown.value("document.scripts.length") == 0
                for role in ("main", "navigation", "banner", "contentinfo", "heading", "table"):
                    assert any(found == role for found, _ in nodes), role
                named = ("image", "img", "heading", "table", "link", "region")
                assert all(name for role, name in nodes if role in named)
                # Text that is as dark or as light as what is behind it would not be seen.
                style = "getComputedStyle(document.body)"
                colours = shown.value(f"[{style}.color, {style}.backgroundColor]")
                light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
                assert (light[0] > light[1]) == (width == 390) and abs(light[0] - light[1]) > 300
        # The check itself sees what is wrong: a page with a script and a picture from elsewhere.
        bad = tmp_path / "bad.html"
        bad.write_text('<script>console.error("no")</script><img src="http://127.0.0.1:9/x.png">')
        assert len(browser.open(bad, 1280).complaints()) >= 2
