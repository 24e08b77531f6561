"""`training:` against the installed TrainingArguments: translation both ways, and the real object."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peft
import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments

from phi3_lora_plugin.lora.inject import add_lora
from phi3_lora_plugin.recipe import Recipe, load_recipe
from phi3_lora_plugin.recipe.sections import LoraSection
from phi3_lora_plugin.recipe.training import fields_of, installed_fields, translate
from phi3_lora_plugin.training.arguments import lora_options, training_arguments

pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning", "error::FutureWarning")

# The fields that changed, as three versions of transformers declare them; nothing but names and types.
OLD = fields_of("""
class TrainingArguments:
    output_dir: Optional[str] = None
    evaluation_strategy: Union[IntervalStrategy, str] = None
    eval_strategy: Union[IntervalStrategy, str] = "no"
    per_device_train_batch_size: int = 8
    learning_rate: float = 5e-5
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    group_by_length: bool = False
    no_cuda: bool = False
    use_cpu: bool = False
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: Optional[Union[dict[str, Any], str]] = None
    optim: Union[OptimizerNames, str] = "adamw_torch"
    report_to: Union[None, str, List[str]] = None
    _n_gpu: int = field(init=False)
""")
BETWEEN = fields_of("""
class TrainingArguments:
    eval_strategy: IntervalStrategy | str = "no"
    warmup_ratio: float | None = None
    warmup_steps: float = 0
    group_by_length: bool = False
    use_cpu: bool = False
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: "dict[str, Any] | str | None" = None
    optim: OptimizerNames | str = "adamw_torch_fused"
""")
NEW = fields_of("""
class TrainingArguments:
    eval_strategy: IntervalStrategy | str = "no"
    warmup_steps: float = 0
    train_sampling_strategy: str = "random"
    use_cpu: bool = False
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None
    gradient_checkpointing: bool | None = None
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None
    optim: OptimizerNames | str = "adamw_torch_fused"
""")


def recipe(*overrides: str) -> Recipe:
    return load_recipe("tiny-cpu", ["output_dir=somewhere", *overrides])


def arguments(*overrides: str, **options: Any) -> TrainingArguments:
    return training_arguments(recipe(*overrides), **options)


def test_the_fields_read_from_source_are_those_of_the_class() -> None:
    real = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}

    assert set(installed_fields()) == real
    assert installed_fields()["learning_rate"] == {"float"}
    assert {"str", "list", "None"} <= installed_fields()["report_to"]


@pytest.mark.parametrize(
    ("fields", "given", "values"),
    [
        (OLD, {"warmup_ratio": 0.1}, {"warmup_ratio": 0.1}),
        (OLD, {"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
        (OLD, {"warmup_steps": 10}, {"warmup_steps": 10}),
        (BETWEEN, {"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        (NEW, {"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        (NEW, {"warmup_ratio": "1e-1"}, {"warmup_steps": 0.1}),
        (NEW, {"warmup_steps": 100.0}, {"warmup_steps": 100}),
        (OLD, {"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        (NEW, {"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        (OLD, {"train_sampling_strategy": "group_by_length"}, {"group_by_length": True}),
        (OLD, {"train_sampling_strategy": "random"}, {"group_by_length": False}),
        (NEW, {"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        (NEW, {"group_by_length": False}, {"train_sampling_strategy": "random"}),
        (OLD, {"no_cuda": True}, {"use_cpu": True}),
        (NEW, {"no_cuda": True}, {"use_cpu": True}),
        (OLD, {"activation_checkpointing": True}, {"gradient_checkpointing": True}),
        (BETWEEN, {"activation_checkpointing": True}, {"gradient_checkpointing": True}),
        (NEW, {"gradient_checkpointing": True}, {"activation_checkpointing": True}),
        (
            NEW,
            {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"activation_checkpointing_kwargs": {"use_reentrant": False}},
        ),
        (OLD, {"per_gpu_train_batch_size": 2}, {"per_device_train_batch_size": 2}),
        (NEW, {"adafactor": True}, {"optim": "adafactor"}),
    ],
)
def test_p8_names_of_any_version_become_the_installed_ones(
    fields: Any, given: dict[str, Any], values: dict[str, Any]
) -> None:
    result = translate(given, fields)

    assert {key: value for key, value in result.values.items() if value is not None} == values
    assert result.problems == []
    (given_name,), (name,) = given, values
    if given_name != name:
        assert result.was == {name: given_name}
        assert result.notes and result.notes[0][0] == given_name


def test_a_warmup_of_one_kind_takes_back_one_of_the_other_where_both_exist() -> None:
    assert translate({"warmup_steps": 0}, OLD).values == {"warmup_steps": 0, "warmup_ratio": None}
    assert translate({"warmup_steps": 0.1}, OLD).values == {"warmup_steps": None, "warmup_ratio": 0.1}
    assert translate({"warmup_steps": 0}, NEW).values == {"warmup_steps": 0}


@pytest.mark.parametrize(
    "given",
    [
        {"warmup_ratio": 0.1, "warmup_steps": 5},
        {"evaluation_strategy": "no", "eval_strategy": "no"},
        {"gradient_checkpointing": True, "activation_checkpointing": True},
        {"group_by_length": True, "train_sampling_strategy": "random"},
        {"no_cuda": True, "use_cpu": True},
    ],
)
def test_old_and_new_name_together_are_an_error(given: dict[str, Any]) -> None:
    result = translate(given, NEW)

    assert len(result.problems) == 1 and "keep one of them" in result.problems[0][1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"evaluation_stratgy": "no"}, "did you mean 'evaluation_strategy'"),
        ({"output_dir": "x"}, "top level"),
        ({"seed": 1}, "top level"),
        ({"save_steps": 1}, "checkpoint.every_steps"),
        ({"save_total_limit": 1}, "checkpoint.keep_last"),
        ({"load_best_model_at_end": True}, "checkpoint.keep_best"),
        ({"resume_from_checkpoint": "x"}, "--resume"),
        ({"max_seq_length": 1}, "data.max_length"),
        ({"packing": True}, "data.packing"),
        ({"assistant_only_loss": True}, "data.train_on"),
        ({"torch_dtype": "bfloat16"}, "model.dtype"),
        ({"hub_token": "hf_x"}, "does not belong in a file"),
        ({"push_to_hub": True}, "hub_model_id"),
        ({"learning_rate": "fast"}, "expected a number, found text 'fast'"),
        ({"learning_rate": -1}, "at least 0"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"learning_rate": True}, "expected a number, found True"),
        ({"max_steps": 1.5}, "expected a whole number, found 1.5"),
        ({"max_steps": "5"}, "expected a whole number, found text '5'"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"max_steps": 0}, "at least 1, or -1 for no limit"),
        ({"max_steps": -2}, "at least 1, or -1 for no limit"),
        ({"num_train_epochs": 0}, "more than 0"),
        ({"bf16": 1}, "expected true or false, found 1"),
        ({"optim": "adamw_torhc"}, "did you mean 'adamw_torch'"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"eval_strategy": "never"}, "one of no, steps, epoch"),
        ({"report_to": 3}, "text or a list"),
        ({"accelerator_config": [1]}, "a mapping"),
        ({"warmup_ratio": 1.5}, "from 0 to below 1"),
        ({"warmup_steps": 1.5}, "whole steps"),
        ({"group_by_length": "always"}, "true or false"),
    ],
)
def test_what_does_not_belong_or_fit_says_where_or_what(given: dict[str, Any], says: str) -> None:
    result = translate(given)

    assert len(result.problems) == 1
    assert result.problems[0][0] in given and says in result.problems[0][1]


def test_numbers_written_as_text_are_numbers_where_a_float_is_wanted() -> None:
    given = {"learning_rate": "2e-4", "weight_decay": 0, "bf16": "no"}
    assert translate(given).values == {"learning_rate": 2e-4, "weight_decay": 0, "bf16": False}


@pytest.mark.parametrize(
    "name", ["overwrite_output_dir", "save_safetensors", "logging_dir", "do_eval", "tpu_num_cores"]
)
def test_settings_without_effect_are_left_out_with_a_note(name: str) -> None:
    result = translate({name: True})

    assert result.values == {} and result.problems == []
    assert result.notes[0][0] == name and "left out" in result.notes[0][1]


def test_every_option_of_sft_config_that_trainer_lacks_has_an_answer() -> None:
    ours = {field.name for field in dataclasses.fields(pytest.importorskip("trl").SFTConfig)} - set(installed_fields())
    known = dict(translate(dict.fromkeys(ours, "x")).problems)

    unanswered = {name for name in ours if name[0] != "_" and "does not belong here" not in known.get(name, "")}
    assert unanswered <= {"activation_offloading", "loss_type", "pad_to_multiple_of", "router_aux_loss_coef"}


def test_the_real_object_has_our_defaults() -> None:
    args = arguments(has_eval=True)

    assert (args.output_dir, args.seed, args.use_cpu) == ("somewhere", 42, True)
    assert args.save_strategy == "no" and args.eval_strategy == "epoch" and args.report_to == []
    assert args.logging_nan_inf_filter is False and args.remove_unused_columns is False
    assert args.label_names == ["labels"] and args.disable_tqdm is True
    assert args.bf16 is False and args.fp16 is False and args.dataloader_pin_memory is False
    assert args.per_device_eval_batch_size == args.per_device_train_batch_size == 8
    assert args.learning_rate == 2e-3


def test_the_recipe_wins_over_defaults_and_the_caller_over_both() -> None:
    args = arguments("training.logging_steps=3", "training.disable_tqdm=false", has_eval=True, logging_steps=7)

    assert (args.logging_steps, args.disable_tqdm) == (7, False)
    assert arguments("training.eval_strategy=steps", "training.eval_steps=5", has_eval=True).eval_steps == 5
    assert arguments("training.eval_strategy=steps", has_eval=False).eval_strategy == "no"
    assert arguments("training.per_device_eval_batch_size=3").per_device_eval_batch_size == 3
    assert arguments("seed=7").seed == 7
    assert arguments("model.dtype=bfloat16").bf16 is True
    assert arguments("model.dtype=bfloat16", "training.bf16=false").bf16 is False


def test_checkpointing_is_not_reentrant_under_either_name() -> None:
    name = "activation_checkpointing" if "activation_checkpointing" in installed_fields() else "gradient_checkpointing"
    for given in ("gradient_checkpointing", "activation_checkpointing"):
        args = arguments(f"training.{given}=true")
        assert getattr(args, name) is True
        assert getattr(args, f"{name}_kwargs") == {"use_reentrant": False}
    reentrant = "training.gradient_checkpointing_kwargs={use_reentrant: true}"
    kept = arguments("training.gradient_checkpointing=true", reentrant)
    assert getattr(kept, f"{name}_kwargs") == {"use_reentrant": True}


def test_checkpointing_yields_gradients_and_labels_an_evaluation_loss(tmp_path: Path) -> None:
    given = recipe("training.gradient_checkpointing=true", "training.max_steps=4", f"output_dir={tmp_path}")
    model = add_lora(tiny.model(), **lora_options(given))
    row = {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = Trainer(
        model=model,
        args=training_arguments(given, has_eval=True),
        train_dataset=[row] * 16,  # type: ignore[arg-type]
        eval_dataset=[row] * 4,  # type: ignore[arg-type]
    )
    trainer.train()

    assert trainer.evaluate()["eval_loss"] > 0
    for name, value in model.named_parameters():
        changed = not torch.equal(value, before[name])
        assert changed == ("lora_" in name), name
    assert not list(tmp_path.glob("checkpoint-*"))


def test_lora_options_say_only_what_differs_and_as_peft_names_it() -> None:
    assert lora_options(recipe()) == {"targets": "all-linear", "r": 16, "alpha": 32, "dropout": 0.0}

    options = lora_options(
        recipe(
            "lora.bias=lora_only",
            "lora.dora=true",
            "lora.rslora=true",
            "lora.init=pissa_niter_4",
            "lora.layers_to_transform=0",
            "lora.rank_pattern={o_proj: 4}",
            "lora.alpha_pattern={o_proj: 8}",
            "lora.exclude_modules=[down_proj]",
            "lora.modules_to_save=[lm_head]",
            "lora.trainable_token_indices=[1, 2]",
            "lora.target_parameters=[mlp.experts.down_proj]",
            "lora.ensure_weight_tying=true",
        )
    )
    assert options["layers_to_transform"] == 0
    assert options["init_lora_weights"] == "pissa_niter_4"
    given = {name: value for name, value in options.items() if name not in ("targets", "r", "alpha", "dropout")}
    assert set(given) <= {field.name for field in dataclasses.fields(peft.LoraConfig)}
    peft.LoraConfig(r=16, target_modules=["o_proj"], **given)
    assert lora_options(recipe("lora.init=random"))["init_lora_weights"] is False


def test_every_option_of_the_section_reaches_add_lora_or_the_optimizer() -> None:
    known = {*inspect.signature(add_lora).parameters, *(field.name for field in dataclasses.fields(peft.LoraConfig))}
    for name in LoraSection.model_fields:
        given = object()
        options = lora_options(cast("Any", SimpleNamespace(lora=LoraSection.model_construct(**{name: given}))))
        passed = [key for key, value in options.items() if value is given]
        # The last is the optimizer's, not the model's.
        assert len(passed) == (name != "loraplus_lr_ratio") and set(options) <= known, name
