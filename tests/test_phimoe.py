"""LoRA on Phi-3.5-MoE: attention by name, experts by their stacked weights, the router never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lora_runs import learn
from peft import PeftModel
from test_inject import IDS, learns, trainable
from transformers import PhimoeForCausalLM

from phi3_lora_plugin.lora.inject import CoverageRow, add_lora, coverage, prepare_for_checkpointing
from phi3_lora_plugin.lora.targets import TargetError

pytestmark = pytest.mark.slow

ATTENTION = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


def moe(**changes: Any) -> PhimoeForCausalLM:
    return tiny.moe(**({"intermediate_size": 48, "router_jitter_noise": 0.01, "input_jitter_noise": 0.0} | changes))


def build(targets: Any, **options: Any) -> PeftModel:
    model = moe()
    torch.manual_seed(1)
    return add_lora(model, targets, 4, 8, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def routers(model: Any) -> list[torch.Tensor]:
    found = [p.detach().clone() for name, p in model.named_parameters() if "router" in name]
    assert len(found) == 2
    return found


def test_all_linear_is_attention_and_neither_router_nor_experts() -> None:
    model = build("all-linear")
    assert {row.module for row in coverage(model)} == ATTENTION
    assert {row.layers for row in coverage(model)} == {(0, 1)}
    assert model.peft_config["default"].target_parameters is None


def test_experts_are_counted_by_their_stacks() -> None:
    rows = set(coverage(build(["all-linear", "experts"])))
    assert CoverageRow("mlp.experts.gate_up_proj", (0, 1), (4, 96, 32), 4, 2 * 4 * 4 * (96 + 32)) in rows
    assert CoverageRow("mlp.experts.down_proj", (0, 1), (4, 32, 48), 4, 2 * 4 * 4 * (32 + 48)) in rows
    assert len(rows) == 6


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], ["experts"], ["all-linear", "experts"]], ids=str
)
@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [1]}, {"use_rslora": True}], ids=str)
def test_phimoe_trains_saves_reloads_with_plain_peft_and_merges(targets: Any, options: Any, tmp_path: Path) -> None:
    model = build(targets, **options)
    assert all("lora_" in name for name in trainable(model))
    assert not any("router" in name for name in trainable(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = routers(model)
    learns(model)
    assert all(torch.equal(one, other) for one, other in zip(frozen, routers(model), strict=True))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora_B" in name)

    expected = logits(model)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(moe(), tmp_path)
    assert torch.equal(logits(fresh), expected)
    assert trainable(PeftModel.from_pretrained(moe(), tmp_path, is_trainable=True)) == trainable(model)
    torch.testing.assert_close(logits(fresh.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits(moe())).abs().max() > 1e-3


def test_pruned_heads_and_jitter_as_in_phi_tiny_moe(tmp_path: Path) -> None:
    def pruned() -> PhimoeForCausalLM:
        return moe(head_dim=4, input_jitter_noise=0.01)

    model = add_lora(pruned(), ["all-linear", "experts"], 4, 8)
    shapes = {row.module: row.shape for row in coverage(model)}
    assert shapes["self_attn.q_proj"] == (16, 32) and shapes["self_attn.o_proj"] == (32, 16)
    frozen = routers(model)
    losses = learn(model, [IDS] * 16)
    assert losses[-1] < losses[0] and all(map(torch.equal, frozen, routers(model)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(pruned(), tmp_path)
    assert torch.equal(logits(fresh), expected)
    torch.testing.assert_close(logits(fresh.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_experts_of_some_layers_only() -> None:
    model = build(["experts"], layers_to_transform=[1])
    assert {row.layers for row in coverage(model)} == {(1,)} and len(coverage(model)) == 2


def test_rank_pattern_reaches_experts() -> None:
    model = build(["q_proj", "experts"], rank_pattern={"experts.down_proj": 2})
    ranks = {row.module: row.rank for row in coverage(model)}
    assert ranks == {"self_attn.q_proj": 4, "mlp.experts.gate_up_proj": 4, "mlp.experts.down_proj": 2}


def test_biases_train_where_the_model_has_them() -> None:
    model = build("all-linear", bias="lora_only")
    biases = {name for name in trainable(model) if "lora_" not in name}
    assert len(biases) == 8 and all(name.endswith("_proj.base_layer.bias") for name in biases)
    assert sum(row.parameters for row in coverage(model)) == model.get_nb_trainable_parameters()[0]
    learns(model)


def test_experts_with_gradient_checkpointing() -> None:
    model = build(["all-linear", "experts"])
    prepare_for_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    learns(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 0.1}, "dropout 0.1 does not go with experts"),
        ({"use_dora": True}, "use_dora does not go with experts"),
        ({"init_lora_weights": "pissa"}, "'pissa' does not go with experts"),
        ({"modules_to_save": ["router"]}, "is the router of the experts"),
    ],
)
def test_what_experts_cannot_have_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError) as caught:
        build(["experts"], **options)
    assert words in str(caught.value)


def test_the_router_is_never_adapted() -> None:
    for targets in (["router"], r".*\.router", r".*mlp.*"):
        with pytest.raises(TargetError, match="names the router of the experts"):
            build(targets)
