"""LoRA state: which tensors it is, for every implementation, and that nothing is skipped when it is put back."""

from __future__ import annotations

import copy
import io
import os
import re
from pathlib import Path
from typing import Any

import loralib
import pytest
import tiny
import torch
from lora_runs import fully_sharded
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from warm_process import Warm

from phi3_lora_plugin.lora.inject import add_lora
from phi3_lora_plugin.lora.state import (
    StateError,
    UnknownBias,
    load_lora_state_dict,
    lora_state_dict,
    mark_only_lora_as_trainable,
)
from phi3_lora_plugin.lora_files.keys import file_key

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


class Everything(nn.Module):
    """Each kind of loralib layer, plain layers, a buffer called `bias`, and a name with `lora_` inside a word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = loralib.Embedding(11, 8, r=2)
        self.linear = loralib.Linear(8, 8, r=2, lora_alpha=4)
        self.merged = loralib.MergedLinear(8, 12, r=2, enable_lora=[True, False, True])
        self.conv = loralib.Conv2d(1, 4, kernel_size=3, r=2)
        self.plain = nn.Linear(8, 8)
        self.explora_net = nn.Linear(8, 8)
        self.relative_bias_table = nn.Parameter(torch.randn(4))
        self.register_buffer("bias", torch.tril(torch.ones(4, 4)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.explora_net(self.plain(self.linear(self.embed(ids))))
        return self.merged(hidden).sum() + self.conv(hidden.reshape(-1, 1, 4, 4)).sum()


def everything(seed: int = 0) -> Everything:
    torch.manual_seed(seed)
    model = Everything()
    _randomise(model)
    return model


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.normal_(std=0.1)


def peft_model(seed: int = 0, base: int = 0, **settings: Any) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": FUSED, "task_type": "CAUSAL_LM"} | settings))
    model = get_peft_model(tiny.model(base), config)
    torch.manual_seed(seed + 100)
    _randomise(model)
    return model


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- loralib's own functions as the oracle ------------------------------------------------------------------------


def test_no_bias_is_exactly_loralibs_state_but_for_words_that_contain_lora() -> None:
    model = everything()
    theirs = loralib.lora_state_dict(model)
    assert _equal(lora_state_dict(model), {k: v for k, v in theirs.items() if not k.startswith("explora_")})


def test_the_state_is_the_live_one_as_in_loralib() -> None:
    model = everything()
    state = lora_state_dict(model)
    with torch.no_grad():
        model.linear.lora_A.fill_(7.0)
    assert (state["linear.lora_A"] == 7).all() and not state["linear.lora_A"].requires_grad


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_loralibs_without_its_mistakes(bias: str) -> None:
    model = everything()
    theirs = loralib.lora_state_dict(model, bias=bias)
    wrong = {"bias", "relative_bias_table", "explora_net.weight"}  # a buffer, a table, a word that contains lora_
    wrong |= {"explora_net.bias"} if bias == "lora_only" else set()
    forgotten = {"conv.conv.bias"}  # PyPI's loralib misses the bias inside its own Conv layer
    ours = lora_state_dict(model, bias=bias)
    assert ours.keys() == (theirs.keys() - wrong) | forgotten


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_parameters_are_trained_that_are_saved(bias: str) -> None:
    model = everything()
    mark_only_lora_as_trainable(model, bias=bias)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == lora_state_dict(model, bias=bias).keys()


def test_marking_agrees_with_loralib_on_its_readme_model() -> None:
    def readme() -> nn.Module:
        return nn.Sequential(loralib.Linear(4, 4, r=2), nn.LayerNorm(4), loralib.Embedding(5, 4, r=2), nn.Linear(4, 4))

    for bias in ("none", "all", "lora_only"):
        ours, theirs = readme(), readme()
        mark_only_lora_as_trainable(ours, bias=bias)
        loralib.mark_only_lora_as_trainable(theirs, bias=bias)
        flags = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (ours, theirs)]
        assert flags[0] == flags[1]


def test_loralibs_frozen_lora_stays_frozen() -> None:
    model = everything()
    model.linear.lora_A.requires_grad_(False)
    mark_only_lora_as_trainable(model)
    assert not model.linear.lora_A.requires_grad and model.linear.lora_B.requires_grad


def test_an_unknown_bias_is_loralibs_error_and_a_value_error() -> None:
    assert issubclass(UnknownBias, NotImplementedError) and issubclass(UnknownBias, ValueError)
    for function in (mark_only_lora_as_trainable, lora_state_dict):
        with pytest.raises(UnknownBias, match="'none', 'all' or 'lora_only', got 'some'"):
            function(everything(), bias="some")


def test_readme_save_and_load_runs_against_ours() -> None:
    model = everything()
    file = io.BytesIO()
    torch.save(lora_state_dict(model), file)
    file.seek(0)
    other = everything(seed=1)
    state = torch.load(file, weights_only=True)
    result = other.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and _equal(lora_state_dict(other), lora_state_dict(model))
    report = load_lora_state_dict(everything(seed=2), state, strict=False)
    assert report == ([], []) and report.missing_keys == [] and report.unexpected_keys == []


def test_nothing_to_train_is_said(caplog: pytest.LogCaptureFixture) -> None:
    mark_only_lora_as_trainable(nn.Linear(2, 2))
    assert "no LoRA parameter" in caplog.text


# --- PEFT --------------------------------------------------------------------------------------------------------


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "full": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "embedding": {"target_modules": [*FUSED, "embed_tokens"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_file_keys_are_those_that_peft_writes(variant: str) -> None:
    model = peft_model(**VARIANTS[variant])
    theirs = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = {file_key(name): tensor for name, tensor in lora_state_dict(model).items()}
    assert _equal(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_file_and_named_spellings_all_load(variant: str) -> None:
    settings = VARIANTS[variant]
    state = lora_state_dict(peft_model(**settings))
    named = {name.replace(".default", ".lora"): tensor for name, tensor in state.items()}
    for spelled in (state, {file_key(name): tensor for name, tensor in state.items()}, named):
        for prefix in ("", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.",
                       "_checkpoint_wrapped_module."):  # fmt: skip
            target = peft_model(seed=1, **settings)
            load_lora_state_dict(target, {prefix + key: tensor for key, tensor in spelled.items()})
            assert _equal(lora_state_dict(target), state)


def test_loralib_keys_load_into_peft_and_peft_keys_into_loralib() -> None:
    source = peft_model()
    bare = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): tensor
        for name, tensor in lora_state_dict(source).items()
    }
    target = peft_model(seed=1)
    load_lora_state_dict(target, bare)
    assert _equal(lora_state_dict(target), lora_state_dict(source))

    back = nn.ModuleDict({"layer": loralib.Linear(8, 6, r=2)})
    state = {"base_model.model.layer.lora_A.weight": torch.ones(2, 8), "layer.lora_B.x.weight": torch.ones(6, 2)}
    load_lora_state_dict(back, state)
    assert (back["layer"].lora_A == 1).all() and (back["layer"].lora_B == 1).all()


def test_models_without_a_wrapper_have_the_same_functions() -> None:
    added = tiny.model()
    added.add_adapter(LoraConfig(r=4, target_modules=FUSED))
    injected = inject_adapter_in_model(LoraConfig(r=4, target_modules=FUSED), tiny.model())
    for model in (added, injected):
        _randomise(model)
        mark_only_lora_as_trainable(model)
        state = lora_state_dict(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == state.keys() and len(state) == 16
        assert set(state) <= set(model.state_dict())
        other = tiny.model()
        other.add_adapter(LoraConfig(r=4, target_modules=FUSED))
        load_lora_state_dict(other, {file_key(name): tensor for name, tensor in state.items()})
        assert _equal(lora_state_dict(other), state)


def test_an_adapter_loaded_for_inference_becomes_trainable() -> None:
    model = peft_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mark_only_lora_as_trainable(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_only_the_active_adapter_is_trained_and_each_can_be_taken_alone() -> None:
    model = peft_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["qkv_proj"], task_type="CAUSAL_LM"))
    mark_only_lora_as_trainable(model)
    assert all(".default." in n for n, p in model.named_parameters() if p.requires_grad)
    assert len(lora_state_dict(model)) == 16 + 4
    second = lora_state_dict(model, adapter="second")
    assert len(second) == 4 and all(".second." in name for name in second)
    with pytest.raises(StateError, match="no adapter 'third'; the model has default, second"):
        lora_state_dict(model, adapter="third")
    with pytest.raises(StateError, match="of another shape"):  # rank 2 into rank 4
        load_lora_state_dict(model, {file_key(name): tensor for name, tensor in second.items()})
    ones = {file_key(name): torch.ones_like(tensor) for name, tensor in second.items()}
    load_lora_state_dict(model, ones, adapter="second")
    assert all((tensor == 1).all() for tensor in lora_state_dict(model, adapter="second").values())


def test_biases_of_peft_models_follow_the_same_three_words() -> None:
    base = nn.Sequential()
    base.add_module("first", nn.Linear(4, 4))
    base.add_module("second", nn.Linear(4, 4))
    base.register_buffer("bias", torch.ones(1))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["first"]))
    prefix = "base_model.model."
    everywhere = {n for n in lora_state_dict(model, bias="all") if "lora_" not in n}
    assert everywhere == {f"{prefix}first.base_layer.bias", f"{prefix}second.bias"}
    state = lora_state_dict(model, bias="lora_only")
    assert {n for n in state if "lora_" not in n} == {f"{prefix}first.base_layer.bias"}
    changed = {name.replace("base_layer.", ""): tensor + 1 for name, tensor in state.items()}
    assert load_lora_state_dict(model, changed) == ([], [])


def test_slices_are_plain_peft_and_refuse_what_lies_between_them() -> None:
    model = add_lora(tiny.model(num_key_value_heads=2), ["q_proj", "v_proj"], r=2, alpha=4)
    state = lora_state_dict(model)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor[tensor != 0] += 1.0
            if "lora_B" in name:
                tensor[:32, :2] = 1.0
    other = add_lora(tiny.model(num_key_value_heads=2), ["q_proj", "v_proj"], r=2, alpha=4)
    load_lora_state_dict(other, state)
    assert _equal(lora_state_dict(other), state)
    before = copy.deepcopy(lora_state_dict(other))
    broken = {name: tensor + 1.0 for name, tensor in state.items()}
    with pytest.raises(StateError, match="outside the slices q_proj, v_proj"):
        load_lora_state_dict(other, broken)
    assert _equal(lora_state_dict(other), before), "a refused load changed the model"


# --- strictness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "base_model.", "net.", "base_model.model.model.model.", "module.base."])
def test_a_wrong_prefix_is_an_error_that_names_both_sides(prefix: str) -> None:
    model = peft_model()
    before = copy.deepcopy(lora_state_dict(model))
    state = {prefix + "layer." + name: tensor for name, tensor in lora_state_dict(peft_model(seed=1)).items()}
    with pytest.raises(StateError) as caught:
        load_lora_state_dict(model, state)
    assert "16 missing" in str(caught.value) and "16 unexpected" in str(caught.value)
    assert "layers.0.self_attn.o_proj.lora_A.default.weight" in str(caught.value) and prefix in str(caught.value)
    assert "and 11 more" in str(caught.value)
    assert _equal(lora_state_dict(model), before)


def test_one_missing_one_unexpected_one_misshapen_one_nan_are_all_named_at_once() -> None:
    model, source = peft_model(), peft_model(seed=1)
    state = {name: tensor.clone() for name, tensor in lora_state_dict(source).items()}
    names = list(state)
    state.pop(names[0])
    state["base_model.model.model.layers.9.mlp.down_proj.lora_A.weight"] = torch.zeros(4, 64)
    state[names[1]] = state[names[1]][:3]
    state[names[2]][0, 0] = float("nan")
    with pytest.raises(StateError) as caught:
        load_lora_state_dict(model, state)
    for part in (f"1 missing.*{names[0]}", "1 unexpected.*layers.9", f"1 of another shape: {names[1]}", names[2]):
        assert re.search(part, str(caught.value)), part


def test_a_good_file_is_reproduced_exactly(tmp_path: Path) -> None:
    source = peft_model()
    source.save_pretrained(tmp_path, save_embedding_layers=False)
    model = peft_model(seed=1)
    load_lora_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
    assert _equal(lora_state_dict(model), lora_state_dict(source))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_the_base_s_own_weight_that_peft_writes_beside_an_embedding_is_compared(target: str, tmp_path: Path) -> None:
    def adapted(seed: int) -> PeftModel:
        torch.manual_seed(seed)
        return get_peft_model(tiny.model(), LoraConfig(target_modules=["qkv_proj", target], task_type="CAUSAL_LM"))

    source, model = adapted(1), adapted(2)
    _randomise(source)
    source.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    (copied,) = [name for name in state if name.endswith(f"{target}.base_layer.weight")]
    assert load_lora_state_dict(model, {f"module.{name}": t for name, t in state.items()}) == ([], [])
    assert _equal(lora_state_dict(model), lora_state_dict(source))
    before = copy.deepcopy(lora_state_dict(model))
    for strict in (True, False):
        with pytest.raises(StateError, match=f"1 of the base, and the model has other values there: {copied}"):
            load_lora_state_dict(model, {**state, copied: state[copied] + 1}, strict=strict)
    assert _equal(lora_state_dict(model), before)


def test_values_that_are_no_numbers_are_named_where_they_are_for_something() -> None:
    model = everything()
    state = dict(lora_state_dict(everything(seed=1)))
    odd = {
        "linear.lora_A": None, "linear.lora_B": state["linear.lora_B"].numpy(), "conv.lora_A": state["conv.lora_A"] > 0,
        "embed.lora_A": state["embed.lora_A"].to(torch.complex64), "embed.lora_B": state["embed.lora_B"].to("meta"),
    }  # fmt: skip
    before = copy.deepcopy(lora_state_dict(model))
    for strict in (True, False):
        with pytest.raises(StateError) as caught:
            load_lora_state_dict(model, {**state, **odd}, strict=strict)
        assert "missing" not in str(caught.value) and "5 not floating-point numbers" in str(caught.value)
        for said in ("linear.lora_A (NoneType)", "(ndarray)", "(bool)", "(complex64)", "embed.lora_B (meta device)"):
            assert said in str(caught.value)
    assert _equal(lora_state_dict(model), before)
    report = load_lora_state_dict(model, {**state, "position_ids": torch.arange(4), "step": 7}, strict=False)
    assert report == ([], ["position_ids", "step"])


def test_not_strict_reports_and_still_refuses_other_shapes(caplog: pytest.LogCaptureFixture) -> None:
    model, source = peft_model(), peft_model(seed=1)
    state = dict(lora_state_dict(source))
    gone = next(iter(state))
    state.pop(gone)
    missing, unexpected = load_lora_state_dict(model, state | {"other": torch.ones(1)}, strict=False)
    assert missing == [gone] and unexpected == ["other"]
    assert torch.equal(lora_state_dict(model)[next(iter(state))], state[next(iter(state))])
    assert load_lora_state_dict(model, {"other": torch.ones(1)}, strict=False).unexpected_keys == ["other"]
    assert "none of the 1 tensors is for this model" in caplog.text
    with pytest.raises(StateError, match="another shape"):
        load_lora_state_dict(model, {next(iter(state)): torch.ones(1)}, strict=False)


def test_ambiguous_keys_are_refused() -> None:
    model = peft_model()
    model.add_adapter("second", LoraConfig(r=4, target_modules=FUSED, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    state = {file_key(name): tensor for name, tensor in lora_state_dict(peft_model(seed=1)).items()}
    with pytest.raises(StateError, match="could be for any of .*default.*second.*: pass adapter="):
        load_lora_state_dict(model, state)
    load_lora_state_dict(model, state, adapter="default")
    twice = lora_state_dict(peft_model(seed=1))
    key = next(iter(twice))
    with pytest.raises(StateError, match="are both for .*, and differ"):
        load_lora_state_dict(peft_model(), twice | {file_key(key): twice[key] + 1})


# --- merged layers: the state hazards of microsoft/LoRA#190 -------------------------------------------------------


def test_loading_into_merged_loralib_layers_takes_the_old_update_out_and_the_new_one_in() -> None:
    source, model = everything(), everything(seed=1)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    state = {name: tensor.clone() for name, tensor in lora_state_dict(source).items()}
    model.eval()
    assert model.linear.merged
    load_lora_state_dict(model, state)
    assert not model.training and model.linear.merged and model.embed.merged
    ids = torch.arange(8).reshape(1, 8) % 11
    with torch.no_grad():
        merged = model(ids)
        model.train()
        unmerged = model(ids)
    torch.testing.assert_close(merged, unmerged)
    for name, weight in base.items():
        torch.testing.assert_close(model.get_parameter(name), weight)


def test_a_merged_loralib_model_gives_its_lora_and_no_base() -> None:
    model = everything()
    state = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    model.eval()
    assert _equal(lora_state_dict(model), state) and all("lora_" in name for name in state)


def test_loading_into_merged_peft_layers_merges_the_new_adapter() -> None:
    model, source = peft_model(), peft_model(seed=1)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        want = source(input_ids=ids).logits
        model.merge_adapter()
        load_lora_state_dict(model, lora_state_dict(source))
        assert model.base_model.model.model.layers[0].mlp.down_proj.merged
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)


# --- wrappers and shards -----------------------------------------------------------------------------------------


def test_wrappers_leave_no_trace_in_the_keys() -> None:
    model = peft_model()
    plain = lora_state_dict(model)
    compiled, parallel = torch.compile(model), nn.DataParallel(model)
    for layer in list(model.base_model.model.model.layers):
        layer.mlp = torch.compile(layer.mlp)  # regional compilation puts _orig_mod into the middle
    for wrapped in (compiled, parallel, model):
        assert _equal(lora_state_dict(wrapped), plain)
    load_lora_state_dict(parallel, {name: tensor + 1 for name, tensor in plain.items()})
    mark_only_lora_as_trainable(compiled)
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    assert sum(p.requires_grad for p in model.parameters()) == 16


def test_a_submodule_that_is_called_module_keeps_its_name() -> None:
    model = nn.Module()
    model.module = loralib.Linear(2, 2, r=1)
    model.head = nn.Linear(2, 2)
    assert list(lora_state_dict(model)) == ["module.lora_A", "module.lora_B"]
    load_lora_state_dict(model, {"module.lora_A": torch.ones(1, 2), "module.lora_B": torch.ones(2, 1)})
    assert (model.module.lora_A == 1).all()


def sharded() -> None:
    """What each of two ranks does."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    want = {name: tensor.clone() for name, tensor in lora_state_dict(peft_model()).items()}
    model = fully_sharded(peft_model(seed=1))
    before = lora_state_dict(model)
    single = lora_state_dict(peft_model(seed=1))
    assert before.keys() == single.keys() and all(torch.equal(before[k], single[k]) for k in before)
    assert any(hasattr(p, "full_tensor") and p.to_local().numel() < p.numel() for p in model.parameters())
    load_lora_state_dict(model, want)
    got = lora_state_dict(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) and type(got[k]) is torch.Tensor for k in got)
    print("rank", dist.get_rank(), "same", flush=True)
    dist.barrier()
    os._exit(0)  # the threads of gloo now and then abort a process that ends properly


@pytest.mark.slow
def test_fsdp2_shards_are_gathered_on_every_rank_and_loaded_back(warm: Warm, tmp_path: Path) -> None:
    for rank, said in enumerate(warm.ranks(tmp_path, sharded)):
        assert f"rank {rank} same" in said, said
