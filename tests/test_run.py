"""Other people's scripts under `phi3-lora run`, in one process and in two: not a line edited."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from warm_process import FILE, Warm

from phi3_lora_plugin import latest_complete, verify

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
OURS = {"module": [sys.executable, "-m", "phi3_lora_plugin.run"], "command": [str(BIN / "phi3-lora"), "run"]}
FORKED = "import runpy; runpy.run_module('phi3_lora_plugin.run', run_name='__main__', alter_sys=True)"
ODD = """
import json, pickle, sys

class Thing:
    pass

def fails():
    raise LookupError("of the script")

print(json.dumps([sys.argv, sys.path[0], __file__, __name__, __spec__, __package__, Thing.__module__]))
import beside
assert type(pickle.loads(pickle.dumps(Thing()))) is Thing and beside.HERE
if "leave" in sys.argv:
    sys.exit(7)
if "stop" in sys.argv:
    raise KeyboardInterrupt
fails()
"""
# As published for other models: no targets, the pad that everybody sets, the plain collator, plain Trainer.
SCRIPT = """
import sys
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, HfArgumentParser,
                          Trainer, TrainingArguments)

base, training_args = sys.argv[1], HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(sys.argv[2:])[0]
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.eos_token
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM"))
rows = [{"text": tokenizer.apply_chat_template([{"role": "user", "content": f"what is {n}?"},
        {"role": "assistant", "content": f"it is {n}."}], tokenize=False)} for n in range(16)]
data = Dataset.from_list(rows).map(lambda row: tokenizer(row["text"]), remove_columns="text")
trainer = Trainer(model, training_args, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
                  data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))
trainer.evaluate()
trainer.train()
trainer.save_model()
total = sum(float(p.abs().sum()) for p in model.parameters() if p.requires_grad)
sys.stdout.write(f"finished {trainer.state.global_step} {total}\\n")  # at once: two processes share the pipe
trainer.accelerator.end_training()
"""


def call(*command: str, where: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Unbuffered, two processes that print at the same moment would write into each other's lines.
    alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": ""}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=where, env=os.environ | alone | environment, timeout=900
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "inside").mkdir()
    (folder / "inside" / "odd.py").write_text(ODD, encoding="utf-8")
    (folder / "inside" / "beside.py").write_text("HERE = True\n", encoding="utf-8")
    (folder / "broken.py").write_text("def x(:\n", encoding="utf-8")
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    tiny.base(folder / "base")
    return folder


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("forked", "leave"),
        ("forked", "stop"),
        pytest.param("module", "stop", marks=pytest.mark.long),  # imports all libraries afresh
        ("command", "raise"),
    ],
)
def test_a_script_sees_and_shows_what_it_would_under_plain_python(way: str, how: str, place: Path, warm: Warm) -> None:
    given = ["inside/odd.py", how, "--recipe", "of the script"]
    plain = call(sys.executable, *given, where=place)
    if way == "forked":
        ours = warm.run(FORKED, "--quiet", *given, cwd=place)
    else:
        ours = call(*OURS[way], "--quiet", *given, where=place)
    assert json.loads(ours.stdout) == json.loads(plain.stdout)
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr)


def test_what_cannot_be_run_is_said_as_python_says_it(place: Path) -> None:
    plain, ours = (call(*way, "broken.py", where=place) for way in ([sys.executable], [*OURS["module"], "--quiet"]))
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr) and "SyntaxError" in ours.stderr
    missing = call(*OURS["module"], "nowhere.py", where=place)
    assert missing.returncode == 2 and "can't open file 'nowhere.py': [Errno 2]" in missing.stderr


@pytest.mark.parametrize("way", ["forked", pytest.param("command", marks=pytest.mark.long)])
def test_a_trainer_script_for_other_models_trains_phi3(way: str, place: Path, warm: Warm) -> None:
    out = f"out-{way}"
    common = ["--use_cpu", "--max_steps", "4", "--per_device_train_batch_size", "4", "--report_to", "none"]
    arguments = ["train.py", "base", "--output_dir", "plain", *common]
    plain = warm.run(FILE, *arguments, cwd=place, plain=True, ACCELERATE_USE_CPU="true")
    assert plain.returncode == 1 and "Please specify `target_modules`" in plain.stderr
    given = ["--recipe", "tiny-cpu", "train.py", "base", "--output_dir", out, *common]
    if way == "forked":
        ours = warm.run(FORKED, *given, cwd=place, ACCELERATE_USE_CPU="true")
    else:
        ours = call(*OURS[way], *given, where=place)
    assert ours.returncode == 0 and "finished 4" in ours.stdout, ours.stderr
    for said in ("LoRA without target_modules goes to qkv_proj", "LoRA-only checkpoints", "speed: loss: on"):
        assert re.search(f"^phi3-lora: .*{said}", ours.stderr, re.MULTILINE), ours.stderr
    adapter = latest_complete(place / out)
    assert adapter and verify(adapter) and adapter.name == "step-00000004"
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert json.loads((adapter / "tokenizer_config.json").read_text())["pad_token"] == "<unk>"
    assert (place / out / "adapter_model.safetensors").exists()


def run_in_two(where: str) -> None:
    """One rank of `accelerate launch -m phi3_lora_plugin.run`; tests/test_scale.py has the launcher itself."""
    os.chdir(where)
    options = ["--use_cpu", "--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none"]
    sys.argv = ["-c", "train.py", "base", "--output_dir", "two", *options]
    runpy.run_module("phi3_lora_plugin.run", run_name="__main__", alter_sys=True)


def test_two_processes_run_it_too_and_speak_once(place: Path, warm: Warm) -> None:
    said = warm.ranks(place, run_in_two, str(place), PYTHONUNBUFFERED="", ACCELERATE_USE_CPU="true")
    ends = [end for each in said for end in re.findall(r"finished 2 [\d.]+", each)]
    assert len(ends) == 2 and ends[0] == ends[1], said  # two processes, and they have learned the same
    together = "".join(said)
    assert "share gradients, which evaluating before training had undone" in together
    assert together.count("LoRA-only checkpoints are saved") == 1
    adapter = latest_complete(place / "two")
    assert adapter and verify(adapter)
