"""Each way to start or train LoRA: it trains, and what it saves means the same on the original base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lora_runs import arguments, four_bit
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from test_inject import IDS, TIED, learns, trainable
from transformers import Trainer

from phi3_lora_plugin.lora.inject import add_lora, coverage
from phi3_lora_plugin.lora.methods import MethodError, initialize_loftq, loraplus_optimizer, plain_lora
from phi3_lora_plugin.lora.slices import SlicedLinear
from phi3_lora_plugin.lora.targets import TargetError
from phi3_lora_plugin.recipe import load_recipe
from phi3_lora_plugin.store.disk_writes import write_file
from phi3_lora_plugin.training.arguments import lora_options

pytestmark = pytest.mark.slow


def batches(count: int = 3, rows: int = 4, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 512, (rows, 16), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append(batch | {"labels": ids} if labels else batch)
    return found


def build(**options: Any) -> PeftModel:
    torch.manual_seed(1)
    return add_lora(tiny.model(**options.pop("config", {})), options.pop("targets", "all-linear"), 4, 8, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def reloaded(model: PeftModel, folder: Path, **config: Any) -> PeftModel:
    """The adapter as PEFT saves it, on a fresh base."""
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(tiny.model(**config), folder)


METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 7]},
    "trainable_token_indices-tied": {"trainable_token_indices": [5, 7], "config": TIED},
    "modules_to_save-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "config": TIED},
    "rank_pattern": {"rank_pattern": {"qkv_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"down_proj": 2}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "eva": {"init_lora_weights": "eva", "data": batches()},
    "eva-rho": {"init_lora_weights": "eva", "data": batches(), "eva_config": {"rho": 2.0}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian-slices": {"targets": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"},
    "random-slices": {"targets": ["q_proj", "v_proj"], "init_lora_weights": False},
}


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_saves_and_reloads_on_the_original_base(name: str, tmp_path: Path) -> None:
    options = dict(METHODS[name])
    config = options.get("config", {})
    model = build(**options)
    learns(model)
    assert trainable(model)
    fresh = reloaded(model, tmp_path, **config)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)


IN_A_RECIPE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "modules_to_save": (["lora.modules_to_save=[lm_head]"], {}),
    "modules_to_save-tied": (["lora.modules_to_save=[embed_tokens]", "lora.ensure_weight_tying=true"], TIED),
    "trainable_token_indices": (["lora.trainable_token_indices=[5, 7]"], {}),
    "trainable_token_indices-tied": (["lora.trainable_token_indices=[5, 7]"], TIED),
    "rank_pattern": (["lora.rank_pattern={qkv_proj: 2, layers.0.mlp.down_proj: 8}"], {}),
    "alpha_pattern": (["lora.alpha_pattern={down_proj: 2}"], {}),
    "layers_to_transform": (["lora.layers_to_transform=[1]"], {}),
    "dora": (["lora.dora=true"], {}),
    "rslora": (["lora.rslora=true", "lora.targets=[q_proj, up_proj]"], {}),
    "pissa": (["lora.init=pissa"], {}),
    "olora": (["lora.init=olora"], {}),
    "eva": (["lora.init=eva"], {}),
    "loftq": (["lora.init=loftq", "model.quantize=nf4"], {}),
    "loraplus": (["lora.loraplus_lr_ratio=16"], {}),
}


@pytest.mark.parametrize("name", IN_A_RECIPE)
def test_each_method_of_a_recipe_trains_and_its_checkpoint_opens_with_plain_peft(name: str, tmp_path: Path) -> None:
    from phi3_lora_plugin.lora.snapshot import take
    from phi3_lora_plugin.store.adapter_files import adapter_files

    overrides, config = IN_A_RECIPE[name]
    given = load_recipe("tiny-cpu", ["lora.r=4", "lora.alpha=8", *overrides])
    quantised = given.model.quantize == "nf4"
    if quantised:
        pytest.importorskip("bitsandbytes")
    options = lora_options(given) | ({"data": batches()} if given.lora.init == "eva" else {})
    torch.manual_seed(1)
    model = add_lora(four_bit(tmp_path / "base") if quantised else tiny.model(**config), **options)
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    if given.lora.loraplus_lr_ratio:
        args = arguments(tmp_path, learning_rate=1e-3)
        learns(model, loraplus_optimizer(model, args, given.lora.loraplus_lr_ratio))
    else:
        learns(model)
    assert all(not torch.equal(value, before[key]) for key, value in model.named_parameters() if key in before)
    snapshot = take(model)
    assert snapshot is not None
    (tmp_path / "adapter").mkdir()
    for file, content in adapter_files(snapshot).items():
        write_file(tmp_path / "adapter" / file, content)
    base = four_bit(tmp_path / "base") if quantised else tiny.model(**config)
    fresh = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-3, atol=1e-3 if quantised else 1e-5)


@pytest.mark.parametrize(
    "name", ["default", "rslora", "dora", "eva", "pissa", "olora", "orthogonal", "modules_to_save"]
)
def test_a_method_starts_where_the_base_is(name: str) -> None:
    torch.testing.assert_close(logits(build(**METHODS[name])), logits(tiny.model()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_methods_that_rewrite_the_base_have_a_plain_form(init: str, rslora: bool, tmp_path: Path) -> None:
    """A host that does not know PiSSA puts A and B on the original base, as any LoRA."""
    model = build(init_lora_weights=init, use_rslora=rslora, rank_pattern={"qkv_proj": 2}, alpha_pattern={"o_proj": 2})
    learns(model)
    state, config = plain_lora(model)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    assert config.init_lora_weights is True and config.r == 8 and config.rank_pattern == {"qkv_proj": 4}
    fresh = PeftModel.from_pretrained(tiny.model(), tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(fresh) - logits(tiny.model())).abs().max() > 1e-2
    torch.testing.assert_close(logits(fresh.merge_and_unload()), logits(model), rtol=1e-4, atol=1e-5)


def test_the_plain_form_of_plain_lora_is_itself() -> None:
    model = build(targets=["q_proj", "o_proj"])
    learns(model)
    state, config = plain_lora(model)
    expected = get_peft_model_state_dict(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert (config.r, config.rank_pattern, config.inference_mode) == (4, {}, True)
    assert model.peft_config["default"].inference_mode is False


def test_the_plain_form_needs_the_start(tmp_path: Path) -> None:
    model = build(init_lora_weights="pissa")
    with pytest.raises(MethodError, match="started is not known"):
        plain_lora(reloaded(model, tmp_path))


def test_randomised_pissa_splits_the_base_the_same_way_again() -> None:
    first = build(init_lora_weights="pissa_niter_2")
    torch.manual_seed(99)
    again = add_lora(tiny.model(), "all-linear", 4, 8, init_lora_weights="pissa_niter_2")
    for (name, one), (_, other) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_gaussian_slices_start_with_the_deviation_of_one_slice() -> None:
    torch.manual_seed(0)
    model = add_lora(tiny.model(hidden_size=512), ["q_proj", "k_proj", "v_proj"], 8, 8, init_lora_weights="gaussian")
    weight = model.base_model.model.model.layers[0].self_attn.qkv_proj.lora_A["default"].weight
    assert weight.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_random_slices_start_empty_between_the_blocks() -> None:
    model = build(**METHODS["random-slices"])
    linear = model.base_model.model.model.layers[0].self_attn.qkv_proj.lora_B["default"]
    assert isinstance(linear, SlicedLinear) and linear.weight[:32, :4].any()
    assert not linear.weight[:32, 4:].any() and not linear.weight[32:64].any()


def test_dora_trains_magnitudes_and_coverage_counts_them() -> None:
    model = build(use_dora=True)
    assert any("lora_magnitude_vector" in name for name in trainable(model))
    assert sum(row.parameters for row in coverage(model)) == model.get_nb_trainable_parameters()[0]


def test_single_tokens_train_and_the_others_stay() -> None:
    for config in ({}, TIED):
        model = build(trainable_token_indices=[5, 7], config=config)
        before = model.get_input_embeddings()(torch.arange(10)).detach()
        learns(model)
        after = model.get_input_embeddings()(torch.arange(10)).detach()
        assert [i for i in range(10) if not torch.equal(before[i], after[i])] == [5, 7]
        assert ("model.embed_tokens", None) in {(row.module, row.rank) for row in coverage(model)}


def test_eva_starts_from_the_data() -> None:
    model, plain = build(init_lora_weights="eva", data=batches()), build()
    start = [p for name, p in model.named_parameters() if "lora_A" in name]
    assert all(torch.allclose(a @ a.T, torch.eye(4), atol=1e-4) for a in start)  # orthonormal directions
    assert not torch.equal(start[0], next(p for n, p in plain.named_parameters() if "lora_A" in n))
    config = model.peft_config["default"]
    assert config.init_lora_weights is True and config.eva_config is None
    assert config.target_modules == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"] and not config.rank_pattern


def test_eva_moves_rank_only_when_told_to() -> None:
    even = build(init_lora_weights="eva", data=batches(), rank_pattern={"o_proj": 2})
    assert {row.module: row.rank for row in coverage(even)}["self_attn.o_proj"] == 2
    moved = build(**METHODS["eva-rho"])
    assert len({row.rank for row in coverage(moved)}) > 1


def test_eva_says_what_its_data_lack() -> None:
    for data in ([], batches(rows=4, count=1)):
        for batch in data:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        with pytest.raises(MethodError, match="batches of at least 4 tokens"):
            build(init_lora_weights="eva", data=data)
    build(init_lora_weights="eva", data=batches(labels=False))


def test_loftq_starts_a_4_bit_base_nearer_to_the_original(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    plain = add_lora(four_bit(tmp_path / "base"), "all-linear", 8, 32)
    model = add_lora(four_bit(tmp_path / "base"), "all-linear", 8, 32, init_lora_weights="loftq")
    original = type(model.get_base_model()).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    module = "model.layers.0.mlp.down_proj"
    exact = original.get_submodule(module).weight.float()
    errors = []
    for each in (plain, model):
        layer = each.base_model.model.get_submodule(module)
        errors.append((exact - dequantised(layer.base_layer) - layer.get_delta_weight("default")).norm().item())
    assert errors[1] < 0.9 * errors[0]
    learns(model)

    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(four_bit(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-3, atol=1e-3)


def dequantised(layer: Any) -> torch.Tensor:
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def test_loftq_needs_the_unquantised_weights(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = add_lora(four_bit(tmp_path / "base"), "all-linear", 4, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MethodError, match="needs the unquantised weights as safetensors"):
        initialize_loftq(model, tmp_path / "empty")
    with pytest.raises(MethodError, match="neither a folder nor in the hub's cache"):
        initialize_loftq(model, "nobody/nothing")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_methods_that_rewrite_the_base_need_an_unquantised_one(init: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(TargetError, match="use an unquantised base"):
        add_lora(four_bit(tmp_path), "all-linear", 4, 8, init_lora_weights=init)


def test_ranks_that_a_factorisation_does_not_have_are_refused() -> None:
    with pytest.raises(TargetError, match="needs a rank of at most 32 in model.layers.0.self_attn.qkv_proj, got 33"):
        add_lora(tiny.model(), "all-linear", 33, 8, init_lora_weights="pissa")
    with pytest.raises(TargetError, match="needs even ranks"):
        add_lora(tiny.model(), "all-linear", 3, 8, init_lora_weights="orthogonal")


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["fused", "slices"])
def test_loraplus_trains_b_faster_than_a(targets: Any, tmp_path: Path) -> None:
    model = build(targets=targets)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 3, "lr_scheduler_type": "constant"}
    args = arguments(tmp_path, **settings)
    optimizer = loraplus_optimizer(model, args, 16)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert rates.keys() == {id(p) for p in named.values()}
    assert all(rates[id(p)] == (1e-3 if "lora_A" in name else 16e-3, 0.1) for name, p in named.items())
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    before = {name: p.detach().clone() for name, p in named.items()}
    trainer = Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))
    losses = [entry["loss"] for entry in (trainer.train(), trainer.state.log_history)[1] if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in named.items())
    model.state_dict()  # refuses entries between the blocks


def test_loraplus_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="at least 1"):
        loraplus_optimizer(build(), arguments(tmp_path), 0.5)
