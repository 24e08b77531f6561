"""The family table: members recognised from configs, rows of fused projections, rotary repairs, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_lora_plugin.inspect.inspect import inspect
from phi3_lora_plugin.model.base_size import base_size, size_of_config
from phi3_lora_plugin.model.families import (
    RopeError,
    UnsupportedModel,
    projections,
    recognise,
    repair_rope,
    rope_of,
    row_limit,
    straddles,
)
from phi3_lora_plugin.model.folder import ModelError, find_config, find_folder, model_folder
from phi3_lora_plugin.model.load import load_model
from phi3_lora_plugin.model.published import published_config, read_planning_config, why_refused
from phi3_lora_plugin.model.tokenizer import load_tokenizer

MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
MEDIUM = MINI | {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
}
PHI4 = MEDIUM | {"vocab_size": 100352, "max_position_embeddings": 16384, "rope_theta": 250000.0}
PHI4_MINI = MINI | {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064}
MOE = MINI | {"model_type": "phimoe", "hidden_size": 4096, "num_key_value_heads": 8, "num_local_experts": 16}


def longrope(first: float = 1.03, count: int = 48, kind: str = "longrope") -> dict[str, object]:
    return {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": kind, "short_factor": [1.0] * count, "long_factor": [first] + [2.0] * (count - 1)},
    }


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (MINI, "phi-3-mini-4k"),
        (MINI | longrope(1.03), "phi-3-mini-128k"),
        (MINI | longrope(1.03, kind="su"), "phi-3-mini-128k"),
        (MINI | longrope(1.0800000429153442), "phi-3.5-mini"),
        (MEDIUM, "phi-3-medium-4k"),
        (MEDIUM | longrope(1.0, 64, "su"), "phi-3-medium-128k"),
        (PHI4, "phi-4"),
        (PHI4 | {"max_position_embeddings": 32768, "rope_theta": 500000.0}, "phi-4-reasoning"),
        (PHI4_MINI | longrope(1.0), "phi-4-mini"),
        (MOE, "phi-3.5-moe"),
        (MOE | {"intermediate_size": 6400}, "phi-3.5-moe"),
        (MOE | {"intermediate_size": 960}, "phi-mini-moe"),
        (MOE | {"intermediate_size": 448, "num_attention_heads": 16, "head_dim": 128}, "phi-tiny-moe"),
        (MINI | {"hidden_size": 64}, "phi3"),
        (MOE | {"hidden_size": 64}, "phimoe"),
    ],
)
def test_a_member_is_recognised_by_its_config(config: dict[str, object], name: str) -> None:
    assert recognise(config).name == name


@pytest.mark.parametrize("kind", ["phi3small", "phi3_v", "phi4mm", "phi4flash", "phi", "llama", None])
def test_anything_else_is_refused_with_a_reason(kind: str | None) -> None:
    with pytest.raises(UnsupportedModel, match=f"model_type {kind!r}: .{{30,}}") as caught:
        recognise(MINI | {"model_type": kind})
    assert "Supported are `phi3`, `phimoe` and the text side of `phi4_multimodal`" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("microsoft/Phi-4-mini-flash-reasoning", "SambaY.*train microsoft/Phi-4-mini-reasoning"),
        ("microsoft/Phi-4-multimodal-instruct", "model.revision=refs/pr/70"),
        ("Microsoft/phi-3.5-vision-instruct", "try Phi-3.5-mini for text"),
        ("microsoft/Phi-3-small-8k-instruct", "try Phi-3-mini or -medium"),
    ],
)
def test_published_models_that_are_refused_are_before_any_download(name: str, words: str) -> None:
    for ask in (find_folder, find_config, model_folder, load_model, load_tokenizer, read_planning_config, inspect):
        with pytest.raises(UnsupportedModel, match=words):
            ask(name)
    assert base_size(name) is None and why_refused(name)
    # Another revision may hold another layout, as of Phi-4-multimodal: only its files tell.
    with pytest.raises(ModelError):
        find_folder(name, "refs/pr/99")


def test_the_text_side_of_phi_4_multimodal_is_a_member() -> None:
    config = published_config("microsoft/Phi-4-multimodal-instruct", "refs/pr/70")
    assert config is not None and recognise(config).name == "phi-4-multimodal"
    mini = published_config("microsoft/Phi-4-mini-instruct")
    assert mini is not None and projections(config) == projections(mini)
    # 5.57 billion with its vision and speech LoRA, r 256 and 320, of 1,441,792 parameters for each of r.
    assert size_of_config(config).parameters + (256 + 320) * 1_441_792 == 5_574_476_224


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (MINI, {"qkv_proj": (9216, 3072), "o_proj": (3072, 3072), "gate_up_proj": (16384, 3072)}),
        (MEDIUM, {"qkv_proj": (7680, 5120), "gate_up_proj": (35840, 5120), "down_proj": (5120, 17920)}),
        (PHI4_MINI, {"qkv_proj": (5120, 3072), "o_proj": (3072, 3072)}),
    ],
)
def test_projections_have_the_published_shapes(config: dict[str, object], shapes: dict[str, tuple[int, int]]) -> None:
    found = {each.name: (each.out_features, each.in_features) for each in projections(config)}
    assert shapes.items() <= found.items()


def test_slices_cover_a_fused_projection_without_a_gap() -> None:
    for config in (MINI, MEDIUM, PHI4_MINI):
        for each in projections(config):
            bounds = [(part.start, part.stop) for part in each.slices]
            if bounds:
                assert bounds[0][0] == 0 and bounds[-1][1] == each.out_features
                assert all(before[1] == after[0] for before, after in zip(bounds, bounds[1:], strict=False))
    qkv = projections(MEDIUM)[0].slices
    assert {part.name: part.stop - part.start for part in qkv} == {"q_proj": 5120, "k_proj": 1280, "v_proj": 1280}


def test_projections_are_those_of_the_real_modules() -> None:
    import tiny

    model = tiny.model(num_key_value_heads=2)
    for each in projections(model.config.to_dict()):
        weight = model.get_parameter(f"model.layers.1.{each.path}.weight")
        assert weight.shape == (each.out_features, each.in_features)
    # Phi-tiny-MoE has had heads pruned: all of them together are smaller than the hidden size.
    for heads in ({}, {"head_dim": 4}):
        moe = tiny.moe(**heads)
        for each in projections(moe.config.to_dict()):
            name = f"model.layers.0.{each.path}" if each.experts else f"model.layers.0.{each.path}.weight"
            head = (each.experts,) if each.experts else ()
            assert moe.get_parameter(name).shape == (*head, each.out_features, each.in_features)


def test_every_spelling_of_longrope_becomes_the_same() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [1.5] * 48}
    common = MINI | {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    spellings = [
        common | {"rope_theta": 10000.0, "rope_scaling": {"type": "su", **factors}},
        common | {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", **factors}},
        common | {"rope_scaling": {"rope_type": "longrope", "type": "su", **factors}},
        common | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **factors}},
    ]
    repaired = [repair_rope(config) for config in spellings]
    assert all(config == repaired[0] for config in repaired)
    assert "type" not in repaired[0]["rope_parameters"] and "rope_scaling" not in repaired[0]
    assert repair_rope(repaired[0]) == repaired[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"long_factor": [1.0] * 47}, "long_factor has 47 numbers; expected 48"),
        ({"short_factor": None}, "short_factor is None; expected a list of 48 positive numbers"),
        ({"short_factor": ["1"] * 48}, "expected a list of 48 positive numbers"),
        ({"long_factor": [True] * 48}, "expected a list of 48 positive numbers"),
        ({"type": "linear"}, "rope type 'linear'"),
        ({"long_factor": "x"}, "expected a list of 48 positive numbers"),
        ({"rope_theta": "x"}, "rope_theta is 'x'; expected a positive number"),
    ],
)
def test_bad_factors_name_field_found_and_expected(change: dict[str, object], says: str) -> None:
    config = MINI | longrope()
    config["rope_scaling"] = config["rope_scaling"] | change  # type: ignore[operator]
    with pytest.raises(RopeError, match=says):
        repair_rope(config)


def test_settings_that_are_none_are_an_error() -> None:
    with pytest.raises(RopeError, match="'su' is not a mapping of settings"):
        recognise(MINI | {"rope_scaling": "su", "max_position_embeddings": 131072})
    assert recognise(MINI | longrope() | {"rope_scaling": {"type": "su", "long_factor": "x"}}).name == "phi-3-mini-128k"


def test_partial_rotary_halves_the_factors_too() -> None:
    config = PHI4_MINI | longrope(1.0, 48) | {"partial_rotary_factor": 0.75}
    assert repair_rope(config)["rope_parameters"]["partial_rotary_factor"] == 0.75
    with pytest.raises(RopeError, match="expected 64"):
        repair_rope(PHI4_MINI | longrope(1.0, 48))


def test_published_configs_load_to_the_same_numbers(shared_data: Path, tmp_path: Path) -> None:
    from phi3_lora_plugin.model.config import read_config

    for file in sorted((shared_data / "configs").glob("*.json")):
        published = json.loads(file.read_text())
        folder = tmp_path / file.stem
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(published))
        loaded = read_config(folder / "config.json")
        rope = published.get("rope_scaling") or {}
        assert loaded.rope_parameters.get("long_factor") == rope.get("long_factor"), file.name
        assert loaded.rope_parameters["rope_type"] == ("longrope" if rope else "default")
        assert loaded.rope_parameters["rope_theta"] == published["rope_theta"]
        assert "type" not in loaded.rope_parameters and getattr(loaded, "auto_map", None) is None
        assert recognise(published).name in file.stem.replace("-instruct", "") + "phi-4-mini"


def test_the_default_length_stays_within_the_original_context() -> None:
    assert row_limit(None, MINI) == 4096
    assert row_limit(None, MINI | longrope()) == 4096
    assert row_limit(None, PHI4) == 16384
    assert row_limit(100, PHI4) == 100


def test_a_straddling_batch_is_flagged_where_logits_really_shift() -> None:
    import tiny
    import torch

    model = tiny.model(**tiny.LONGROPE)  # 32 tokens
    config = model.config.to_dict()
    short = torch.randint(3, 500, (1, 10), generator=torch.Generator().manual_seed(0))
    alone = model(short).logits
    for width in (32, 33):
        padded = torch.zeros(1, width, dtype=torch.long)
        padded[:, :10] = short
        shifted = not torch.allclose(model(padded).logits[:, :10], alone, atol=1e-4)
        assert shifted is straddles([10, width], config) is (width > 32)
    assert not straddles([33, 36], config) and not straddles([], config) and not straddles([10, 5000], MINI)


def test_rope_settings_are_read_without_changing_the_config() -> None:
    config = MINI | longrope(kind="su")
    before = json.dumps(config)
    assert rope_of(config)["rope_type"] == "longrope"
    assert json.dumps(config) == before


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
def test_sizes_that_no_model_has_are_refused_before_anything_walks_them(name: str) -> None:
    config = {"model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "vocab_size": 32064, name: 10**9}
    with pytest.raises(UnsupportedModel, match=f"{name} is 1000000000, expected at most"):
        recognise(config)
