"""Everything but TRL's own trainers, with TRL missing or broken; `.ci/without_trl` runs it where TRL really is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import tiny
from warm_process import COMMAND, Warm

from phi3_lora_plugin import latest_complete, verify

pytestmark = pytest.mark.slow

#: A Trainer's own script for other models: it names no targets and does not know this package.
SCRIPT = """
import sys
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

base, out = sys.argv[1:]
words = AutoTokenizer.from_pretrained(base)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"))
row = words("the quick brown fox")
rows = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["input_ids"]}] * 4)
settings = TrainingArguments(out, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
Trainer(model, settings, train_dataset=rows, processing_class=words).train()
print("trl" in {name for name, module in sys.modules.items() if module is not None})
"""
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture(params=["missing", "broken"])
def run(request: pytest.FixtureRequest, warm: Warm, tmp_path: Path) -> Run:
    """Run `phi3-lora` where TRL cannot be found, or where importing it fails as an incompatible release does."""
    broken = tmp_path / "broken" / "trl"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('this release needs another torch')\n", encoding="utf-8")

    def command(*arguments: str) -> CompletedProcess[str]:
        if request.param == "broken":
            return warm.command(*arguments, cwd=tmp_path, PYTHONPATH=str(broken.parent))
        return warm.run("import sys; sys.modules['trl'] = None; " + COMMAND, *arguments, cwd=tmp_path)

    command.__name__ = str(request.param)
    return command


def common(base: Path, out: str) -> list[str]:
    return [
        f"model.path={base}", "data.max_length=64", "training.max_steps=2", "training.num_train_epochs=null",
        "data.max_rows=8", f"output_dir={out}",
    ]  # fmt: skip


def chats(folder: Path, pairs: bool = False) -> Path:
    ask, good = tiny.turns("what is two?", "it is two.")
    pair = {"prompt": [ask], "chosen": [good], "rejected": [good | {"content": "it is six."}]}
    return tiny.write(folder / "rows.jsonl", [pair if pairs else {"messages": [ask, good]}] * 8)


def test_chats_train_are_verified_and_exported(run: Run, tmp_path: Path) -> None:
    base, data = tiny.base(tmp_path / "base"), chats(tmp_path)
    trained = run("train", "tiny-cpu", *common(base, "out"), f"data.path={data}", "data.eval_path=null", "--no-check")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    adapter = latest_complete(tmp_path / "out")
    assert adapter and verify(adapter)
    assert run("merge", str(adapter), "merged").returncode == 0
    assert (tmp_path / "merged" / "config.json").exists()


def test_somebody_s_trainer_gets_everything_and_one_sentence(run: Run, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = run("run", "script.py", str(tiny.base(tmp_path / "base")), "out")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "False"), done.stderr
    assert verify(latest_complete(tmp_path / "out"))
    about = [line for line in done.stderr.splitlines() if "TRL" in line or "trl" in line]
    if run.__name__ == "missing":
        assert about == ["phi3-lora: TRL is not installed: part trl does nothing"]
    else:
        why = "RuntimeError: this release needs another torch"
        assert about == [f"phi3-lora: TRL cannot be imported ({why}): part trl does nothing"]


def test_what_is_trl_s_is_refused_in_one_sentence(run: Run, tmp_path: Path) -> None:
    base, data = tiny.base(tmp_path / "base"), chats(tmp_path, pairs=True)
    command = run("trl", "sft", "--help")
    overrides = [*common(base, "out"), f"data.path={data}", "data.eval_path=null", "preference.loss=sigmoid"]
    preference = run("train", "tiny-cpu", *overrides)
    for refused, named in ((command, "phi3-lora trl sft"), (preference, "preference.loss needs TRL")):
        assert refused.returncode != 0 and "Traceback" not in refused.stderr
        said = refused.stdout + refused.stderr
        assert ("part trl" in said or named in said) and "install" in said and said.count("TRL") <= 2, said
