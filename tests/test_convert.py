"""Adapters and models of other people's making come in and go out without changing a single logit."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import loralib
import pytest
import tiny
import torch
from lora_runs import adapter_on, load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from phi3_lora_plugin import load_lora_state_dict
from phi3_lora_plugin.cli import app
from phi3_lora_plugin.evaluate.generate import with_adapter
from phi3_lora_plugin.export.base_layouts import BaseLayoutError, convert_base
from phi3_lora_plugin.export.convert import ConvertError, convert
from phi3_lora_plugin.export.merge import merge
from phi3_lora_plugin.inspect.inspect import inspect
from phi3_lora_plugin.lora_files.layouts import LayoutError
from phi3_lora_plugin.lora_files.loralib_files import LoralibError, parse_enable_lora
from phi3_lora_plugin.lora_files.peft_files import PeftFilesError, parts, read_peft
from phi3_lora_plugin.lora_files.servable import servable
from phi3_lora_plugin.lora_files.torchtune_files import TorchtuneError
from phi3_lora_plugin.model.folder import ModelError
from phi3_lora_plugin.model.shards import Weights

pytestmark = pytest.mark.slow

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 27).reshape(2, 12)


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = load(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def tensors_of(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def config_of(adapter: Path) -> dict:
    return json.loads((adapter / "adapter_config.json").read_text())


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def bases(request, tmp_path_factory) -> tuple[Path, Path]:
    """(a tiny Phi-3, the same model as a Llama, as unsloth's mirrors are)"""
    folder = tmp_path_factory.mktemp("bases")
    fused = tiny.base(folder / "phi3", num_key_value_heads=request.param)
    convert_base(fused, folder / "llama", "llama-base")
    return fused, folder / "llama"


@pytest.fixture
def fused(bases) -> Path:
    return bases[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"qkv_proj": 6}, "alpha_pattern": {"layers.1.mlp.gate_up_proj": 20}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
        {"layers_to_transform": [1]},
        {"lora_bias": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_a_fused_adapter_runs_on_the_split_base_and_comes_back_as_it_was(bases, tmp_path, options):
    fused, llama = bases
    adapter = adapter_on(fused, tmp_path / "fused", **options)

    report = convert(adapter, tmp_path / "split", "split", base=fused, target_base=str(llama))
    same(logits(llama, tmp_path / "split"), logits(fused, adapter))
    assert not any("fused" in key or "qkv" in key for key in tensors_of(tmp_path / "split"))
    assert any(row.rule.startswith("A shared") for row in report.rows)

    convert(tmp_path / "split", tmp_path / "back", "fused", base=fused)
    before, after = (tensors_of(path) for path in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    same(logits(fused, tmp_path / "back"), logits(fused, adapter))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": SPLIT},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": SPLIT, "use_rslora": True},
        {"target_modules": SPLIT, "use_dora": True},
        {"target_modules": SPLIT, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3, "up_proj": 32}},
        {"target_modules": ["gate_proj", "o_proj"], "layers_to_transform": [0]},
    ],
    ids=["all", "q-v", "rslora", "dora", "patterns", "gate-of-layer-0"],
)
def test_an_adapter_of_a_split_mirror_runs_on_the_fused_base(bases, tmp_path, options):
    fused, llama = bases
    adapter = adapter_on(llama, tmp_path / "split", **options)
    convert(adapter, tmp_path / "fused", "fused", base=fused)
    same(logits(fused, tmp_path / "fused"), logits(llama, adapter))
    config = config_of(tmp_path / "fused")
    assert config["base_model_name_or_path"] == str(fused)
    if options == {"target_modules": SPLIT}:
        assert config["rank_pattern"] == {"qkv_proj": 12, "gate_up_proj": 8}
        assert config["alpha_pattern"] == {"qkv_proj": 24, "gate_up_proj": 16}


def test_the_split_mirror_itself_says_where_the_rows_begin(bases, tmp_path):
    fused, llama = bases
    # Its config names the mirror, as unsloth's do.
    adapter = adapter_on(llama, tmp_path / "split", target_modules=SPLIT)
    report = convert(adapter, tmp_path / "fused", "fused")
    same(logits(fused, tmp_path / "fused"), logits(llama, adapter))
    assert config_of(tmp_path / "fused")["base_model_name_or_path"] is None
    assert any("--target-base" in note for note in report.notes)
    convert(tmp_path / "fused", tmp_path / "again", "split", base=llama)
    same(logits(llama, tmp_path / "again"), logits(llama, adapter))
    assert config_of(tmp_path / "again")["base_model_name_or_path"] == str(llama)
    with pytest.raises(ConvertError, match="is a split copy; llama.cpp's adapter is for the fused model"):
        convert(adapter, tmp_path / "a.gguf", "gguf")


def test_a_written_config_is_minimal_sorted_and_the_same_every_time(fused, tmp_path):
    adapter = adapter_on(fused, tmp_path / "fused")
    for name in ("one", "two"):
        convert(adapter, tmp_path / name, "split", base=fused)
    one, two = (tmp_path / name for name in ("one", "two"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    config = config_of(one)
    assert list(config) == sorted(config) and config["target_modules"] == sorted(SPLIT)
    assert not {"eva_config", "corda_config", "peft_version", "use_dora"} & set(config)


def with_loralib(base: Path, seed: int = 0, **flags) -> torch.nn.Module:
    """The model of `base` with loralib's own layers in it, as its README says, and LoRA weights that do something."""
    model = load(base)
    torch.manual_seed(seed)
    for name, module in list(model.named_modules()):
        last = name.rpartition(".")[2]
        if last not in FUSED:
            continue
        shape = (module.in_features, module.out_features)
        kind = loralib.MergedLinear if last in flags else loralib.Linear
        more = {"enable_lora": flags[last]} if last in flags else {}
        layer = kind(*shape, r=2, lora_alpha=6, bias=False, merge_weights=False, **more)
        layer.weight.data = module.weight.data
        torch.nn.init.normal_(layer.lora_B, std=0.2)
        model.get_submodule(name.rpartition(".")[0]).register_module(last, layer)
    loralib.mark_only_lora_as_trainable(model)
    return model.eval()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loralib_layers_become_a_peft_adapter_and_go_back(fused, tmp_path, suffix):
    groups = 3 if load(fused).config.num_key_value_heads == 4 else 4
    qkv = [True, False, True] if groups == 3 else [True, True, False, True]
    flags = {"qkv_proj": qkv, "gate_up_proj": [True, False]}
    model = with_loralib(fused, **flags)
    file = tmp_path / f"lora{suffix}"
    state = {key: value.clone() for key, value in loralib.lora_state_dict(model).items()}
    torch.save(state, file) if suffix == ".pt" else save_file(state, file)
    with torch.inference_mode():
        wanted = model(input_ids=IDS).logits

    report = convert(file, tmp_path / "peft", "peft", base=fused, alpha=6, enable_lora=flags)
    same(logits(fused, tmp_path / "peft"), wanted)
    assert report.kind == "loralib" and any(row.rule.startswith("MergedLinear") for row in report.rows)

    file = tmp_path / f"back{suffix}"
    convert(tmp_path / "peft", file, "loralib", base=fused)
    back = torch.load(file, weights_only=True) if suffix == ".pt" else load_file(file)
    assert back.keys() == state.keys() and all("lora_" in key for key in back)
    assert all(torch.equal(back[key], state[key]) for key in state)
    sidecar = json.loads((tmp_path / f"back{suffix}.json").read_text())
    assert sidecar["r"] == 2 and sidecar["alpha"] == 6
    assert sidecar["modules"]["model.layers.0.self_attn.qkv_proj"]["enable_lora"] == flags["qkv_proj"]

    convert(file, tmp_path / "again", "fused", base=fused)  # the sidecar says it all
    same(logits(fused, tmp_path / "again"), wanted)


def test_a_loralib_embedding_is_peft_s_embedding(tmp_path):
    torch.manual_seed(0)
    layer = loralib.Embedding(512, 32, r=2, lora_alpha=6, merge_weights=False)
    torch.nn.init.normal_(layer.lora_A)
    base = tiny.base(tmp_path / "base")
    model = load(base)
    layer.weight.data = model.model.embed_tokens.weight.data
    model.model.embed_tokens = layer
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    with torch.inference_mode():
        wanted = model.eval()(input_ids=IDS).logits
    report = convert(tmp_path / "lora.pt", tmp_path / "peft", "peft", base=base, alpha=6)
    same(logits(base, tmp_path / "peft"), wanted)
    assert any("embeddings: embed_tokens" in note for note in report.notes)


def test_what_loralib_does_not_store_is_asked_for(fused, tmp_path):
    model = with_loralib(fused, qkv_proj=[True, False, False, True])
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    with pytest.raises(LoralibError, match="alpha is missing: loralib does not store r or lora_alpha") as caught:
        convert(tmp_path / "lora.pt", tmp_path / "peft", "peft", base=fused)
    assert "this is a MergedLinear; pass its flags, for example --enable-lora qkv_proj=T,F,T" in str(caught.value)
    with pytest.raises(LoralibError, match="r is set to 8, but the tensors have rank 2"):
        convert(tmp_path / "lora.pt", tmp_path / "peft", "peft", base=fused, alpha=6, r=8)
    with pytest.raises(LoralibError, match="do not belong to r=2 with enable_lora=T,F"):
        convert(tmp_path / "lora.pt", tmp_path / "peft", "peft", base=fused, alpha=6, enable_lora={"qkv_proj": (1, 0)})
    assert not (tmp_path / "peft").exists()


def test_a_merged_linear_with_one_group_is_caught_by_its_height(tmp_path):
    base = tiny.base(tmp_path / "base")
    model = with_loralib(base, qkv_proj=[True, False, False])
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    said = "B reaches over 32 rows, the model's qkv_proj has 96; if it was a MergedLinear"
    with pytest.raises(LoralibError, match=said):
        convert(tmp_path / "lora.pt", tmp_path / "peft", "peft", base=base, alpha=6)


def test_conv_layers_biases_and_code_are_refused(tmp_path):
    torch.manual_seed(0)
    conv = torch.nn.Sequential(loralib.Conv2d(4, 8, 3, r=2, lora_alpha=4))
    torch.save(loralib.lora_state_dict(conv), tmp_path / "conv.pt")
    with pytest.raises(LoralibError, match="r is set to 2, but the tensors have rank 6"):
        convert(tmp_path / "conv.pt", tmp_path / "out", "peft", alpha=4, r=2)
    (tmp_path / "conv.pt.json").write_text(json.dumps({"alpha": 4, "modules": {"0": {"kind": "conv2d", "alpha": 4}}}))
    with pytest.raises(LoralibError, match="a loralib Conv layer .* has no PEFT counterpart"):
        convert(tmp_path / "conv.pt", tmp_path / "out", "peft")

    linear = torch.nn.Sequential(loralib.Linear(4, 4, r=2))
    torch.save(loralib.lora_state_dict(linear, bias="all"), tmp_path / "bias.pt")
    with pytest.raises(LoralibError, match=r"1 tensors are not LoRA \(0.bias\)"):
        convert(tmp_path / "bias.pt", tmp_path / "out", "peft", alpha=1)

    class Touch:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a.lora_A": Touch()}))
    with pytest.raises(LoralibError, match="needs code from it to be run, which is never done"):
        convert(tmp_path / "evil.pt", tmp_path / "out", "peft", alpha=1)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_adapters_that_are_broken_are_refused_whatever_they_become(fused, tmp_path):
    adapter = adapter_on(fused, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    save_file({**tensors, key: tensors[key].index_fill(0, torch.tensor([3]), float("nan"))}, file)
    for to in ("peft", "split"):
        with pytest.raises(ConvertError, match=r"1 tensors are not finite .*layers.1.mlp.down_proj.lora_B"):
            convert(adapter, tmp_path / "out", to)
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:4], b""):
        file.write_bytes(content)
        with pytest.raises(PeftFilesError, match="adapter_model.safetensors is cut off or damaged"):
            convert(adapter, tmp_path / "out", "split")
        for name in ("a.safetensors", "a.pt"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(LoralibError, match=f"{name} is (cut off or )?damaged"):
                convert(tmp_path / name, tmp_path / "out", "peft", alpha=1)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(PeftFilesError, match="adapter_model.bin is damaged"):
        convert(adapter, tmp_path / "out", "split")
    base = Path(shutil.copytree(fused, tmp_path / "base"))
    (base / "model.safetensors").write_bytes((fused / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ModelError, match="model.safetensors is cut off or damaged"):
        convert(base, tmp_path / "out", "llama-base")
    assert not (tmp_path / "out").exists()


def test_torchtune_names_come_in(fused, tmp_path):
    torch.manual_seed(0)
    config = load(fused).config
    head = config.hidden_size // config.num_attention_heads
    heights = {
        "attn.q_proj": config.num_attention_heads * head,
        "attn.v_proj": config.num_key_value_heads * head,
        "attn.output_proj": 32,
        "mlp.w1": 64,
        "mlp.w2": 32,
        "mlp.w3": 64,
    }
    state = {}
    for layer in range(2):
        for name, out in heights.items():
            width = 64 if name == "mlp.w2" else 32
            state[f"layers.{layer}.{name}.lora_a.weight"] = torch.randn(2, width) * 0.1
            state[f"layers.{layer}.{name}.lora_b.weight"] = torch.randn(out, 2) * 0.1
    torch.save(state, tmp_path / "adapter_model.pt")

    with pytest.raises(TorchtuneError, match="alpha is missing: torchtune stores none with a Phi-3 adapter"):
        convert(tmp_path / "adapter_model.pt", tmp_path / "peft", "fused", base=fused)
    convert(tmp_path / "adapter_model.pt", tmp_path / "peft", "fused", base=fused, alpha=16)

    merged = PeftModel.from_pretrained(load(fused), str(tmp_path / "peft")).merge_and_unload().state_dict()
    plain = load(fused).state_dict()
    name = "layers.1.mlp.w3"
    delta = (merged["model.layers.1.mlp.gate_up_proj.weight"] - plain["model.layers.1.mlp.gate_up_proj.weight"])[64:]
    wanted = state[f"{name}.lora_b.weight"] @ state[f"{name}.lora_a.weight"] * 8  # w3 is "up", the second half
    torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-6)

    state["layers.0.attn.qkv.lora_a.weight"] = torch.zeros(2, 32)
    torch.save(state, tmp_path / "odd.pt")
    said = "'layers.0.attn.qkv.lora_a.weight' is not a key of a torchtune Phi-3 adapter"
    with pytest.raises(TorchtuneError, match=said):
        convert(tmp_path / "odd.pt", tmp_path / "odd", "fused", base=fused, alpha=16)


def test_named_and_wrapped_adapters_are_understood_or_pointed_at(fused, tmp_path):
    model = get_peft_model(load(fused), LoraConfig(r=2, target_modules=FUSED), adapter_name="mine")
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(PeftFilesError, match="it has the adapters mine inside: name one of these folders"):
        read_peft(tmp_path / "run")
    convert(tmp_path / "run" / "mine", tmp_path / "split", "split", base=fused)

    adapter = adapter_on(fused, tmp_path / "plain")
    raw = tensors_of(adapter)
    wrapped = {
        f"module.{key.replace('lora_A.', 'lora_A.default.').replace('lora_B.', 'lora_B.default.')}": raw[key]
        for key in raw
    }
    save_file(wrapped, adapter / "adapter_model.safetensors")
    report = convert(adapter, tmp_path / "clean", "peft", base=fused)
    assert tensors_of(tmp_path / "clean").keys() == raw.keys()
    assert any("16 keys were brought to PEFT's names" in note for note in report.notes)

    save_file(wrapped | {key.replace("default", "other"): value.clone() for key, value in wrapped.items()},
              adapter / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(PeftFilesError, match="holds several adapters"):
        read_peft(adapter)


WRAPPED = {
    "DDP": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace("base_model.model.", "base_model.model.module.", 1),
    "FSDP": lambda key: key.replace("base_model.model.", "base_model.model._fsdp_wrapped_module.", 1),
    "compiled": lambda key: f"_orig_mod.{key}",
    "checkpointed": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "all": lambda key: (
        "module._orig_mod." + key.replace(".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.")
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_adapter_is_the_same_to_every_reader(fused, tmp_path, kind):
    adapter = adapter_on(fused, tmp_path / "a")
    raw = tensors_of(adapter)
    wrapped = {WRAPPED[kind](key): value for key, value in raw.items()}
    odd = len(wrapped.keys() - raw.keys())
    wanted = logits(fused, adapter)
    save_file(wrapped, adapter / "adapter_model.safetensors")
    said = f"{odd} keys are spelled in a way that PEFT silently ignores"
    assert any(problem.what.startswith(said) for problem in inspect(adapter).problems)
    convert(adapter, tmp_path / "clean", "peft", base=fused)
    cleaned = tensors_of(tmp_path / "clean")
    assert cleaned.keys() == raw.keys() and all(torch.equal(cleaned[key], raw[key]) for key in raw)
    report = merge(adapter, fused, tmp_path / "merged", check="logits")
    assert any("brought to PEFT's names" in note for note in report.notes)
    same(load(tmp_path / "merged")(IDS).logits, wanted)
    same(with_adapter(load(fused), adapter)(IDS).logits, wanted)
    target = get_peft_model(load(fused), LoraConfig(r=4, lora_alpha=8, target_modules=FUSED))
    load_lora_state_dict(target, wrapped)
    same(target(IDS).logits, wanted)
    bare = {key.replace("base_model.model.", "").removesuffix(".weight"): value for key, value in wrapped.items()}
    torch.save(bare, tmp_path / "lora.pt")
    convert(tmp_path / "lora.pt", tmp_path / "from-loralib", "peft", base=fused, alpha=8)
    assert tensors_of(tmp_path / "from-loralib").keys() == raw.keys()


def test_what_would_be_silently_wrong_is_refused_with_its_reason(fused, tmp_path):
    def changed(**settings) -> Path:
        adapter = adapter_on(fused, tmp_path / "adapter")
        tiny.edit(adapter / "adapter_config.json", **settings)
        return adapter

    cases = {
        "use_qalora=True changes what the adapter computes": {"use_qalora": True},
        "someday_config={'a': 1} changes what the adapter computes": {"someday_config": {"a": 1}},
        "peft_type is 'LOHA'": {"peft_type": "LOHA"},
        "fan_in_fan_out is set": {"fan_in_fan_out": True},
        "it started from 'pissa'": {"init_lora_weights": "pissa"},
        "the config has rank 5, but A is": {"rank_pattern": {"o_proj": 5}},
    }
    for message, settings in cases.items():
        with pytest.raises(PeftFilesError, match=message):
            convert(changed(**settings), tmp_path / "out", "split", base=fused)
    with pytest.raises(ConvertError, match="whose config has r and alpha"):
        convert(changed(), tmp_path / "out", "split", base=fused, alpha=3)
    full = adapter_on(fused, tmp_path / "full", modules_to_save=["lm_head"])
    said = "lm_head.weight: trained in full or by token, which loralib files do not hold"
    with pytest.raises(ConvertError, match=said):
        convert(full, tmp_path / "out.pt", "loralib", base=fused)
    dora = adapter_on(fused, tmp_path / "dora", use_dora=True)
    with pytest.raises(LoralibError, match="loralib has no DoRA"):
        convert(dora, tmp_path / "out.pt", "loralib", base=fused)
    other = tiny.base(tmp_path / "other", hidden_size=64, num_hidden_layers=1)
    with pytest.raises(ConvertError, match=r"do not fit the model's weight .*64|only 1 layers"):
        convert(changed(), tmp_path / "out", "split", base=other)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        ({"target_modules": ["qkv_proj", "embed_tokens"]}, "embeddings: embed_tokens"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias: servers silently drop"),
        ({"lora_bias": True}, "bias: servers silently drop"),
        ({"r": 65}, "rank 65 is above the limit of 64"),
        ({"rank_pattern": {"qkv_proj": 128}, "alpha_pattern": {"qkv_proj": 256}}, "rank 128 is above"),
        ({"alpha_pattern": {"qkv_proj": 5}}, "scaled differently"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"init_lora_weights": "olora"}, "meant for a changed base"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is empty"),
        ({"peft_type": "IA3"}, "servers load LORA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_servability_flags_each_obstacle_and_nothing_else(tmp_path, settings, flag):
    good = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": FUSED, "base_model_name_or_path": "x/y"}
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(16, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(good))
    assert servable(tmp_path) == []
    (tmp_path / "adapter_config.json").write_text(json.dumps(good | settings))
    problems = servable(tmp_path)
    assert any(flag in problem for problem in problems), problems
    assert len(problems) == 1


MIXED = {
    "fused": {"target_modules": FUSED, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3, "down_proj": 5}},
    "split": {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "alpha_pattern": {"k_proj": 3}},
    "rslora": {"target_modules": FUSED, "use_rslora": True, "rank_pattern": {"qkv_proj": 9}},
    "bias": {"target_modules": FUSED, "lora_bias": True, "alpha_pattern": {"o_proj": 3}},
}


@pytest.mark.parametrize("to", ["peft", "fused", "split"])
@pytest.mark.parametrize("kind", MIXED)
def test_uniform_is_right_for_who_reads_only_r_and_lora_alpha(bases, tmp_path, kind, to):
    fused, split = bases
    adapter = adapter_on(split if kind == "split" else fused, tmp_path / "mixed", **MIXED[kind])
    options = {"target_base": "microsoft/x"} if to != "peft" else {}
    convert(adapter, tmp_path / "one", to, base=fused, uniform=True, overwrite=True, **options)
    config = config_of(tmp_path / "one")
    assert not {"rank_pattern", "alpha_pattern", "use_rslora"} & set(config)
    tensors = tensors_of(tmp_path / "one")
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {config["r"]}
    convert(adapter, tmp_path / "plain", to, base=fused, **options)
    plain = parts(read_peft(tmp_path / "plain")).loras
    assert len(plain) == sum("lora_A" in key for key in tensors)
    if kind != "split" and to == "peft":
        same(logits(fused, tmp_path / "one"), logits(fused, adapter))
    for lora in plain:
        a, b = (tensors[f"base_model.model.{lora.module}.lora_{side}.weight"] for side in "AB")
        scaling = config["lora_alpha"] / config["r"]
        torch.testing.assert_close(b @ a * scaling, lora.delta(), rtol=1e-4, atol=1e-6)
        if lora.bias is not None:
            bias = tensors[f"base_model.model.{lora.module}.lora_B.bias"]
            torch.testing.assert_close(bias * scaling, lora.bias * lora.scaling)


def test_embeddings_that_equal_the_bases_are_dropped_on_request(fused, tmp_path):
    adapter = adapter_on(fused, tmp_path / "a")
    weights = adapter / "adapter_model.safetensors"
    own = load_file(fused / "model.safetensors")["model.embed_tokens.weight"]
    saved = load_file(weights) | {"base_model.model.model.embed_tokens.weight": own.half().float()}
    save_file(saved | {"base_model.model.lm_head.weight": own + 1}, weights)
    report = convert(adapter, tmp_path / "out", "peft", base=fused, drop_equal_embeddings=True)
    left = tensors_of(tmp_path / "out")
    equal = bool((own.half().float() == own).all())
    assert any("embed_tokens" in key for key in left) is not equal and any("lm_head" in key for key in left)
    save_file(saved | {"base_model.model.model.embed_tokens.weight": own}, weights)
    report = convert(adapter, tmp_path / "bare", "peft", base=fused, drop_equal_embeddings=True)
    assert any("they equal the base's: model.embed_tokens.weight" in note for note in report.notes)
    assert not any("embed_tokens" in key for key in tensors_of(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"num_key_value_heads": 2}, "llama"),
        ({"tie_word_embeddings": True}, "llama"),
        ({"sliding_window": 16, "num_key_value_heads": 1}, "mistral"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}}, "llama"),
        (tiny.LONGROPE | {"sliding_window": 262144}, "llama"),
    ],
    ids=["gqa", "tied", "window", "theta", "longrope"],
)
def test_a_base_becomes_split_and_fused_again_with_equal_logits(tmp_path, changes, kind):
    base = tiny.base(tmp_path / "phi3", **changes)
    tiny.edit(base / "config.json", auto_map={"AutoModel": "modeling_phi3.Phi3"})
    rows, notes = convert_base(base, tmp_path / "split", "llama-base", max_shard="50KB")
    written = json.loads((tmp_path / "split" / "config.json").read_text())
    assert written["model_type"] == kind and "auto_map" not in written
    for file in ("model.safetensors.index.json", "tokenizer.json"):
        assert (tmp_path / "split" / file).is_file()
    assert any("logits compared" in note for note in notes)
    ids = torch.arange(40)[None] + 3
    with torch.inference_mode():
        for part in (ids[:, :12], ids):
            same(load(tmp_path / "split")(input_ids=part).logits, load(base)(input_ids=part).logits)

    convert_base(tmp_path / "split", tmp_path / "again", "phi3-base")
    one, two = Weights(base), Weights(tmp_path / "again")
    assert set(one) == set(two) and all(torch.equal(one.read(name), two.read(name)) for name in one)
    assert len(rows) == len(Weights(tmp_path / "split"))


def test_a_base_that_the_other_layout_cannot_say_is_refused(tmp_path):
    partial = tiny.base(tmp_path / "partial", rope_parameters={
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75})  # fmt: skip
    with pytest.raises(BaseLayoutError, match="it rotates only 75% of each head"):
        convert_base(partial, tmp_path / "out", "llama-base")
    good = tiny.base(tmp_path / "good")
    convert_base(good, tmp_path / "llama", "llama-base")
    path = tmp_path / "llama" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"attention_bias": True, "rope_scaling": {"rope_type": "llama3"}}))
    with pytest.raises(BaseLayoutError, match="(?s)rope is 'llama3'.*attention_bias is set"):
        convert_base(tmp_path / "llama", tmp_path / "out", "phi3-base")
    path.write_text(json.dumps(config | {"rope_theta": 99.0}))
    convert_base(tmp_path / "llama", tmp_path / "theta", "phi3-base")
    with pytest.raises(BaseLayoutError, match="only phi3 has fused projections"):
        convert_base(tmp_path / "llama", tmp_path / "out", "llama-base")
    with pytest.raises(ModelError, match="is not empty"):
        convert_base(good, tmp_path / "llama", "llama-base")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))


def test_a_wrong_conversion_is_caught_by_the_logits_and_leaves_nothing(tmp_path, monkeypatch):
    from phi3_lora_plugin.export import base_layouts

    base = tiny.base(tmp_path / "base")
    right = base_layouts._split_config
    wrong = {"rope_theta": 50.0}
    monkeypatch.setattr(base_layouts, "_split_config", lambda config: (right(config)[0] | wrong, right(config)[1]))
    with pytest.raises(BaseLayoutError, match="the converted model's logits differ by"):
        convert_base(base, tmp_path / "out", "llama-base")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))


def test_p24_the_tokenizer_and_the_base_travel_with_the_adapter(bases, tmp_path):
    fused, llama = bases
    adapter = adapter_on(fused, tmp_path / "fused")
    tiny.tokenizer().save_pretrained(adapter)
    convert(adapter, tmp_path / "split", "split", base=fused, target_base="unsloth/Phi-3-mini-4k-instruct")
    assert (tmp_path / "split" / "tokenizer.json").is_file()
    assert config_of(tmp_path / "split")["base_model_name_or_path"] == "unsloth/Phi-3-mini-4k-instruct"
    report = convert(adapter, tmp_path / "nameless", "split", base=fused)
    assert any("pass --target-base" in note for note in report.notes)


def test_the_command_reports_rules_rows_and_json(fused, tmp_path):
    adapter = adapter_on(fused, tmp_path / "fused")
    out = tmp_path / "x"

    def run(*words):
        return CliRunner().invoke(app, ["convert", *map(str, words)])

    told = run(adapter, tmp_path / "split", "--to", "split", "--base", fused)
    assert told.exit_code == 0, told.output
    rule = "2 x model.layers.N.self_attn.qkv_proj -> model.layers.N.self_attn.q_proj: A shared, rows 0-31 of B"
    assert rule in told.output
    told = run(adapter, tmp_path / "o.pt", "--to", "loralib", "--base", fused, "--json")
    assert json.loads(told.output)["rows"][0]["target"].startswith("model.layers.0.")
    told = run(tmp_path / "o.pt", tmp_path / "q", "--to", "peft", "--enable-lora", "qkv_proj")
    assert isinstance(told.exception, LoralibError) and "expected MODULE=T,F" in str(told.exception)
    assert run(adapter, out, "--to", "onnx").exit_code == 2
    for words, message in [
        ((adapter, out, "--to", "phi3-base"), "is an adapter; it can be converted to peft, fused"),
        ((fused, out, "--to", "split"), "is a model; it can be converted to llama-base"),
        ((adapter, out, "--to", "gguf"), "gguf is one file"),
        ((tmp_path / "nothing", out, "--to", "llama-base"), "no such file or folder"),
        ((adapter, out, "--to", "split", "--base", tmp_path / "no"), "no such folder"),
    ]:
        told = run(*words)
        assert isinstance(told.exception, (ConvertError, ModelError)) and message in str(told.exception)
    assert parse_enable_lora("qkv_proj=T,F,true") == ("qkv_proj", (True, False, True))


def test_misshapen_tensors_are_named(fused, tmp_path):
    adapter = adapter_on(fused, tmp_path / "fused")
    tensors = tensors_of(adapter)
    key = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"
    tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")
    said = r"layers.0.self_attn.qkv_proj: A \(4, 32\) and B \(\d+, 4\) do not fit"
    with pytest.raises((ConvertError, LayoutError), match=said):
        convert(adapter, tmp_path / "split", "split", base=fused)
