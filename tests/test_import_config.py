"""`phi3-lora import`: what other hosts' documentation shows for Phi, as recipes; and what `render` wrote, exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.hosts.read.common import ImportConfigError
from phi3_lora_plugin.hosts.read.read import HOSTS, import_config
from phi3_lora_plugin.hosts.render.common import RenderError
from phi3_lora_plugin.hosts.render.render import render
from phi3_lora_plugin.recipe import load_recipe
from phi3_lora_plugin.recipe.layers import shipped_names

BOTH = ("axolotl", "llamafactory", "trl")

AXOLOTL = """
base_model: microsoft/Phi-3-mini-4k-instruct
trust_remote_code: true
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
chat_template: phi_3
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: garage-bAInd/Open-Platypus
    type: alpaca:phi
  - path: fozziethebeat/alpaca_messages_2k_test
    type: chat_template
    field_messages: chats
    message_property_mappings:
      role: who
      content: text
    split: test
    shards: 4
dataset_prepared_path: last_run_prepared
val_set_size: 0.01
output_dir: ./outputs/out
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
adapter: qlora
lora_r: 64
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
adam_beta2: 0.95
adam_epsilon: 0.00001
max_grad_norm: 1.0
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
early_stopping_patience: 3
logging_steps: 1
flash_attention: true
warmup_steps: 100
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.1
resume_from_checkpoint:
"""
FACTORY = """
model_name_or_path: microsoft/Phi-4-mini-instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: phi4_mini
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/phi4/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 500
rope_scaling: linear
"""
INFO = {
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {
        "hf_hub_url": "llamafactory/alpaca_en",
        "split": "demo",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
}
TRL = """
model_name_or_path: microsoft/Phi-3.5-mini-instruct
torch_dtype: bfloat16
attn_implementation: flash_attention_2
use_peft: true
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_modules: all-linear
dataset_name: HuggingFaceH4/ultrachat_200k
dataset_train_split: train_sft
dataset_test_split: test_sft
eval_strategy: epoch
max_seq_length: 2048
packing: true
assistant_only_loss: true
learning_rate: 2.0e-4
warmup_ratio: 0.1
gradient_accumulation_steps: 2
per_device_train_batch_size: 8
num_train_epochs: 1
report_to: wandb
run_name: mine
output_dir: data/phi
push_to_hub: true
gizmo: {swiglu: true}
"""
TUNE = """
output_dir: /tmp/torchtune/phi3_mini/lora_single_device
model:
  _component_: torchtune.models.phi3.lora_phi3_mini
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.0
tokenizer:
  _component_: torchtune.models.phi3.phi3_mini_tokenizer
  path: /tmp/Phi-3-mini-4k-instruct/tokenizer.model
  max_seq_len: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/Phi-3-mini-4k-instruct
  output_dir: ${output_dir}
  model_type: PHI3_MINI
resume_from_checkpoint: False
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False
seed: null
shuffle: True
epochs: 1
max_steps_per_epoch: null
batch_size: 2
gradient_accumulation_steps: 8
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  weight_decay: 0.01
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
compile: False
device: cuda
enable_activation_checkpointing: True
dtype: bf16
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}
log_every_n_steps: 1
gizmo: 3
"""
MLX = """
model: "microsoft/Phi-3-mini-4k-instruct"
train: true
data: "{data}"
seed: 0
lora_layers: 32
batch_size: 1
iters: 1000
val_batches: 25
learning_rate: 1e-6
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 1000
test: false
max_seq_length: 2048
lora_parameters:
  keys: ["self_attn.o_proj", "self_attn.qkv_proj"]
  rank: 64
  scale: 1
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 100
  arguments: [1e-5, 1000]
fuse_when_done: true
"""


def imported(folder: Path, text: str, name: str = "config.yaml", host: str = "") -> Any:
    (folder / name).write_text(text, encoding="utf-8")
    return import_config(folder / name, host)


def test_axolotl(tmp_path: Path) -> None:
    made = imported(tmp_path, AXOLOTL)
    recipe = made.recipe
    assert made.host == "axolotl"
    assert (recipe.model.path, recipe.model.quantize) == ("microsoft/Phi-3-mini-4k-instruct", "nf4")
    assert recipe.model.attention == "flash_attention_2"
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout, recipe.lora.targets) == (64, 32, 0.05, "all-linear")
    assert recipe.data.path == [
        {"path": "garage-bAInd/Open-Platypus", "format": "alpaca"},
        {
            "path": "fozziethebeat/alpaca_messages_2k_test",
            "split": "test",
            "format": "messages",
            "columns": {"messages": "chats", "role": "who", "content": "text"},
        },
    ]
    assert (recipe.data.eval_fraction, recipe.data.max_length, recipe.data.packing) == (0.01, 2048, True)
    wanted = {"learning_rate": 2e-4, "per_device_train_batch_size": 2, "num_train_epochs": 1, "optim": "adamw_bnb_8bit",
              "weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "warmup_steps": 100,
              "lr_scheduler_type": "cosine", "logging_steps": 1}  # fmt: skip
    assert {name: recipe.training.get(name) for name in wanted} == wanted and recipe.output_dir == "./outputs/out"
    said = "\n".join(made.notes)
    for key in ("early_stopping_patience: 3", "datasets.shards: 4", "chat_template: phi_3", "evals_per_epoch"):
        assert key in said and key in made.text
    assert "val_set_size" not in said and "learning_rate" not in said


def test_llamafactory_with_its_data_sets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "data" / "identity.json").write_text("[]")
    made = imported(tmp_path, FACTORY)
    recipe = made.recipe
    assert made.host == "llamafactory" and recipe.model.path == "microsoft/Phi-4-mini-instruct"
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.targets) == (8, 16, "all-linear")  # alpha is twice the rank
    first, second = recipe.data.path
    assert first == {"path": str(tmp_path / "data" / "identity.json"), "format": "alpaca", "max_rows": 1000}
    assert second == {"path": "llamafactory/alpaca_en", "split": "demo", "format": "messages", "max_rows": 1000}
    assert recipe.training["warmup_steps"] == 0.1 and recipe.training["eval_steps"] == 500
    assert recipe.training.get("activation_checkpointing", recipe.training.get("gradient_checkpointing")) is True
    assert recipe.checkpoint.every_steps == 500 and "rope_scaling: linear" in "\n".join(made.notes)


def test_trl_s_defaults_come_with_it(tmp_path: Path) -> None:
    made = imported(tmp_path, TRL)
    recipe = made.recipe
    assert made.host == "trl" and recipe.model.dtype == "bfloat16" and recipe.model.quantize == "nf4"
    data = recipe.data
    assert (data.path, data.split, data.eval_split) == ("HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft")
    assert (data.packing, data.max_length, data.train_on) == (True, 2048, "assistant")
    assert recipe.lora.dropout == 0.05  # TRL's default, which the config leaves out
    assert recipe.training["report_to"] == "wandb" and recipe.training["run_name"] == "mine"
    said = "\n".join(made.notes)
    assert "push_to_hub" in said and "gizmo" in said
    assert imported(tmp_path, "use_peft: true\nmodel_name_or_path: microsoft/phi-4\n").recipe.training[
        "learning_rate"] == 2e-5  # fmt: skip


def test_torchtune(tmp_path: Path) -> None:
    made = imported(tmp_path, TUNE)
    recipe, published = made.recipe, load_recipe("phi3-mini-4k-torchtune")
    assert made.host == "torchtune"
    assert set(recipe.lora.targets) == set(published.lora.targets)
    for section in ("model", "lora", "data"):
        ours, theirs = getattr(recipe, section).model_dump(), getattr(published, section).model_dump()
        assert {k: v for k, v in ours.items() if k != "targets"} == {k: v for k, v in theirs.items() if k != "targets"}
    assert dict(recipe.training) == dict(published.training)
    assert recipe.output_dir == "/tmp/torchtune/phi3_mini/lora_single_device"
    assert "gizmo: 3" in "\n".join(made.notes)


def test_mlx(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("")
    made = imported(tmp_path, MLX.replace("{data}", str(folder)))
    recipe = made.recipe
    assert made.host == "mlx" and (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (64, 64, 0.1)
    assert recipe.lora.targets == ["o_proj", "qkv_proj"] and recipe.lora.layers_to_transform is None
    assert (recipe.data.path, recipe.data.eval_path) == (str(folder / "train.jsonl"), str(folder / "valid.jsonl"))
    assert recipe.data.train_on == "all" and recipe.seed == 0 and recipe.checkpoint.every_steps == 1000
    assert recipe.training["max_steps"] == 1000 and recipe.training["learning_rate"] == 1e-5
    assert "fuse_when_done: true" in "\n".join(made.notes)
    half = imported(tmp_path, MLX.replace("{data}", str(folder)).replace("lora_layers: 32", "num_layers: 16"))
    assert half.recipe.lora.layers_to_transform == list(range(16, 32))


@pytest.mark.parametrize("host", BOTH)
def test_what_render_wrote_is_the_same_recipe_again_and_edits_are_kept(host: str, tmp_path: Path) -> None:
    for name in shipped_names():
        try:
            text = render(load_recipe(name), host).text
        except RenderError:
            continue
        recipe = load_recipe(name)
        made = imported(tmp_path, text, f"{name}.yaml")
        assert (made.host, made.recipe.digest(), made.recipe.output_dir) == (host, recipe.digest(), recipe.output_dir)
    part = render(load_recipe("tiny-cpu", ["lora.targets=[o_proj]", "lora.r=4", "lora.alpha=5"]), host).text
    lora = imported(tmp_path, part.replace("learning_rate: 0.002", "learning_rate: 0.001")).recipe.lora
    assert (lora.targets, lora.r, lora.alpha) == (["o_proj"], 4, 5)
    edited = text.replace(f"learning_rate: {recipe.training['learning_rate']}", "learning_rate: 0.5")
    edited = edited.replace(f"lora_dropout: {recipe.lora.dropout}", "lora_dropout: 0.25")
    changed = imported(tmp_path, edited).recipe
    assert (changed.training["learning_rate"], changed.lora.dropout) == (0.5, 0.25)
    rest = [one.model_copy(update={"training": {}, "lora": None}).digest() for one in (changed, recipe)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("host", BOTH)
def test_a_config_without_our_comment_trains_the_same(host: str, tmp_path: Path) -> None:
    """Whatever the text says in the host's own keys is read from them."""
    for name in ("phi3-mini-4k-qlora", "phi4-lora", "phi3-mini-4k-lora-cookbook", "phi3.5-mini-lora"):
        recipe = load_recipe(name)
        text = "".join(line for line in render(recipe, host).text.splitlines(True) if not line.startswith("#"))
        made = imported(tmp_path, text).recipe
        assert made.model.path == recipe.model.path and made.model.quantize == recipe.model.quantize
        ours, theirs = ((lora.r, lora.alpha, lora.dropout) for lora in (made.lora, recipe.lora))
        assert ours == theirs
        assert made.data.max_length == yaml.safe_load(text)[
            {"axolotl": "sequence_len", "llamafactory": "cutoff_len", "trl": "max_length"}[host]]  # fmt: skip
        assert made.data.train_on == recipe.data.train_on and made.data.packing == recipe.data.packing
        # A host knows yes and no; our plan's choice is written as yes.
        asked = dict(recipe.training)
        asked |= {"activation_checkpointing": True} if asked.get("activation_checkpointing") == "auto" else {}
        assert {key: made.training[key] for key in asked if key in made.training} == {
            key: value for key, value in asked.items() if key in made.training
        }
        lost = set(recipe.training) - set(made.training)
        assert lost <= {"eval_strategy", "eval_steps", "report_to", "log_level", "per_device_eval_batch_size"}
        assert (made.seed, made.output_dir) == (recipe.seed, recipe.output_dir)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: meta-llama/Llama-3.1-8B\nadapter: lora\nnum_epochs: 9\n", "meta-llama.* is not a Phi"),
        ("base_model: microsoft/phi-2\nadapter: lora\nsequence_len: 9\n", "base_model: microsoft/phi-2 is not a Phi"),
        ("base_model: microsoft/phi-4\nsequence_len: 9\n", "adapter: None: a recipe trains LoRA"),
        ("finetuning_type: full\nmodel_name_or_path: microsoft/phi-4\n", "finetuning_type: full"),
        ("stage: ppo\nfinetuning_type: lora\nmodel_name_or_path: microsoft/phi-4\n", "stage: ppo"),
        ("model:\n  _component_: a.phi3_mini\ncheckpointer: {}\nepochs: 1\n", "a builder such as lora_phi3_mini"),
        ("hello: 1\n", "its keys are nobody's; name the host: --host"),
        ("- 1\n", "expected a mapping of settings, found list"),
        ("a: [\n", "is not YAML or JSON"),
        ("use_peft: true\nmodel_name_or_path: microsoft/phi-4\nlora_r: 0\n", "a recipe refuses:\n  lora.r"),
        ("base_model: x/phi-4\nadapter: lora\nrl: grpo\nsequence_len: 9\n", "rl: grpo is not a loss"),
    ],
)
def test_what_cannot_be_imported_is_said(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImportConfigError, match=message):
        imported(tmp_path, text)


def test_rank_8_and_twice_that_are_llamafactory_s_defaults(tmp_path: Path) -> None:
    lora = imported(tmp_path, "finetuning_type: lora\nmodel_name_or_path: microsoft/phi-4\n").recipe.lora
    assert (lora.r, lora.alpha, lora.targets) == (8, 16, "all-linear")


def test_a_folder_s_config_decides_and_json_is_read_too(tmp_path: Path) -> None:
    tiny.base(tmp_path / "mine")
    given = {"base_model": "mine", "adapter": "lora", "micro_batch_size": 1, "lora_r": 4, "rl": "dpo", "rl_beta": 0.2}
    made = imported(tmp_path, json.dumps(given), "config.json")
    assert made.recipe.model.path == str(tmp_path / "mine")
    assert (made.recipe.preference.loss, made.recipe.preference.beta) == ("sigmoid", 0.2)
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ImportConfigError, match="not a Phi model that can be trained here"):
        imported(tmp_path, json.dumps(given), "config.json")


def test_unsloth_s_copy_is_the_published_base(tmp_path: Path) -> None:
    given = "model_name_or_path: unsloth/Phi-3.5-mini-instruct-bnb-4bit\nuse_peft: true\nload_in_4bit: true\n"
    made = imported(tmp_path, given)
    assert made.recipe.model.path == "microsoft/Phi-3.5-mini-instruct" and "unsloth's copy" in made.notes[0]


def test_the_command_writes_a_recipe_and_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(AXOLOTL)
    out = tmp_path / "recipe.yaml"
    done = CliRunner().invoke(app, ["import", str(tmp_path / "a.yaml"), "--out", str(out)])
    assert done.exit_code == 0 and "axolotl: early_stopping_patience: 3 - has no equal" in done.stderr
    assert load_recipe(out).lora.r == 64
    again = CliRunner().invoke(app, ["import", str(tmp_path / "a.yaml"), "--out", str(out)])
    assert again.exit_code == 2 and "already exists" in again.stderr
    printed = CliRunner().invoke(app, ["import", str(tmp_path / "a.yaml"), "--host", "axolotl"])
    assert yaml.safe_load(printed.stdout) == yaml.safe_load(out.read_text())
    assert set(HOSTS) == {"axolotl", "llamafactory", "mlx", "torchtune", "trl"}
