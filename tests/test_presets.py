"""Every preset: fits its schema, makes the real arguments, trains its family, and keeps the published numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import peft
import pytest
import tiny
import torch
import yaml
from transformers import BitsAndBytesConfig, PhimoeConfig, Trainer, TrainingArguments

from phi3_lora_plugin.lora.inject import add_lora
from phi3_lora_plugin.recipe import Recipe, load_recipe
from phi3_lora_plugin.recipe.layers import shipped_names, shipped_preset
from phi3_lora_plugin.recipe.schema import recipe_schema
from phi3_lora_plugin.recipe.training import AUTO, installed_fields, translate
from phi3_lora_plugin.recipe.yaml_file import read_file
from phi3_lora_plugin.training.arguments import lora_options, training_arguments

NAMES = shipped_names()
FOLDER = Path(__file__).parents[1] / "recipes"

#: For presets that are for a device which is not here.
DEVICES = {"phi3-mini-4k-lora-mac": ["model.device=cpu"]}


def _keys(text: str) -> dict[str, Any]:
    """The keys of a recipe with their sections before them."""
    flat: dict[str, Any] = {}
    for name, value in yaml.safe_load(text).items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


# What each source publishes, by our keys; written from the sources, not from the presets. None: not set there.
MODEL_CARD = _keys("""
lora: {r: 16, alpha: 32, dropout: 0.05, bias: none, targets: all-linear, modules_to_save: null}
model: {path: microsoft/Phi-3-mini-4k-instruct, attention: flash_attention_2, dtype: bfloat16}
data: {path: HuggingFaceH4/ultrachat_200k, split: train_sft, eval_split: test_sft, max_length: 2048, packing: true,
  train_on: all}
training: {bf16: true, learning_rate: 5.0e-6, lr_scheduler_type: cosine, warmup_steps: 0.2, num_train_epochs: 1,
  max_steps: -1, per_device_train_batch_size: 4, per_device_eval_batch_size: 4, gradient_accumulation_steps: 1,
  activation_checkpointing: true, activation_checkpointing_kwargs: {use_reentrant: false}, eval_strategy: "no",
  log_level: info, logging_strategy: steps, logging_steps: 20}
checkpoint: {every_steps: 100, keep_last: 1}
output_dir: checkpoint_dir
seed: 0
""")
COOKBOOK = _keys("""
lora: {r: 16, alpha: 16, dropout: 0.05, bias: none,
  targets: [k_proj, q_proj, v_proj, o_proj, gate_proj, down_proj, up_proj]}
model: {path: microsoft/Phi-3-mini-4k-instruct, quantize: none}
data: {path: iamtarun/python_code_instructions_18k_alpaca, split: train, eval_fraction: 0.05, max_length: 512,
  packing: false, train_on: all}
training: {optim: adamw_torch, learning_rate: 0.0001, lr_scheduler_type: linear, warmup_steps: 0.1,
  num_train_epochs: 3, per_device_train_batch_size: 8, per_device_eval_batch_size: 8, gradient_accumulation_steps: 4,
  activation_checkpointing: false, eval_strategy: steps, eval_steps: 100, logging_steps: 100, log_level: debug,
  report_to: wandb}
checkpoint: {every_steps: each epoch}
output_dir: phi-3-mini-LoRA
seed: 42
""")
NOTEBOOK = _keys("""
lora: {r: null, alpha: null, dropout: null, targets: null}
model: {path: microsoft/Phi-3-mini-4k-instruct, quantize: none}
data: {split: train, max_rows: 100, max_length: 128, format: sharegpt, train_on: all}
training: {optim: paged_adamw_32bit, learning_rate: 0.0001, lr_scheduler_type: linear, warmup_steps: 0,
  num_train_epochs: 3, max_steps: -1, per_device_train_batch_size: 7, gradient_accumulation_steps: 4,
  activation_checkpointing: true, logging_steps: 10}
checkpoint: {every_steps: each epoch}
output_dir: New-Model-phi-3-mini-4k
seed: 42
""")
TORCHTUNE = _keys("""
lora: {r: 8, alpha: 16, dropout: 0.0, targets: [q_proj, v_proj, output_proj, w1, w2, w3]}
model: {path: microsoft/Phi-3-mini-4k-instruct, dtype: bfloat16, quantize: none}
data: {path: yahma/alpaca-cleaned, max_length: null, packing: false}
training: {optim: adamw_torch_fused, weight_decay: 0.01, learning_rate: 0.0003, lr_scheduler_type: cosine,
  warmup_steps: 100, num_train_epochs: 1, per_device_train_batch_size: 2, gradient_accumulation_steps: 8,
  activation_checkpointing: true, logging_steps: 1}
seed: null
""")
PUBLISHED = {
    "phi3-mini-4k-modelcard": MODEL_CARD,
    "phi3-mini-4k-lora-cookbook": COOKBOOK,
    "phi3-mini-4k-qlora-cookbook": COOKBOOK
    # checkpointing by prepare_model_for_kbit_training
    | _keys("{model: {quantize: nf4}, training: {activation_checkpointing: true}, output_dir: phi-3-mini-QLoRA}"),
    "phi3-mini-4k-inference-finetuning": NOTEBOOK,
    "phi3-script": NOTEBOOK
    | _keys("""
model: {path: Model_Name, dtype: float16}
training: {fp16: true}
data: {max_rows: null}
output_dir: runs/phi3-script
"""),
    "phi3-mini-4k-olive": _keys("""
lora: {r: 64, alpha: 64, dropout: 0.1, targets: [o_proj, qkv_proj]}
data: {max_length: 2048, eval_fraction: 0.3}
training: {learning_rate: 0.0001, num_train_epochs: 3, max_steps: 10, per_device_train_batch_size: 1,
  per_device_eval_batch_size: 1, gradient_accumulation_steps: 4, activation_checkpointing: false,
  eval_strategy: steps, eval_steps: 187, logging_steps: 10, train_sampling_strategy: group_by_length,
  adam_beta2: 0.999, max_grad_norm: 0.3, data_seed: 42}
seed: 0
"""),
    "phi3-mini-4k-mlx": _keys("""
lora: {r: 64, alpha: "scale: 1", dropout: 0.1, targets: [o_proj, qkv_proj], layers_to_transform: null}  # all 32 layers
data: {path: data, max_length: 2048}
training: {learning_rate: 1.0e-6, lr_scheduler_type: constant, max_steps: 1000, per_device_train_batch_size: 1,
  activation_checkpointing: true, eval_strategy: steps, eval_steps: 200, logging_steps: 10}
checkpoint: {every_steps: 1000}
seed: 0
"""),
    "phi3-mini-4k-torchtune": TORCHTUNE,
    "phi3-mini-4k-torchtune-qlora": TORCHTUNE | {"model.quantize": "nf4"},
}
# Deviations that no key of a recipe can show: they are about what the samples do around their numbers.
BESIDE_KEYS = (
    "trust_remote_code, tokenizer.pad_token, tokenizer.add_eos_token, tokenizer.padding_side, packing strategy, "
    "processes, prompt, source columns, seed of the split, text, end of text, double_quant"
).split(", ")


def says(recipe: Recipe, key: str, value: Any) -> bool:
    """Whether the resolved recipe has `value` at a dotted key, under the name that the installed transformers has."""
    section, _, name = key.partition(".")
    if section != "training":
        found: Any = recipe.resolved()[section]
        return bool((found[name] if name else found) == value)
    result = translate({name: value})
    wanted = result.values
    assert not result.problems and (wanted or value is None), key
    return all(recipe.training.get(key) == value for key, value in wanted.items())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_sample_keeps_its_numbers_but_for_the_listed_deviations(name: str) -> None:
    recipe = load_recipe(name)
    deviations = {deviation.key: deviation for deviation in recipe.about.deviations}
    assert len(deviations) == len(recipe.about.deviations), "a key is listed twice"

    for key, value in PUBLISHED[name].items():
        deviation = deviations.pop(key, None)
        if deviation is None:
            assert says(recipe, key, value), key
        else:
            assert deviation.published == value and says(recipe, key, deviation.ours), key
            assert deviation.published != deviation.ours, f"{key} does not deviate"

    for key, deviation in deviations.items():
        assert len(deviation.why) > 15
        if key in BESIDE_KEYS:
            continue
        # What is left are old names, for which `ours` gives today's, and keys without a number.
        section, _, old = key.partition(".")
        assert section in ("training", "model"), f"{key} is in no table of published values"
        if isinstance(deviation.ours, dict):
            ((new, value),) = deviation.ours.items()
            assert says(recipe, new, value), key
            same = {new.removeprefix("training."): value}
            assert translate({old: deviation.published}).values == translate(same).values, key
        else:
            assert says(recipe, key, deviation.ours), key


def test_every_published_preset_has_its_table_and_its_source() -> None:
    groups = {name: load_recipe(name).about for name in NAMES}

    assert {name for name, about in groups.items() if about.group == "published"} == set(PUBLISHED)
    assert all(groups[name].source and groups[name].deviations for name in PUBLISHED)
    assert not any(groups[name].deviations for name in set(NAMES) - set(PUBLISHED))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_is_and_how_to_run_it(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    about = load_recipe(name).about

    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any(line.startswith(f"#   phi3-lora train {name}") for line in header), "the command that runs it"
    assert "# yaml-language-server: $schema=recipe.schema.json" in header
    assert about.group and about.method and about.memory
    recipe = load_recipe(name)
    in_bits = recipe.model.quantize != "none" or recipe.training.get("optim") == "paged_adamw_32bit"
    assert ("phi3-lora-plugin[qlora]" in about.needs) == in_bits


def test_the_shipped_schema_is_the_generated_one() -> None:
    assert json.loads((FOLDER / "recipe.schema.json").read_text(encoding="utf-8")) == recipe_schema()


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_fits_the_schema_and_a_spoilt_one_does_not(name: str) -> None:
    file = shipped_preset(name)
    assert file is not None
    data: dict[str, Any] = read_file(file).data
    validator = jsonschema.Draft202012Validator(recipe_schema())

    validator.validate(data)
    for section, key, value in (
        ("lora", "dropuot", 0.1),
        ("lora", "r", "8"),
        ("lora", "dropout", 1.0),
        ("model", "dtype", "float33"),
        ("data", "packing", "yes"),
        (None, "learning_rate", 1e-4),
    ):
        spoilt = copy.deepcopy(data)
        (spoilt.setdefault(section, {}) if section else spoilt)[key] = value
        assert not validator.is_valid(spoilt), (section, key)
    for section, key, value in (("lora", "lora_alpha", 8), ("lora", "init_lora_weights", False), ("training", "x", 1)):
        fine = copy.deepcopy(data)
        fine.setdefault(section, {})[key] = value
        validator.validate(fine)
    validator.validate({"extends": "tiny-cpu", "lora": None, "data": {"max_length": None}})
    assert not validator.is_valid({"seed": 1})


@pytest.mark.filterwarnings("error::DeprecationWarning", "error::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_preset_makes_the_real_arguments_without_a_deprecation(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, [f"output_dir={tmp_path}", *DEVICES.get(name, ())])

    args = training_arguments(recipe, has_eval=True)
    options = lora_options(recipe)
    names = {"alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}  # of ours, PEFT's
    config = peft.LoraConfig(**{names.get(key, key): value for key, value in options.items()})
    if recipe.model.quantize == "nf4":
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)

    assert isinstance(args, TrainingArguments)
    assert (config.r, config.lora_alpha) == (recipe.lora.r, recipe.lora.alpha)
    for key, value in recipe.training.items():
        kept = getattr(args, key)
        value = True if value == AUTO else value  # until it is known what fits
        assert kept == value or str(getattr(kept, "value", kept)) == str(value) or key in ("report_to", "eval_strategy")
    assert not recipe.notes or "activation_checkpointing" not in installed_fields(), "presets have the newest names"


def tiny_base(path: str) -> Any:
    """A random model of two layers with the traits of `path`'s family: GQA, partial rotary, tied head, experts."""
    if "MoE" in path:
        # Heads that are pruned: together they are not the hidden size, which transformers before 5 does not know.
        pruned = "tiny" in path and hasattr(PhimoeConfig(), "rope_parameters")
        return tiny.moe(**({"head_dim": 4, "router_jitter_noise": 0.01, "input_jitter_noise": 0.01} if pruned else {}))
    traits: dict[str, Any] = {}
    if "medium" in path or "phi-4" in path.lower():
        traits["num_key_value_heads"] = 2
    if "Phi-4-mini" in path:
        traits |= {"tie_word_embeddings": True, "partial_rotary_factor": 0.75, "hidden_size": 64}
    if "4k" in path:
        traits["sliding_window"] = 16
    return tiny.model(**traits)


# Only PEFT's look at a renamed attribute and old accelerate's use of torch may warn: neither is a call of ours.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")
@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains_a_tiny_model_of_its_family(name: str, tmp_path: Path) -> None:
    overrides = [
        f"output_dir={tmp_path}", "model.device=cpu", "training.max_steps=3", "training.learning_rate=1e-3",
        "training.warmup_steps=0", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=1",
        "training.log_level=error",
    ]  # fmt: skip
    if "grpo" in name:
        overrides.append("grpo.num_generations=2")
    recipe = load_recipe(name, overrides)
    drawn = torch.randint(3, 500, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in drawn]
    model = add_lora(tiny_base(recipe.model.path), **lora_options(recipe))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    trainer = Trainer(
        model=model,
        args=training_arguments(recipe, has_eval=True),
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows[:2],  # type: ignore[arg-type]
    )
    trainer.train()

    assert 0 < trainer.evaluate()["eval_loss"] < 20
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "lora_" in key}
    assert not any("router" in key or "gate.weight" in key or "lm_head" in key for key in changed)


def test_our_presets_stay_within_the_original_context_unless_they_say_so() -> None:
    for name in set(NAMES) - set(PUBLISHED):
        recipe = load_recipe(name)
        if "128k" not in name:
            assert recipe.data.max_length is not None and recipe.data.max_length <= 4096, name
        if recipe.model.path.endswith("4k-instruct"):  # the window of 2047, which padding to 8 must not reach
            assert recipe.data.max_length % 8 == 0 and recipe.data.max_length < 2047, name
        batch = recipe.training["per_device_train_batch_size"] * recipe.training.get("gradient_accumulation_steps", 1)
        assert batch == (64 if recipe.reward else 8 if name == "tiny-cpu" else 16), name  # 64 answers to 8 prompts
