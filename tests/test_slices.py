"""LoRA on slices of fused projections, against loralib's MergedLinear and against separate adapters written by hand."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import loralib
import pytest
import tiny
import torch
from lora_runs import four_bit, fully_sharded, learn, trainer
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from warm_process import Warm

from phi3_lora_plugin.lora.inject import add_lora, prepare_for_checkpointing
from phi3_lora_plugin.lora.slices import SlicedLinear, SliceError, apply_slices, blocks_of

R, ALPHA = 4, 12
MHA: dict[str, Any] = {}
GQA = {"num_key_value_heads": 2}
IDS = torch.arange(3, 3 + 24).reshape(2, 12)
SPLIT_NAMES = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def drawn(count: int, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 512, (rows, 12), generator=generator) for _ in range(count)]


def batches(count: int) -> list[torch.Tensor]:
    """Two random batches by turns, so that there is something to learn."""
    return [drawn(2, rows=2)[number % 2] for number in range(count)]


def fell(losses: list[float]) -> bool:
    return sum(losses[-2:]) < sum(losses[:2])


def sliced(targets: list[str], base: Any = None, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return add_lora(tiny.model() if base is None else base, targets, R, ALPHA, **options)


def fused_layers(model: PeftModel) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_B") and any(isinstance(b, SlicedLinear) for b in module.lora_B.values())
    }


def places(linear: SlicedLinear) -> list[tuple[slice, slice]]:
    """(rows, columns) of each block of a sliced B."""
    ends = [*accumulate(block.rank for block in linear.blocks)]
    return [
        (slice(block.start, block.stop), slice(end - block.rank, end))
        for block, end in zip(linear.blocks, ends, strict=True)
    ]


def randomise(model: PeftModel) -> None:
    """Give B values, as if trained, so that gradients reach A in the first step."""
    generator = torch.Generator().manual_seed(3)
    for layer in fused_layers(model).values():
        linear = layer.lora_B["default"]
        for place in places(linear):
            linear.weight.data[place] = torch.randn(linear.weight[place].shape, generator=generator) * 0.05


def off_block(model: PeftModel) -> torch.Tensor:
    """All entries of every sliced B that are outside its blocks."""
    found = []
    for layer in fused_layers(model).values():
        linear = layer.lora_B["default"]
        outside = torch.ones_like(linear.weight, dtype=torch.bool)
        for place in places(linear):
            outside[place] = False
        found.append(linear.weight.detach()[outside])
    return torch.cat(found)


def train(model: nn.Module, steps: int = 10) -> list[float]:
    return learn(model, batches(steps), weight_decay=0.1)


def with_merged_linear(peft_model: PeftModel, **config: Any) -> nn.Module:
    """The same base with loralib's MergedLinear in place of each sliced module, holding the same A and B."""
    model = tiny.model(**config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, layer in fused_layers(peft_model).items():
        blocks = layer.lora_B["default"].blocks
        names = next(names for end, names in SPLIT_NAMES.items() if path.endswith(end))
        enabled = [name in {block.name for block in blocks} for name in names]
        merged = loralib.MergedLinear(
            layer.in_features, layer.out_features, r=R, lora_alpha=ALPHA, enable_lora=enabled, bias=False,
            merge_weights=False,
        )  # fmt: skip
        merged.weight.data.copy_(layer.base_layer.weight)
        merged.lora_A.data.copy_(layer.lora_A["default"].weight)
        merged.lora_B.data.copy_(blocks_below_each_other(layer.lora_B["default"]))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, merged)
    return model


def blocks_below_each_other(linear: SlicedLinear, attribute: str = "data") -> torch.Tensor:
    """A sliced B, or its gradient, in loralib's layout: (rows of enabled slices, r)."""
    return torch.cat([getattr(linear.weight, attribute)[place] for place in places(linear)])


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"], ["k_proj"], ["gate_proj", "up_proj"], ["q_proj", "up_proj"]],
    ids="-".join,
)
def test_slices_equal_loralib_merged_linear_forward_gradients_and_ten_steps(targets: list[str]) -> None:
    ours = sliced(targets)
    randomise(ours)
    theirs = with_merged_linear(ours)
    ours.train(), theirs.train()

    here, there = ours(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(here.logits, there.logits, rtol=1e-5, atol=1e-6)
    here.loss.backward(), there.loss.backward()

    def compare(attribute: str, tolerance: float) -> None:
        for path, layer in fused_layers(ours).items():
            merged, value_a = theirs.get_submodule(path), getattr(layer.lora_A["default"].weight, attribute)
            value_b = blocks_below_each_other(layer.lora_B["default"], attribute)
            expected_a, expected_b = (getattr(each, attribute) for each in (merged.lora_A, merged.lora_B))
            assert expected_a.abs().max() > 0 and expected_b.abs().max() > 0
            torch.testing.assert_close(value_a, expected_a, rtol=1e-4, atol=tolerance)
            torch.testing.assert_close(value_b, expected_b, rtol=1e-4, atol=tolerance)

    compare("grad", 1e-7)
    ours.zero_grad(), theirs.zero_grad()
    torch.testing.assert_close(train(ours), train(theirs), rtol=1e-5, atol=1e-6)
    compare("data", 2e-5)
    assert not off_block(ours).any()


class SeparateLora(nn.Module):
    """Three adapters written out by hand: y = W x + alpha / r * [B_q A_q x; B_k A_k x; B_v A_v x]."""

    def __init__(self, base: nn.Linear, layer: Any) -> None:
        super().__init__()
        self.base, self.rows = base, []
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for rows, columns in places(layer.lora_B["default"]):
            self.rows.append(rows)
            self.a.append(layer.lora_A["default"].weight.detach()[columns].clone())
            self.b.append(layer.lora_B["default"].weight.detach()[rows, columns].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        for rows, a, b in zip(self.rows, self.a, self.b, strict=True):
            y[..., rows] += x @ a.T @ b.T * (ALPHA / R)
        return y


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"]], ids="-".join)
def test_slices_of_grouped_query_attention_equal_separate_adapters(targets: list[str]) -> None:
    ours = sliced(targets, tiny.model(**GQA))
    randomise(ours)
    reference = tiny.model(**GQA)
    reference.requires_grad_(False)
    for path, layer in fused_layers(ours).items():
        parent, _, name = path.rpartition(".")
        setattr(reference.get_submodule(parent), name, SeparateLora(layer.base_layer, layer))
    torch.testing.assert_close(ours(input_ids=IDS).logits, reference(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(train(ours), train(reference), rtol=1e-5, atol=1e-6)
    for path, layer in fused_layers(ours).items():
        separate = reference.get_submodule(path)
        a, b = (part["default"].weight.data for part in (layer.lora_A, layer.lora_B))
        for index, (rows, columns) in enumerate(places(layer.lora_B["default"])):
            torch.testing.assert_close(a[columns], separate.a[index].data, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(b[rows, columns], separate.b[index].data, rtol=1e-4, atol=2e-5)
    assert not off_block(ours).any()


def test_slices_not_named_never_change() -> None:
    model = sliced(["q_proj", "v_proj"], tiny.model(**GQA))
    assert fell(train(model))
    layer = model.base_model.model.model.layers[0].self_attn.qkv_proj
    delta = layer.get_delta_weight("default")
    assert delta[:32].any() and delta[48:].any()
    assert not delta[32:48].any()  # k_proj


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_sliced_adapter_is_plain_peft_on_disk(tmp_path: Path, rslora: bool, warm: Warm) -> None:
    model = sliced(["q_proj", "k_proj", "v_proj", "up_proj", "o_proj"], tiny.model(**GQA), use_rslora=rslora)
    train(model, 3)
    model.eval()
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    tiny.model(**GQA).save_pretrained(tmp_path / "base")
    torch.save(expected.detach(), tmp_path / "logits.pt")
    # A process that cannot know this package: plain transformers and peft, merged and unmerged.
    code = """
import sys, torch
assert not any(name.startswith("phi3_lora") for name in sys.modules)
sys.modules["phi3_lora_plugin"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
expected, ids = torch.load("logits.pt", weights_only=True), torch.arange(3, 27).reshape(2, 12)
assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5), "unmerged"
assert torch.allclose(model.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-5), "merged"
"""
    done = warm.run(code, cwd=tmp_path, plain=True)
    assert done.returncode == 0, done.stderr
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_scaling_is_alpha_over_r_for_each_slice() -> None:
    for rslora, scaling in ((False, ALPHA / R), (True, ALPHA / R**0.5)):
        model = sliced(["q_proj", "k_proj", "v_proj", "gate_proj"], use_rslora=rslora)
        for layer in fused_layers(model).values():
            assert layer.scaling["default"] == pytest.approx(scaling, rel=1e-12)


def test_blocks_are_found_again_in_a_loaded_adapter_and_training_goes_on(tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    unbroken, first = sliced(targets, tiny.model(**GQA)), sliced(targets, tiny.model(**GQA))
    train(first, 3), train(unbroken, 3)
    first.save_pretrained(tmp_path)

    plain = PeftModel.from_pretrained(tiny.model(**GQA), tmp_path, is_trainable=True)
    assert not fused_layers(plain)
    blocks = blocks_of(plain)
    assert blocks == blocks_of(first)
    found = [(b.name, b.start, b.stop, b.rank) for b in blocks["model.layers.1.self_attn.qkv_proj"]]
    assert found == [("q_proj", 0, 32, 4), ("v_proj", 48, 64, 4)]
    assert "model.layers.0.mlp.down_proj" not in blocks
    apply_slices(plain, blocks)
    assert train(plain, 4) == train(unbroken, 4)
    assert not off_block(plain).any() and len(fused_layers(plain)) == 4


def test_an_adapter_on_the_whole_projection_has_no_blocks() -> None:
    model = sliced(["qkv_proj", "gate_up_proj"])
    assert blocks_of(model) == {}  # untrained: B shows nothing
    train(model, 2)
    assert blocks_of(model) == {}


def test_loading_the_adapter_into_the_model_keeps_it_sliced(tmp_path: Path) -> None:
    """What `Trainer` does when it resumes and when it fetches the best checkpoint."""
    model = sliced(["q_proj", "v_proj"])
    train(model, 2)
    model.save_pretrained(tmp_path)
    saved = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, 2)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert len(fused_layers(model)) == 2
    for name, parameter in model.named_parameters():
        if name in saved:
            assert torch.equal(parameter, saved[name])
    train(model, 2)
    assert not off_block(model).any()


def test_a_trainer_that_resumes_ends_where_one_without_a_break_does(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for ids in batches(4) for row in ids]

    def run(folder: str, steps: int, **arguments: Any) -> PeftModel:
        model = sliced(["q_proj", "v_proj", "down_proj"], tiny.model(**GQA), dropout=0.1)
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
        settings |= {"per_device_train_batch_size": 2}
        trainer(tmp_path / folder, StopAfter(steps), model=model, data=data, **settings).train(**arguments)
        return model

    unbroken = run("unbroken", 4)
    run("broken", 2)
    resumed = run("broken", 4, resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert len(fused_layers(resumed)) == 2 and not off_block(resumed).any()
    for (name, one), (_, other) in zip(unbroken.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        control.should_training_stop = state.global_step >= self.steps
        return control


def test_a_dense_adapter_does_not_load_into_slices(tmp_path: Path) -> None:
    dense = add_lora(tiny.model(), ["qkv_proj"], 2 * R, 2 * ALPHA)
    train(dense, 2)
    dense.save_pretrained(tmp_path)
    model = sliced(["q_proj", "v_proj"])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    with pytest.raises(RuntimeError, match="outside the slices q_proj, v_proj are not zero"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    with pytest.raises(SliceError, match="trained on the whole projection"):
        apply_slices(dense, blocks_of(model))


def test_apply_slices_says_which_modules_do_not_fit() -> None:
    model = add_lora(tiny.model(), ["qkv_proj"], R, ALPHA)
    wanted = blocks_of(sliced(["q_proj", "v_proj", "up_proj"]))
    with pytest.raises(SliceError) as caught:
        apply_slices(model, wanted)
    assert "layers.0.self_attn.qkv_proj: the slices need rank 8, the adapter has 4" in str(caught.value)
    assert "layers.1.mlp.gate_up_proj has no LoRA layer" in str(caught.value)


def test_an_optimizer_that_mixes_entries_is_caught_when_saving(tmp_path: Path) -> None:
    model = sliced(["q_proj", "v_proj"])
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.qkv_proj.lora_B["default"].weight += 0.01
    with pytest.raises(SliceError, match=r"layers\.1\.self_attn\.qkv_proj\.lora_B\.default\.weight"):
        model.save_pretrained(tmp_path)


def test_slices_in_bfloat16() -> None:
    for cast in (True, False):
        model = sliced(["q_proj", "v_proj"], tiny.model(**GQA).to(torch.bfloat16), autocast_adapter_dtype=cast)
        weight = fused_layers(model)["model.layers.0.self_attn.qkv_proj"].lora_B["default"].weight
        assert weight.dtype == (torch.float32 if cast else torch.bfloat16)
        assert fell(train(model)) and not off_block(model).any()
    with torch.autocast("cpu", torch.bfloat16):
        model = sliced(["q_proj", "v_proj"])
        assert fell(train(model)) and not off_block(model).any()


def test_slices_with_gradient_checkpointing_learn_the_same() -> None:
    plain, checkpointed = (sliced(["q_proj", "v_proj", "up_proj"]) for _ in range(2))
    prepare_for_checkpointing(checkpointed)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(train(checkpointed), train(plain), rtol=1e-5, atol=1e-6)
    assert not off_block(checkpointed).any()


def test_slices_on_a_4_bit_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = sliced(["q_proj", "v_proj", "up_proj"], four_bit(tmp_path, torch.float32, **GQA))
    assert fell(train(model))
    assert len(fused_layers(model)) == 4 and not off_block(model).any()


def in_parallel(folder: str, kind: str) -> None:
    """What each of two ranks does: train on its half of each batch, and write its adapter."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = sliced(["q_proj", "v_proj"], tiny.model(**GQA))
    wrapped = DistributedDataParallel(model) if kind == "ddp" else fully_sharded(model)
    learn(wrapped, [ids[rank::2] for ids in drawn(5, rows=4)], weight_decay=0.1)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if "lora_" in name}
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
    torch.save(whole, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_slices_on_two_processes_equal_one(kind: str, tmp_path: Path, warm: Warm) -> None:
    warm.ranks(tmp_path, in_parallel, str(tmp_path), kind)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

    alone = sliced(["q_proj", "v_proj"], tiny.model(**GQA))
    learn(alone, drawn(5, rows=4), weight_decay=0.1)
    expected = {name: p.data for name, p in alone.named_parameters() if p.requires_grad}
    assert first.keys() == second.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)
    alone.load_state_dict(first, strict=False)  # refuses anything between the blocks
