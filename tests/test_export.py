"""`phi3-lora export`: the flow around every target, with a target made here, and targets that strangers bring."""

from __future__ import annotations

import errno
import json
import re
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import tiny
import torch
from commands import phi3_lora
from exports import EMBEDDED, adapter, ship
from transformers import Phi3ForCausalLM

from phi3_lora_plugin.export.export import export
from phi3_lora_plugin.export.exporter import ExportError, Shipped, Variant, Wanted, refuse, require
from phi3_lora_plugin.export.proof import ProofError
from phi3_lora_plugin.model.tokenizer import load_tokenizer
from phi3_lora_plugin.plugins.discovery import load_plugins


class Plain:
    """A runtime of its own: transformers, with knobs to be wrong in."""

    measure = "logits"

    def __init__(self, folder: Path, shift: float = 0.0, template: str | None = None, stop: bool = True) -> None:
        self.model = Phi3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = load_tokenizer(folder)
        self.shift, self.stop = shift, stop
        if template:
            self.tokenizer.chat_template = template

    def prompt_ids(self, messages):
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def next_scores(self, ids):
        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([list(ids)])).logits[0, -1].numpy() + self.shift

    def answer(self, ids, max_new_tokens):
        said: list[int] = []
        while len(said) < max_new_tokens:
            said.append(int(self.next_scores([*ids, *said]).argmax()))
            if self.stop and said[-1] in (2043, 2046):
                break
        return said


def merged_target(**knobs):
    def target(adapted, wanted, folder):
        (folder / "note.txt").write_text("shipped")
        merged = adapted.merged()

        @contextmanager
        def opened():
            yield Plain(merged, **knobs)

        return Shipped(("cat {out}/note.txt",), (Variant("plain", opened),))

    return target


def test_an_export_is_proved_saved_and_reported(random_adapter, tmp_path):
    steps: list[str] = []
    report = export(
        random_adapter, merged_target(), "note", tmp_path / "out", prompts=6,
        progress=lambda text, count: steps.append(text),
    )  # fmt: skip
    (one,) = report.comparisons
    assert one.holds and (one.ids_equal, one.answers_equal, one.stopped) == (6, 6, 6)
    assert 0 < one.difference < 1e-4 < one.largest  # merged weights are other numbers than base and adapter apart
    assert report.files == ("note.txt",) and (tmp_path / "out" / "note.txt").read_text() == "shipped"
    assert report.commands == (f"cat {tmp_path / 'out'}/note.txt",)
    text = "\n".join(report.lines())
    assert "6 prompts; prompt ids equal 6, greedy answers equal 6, stopped 6" in text and "run it:" in text
    assert steps.count("") == 6 and "comparing plain" in steps
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing in between is left
    json.dumps(report.as_dict())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"shift": 0.01}, r"differ by at most 1.0e-02"),
        ({"template": "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"}, "difference, prompt ids"),
        ({"stop": False}, "first difference, answer"),
    ],
    ids=["scores", "template", "stop"],
)  # fmt: skip
def test_what_says_other_words_is_not_saved(random_adapter, tmp_path, knobs, message):
    with pytest.raises(ProofError, match=message) as raised:
        export(random_adapter, merged_target(**knobs), "note", tmp_path / "out", prompts=2, max_new_tokens=24)
    assert raised.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_middle_leaves_what_was_there(random_adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")

    def target(adapted, wanted, folder):
        (folder / "half").write_text("written")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "half"))

    with pytest.raises(OSError, match="No space left"):
        export(random_adapter, target, "note", tmp_path / "out", prompts=2, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_what_native_writers_say_of_a_full_disk_is_told_as_such(random_adapter, tmp_path):
    from safetensors import SafetensorError

    def target(adapted, wanted, folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as raised:
        export(random_adapter, target, "note", tmp_path / "out", prompts=2)
    assert raised.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_into_memory_is_saved_uncompared_and_said_so(random_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("phi3_lora_plugin.export.merge_check.fits", lambda total, dtype: False)
    report = export(random_adapter, merged_target(), "note", tmp_path / "out")
    assert report.comparisons == () and (tmp_path / "out" / "note.txt").is_file()
    told = "\n".join(report.lines())
    assert re.search(r"not compared: [\d.]+ MB in float32 do not fit into memory; pass --prompts 2", told)


def test_a_folder_with_something_in_it_is_kept(random_adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="is not empty"):
        export(random_adapter, merged_target(), "note", tmp_path / "out", prompts=2)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_prompts_from_a_file_and_none_at_all(random_adapter, tmp_path):
    chats = tiny.write(tmp_path / "mine.jsonl", [tiny.chat("Where does the fox live?", "There.")])
    report = export(random_adapter, merged_target(), "note", tmp_path / "out", prompts=str(chats))
    assert report.comparisons[0].prompts == 1 and report.prompts_from == str(chats)
    report = export(random_adapter, merged_target(), "note", tmp_path / "none", prompts=0)
    assert report.comparisons == () and "not compared" in "\n".join(report.lines())


def test_options_that_a_target_does_not_have_are_told_together():
    with pytest.raises(ExportError) as raised:
        refuse("tin", Wanted(quantize=("q9",), dtype="int3", merged=False, push="a/b"), quantize=("q4",), forms=(True,))
    for part in ("--quantize q9: available: q4", "--dtype int3", "--adapter", "--push"):
        assert part in str(raised.value)


def test_a_missing_runtime_is_named_by_its_pip_command():
    with pytest.raises(ExportError, match=r'no_such_module.*pip install "phi3-lora-plugin\[tin\]"'):
        require("tin", "numpy", "no_such_module", what="tin")


def test_targets_come_through_the_hook_and_unknown_ones_are_told(tmp_path, capsys):
    assert "llama.cpp" in load_plugins(strict=True).named("exporters")
    assert phi3_lora("export", tmp_path, "--to", "lama.cpp") == 2
    assert "no export target is named 'lama.cpp'; did you mean 'llama.cpp'?" in capsys.readouterr().err


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no LoRA adapter"):
        ship(tmp_path, "llama.cpp", tmp_path / "out", 2)


def test_scores_that_a_runtime_gives_as_log_probabilities_are_compared_as_such():
    from phi3_lora_plugin.export.scores import in_measure

    row = numpy.array([1.0, 3.0, -2.0], dtype=numpy.float32)
    assert numpy.exp(in_measure(row, "log-probabilities")).sum() == pytest.approx(1.0)
    assert in_measure(row, "logits") is row


@pytest.mark.parametrize("same", [True, False])
def test_the_system_message_of_training_is_shipped_where_every_row_had_it(tmp_path, same):
    made = adapter(EMBEDDED, tmp_path / "run" / "lora")
    systems = ["Be a pirate."] * 2 + ["Be a pirate." if same else "Be kind."]
    rest = tiny.chat("q", "a")["messages"]
    rows = [{"messages": [{"role": "system", "content": system}, *rest]} for system in systems]
    data = tiny.write(tmp_path / "rows.jsonl", rows)
    recipe = f"model: {{path: 'embedded:tiny-phi3'}}\ndata: {{path: {data}}}\n"
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    asked: list[str | None] = []

    def target(adapted, wanted, folder):
        asked.append(wanted.system)
        return Shipped(("true",), unproven="nothing to run")

    report = export(made, target, "note", tmp_path / "out")
    assert asked == ["Be a pirate." if same else None] and report.unproven == "nothing to run"
