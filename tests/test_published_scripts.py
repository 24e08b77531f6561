"""Scripts and notebooks that do not know this package under `phi3-lora run`: TRL's own, and those that people copy.

TRL's come from the installed package. What PyPI does not carry (TRL's and PEFT's examples, the model card's script,
the cookbook's notebooks) is in tests/published/ and below, in our words with the same calls.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from warm_process import Warm

from phi3_lora_plugin import latest_complete, verify

pytestmark = pytest.mark.long

trl = pytest.importorskip("trl")
SCRIPTS = Path(str(trl.__file__)).parent / "scripts"
OURS = Path(__file__).parent / "published"
ASK, GOOD, BAD = tiny.turns("what is two?"), tiny.turns("", "it is two.")[1:], tiny.turns("", "who knows")[1:]
ROWS: dict[str, list[dict[str, Any]]] = {
    "chats": [{"messages": ASK + GOOD}] * 8,
    "pairs": [{"prompt": ASK, "chosen": GOOD, "rejected": BAD}] * 8,
    "implicit": [{"chosen": ASK + GOOD, "rejected": ASK + BAD}] * 8,
    "judged": [{"prompt": ASK, "completion": GOOD, "label": True}, {"prompt": ASK, "completion": BAD, "label": False}]
    * 4,
    "prompts": [{"prompt": ASK}] * 8,
    "tasks": [{"instruction": "what is two?", "input": "", "output": "it is two."}] * 12,
}
COMMON = "--max_steps 2 --per_device_train_batch_size 2 --learning_rate 1e-3".split()
COMMON += "--use_cpu --bf16 0 --report_to none".split()

PEFT = "--model_name_or_path base --use_peft --lora_r 4 --dtype float32".split()
SAMPLED = "--reward_funcs rewards.short --num_generations 2 --max_completion_length 4".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, also under a published name, and data sets as folders."""
    folder = tmp_path_factory.mktemp("published")
    tiny.base(folder / "base")
    published = tiny.base(folder / "microsoft" / "Phi-3-mini-4k-instruct")
    remote = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    tiny.edit(published / "config.json", auto_map=remote)  # code that is not there
    for name, rows in ROWS.items():
        for split in ("train", "test"):
            tiny.write(folder / name / f"{split}.jsonl", rows)
    data = folder / "HuggingFaceH4" / "ultrachat_200k" / "data"
    data.mkdir(parents=True)
    for split in ("train_sft", "test_sft"):
        Dataset.from_list(ROWS["chats"]).to_parquet(data / f"{split}-00000-of-00001.parquet")
    reward = "def short(completions, **_):\n    return [-len(chat[0]['content']) for chat in completions]\n"
    (folder / "rewards.py").write_text(reward)
    return folder


def run(warm: Warm, place: Path, *arguments: str) -> str:
    done = warm.command(*arguments, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def reloaded(folder: Path, base: Path, kind: Any = AutoModelForCausalLM, **more: Any) -> Path:
    """Our checkpoint of a run: whole, learned something, and loaded by plain PEFT."""
    adapter = latest_complete(folder)
    assert adapter is not None and verify(adapter)
    model = PeftModel.from_pretrained(kind.from_pretrained(base, **more), adapter)
    learned = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert learned and all(value.any() for value in learned)
    return adapter


@pytest.mark.parametrize(
    ("script", "rows", "more"),
    [
        ("sft", "chats", ["--assistant_only_loss"]),
        ("dpo", "pairs", []),
        ("kto", "judged", []),
        ("reward", "implicit", ["--lora_task_type", "SEQ_CLS"]),
        ("grpo", "prompts", SAMPLED),
        ("rloo", "prompts", SAMPLED),
    ],
)
def test_trl_s_own_scripts(script: str, rows: str, more: list[str], place: Path, warm: Warm) -> None:
    file = SCRIPTS / f"{script}.py"
    if not file.exists():
        pytest.skip(f"the installed TRL has no {script}.py")
    out = f"out-{script}"
    said = run(warm, place, "run", str(file), "--dataset_name", rows, "--output_dir", out, *COMMON, *PEFT, *more)
    assert "LoRA-only checkpoints are saved next to the Trainer's own" in said
    if script == "reward":
        reloaded(place / out, place / "base", AutoModelForSequenceClassification, num_labels=1)
    elif script in ("grpo", "rloo"):  # equal answers of two samples are worth nothing, and teach nothing
        assert verify(latest_complete(place / out))
    else:
        reloaded(place / out, place / "base")


def test_trl_s_command_runs_what_trl_s_scripts_run(place: Path, warm: Warm) -> None:
    if not (file := SCRIPTS / "kto.py").exists():
        pytest.skip("the installed TRL has no kto.py")
    given = ["--dataset_name", "judged", *COMMON, *PEFT]
    run(warm, place, "trl", "kto", "--output_dir", "out-command", *given)
    # Again, for the test of the script may have run in another process, or not at all.
    run(warm, place, "run", str(file), "--output_dir", "out-script", *given)
    ours, theirs = (reloaded(place / name, place / "base") for name in ("out-command", "out-script"))
    assert (ours / "adapter_model.safetensors").read_bytes() == (theirs / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_trl_s_experimental_trainers(method: str, place: Path, warm: Warm) -> None:
    pytest.importorskip(f"trl.experimental.{method}")
    out = f"out-{method}"
    given = [str(OURS / "orpo.py"), *(["--cpo"] if method == "cpo" else [])]
    given += ["--dataset_name", "pairs", "--output_dir", out, *COMMON, "--model_name_or_path", "base", "--use_peft"]
    said = run(warm, place, "run", *given, "--lora_r", "4")
    assert f"{method.upper()}Trainer: LoRA-only checkpoints" in said
    reloaded(place / out, place / "base")


def test_an_olora_example_without_targets(place: Path, warm: Warm) -> None:
    run(warm, place, "run", str(OURS / "olora.py"), "base", "tasks", "out-olora")
    adapter = latest_complete(place / "out-olora")
    assert adapter and verify(adapter)
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


def test_an_sft_example_with_a_template_and_tokens_of_its_own(place: Path, warm: Warm) -> None:
    more = ["--packing", "True", "--max_length", "64", "--eval_strategy", "epoch", "--dataset_text_field", "content"]
    run(warm, place, "run", str(OURS / "peft_sft.py"), "base", "chats", "--output_dir", "out-peft", *COMMON, *more)
    adapter = latest_complete(place / "out-peft")
    assert adapter and verify(adapter)
    assert json.loads((adapter / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


def test_the_model_card_s_script_of_2024(place: Path, warm: Warm) -> None:
    """Arguments that no release has any more, remote code, flash attention and CUDA, on a machine without a GPU."""
    said = run(warm, place, "run", str(OURS / "model_card.py"))
    for sentence in (
        "TrainingArguments: warmup_ratio is now warmup_steps",
        "TrainingArguments: overwrite_output_dir is left out",
        "AutoModelForCausalLM: trust_remote_code: false",
        "SFTTrainer: tokenizer is now processing_class",
        "SFTTrainer: max_seq_length is now max_length",
        "SFTTrainer: packing is now of SFTConfig",
    ):
        assert f"phi3-lora: {sentence}" in said
    adapter = latest_complete(place / "checkpoint_dir")
    assert adapter and verify(adapter) and (place / "checkpoint_dir" / "eval_results.json").exists()


def test_an_embedding_model_gets_peft_s_files(place: Path, warm: Warm) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    run(warm, place, "run", str(OURS / "sentence_embeddings.py"), "base", "out-st")
    adapter = reloaded(place / "out-st", place / "base", AutoModel)
    assert not (adapter / "lora.safetensors").exists()


CELLS = [
    "import torch\nfrom datasets import load_dataset\nfrom peft import LoraConfig, TaskType\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed\n"
    "from trl import SFTTrainer",
    'model_id = "microsoft/Phi-3-mini-4k-instruct"\nset_seed(1234)\n'
    'dataset = load_dataset("tasks", split="train")\ntokenizer = AutoTokenizer.from_pretrained(model_id)\n'
    "tokenizer.padding_side = 'right'",
    "def chat(row):\n"
    "    ask = {'content': f\"{row['instruction']}\\n Input: {row['input']}\", 'role': 'user'}\n"
    "    return {'messages': [ask, {'content': row['output'], 'role': 'assistant'}]}\n"
    "def text(row):\n"
    "    turns = row['messages']\n"
    "    return {'text': tokenizer.apply_chat_template(turns, add_generation_prompt=False, tokenize=False)}\n"
    "dataset = dataset.map(chat).map(text).train_test_split(test_size=0.2, seed=1234)\ndataset",
    "model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype=torch.bfloat16, trust_remote_code=True,\n"
    "    device_map={'': 0}, attn_implementation='flash_attention_2')",
    "args = TrainingArguments(output_dir='out-notebook', evaluation_strategy='steps', do_eval=True,\n"
    "    optim='adamw_torch', per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=2,\n"
    "    per_device_eval_batch_size=4, log_level='debug', save_strategy='epoch', logging_steps=1,\n"
    "    learning_rate=1e-3, fp16=False, bf16=True, eval_steps=1, warmup_ratio=0.1, lr_scheduler_type='linear',\n"
    "    report_to='none', seed=42)\n"
    "peft_config = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, task_type=TaskType.CAUSAL_LM,\n"
    "    target_modules=['k_proj', 'q_proj', 'v_proj', 'o_proj', 'gate_proj', 'down_proj', 'up_proj'])",
    "trainer = SFTTrainer(model=model, train_dataset=dataset['train'], eval_dataset=dataset['test'],\n"
    "    peft_config=peft_config, dataset_text_field='text', max_seq_length=64, tokenizer=tokenizer, args=args)",
    "trainer.train()",
    "trainer.save_model()",
]


@pytest.mark.parametrize("way", ["kernel", "line"])
def test_a_cookbook_notebook(way: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel that `phi3-lora run` starts, nothing is edited; in any other, one line is added."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    start = [sys.executable, "-m", *(["phi3_lora_plugin.run", "-m"] if way == "kernel" else []), "ipykernel_launcher"]
    kernel = place / f"jupyter-{way}" / "kernels" / "phi"
    kernel.mkdir(parents=True)
    spec = {"argv": [*start, "-f", "{connection_file}"], "display_name": "Phi", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(kernel.parent.parent))
    cells = [*(["%load_ext phi3_lora_plugin"] if way == "line" else []), *CELLS]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    out = place / "out-notebook"
    here = {"metadata": {"path": str(place)}}
    nbclient.NotebookClient(made, timeout=300, kernel_name="phi", resources=here).execute()
    adapter = latest_complete(out)
    assert adapter and verify(adapter)
    said = "".join(
        output.get("text", "") for cell in made.cells for output in cell.outputs if output.output_type == "stream"
    )
    assert "k_proj, q_proj, up_proj, v_proj got no LoRA: this model fuses them" in said
    for file in out.rglob("*"):
        if file.is_file():
            file.unlink()
