"""The tensor maps between layouts change no weight update, whatever the shapes."""

from __future__ import annotations

import math
from dataclasses import replace

import loralib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_lora_plugin.lora_files.layouts import (
    LayoutError,
    Lora,
    fused_to_grouped,
    fused_to_split,
    grouped_to_fused,
    padded,
    split_to_fused,
    uniform,
    unknown_modules,
)
from phi3_lora_plugin.model.families import Projection, projections

LAYER = "model.layers.3"


def config(heads: int = 4, groups: int = 4, size: int = 4, inner: int = 12) -> dict:
    return {
        "model_type": "phi3",
        "hidden_size": heads * size,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": 8,
    }


@st.composite
def configs(draw: st.DrawFn) -> dict:
    groups = draw(st.integers(1, 3))
    return config(groups * draw(st.integers(1, 3)), groups, draw(st.sampled_from([2, 4])), draw(st.integers(1, 9)))


def random_lora(
    path: str, projection_shape: tuple[int, int], rank: int, alpha: float = 16, seed: int = 0, **more
) -> Lora:
    out, width = projection_shape
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
    return Lora(f"{LAYER}.{path}", a, b, alpha, **more)


def whole(name: str, layout: tuple[Projection, ...]) -> Projection:
    return next(projection for projection in layout if projection.name == name)


def slices_of(lora: Lora, projection: Projection) -> dict[str, torch.Tensor]:
    delta = lora.delta()
    return {part.name: delta[part.start : part.stop] for part in projection.slices}


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 5), st.sampled_from(["qkv_proj", "gate_up_proj"]), st.booleans())
def test_fused_to_split_is_exact_block_by_block(cfg, rank, name, rslora):
    layout = projections(cfg)
    projection = whole(name, layout)
    fused = random_lora(projection.path, (projection.out_features, projection.in_features), rank, rslora=rslora)

    split, rows = fused_to_split([fused], layout)

    assert [lora.module.rpartition(".")[2] for lora in split] == [part.name for part in projection.slices]
    assert len(rows) == len(projection.slices)
    for lora in split:
        assert lora.rank == rank and lora.alpha == 16
        wanted = slices_of(fused, projection)[lora.module.rpartition(".")[2]]
        torch.testing.assert_close(lora.delta(), wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(configs(), st.lists(st.integers(1, 4), min_size=3, max_size=3), st.integers(1, 7), st.booleans())
def test_split_to_fused_stacks_ranks_and_leaves_zero_rows_where_nothing_was_adapted(cfg, ranks, chosen, rslora):
    layout = projections(cfg)
    projection = whole("qkv_proj", layout)
    parts = [part for bit, part in enumerate(projection.slices) if chosen >> bit & 1]
    pieces = [
        random_lora(
            f"self_attn.{part.name}",
            (part.stop - part.start, projection.in_features),
            rank,
            alpha=16 * (math.sqrt(rank) if rslora else rank),
            seed=index,
            rslora=rslora,
        )
        for index, (part, rank) in enumerate(zip(parts, ranks, strict=False))
    ]

    (fused,), rows = split_to_fused(pieces, layout)

    assert fused.rank == sum(lora.rank for lora in pieces) and len(rows) == len(pieces)
    blocks = slices_of(fused, projection)
    for part in projection.slices:
        own = next((lora for lora in pieces if lora.module.endswith(part.name)), None)
        wanted = torch.zeros_like(blocks[part.name]) if own is None else own.delta()
        torch.testing.assert_close(blocks[part.name], wanted, rtol=1e-5, atol=1e-5)
        if own is None:
            assert not blocks[part.name].any()


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 5), st.booleans())
def test_going_there_and_back_gives_the_very_same_tensors(cfg, rank, rslora):
    layout = projections(cfg)
    fused = [
        random_lora(p.path, (p.out_features, p.in_features), rank, seed=index, rslora=rslora)
        for index, p in enumerate(layout)
    ]
    back, _ = split_to_fused(fused_to_split(fused, layout)[0], layout)
    assert {one.module for one in back} == {one.module for one in fused}
    for one in fused:
        other = next(lora for lora in back if lora.module == one.module)
        assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
        assert (one.rank, one.alpha) == (other.rank, other.alpha)

    split = [
        random_lora(
            f"{p.path.rpartition('.')[0]}.{part.name}", (part.stop - part.start, p.in_features), rank, seed=9 + i
        )
        for p in layout
        for i, part in enumerate(p.slices)
    ]
    again, _ = fused_to_split(split_to_fused(split, layout)[0], layout)
    for one in split:
        other = next(lora for lora in again if lora.module == one.module)
        assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b) and one.alpha == other.alpha


def test_without_compaction_every_slice_keeps_the_rank_of_the_whole():
    layout = projections(config())
    parts = whole("qkv_proj", layout).slices
    split = [random_lora(f"self_attn.{part.name}", (16, 16), 2, seed=i) for i, part in enumerate(parts)]
    fused, _ = split_to_fused(split, layout)
    kept, _ = fused_to_split(fused, layout, compact=False)
    assert [lora.rank for lora in kept] == [6, 6, 6]
    for one, other in zip(split, kept, strict=True):
        torch.testing.assert_close(one.delta(), other.delta())


def test_a_slice_that_is_not_adapted_disappears_and_says_so():
    layout = projections(config())
    q = random_lora("self_attn.q_proj", (16, 16), 2)
    fused, _ = split_to_fused([q], layout)
    split, rows = fused_to_split(fused, layout)
    assert [lora.module for lora in split] == [f"{LAYER}.self_attn.q_proj"]
    assert [row.rule for row in rows if row.target == "-"] == [
        "k_proj is not adapted: its rows are zero",
        "v_proj is not adapted: its rows are zero",
    ]


def test_an_untrained_adapter_keeps_all_its_ranks():
    layout = projections(config())
    fresh = random_lora("self_attn.qkv_proj", (48, 16), 4)
    fresh = replace(fresh, b=torch.zeros_like(fresh.b))
    split, _ = fused_to_split([fresh], layout)
    assert [lora.rank for lora in split] == [4, 4, 4]


def test_slices_with_different_scalings_are_fused_by_multiplying_the_ratio_into_b():
    layout = projections(config())
    gate = random_lora("mlp.gate_proj", (12, 16), 2, alpha=4)
    up = random_lora("mlp.up_proj", (12, 16), 4, alpha=4, seed=1)
    (fused,), rows = split_to_fused([gate, up], layout)
    blocks = slices_of(fused, whole("gate_up_proj", layout))
    assert torch.equal(blocks["gate_proj"], gate.delta()) and torch.equal(blocks["up_proj"], up.delta())
    assert "multiplied into B" in rows[0].rule


def test_dora_is_fused_with_all_slices_and_refused_with_some():
    layout = projections(config())
    pieces = [
        replace(random_lora(f"mlp.{name}", (12, 16), 2, seed=i), magnitude=torch.arange(12.0) + i)
        for i, name in enumerate(["gate_proj", "up_proj"])
    ]
    (fused,), _ = split_to_fused(pieces, layout)
    assert fused.magnitude.tolist() == [*range(12), *range(1, 13)]
    with pytest.raises(LayoutError, match="the rows of up_proj would need the lengths of the base"):
        split_to_fused(pieces[:1], layout)


def test_all_misfits_are_named_at_once():
    layout = projections(config())
    wrong = [
        random_lora("self_attn.q_proj", (15, 16), 2),
        random_lora("mlp.up_proj", (12, 17), 2),
        random_lora("mlp.gate_up_proj", (24, 16), 2),
    ]
    with pytest.raises(LayoutError) as caught:
        split_to_fused(wrong, layout)
    assert len(caught.value.problems) == 3
    assert "(15, 2) do not fit the model's weight (16, 16)" in caught.value.problems[0]
    assert "adapted as a whole and again by its slices up_proj" in caught.value.problems[2]
    unknown = unknown_modules([random_lora("mlp.fc1", (12, 16), 2)], layout, 8)
    assert "mlp.fc1 is not a projection of this model; it has self_attn.qkv_proj" in unknown[0]
    assert "only 2 layers" in unknown_modules([random_lora("self_attn.o_proj", (16, 16), 2)], layout, 2)[0]


def trained_merged_linear(out: int, flags: list[bool], r: int = 2, seed: int = 0) -> loralib.MergedLinear:
    torch.manual_seed(seed)
    layer = loralib.MergedLinear(16, out, r=r, lora_alpha=6, enable_lora=flags, merge_weights=False)
    torch.nn.init.normal_(layer.lora_B)
    return layer


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6).filter(any), st.integers(1, 3))
def test_p31_merged_linear_is_block_diagonal_on_the_whole_projection(flags, r):
    layer = trained_merged_linear(4 * len(flags), flags, r)
    stored = Lora("m", layer.lora_A.data, layer.lora_B.data, 6)

    fused = grouped_to_fused(stored, r, flags)

    assert (fused.rank, fused.alpha) == (r * sum(flags), 6 * sum(flags))
    torch.testing.assert_close(fused.delta(), (layer.merge_AB() * layer.scaling).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flags", [(True, False, True), (True, True, True), (False, True, False)])
def test_p31_block_diagonal_goes_back_to_the_same_merged_linear(flags):
    layout = projections(config())
    layer = trained_merged_linear(48, list(flags))
    fused = grouped_to_fused(Lora(f"{LAYER}.self_attn.qkv_proj", layer.lora_A.data, layer.lora_B.data, 6), 2, flags)
    stored, r, enable = fused_to_grouped(fused, whole("qkv_proj", layout))
    assert (r, enable, stored.alpha) == (2, flags, 6)
    assert torch.equal(stored.a, layer.lora_A) and torch.equal(stored.b, layer.lora_B)


def test_p31_grouped_query_attention_takes_several_equal_groups():
    layout = projections(config(heads=4, groups=1))
    projection = whole("qkv_proj", layout)  # q 16 rows, k 4, v 4: six groups of 4, of which q has four
    pieces = [random_lora("self_attn.q_proj", (16, 16), 2), random_lora("self_attn.v_proj", (4, 16), 2, seed=1)]
    (fused,), _ = split_to_fused(pieces, layout)
    stored, r, enable = fused_to_grouped(fused, projection)
    assert enable == (True, True, True, True, False, True) and r == 2
    layer = loralib.MergedLinear(16, 24, r=2, lora_alpha=stored.alpha, enable_lora=list(enable))
    layer.lora_A.data, layer.lora_B.data = stored.a, stored.b
    torch.testing.assert_close((layer.merge_AB() * layer.scaling).detach(), fused.delta(), rtol=1e-5, atol=1e-5)
    back = grouped_to_fused(replace(stored, module=fused.module), r, enable)
    assert torch.equal(back.a, fused.a) and torch.equal(back.b, fused.b) and back.alpha == fused.alpha


def test_an_update_without_blocks_is_no_merged_linear():
    layout = projections(config())
    assert fused_to_grouped(random_lora("self_attn.qkv_proj", (48, 16), 3), whole("qkv_proj", layout)) is None


def test_flags_that_do_not_belong_to_the_tensors_are_refused():
    layer = trained_merged_linear(12, [True, False, True])
    with pytest.raises(LayoutError, match=r"do not belong to r=2 with enable_lora=T,T,T; expected A \(6, in\)"):
        grouped_to_fused(Lora("m", layer.lora_A.data, layer.lora_B.data, 6), 2, [True, True, True])


def test_uniform_and_padded_keep_the_update():
    loras = [
        random_lora("self_attn.o_proj", (16, 16), 4, alpha=8, rslora=True),
        random_lora("mlp.down_proj", (16, 12), 2),
    ]
    made = uniform(loras)
    assert {(other.rank, other.alpha) for other in made} == {(4, made[0].alpha)}
    for one, other in zip(loras, made, strict=True):
        assert not other.rslora
        torch.testing.assert_close(one.delta(), other.delta())
    for one in loras:
        wide = padded(one, 7)
        assert wide.rank == 7
        torch.testing.assert_close(one.delta(), wide.delta())
