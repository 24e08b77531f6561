"""Target names in both vocabularies, resolved against configs of the whole family, and every way to get them wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_families
import tiny
from pages import blocks, page
from test_families import MEDIUM, MINI

from phi3_lora_plugin.lora.plan import Block, TargetPlan, span
from phi3_lora_plugin.lora.targets import TargetError, resolve_targets

PHI4_MINI = test_families.PHI4_MINI | {"tie_word_embeddings": True}
MOE = test_families.MOE | {"intermediate_size": 6400}
FUSED = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plan(targets: Any, config: dict[str, Any] = MINI, r: int = 16, alpha: float = 32, **options: Any) -> TargetPlan:
    return resolve_targets(config, targets, r, alpha, **options)


def problems(targets: Any, config: dict[str, Any] = MINI, **options: Any) -> str:
    with pytest.raises(TargetError) as caught:
        plan(targets, config, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [(MINI, 25_165_824), (MEDIUM, 55_705_600), (PHI4_MINI, 23_068_672)],
    ids=["mini", "medium", "4-mini"],
)
def test_all_linear_is_four_projections_in_every_layer(config: dict[str, Any], expected: int) -> None:
    for targets in ("all-linear", FUSED, r".*\.(qkv_proj|o_proj|gate_up_proj|down_proj)", r"model\.layers\.\d+\..*"):
        found = plan(targets, config)
        layers = config["num_hidden_layers"]
        assert len(found.targets) == 4 * layers
        assert found.target_modules == FUSED and found.layers_to_transform is None
        assert not found.rank_pattern and not found.alpha_pattern and not found.blocks and not found.target_parameters
        h, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        d, f = config.get("head_dim") or h // heads, config["intermediate_size"]
        assert found.parameters == expected == layers * 16 * (4 * h + (2 * heads + 2 * kv) * d + 3 * f)


@pytest.mark.parametrize("name", ["qkv_proj", "self_attn.qkv_proj"])
def test_a_name_may_be_any_ending_of_the_module_path(name: str) -> None:
    assert plan([name]).target_modules == ["qkv_proj"]


def test_split_names_are_slices_with_their_own_rows() -> None:
    found = plan(["q_proj", "v_proj"], MEDIUM)
    assert found.target_modules == ["qkv_proj"]
    blocks = found.blocks["model.layers.39.self_attn.qkv_proj"]
    assert blocks == (Block("q_proj", 0, 5120, 16), Block("v_proj", 6400, 7680, 16))
    assert found.rank_pattern == {"qkv_proj": 32} and found.alpha_pattern == {"qkv_proj": 64}
    assert found.parameters == 40 * 16 * (2 * 5120 + 5120 + 1280)


def test_the_llama_list_trains_every_projection_by_slices() -> None:
    """Half of it matched nothing on a fused model, in silence, before; now it means what it says."""
    found = plan(LLAMA)
    assert found.target_modules == FUSED
    assert found.rank_pattern == {"gate_up_proj": 32, "qkv_proj": 48}
    assert found.alpha_pattern == {"gate_up_proj": 64, "qkv_proj": 96}
    assert found.parameters == 29_884_416  # what the same list trains on an unfused model


def test_order_of_names_does_not_matter() -> None:
    assert plan(["v_proj", "up_proj", "q_proj"]) == plan(["q_proj", "v_proj", "up_proj", "q_proj"])


def test_a_pattern_may_name_slices() -> None:
    assert plan(r".*\.(q_proj|v_proj)") == plan(["q_proj", "v_proj"])
    assert plan(r".*\.(q_proj|o_proj)") == plan(["q_proj", "o_proj"])


def test_a_pattern_that_fits_the_end_of_a_fused_name_is_unclear() -> None:
    said = "fits both self_attn.qkv_proj as a whole and, of its slices, only self_attn.q_proj, self_attn.v_proj"
    assert said in problems(r".*(q_proj|v_proj)")


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["query_key_value", "c_attn"], ["'query_key_value' matches no module", "'c_attn' matches no module"]),
        (["qkv_prj"], ["'qkv_prj' matches no module; did you mean 'qkv_proj'?"]),
        (["q_proj", "qkv_proj"], ["self_attn.qkv_proj is named both as a whole and by its slices self_attn.q_proj"]),
        (["all-linear", "up_proj"], ["mlp.gate_up_proj is named both"]),
        (["experts"], ["only PhiMoE has experts"]),
        ("q_proj,v_proj", ["several targets are a list: [q_proj,v_proj]"]),
        ([], ["no target is named"]),
        (r"(q_proj", ["is not a name or a regular expression"]),
        (["model.layers.3.mlp.down_proj"], ["in layer 3 but not in layers 0-2, 4-31", "layers_to_transform=[3]"]),
        (r"model\.layers\.([0-9]|1\d)\.mlp.down_proj", ["in layers 0-19 but not in layers 20-31"]),
        (["lm_head"], ["LoRA on lm_head is refused", "modules_to_save=['lm_head']"]),
        (["embed_tokens"], ["LoRA on embed_tokens is refused"]),
        (r".*", ["LoRA on lm_head is refused", "LoRA on embed_tokens is refused"]),
    ],
)  # fmt: skip
def test_what_matches_nothing_or_not_everywhere_is_an_error(targets: Any, words: list[str]) -> None:
    message = problems(targets)
    for word in [*words, "self_attn.qkv_proj (= q_proj, k_proj, v_proj)", "mlp.gate_up_proj (= gate_proj, up_proj)"]:
        assert word in message


def test_all_bad_targets_are_named_at_once() -> None:
    with pytest.raises(TargetError) as caught:
        plan(["wq", "o_proj", "lm_head", "fc1"], r=0, alpha=-1, layers_to_transform=[0, 32, -1])
    assert len(caught.value.problems) == 6
    assert isinstance(caught.value, ValueError)


def test_lora_on_tied_embeddings_is_refused_with_the_reason() -> None:
    for name, other in (("lm_head", "embed_tokens"), ("embed_tokens", "lm_head")):
        assert f"{name} shares its weight with {other} (tie_word_embeddings)" in problems([name], PHI4_MINI)


def test_layers_to_transform_is_the_way_to_choose_layers() -> None:
    found = plan(["qkv_proj", "up_proj"], layers_to_transform=[1, 5])
    assert found.layers_to_transform == [1, 5] and found.target_modules == ["gate_up_proj", "qkv_proj"]
    names = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    modules = [target.module for target in found.targets]
    assert modules == [f"model.layers.{layer}.{name}" for layer in (1, 5) for name in names]
    third = plan(["model.layers.3.self_attn.qkv_proj"], layers_to_transform=[3])
    assert plan(["qkv_proj"], layers_to_transform=3) == third
    assert plan("all-linear", layers_to_transform=range(32)).layers_to_transform is None
    assert "expected layers of 0 to 31, got [32]" in problems("all-linear", layers_to_transform=32)
    assert "got none at all" in problems("all-linear", layers_to_transform=[])


def test_exclude_modules_by_name_and_by_pattern() -> None:
    assert plan("all-linear", exclude_modules=["o_proj"]) == plan(["qkv_proj", "gate_up_proj", "down_proj"])
    assert plan(["q_proj", "k_proj", "v_proj"], exclude_modules=["k_proj"]) == plan(["q_proj", "v_proj"])
    uneven = plan(["qkv_proj", "o_proj"], exclude_modules=r"model\.layers\.(0|31)\.self_attn\.o_proj")
    assert len(uneven.targets) == 62 and uneven.layers_to_transform is None
    assert "model.layers.0.self_attn.o_proj" not in uneven.target_modules
    assert "model.layers.1.self_attn.o_proj" in uneven.target_modules
    assert "'up_proj' excludes nothing" in problems(["qkv_proj"], exclude_modules=["up_proj"])
    assert "exclude_modules leaves nothing" in problems(["qkv_proj"], exclude_modules=["qkv_proj"])


def test_rank_and_alpha_patterns_of_whole_projections() -> None:
    pattern = {"qkv_proj": 8, r"layers\.0\.mlp\.down_proj": 4}
    found = plan("all-linear", rank_pattern=pattern, alpha_pattern={"qkv_proj": 16})
    ranks = {target.module: (target.rank, target.alpha) for target in found.targets}
    assert ranks["model.layers.7.self_attn.qkv_proj"] == (8, 16)
    assert ranks["model.layers.0.mlp.down_proj"] == (4, 32) and ranks["model.layers.10.mlp.down_proj"] == (16, 32)
    assert found.rank_pattern == {"model.layers.0.mlp.down_proj": 4, "qkv_proj": 8}
    assert found.alpha_pattern == {"qkv_proj": 16}


def test_rank_and_alpha_patterns_compose_with_slices() -> None:
    found = plan(["q_proj", "v_proj", "o_proj"], rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 8})
    blocks = found.blocks["model.layers.0.self_attn.qkv_proj"]
    assert blocks == (Block("q_proj", 0, 3072, 16), Block("v_proj", 6144, 9216, 4))
    assert found.rank_pattern == {"qkv_proj": 20} and found.alpha_pattern == {"qkv_proj": 40}
    one_layer = plan(["q_proj"], rank_pattern={r"layers\.2\..*q_proj": 4}, alpha_pattern={r"layers\.2\..*q_proj": 8})
    assert one_layer.rank_pattern == {"model.layers.2.self_attn.qkv_proj": 4}
    rooted = plan(["q_proj", "k_proj"], r=4, alpha=8, rslora=True)
    assert rooted.alpha_pattern["qkv_proj"] / rooted.rank_pattern["qkv_proj"] ** 0.5 == pytest.approx(8 / 4**0.5)


def test_patterns_that_cannot_be_kept_are_refused() -> None:
    message = problems(["q_proj", "v_proj"], rank_pattern={"v_proj": 4})
    assert "scaled differently (q_proj 2, v_proj 8)" in message and "alpha_pattern" in message
    message = problems(["q_proj"], rank_pattern={"qkv_proj": 4})
    assert "'qkv_proj' fits none of the targets" in message and "so name q_proj, k_proj, v_proj" in message
    assert "alpha_pattern: 'up_proj' fits none" in problems(["qkv_proj"], alpha_pattern={"up_proj": 4})
    assert "rank_pattern['o_proj']: expected a whole number" in problems("all-linear", rank_pattern={"o_proj": 2.5})
    assert "is not a regular expression" in problems("all-linear", rank_pattern={"(o_proj": 2})


@pytest.mark.parametrize(
    ("r", "alpha"), [(0, 1), (-1, 1), (True, 1), (2.0, 1), ("8", 1), (8, 0), (8, "16"), (8, float("nan"))]
)
def test_rank_and_alpha_are_checked(r: Any, alpha: Any) -> None:
    with pytest.raises(TargetError, match=r"(r: expected a whole number|alpha: expected a number above 0)"):
        plan("all-linear", r=r, alpha=alpha)


def test_phimoe_attention_is_by_name_and_experts_are_parameters() -> None:
    attention = plan("all-linear", MOE)
    assert attention.target_modules == ["k_proj", "o_proj", "q_proj", "v_proj"] and not attention.target_parameters
    assert attention == plan(["q_proj", "k_proj", "v_proj", "o_proj"], MOE) and not attention.blocks
    experts = plan(["experts"], MOE)
    assert experts.target_modules == []
    assert experts.target_parameters == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert experts.parameters == 32 * 16 * 16 * (4096 + 2 * 6400 + 6400 + 4096)
    assert plan([], MOE, target_parameters=["mlp.experts.gate_up_proj"]) == plan(["experts.gate_up_proj"], MOE)
    few = plan(["all-linear", "experts"], MOE, layers_to_transform=[3])
    assert few.layers_to_transform == [3]
    assert few.target_parameters == ["model.layers.3.mlp.experts.down_proj", "model.layers.3.mlp.experts.gate_up_proj"]


def test_the_router_of_the_experts_is_never_adapted() -> None:
    for targets in ("router", "mlp.router", r".*router", r".*\.mlp\..*"):
        assert "names the router of the experts" in problems(targets, MOE)
    assert not any("router" in target.module for target in plan(["all-linear", "experts"], MOE).targets)


def test_phimoe_is_told_apart_from_the_fused_vocabulary() -> None:
    message = problems(["qkv_proj", "gate_up_proj", "w1"], MOE)
    assert "attention is not fused here: q_proj, k_proj, v_proj" in message
    assert message.count("the MLP is a mixture of experts here") == 2
    assert "is not a stack of expert weights" in problems("all-linear", target_parameters=["mlp.experts.down_proj"])


def test_a_model_and_a_config_object_will_do() -> None:
    model = tiny.model()
    assert plan("all-linear", model) == plan("all-linear", model.config) == plan("all-linear", model.config.to_dict())


def test_unsupported_models_are_refused() -> None:
    for model_type in ("llama", "phi3small", "phi3_v"):
        with pytest.raises(ValueError, match=model_type):
            plan("all-linear", MINI | {"model_type": model_type})


def test_layers_are_written_as_ranges() -> None:
    spans = {"layer 3": [3], "layers 0-31": range(32), "layers 0-2, 5, 7-8": [0, 1, 2, 5, 7, 8]}
    assert [span(layers) for layers in spans.values()] == list(spans)


def test_published_configs_resolve(shared_data: Path) -> None:
    for file in sorted((shared_data / "configs").glob("*.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        assert len(plan("all-linear", config).targets) == 4 * config["num_hidden_layers"]
        assert len(plan(LLAMA, config).blocks) == 2 * config["num_hidden_layers"]


DOCS = page("targets")


def test_the_examples_of_the_docs_run() -> None:
    snippets = blocks(DOCS, "python")
    assert len(snippets) >= 3
    names: dict[str, Any] = {"load": tiny.model}
    for snippet in snippets:
        exec(snippet, names)


def test_the_table_of_the_docs_is_right() -> None:
    rows = re.findall(r"^\| `targets: (.+?)` \| ([\d,]+) \|", DOCS, re.MULTILINE)
    assert len(rows) >= 4
    for targets, count in rows:
        names = [name.strip() for name in targets.strip("[]").split(",")]
        assert plan(names, r=16).parameters == int(count.replace(",", ""))
