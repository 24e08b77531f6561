"""What `add_lora` builds, proves and refuses, on real tiny models."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lora_runs import four_bit, learn
from peft import PeftModel
from rich.console import Console
from torch import nn
from warm_process import Warm

from phi3_lora_plugin.lora.inject import (
    CoverageRow,
    InjectionError,
    add_lora,
    coverage,
    prepare_for_checkpointing,
    render_coverage,
)
from phi3_lora_plugin.lora.targets import TargetError

IDS = torch.arange(3, 27).reshape(2, 12)
FUSED = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
TIED = {"tie_word_embeddings": True}


def base_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def learns(model: nn.Module, optimizer: Any = None) -> None:
    """Steps on one batch lower its loss."""
    losses = learn(model, [IDS] * 8, optimizer)
    assert losses[-1] < losses[0]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def problems(*arguments: Any, base: Any = None, **options: Any) -> str:
    model = tiny.model() if base is None else base
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(TargetError) as caught:
        add_lora(model, *(arguments or ("all-linear", 4, 8)), **options)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before  # refused before it is touched
    return str(caught.value)


@pytest.mark.parametrize("kv", [4, 2], ids=["mha", "gqa"])
def test_the_preset_adapts_four_modules_in_every_layer(kv: int) -> None:
    model = add_lora(tiny.model(num_key_value_heads=kv), "all-linear", 4, 8)
    h, heads, d, f, layers, r = 32, 4, 8, 64, 2, 4
    expected = layers * r * (4 * h + (2 * heads + 2 * kv) * d + 3 * f)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 4 * layers
    assert sum(row.parameters for row in coverage(model)) == expected


def test_a_list_that_matches_half_is_an_error_with_the_phi3_names() -> None:
    message = problems(["wq", "wk", "o_proj", "down_proj"], 4, 8)
    assert "qkv_proj" in message and "gate_up_proj" in message and "'wq'" in message and "'wk'" in message


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "up_proj"]], ids=["fused", "slices"])
def test_exactly_the_lora_tensors_train_and_the_base_stays(targets: Any) -> None:
    model = add_lora(tiny.model(), targets, 4, 8)
    assert trainable(model) == {name for name, _ in model.named_parameters() if "lora_" in name} != set()
    before, base = {n: p.detach().clone() for n, p in model.named_parameters()}, base_hash(model)
    learn(model, [IDS])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert not torch.equal(parameter, before[name]), name
    assert base_hash(model) == base


def test_a_base_that_slips_into_training_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import LoraModel

    original = LoraModel._mark_only_adapters_as_trainable

    def leaky(self: Any, model: nn.Module) -> None:
        original(self, model)
        model.model.norm.weight.requires_grad_(True)

    monkeypatch.setattr(LoraModel, "_mark_only_adapters_as_trainable", leaky)
    with pytest.raises(InjectionError, match="norm.weight would be trained"):
        add_lora(tiny.model(), "all-linear", 4, 8)


def test_the_result_is_a_peft_model_that_starts_as_the_base() -> None:
    expected = tiny.model()(input_ids=IDS).logits
    model = add_lora(tiny.model(), "all-linear", 4, 8, dropout=0.5).eval()
    assert isinstance(model, PeftModel)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (4, 8, 0.5, FUSED)
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_options_reach_peft_by_their_names(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "base")
    base = type(tiny.model()).from_pretrained(tmp_path / "base")
    model = add_lora(
        base, ["qkv_proj", "o_proj"], 4, 8, use_rslora=True, layers_to_transform=1, rank_pattern={"o_proj": 2},
        init_lora_weights="default", revision="abc",
    )  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == str(tmp_path / "base") and saved["revision"] == "abc"
    assert saved["task_type"] == "CAUSAL_LM" and saved["use_rslora"] is True and saved["init_lora_weights"] is True
    assert saved["target_modules"] == ["o_proj", "qkv_proj"] and saved["layers_to_transform"] == [1]
    assert saved["rank_pattern"] == {"o_proj": 2}


@pytest.mark.slow
def test_the_saved_config_does_not_depend_on_the_hash_seed(tmp_path: Path, warm: Warm) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tiny\n"
        "from phi3_lora_plugin.lora.inject import add_lora\n"
        "add_lora(tiny.model(), 'all-linear', 4, 8, exclude_modules=['o_proj']).save_pretrained(sys.argv[2])"
    )
    arguments = [str(Path(__file__).parent), str(tmp_path / "there")]
    done = warm.run(f"{code}\nprint(hash('o_proj'))", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) != hash("o_proj")  # this process has another seed
    add_lora(tiny.model(), "all-linear", 4, 8, exclude_modules=["o_proj"]).save_pretrained(tmp_path / "here")
    written = [(tmp_path / place / "adapter_config.json").read_bytes() for place in ("there", "here")]
    assert written[0] == written[1]


def test_only_the_layers_asked_for_are_adapted() -> None:
    model = add_lora(tiny.model(), "all-linear", 4, 8, layers_to_transform=[1])
    assert {name.split(".")[4] for name in trainable(model)} == {"1"}
    assert len(trainable(model)) == 8
    without = r"model\.layers\.0\.self_attn\.o_proj"
    uneven = add_lora(tiny.model(), ["qkv_proj", "o_proj"], 4, 8, exclude_modules=without)
    layers = {row.module: row.layers for row in coverage(uneven)}
    assert layers == {"self_attn.qkv_proj": (0, 1), "self_attn.o_proj": (1,)}


def test_ranks_and_alphas_by_pattern() -> None:
    model = add_lora(
        tiny.model(), ["q_proj", "v_proj", "o_proj"], 4, 8, rank_pattern={"v_proj": 2, "layers.1.self_attn.o_proj": 3},
        alpha_pattern={"v_proj": 4},
    )  # fmt: skip
    first, second = (layer.self_attn for layer in model.base_model.model.model.layers)
    assert (first.qkv_proj.r["default"], first.qkv_proj.scaling["default"]) == (6, 2)
    assert (first.o_proj.r["default"], second.o_proj.r["default"]) == (4, 3)
    learns(model)


def test_coverage_counts_what_is_trained() -> None:
    base = tiny.model(num_key_value_heads=2)
    model = add_lora(base, ["q_proj", "v_proj", "down_proj"], 4, 8, modules_to_save=["norm"])
    assert set(coverage(model)) == {
        CoverageRow("self_attn.qkv_proj[q_proj]", (0, 1), (32, 32), 4, 2 * 4 * (32 + 32)),
        CoverageRow("self_attn.qkv_proj[v_proj]", (0, 1), (16, 32), 4, 2 * 4 * (32 + 16)),
        CoverageRow("mlp.down_proj", (0, 1), (32, 64), 4, 2 * 4 * (64 + 32)),
        CoverageRow("model.norm", (), (32,), None, 32),
    }
    console = Console(record=True, width=100)
    console.print(render_coverage(coverage(model)))
    text = console.export_text()
    assert "self_attn.qkv_proj[q_proj]" in text and "0-1" in text and "16 x 32" in text and "full" in text
    assert f"{2 * 4 * (64 + 48 + 96) + 32:,}" in text


def test_adapters_are_float32_on_a_half_precision_base() -> None:
    model = add_lora(tiny.model().to(torch.bfloat16), "all-linear", 4, 8)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    learns(model)
    kept = add_lora(tiny.model().to(torch.bfloat16), "all-linear", 4, 8, autocast_adapter_dtype=False)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}


def test_a_4_bit_base_is_left_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = four_bit(tmp_path)
    dtypes = {name: p.dtype for name, p in base.named_parameters()}
    model = add_lora(base, "all-linear", 4, 8)
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert parameter.dtype == (torch.float32 if "lora_" in name else dtypes[plain])
    learns(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_pass_through_checkpointed_layers(reentrant: bool) -> None:
    plain, checkpointed = (add_lora_seeded() for _ in range(2))
    prepare_for_checkpointing(checkpointed)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(learn(checkpointed, [IDS] * 3), learn(plain, [IDS] * 3), rtol=1e-5, atol=1e-6)
    assert checkpointed.config.use_cache is False


def add_lora_seeded() -> PeftModel:
    torch.manual_seed(5)
    return add_lora(tiny.model(), "all-linear", 4, 8)


def test_nothing_is_deprecated_and_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(tiny.model(), ["q_proj", "down_proj"], 4, 8, use_rslora=True)


def test_a_model_with_an_adapter_is_refused() -> None:
    wrapped = add_lora(tiny.model(), "all-linear", 4, 8)
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(TargetError, match="already has an adapter"):
            add_lora(model, "all-linear", 4, 8)


def test_every_problem_is_told_at_once() -> None:
    message = problems(["qkv_prj"], 0, 8, dropout=2, use_dorra=True, lora_alpha=3, bias="some", modules_to_save=["nrm"])
    for words in ("'qkv_prj' matches no module", "r: expected", "use_dorra: unknown option; did you mean 'use_dora'?",
                  "lora_alpha: use add_lora's own arguments", "bias: expected 'none'"):  # fmt: skip
        assert words in message
    message = problems("all-linear", 4, 8, dropout=1, modules_to_save=["nrm"], trainable_token_indices=[512])
    assert "dropout: expected a number from 0" in message
    assert "modules_to_save: 'nrm' matches no module; did you mean 'norm'?" in message
    assert "trainable_token_indices: expected token ids of 0 to 511, got [512]" in message
    message = problems("all-linear", 4, 8, modules_to_save=["embed_tokens"], trainable_token_indices=[5])
    assert "all of embed_tokens is trained by modules_to_save already" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora does not go with slices (q_proj)"),
        ({"lora_bias": True}, "lora_bias does not go with slices"),
        ({"init_lora_weights": "pissa"}, "'pissa' starts from a factorisation for all rows"),
        ({"init_lora_weights": "olora"}, "'olora' starts from a factorisation"),
        ({"init_lora_weights": "orthogonal"}, "'orthogonal' starts from a factorisation"),
        ({"init_lora_weights": "eva", "data": []}, "'eva' starts from a factorisation"),
        ({"init_lora_weights": "pisa"}, "did you mean 'pissa'?"),
        ({"init_lora_weights": "corda"}, "needs a pass of PEFT's own over data first"),
        ({"init_lora_weights": "loftq"}, "this base is not in 4 bit"),
        ({"init_lora_weights": "eva"}, "pass batches of model inputs as data"),
        ({"data": []}, "only init_lora_weights='eva' uses it"),
        ({"eva_config": {"rho": 2.0}}, "eva_config: only init_lora_weights='eva'"),
        ({"layers_pattern": "h"}, "Phi keeps its layers in 'layers'"),
        ({"modules_to_save": ["qkv_proj"]}, "is trained in full and cannot have LoRA as well"),
        ({"modules_to_save": ["self_attn"]}, "is trained in full and cannot have LoRA as well"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_cannot_work_together_is_refused_with_the_reason(options: dict[str, Any], words: str) -> None:
    assert words in problems(["q_proj"], 4, 8, **options)


def test_tied_embeddings_are_not_trained_apart() -> None:
    for name in ("lm_head", "embed_tokens"):
        assert "shares its weight" in problems(base=tiny.model(**TIED), modules_to_save=[name])
        assert "shares its weight" in problems([name], 4, 8, base=tiny.model(**TIED))
        assert add_lora(tiny.model(), "all-linear", 4, 8, modules_to_save=[name])


def test_bias_on_a_model_without_biases_says_that_it_does_nothing() -> None:
    for bias in ("all", "lora_only"):
        with pytest.warns(UserWarning, match="trains nothing extra: this model has no biases"):
            model = add_lora(tiny.model(), "all-linear", 4, 8, bias=bias)
        assert all("lora_" in name for name in trainable(model))


def test_layers_pattern_of_peft_is_taken() -> None:
    model = add_lora(tiny.model(), "all-linear", 4, 8, layers_to_transform=[0], layers_pattern="layers")
    assert {row.layers for row in coverage(model)} == {(0,)}
