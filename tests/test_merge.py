"""A merged model is the adapted one, tensor for tensor as PEFT merges, or nothing is written and the reason told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from lora_runs import adapter_on, disturb, load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from typer.testing import CliRunner

from phi3_lora_plugin.cli import app
from phi3_lora_plugin.export import merge_module as merge_math
from phi3_lora_plugin.export import merge_plan
from phi3_lora_plugin.export.merge import MergeError, VerificationError, merge, portable_config
from phi3_lora_plugin.lora.inject import add_lora
from phi3_lora_plugin.model.folder import ModelError
from phi3_lora_plugin.model.shards import ShardWriter, Weights
from phi3_lora_plugin.store.adapter_folder import AdapterError
from phi3_lora_plugin.wording import read_size

pytestmark = pytest.mark.slow

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(3, 27).reshape(2, 12)


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(load(base, dtype), str(adapter)).merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base") / "phi3", num_key_value_heads=2)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("tied") / "phi3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """One with pruned heads, as in Phi-tiny-MoE: together they are not the hidden size."""
    folder = tmp_path_factory.mktemp("moe") / "phimoe"
    tiny.moe(head_dim=16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"qkv_proj": 8, "layers.1.self_attn.o_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 5]},
        {"target_modules": [*FUSED, "embed_tokens"]},
        {"target_modules": ["lm_head", "o_proj"]},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda options: ",".join(map(str, options)) + str(options.get("init_lora_weights", "")) or "plain",
)
def test_our_merge_is_peft_s_tensor_for_tensor(base, tmp_path, options):
    adapter = adapter_on(base, tmp_path / "adapter", **options)
    report = merge(adapter, base, tmp_path / "out", max_shard="40KB")
    wanted, got = merged_by_peft(base, adapter), load(tmp_path / "out").state_dict()
    assert wanted.keys() == got.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []
    assert report.files > 1 and report.logit_difference < 1e-5 < report.adapter_effect
    assert report.merged + report.copied == len(Weights(base))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj"], "lora_bias": True},
    ],
    ids=["attention", "experts", "down-experts", "bias", "bias-lora", "lora-bias"],
)
def test_the_mixture_of_experts_too(moe, tmp_path, options):
    adapter = adapter_on(moe, tmp_path / "adapter", **options)
    stored = set(Weights(moe))
    assert any(name.endswith("block_sparse_moe.experts.3.w3.weight") for name in stored)  # one by one, as published
    merge(adapter, moe, tmp_path / "out", max_shard="20KB")
    wanted, got = merged_by_peft(moe, adapter), load(tmp_path / "out").state_dict()
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []
    assert set(Weights(tmp_path / "out")) == stored


def test_our_own_sliced_adapter_merges(base, tmp_path):
    model = add_lora(load(base), ["q_proj", "v_proj", "down_proj"], r=4, alpha=8)
    disturb(model)
    for module in model.modules():  # as in training: entries between the blocks stay zero
        if type(module).__name__ == "SlicedLinear":
            kept = torch.zeros_like(module.weight)
            rank = 0
            for block in module.blocks:
                columns = slice(rank, rank + block.rank)
                kept[block.start : block.stop, columns] = module.weight.data[block.start : block.stop, columns]
                rank += block.rank
            module.weight.data = kept
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", base, tmp_path / "out")
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path / "out")(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "auto"), ("float32", "bfloat16"), ("float32", "float16")])
def test_sixteen_bits_round_the_float32_sum_once(tmp_path, stored, dtype):
    base = tiny.base(tmp_path / "base")
    load(base, getattr(torch, stored)).save_pretrained(base)
    adapter = adapter_on(base, tmp_path / "adapter")
    report = merge(adapter, base, tmp_path / "out", dtype)
    kind = getattr(torch, report.dtype)
    assert report.dtype == (stored if dtype == "auto" else dtype)
    exact = merged_by_peft(base, adapter)
    for name in Weights(tmp_path / "out"):
        got = Weights(tmp_path / "out").read(name)
        assert got.dtype == kind and torch.equal(got, exact[name].to(kind)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == report.dtype
    assert report.logit_difference < report.adapter_effect / 4


def test_p32_tied_weights_stay_one_or_are_written_apart_on_demand(tied, tmp_path):
    for name, options in {
        "plain": {},
        "tokens": {"trainable_token_indices": [3, 5]},
        "both": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    }.items():
        adapter = adapter_on(tied, tmp_path / name, **options)
        merge(adapter, tied, tmp_path / f"{name}-out")
        assert "lm_head.weight" not in Weights(tmp_path / f"{name}-out")
        wanted, got = merged_by_peft(tied, adapter), load(tmp_path / f"{name}-out").state_dict()
        assert [key for key in wanted if not torch.equal(wanted[key], got[key])] == []

    for name, options in {
        "head": {"target_modules": FUSED, "modules_to_save": ["lm_head"]},
        "table": {"target_modules": [*FUSED, "embed_tokens"]},
    }.items():
        adapter = adapter_on(tied, tmp_path / name, **options)
        with pytest.raises(MergeError, match="head and embeddings share one weight in this base"):
            merge(adapter, tied, tmp_path / "out")
        report = merge(adapter, tied, tmp_path / f"{name}-out", untie=True)
        config = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        assert any("untied head and embeddings" in note for note in report.notes)
        # PEFT's own merge of `table` moves the head as well; what was trained is its forward pass before merging.
        with torch.inference_mode():
            adapted = PeftModel.from_pretrained(load(tied), str(adapter)).eval()(input_ids=IDS).logits
            torch.testing.assert_close(load(tmp_path / f"{name}-out")(input_ids=IDS).logits, adapted)
    assert not (tmp_path / "out").exists()


def test_the_folder_is_complete_asks_for_no_code_and_stops(tmp_path):
    base = tiny.base(tmp_path / "base")
    for name in ("config.json", "tokenizer_config.json"):
        tiny.edit(base / name, auto_map={"AutoConfig": "evil.Evil"})
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    merge(adapter_on(base, tmp_path / "adapter"), base, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "out").glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "out" / name).read_text()
    words = tiny.tokenizer()
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    ends = words.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    assert set(ends) <= set(generation.eos_token_id) and generation.pad_token_id not in generation.eos_token_id
    shipped, given = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "out", base))
    assert shipped == given


def test_real_128k_config_is_written_with_the_name_that_loads_today(shared_data, tmp_path):
    from transformers import AutoConfig

    for name in ("phi-3-mini-128k-instruct", "phi-3-medium-128k-instruct", "phi-3.5-mini-instruct"):
        published = json.loads((shared_data / "configs" / f"{name}.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(portable_config(published)))
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.rope_parameters["rope_type"] == "longrope"
        assert config.rope_parameters["long_factor"] == published["rope_scaling"]["long_factor"]


def test_p12_a_quantised_base_is_refused(base, tmp_path):
    adapter = adapter_on(base, tmp_path / "adapter")
    quantised = tiny.base(tmp_path / "nf4")
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    tiny.edit(quantised / "config.json", quantization_config=how)
    with pytest.raises(MergeError, match=r"is quantised \(bitsandbytes, 4 bits\).*merge onto the unquantised base"):
        merge(adapter, quantised, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_p12_the_loss_of_merging_a_qlora_adapter_is_measured_or_avoided(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = tiny.base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    adapter = adapter_on(base, tmp_path / "adapter")
    run = f"model: {{path: {base}, quantize: nf4}}\n"  # that the adapter lies in
    (tmp_path / "recipe.yaml").write_text(run)
    plain = merge(adapter, base, tmp_path / "plain")
    said = "trained on a nf4 base and merged onto the unquantised"
    note = next(note for note in plain.notes if note.startswith(said))
    apart = float(note.partition("up to ")[2].partition(",")[0])
    restored = merge(adapter, base, tmp_path / "restored", dequantize=True)
    note = next(note for note in restored.notes if "merged onto the values of the quantised base" in note)
    assert float(note.partition("up to ")[2].partition(",")[0]) < apart / 5
    one, two = Weights(tmp_path / "plain"), Weights(tmp_path / "restored")
    down, head = "model.layers.0.mlp.down_proj.weight", "lm_head.weight"  # the head is never quantised in training
    assert not torch.equal(one.read(down), two.read(down)) and torch.equal(two.read(head), Weights(base).read(head))


def test_every_tensor_of_the_adapter_finds_its_weight_or_nothing_is_written(base, tmp_path):
    layer = "base_model.model.model.layers"

    def adapter() -> Path:
        return adapter_on(base, tmp_path / "adapter")

    model, attention = "base_model.model", f"{layer}.0.self_attn.o_proj"
    stray = {f"{layer}.9.mlp.down_proj.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    for message, changes in {
        "1 adapted modules are not in the base: model.layers.9.mlp.down_proj": stray,
        r"o_proj: A \(4, 31\) and B \(32, 4\) do not fit": {f"{attention}.lora_A.weight": torch.zeros(4, 31)},
        r"o_proj: A \(4, 32\) and B missing": {f"{attention}.lora_B.weight": None},
        "someone.weight: trained in full, but the base has no such": {f"{model}.someone.weight": torch.zeros(2)},
        r"model.norm.weight: the adapter has shape \(33,\), the base \(32,\); was the vocabulary": {
            f"{model}.model.norm.weight": torch.zeros(33)
        },
        "a bias .lora_bias., and the base has none": {f"{layer}.0.mlp.down_proj.lora_B.bias": torch.zeros(32)},
        "values are not finite in float32": {f"{attention}.lora_B.weight": torch.full((32, 4), float("nan"))},
    }.items():
        file = adapter() / "adapter_model.safetensors"
        tensors = load_file(file) | changes
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
        with pytest.raises((MergeError, VerificationError), match=message):
            merge(file.parent, base, tmp_path / "out")
    path = adapter() / "adapter_config.json"
    for init in ("pissa_niter_4", "corda", "loftq"):
        tiny.edit(path, init_lora_weights=init)
        with pytest.raises(MergeError, match="changed the base in a way that cannot be computed again"):
            merge(path.parent, base, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_split_adapter_on_a_fused_base_is_sent_to_convert(base, tmp_path):
    from phi3_lora_plugin.export.base_layouts import convert_base

    convert_base(base, tmp_path / "llama", "llama-base")
    adapter = adapter_on(tmp_path / "llama", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    with pytest.raises(MergeError, match="4 adapted modules are not in the base: .*convert ... --to fused` first"):
        merge(adapter, base, tmp_path / "out")


@pytest.mark.parametrize(
    ("broken", "said"), [("module", "differs from PEFT's"), ("model", "logits differ from PEFT's by")]
)
def test_a_wrong_merge_is_found_out_and_leaves_nothing(base, tmp_path, monkeypatch, broken, said):
    adapter = adapter_on(base, tmp_path / "adapter")
    right = merge_math.merge_module

    def wrong(config, module, *rest):
        weight, bias, difference = right(config, module, *rest)
        return (weight, bias, 9e9) if broken == "module" else (weight * 1.5, bias, difference)

    monkeypatch.setattr(merge_math, "merge_module", wrong)
    with pytest.raises(VerificationError, match=said):
        merge(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_weight_that_was_forgotten_is_found_out(base, tmp_path, monkeypatch):
    adapter = adapter_on(base, tmp_path / "adapter")
    right, forgotten = merge_plan._one, "model.norm.weight"
    monkeypatch.setattr(merge_plan, "_one", lambda name, *rest: () if name == forgotten else right(name, *rest))
    with pytest.raises(VerificationError, match="do not have the base's weights: model.norm.weight"):
        merge(adapter, base, tmp_path / "out")


def test_a_target_with_something_in_it_is_kept_unless_told(base, tmp_path):
    adapter = adapter_on(base, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ModelError, match="out is not empty; choose another folder, or pass --overwrite"):
        merge(adapter, base, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    merge(adapter, base, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "out" / "mine.txt").exists() and not list(tmp_path.glob(".*"))


def test_shards_are_indexed_and_none_is_larger_than_said(base, tmp_path):
    adapter = adapter_on(base, tmp_path / "adapter")
    merge(adapter, base, tmp_path / "out", max_shard="70KB", check="modules")
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert all(sum(t.numel() * 4 for t in load_file(file).values()) <= 70_000 for file in files)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in load(base).state_dict().values())
    merge(adapter, tmp_path / "out", tmp_path / "twice")  # a sharded base is read as well
    (tmp_path / "out" / files[0].name).unlink()
    with pytest.raises(ModelError, match=f"names {files[0].name}, which is missing; the download is not complete"):
        merge(adapter, tmp_path / "out", tmp_path / "never")


def test_memory_stays_near_one_shard(tmp_path, warm):
    """A 330 MB model in 20 MB shards: the peak grows by far less than the model."""
    large = tiny.model(hidden_size=512, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8)
    large.save_pretrained(tmp_path / "base", max_shard_size="100MB")
    config = LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"])
    get_peft_model(large, config).save_pretrained(tmp_path / "adapter")
    script = """
import re, sys
import peft.tuners.lora.bnb
from phi3_lora_plugin.export.merge import merge
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
report = merge(sys.argv[1] + "/adapter", sys.argv[1] + "/base", sys.argv[1] + "/out", max_shard="20MB", check="modules")
print(report.total_bytes // 1024, peak() - before)
"""
    done = warm.run(script, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    model, grown = map(int, done.stdout.split()[-2:])
    assert model > 290_000 and grown < model / 3, (model, grown)


def test_the_command_says_what_it_checked(base, tmp_path):
    adapter = adapter_on(base, tmp_path / "adapter")

    def run(out, *options):
        return CliRunner().invoke(app, ["merge", *map(str, (adapter, tmp_path / out, *options))])

    told = run("out", "--base", base, "--dtype", "bfloat16")
    assert told.exit_code == 0, told.output
    assert "merged 8 weights, copied 7" in told.output
    assert "logits against PEFT's model: largest difference" in told.output
    assert "logits of the whole model were not compared" in run("out2", "--base", base, "--no-check").output
    tiny.edit(adapter / "adapter_config.json", base_model_name_or_path=None)
    told = run("out3")
    assert isinstance(told.exception, AdapterError) and "records no base model" in str(told.exception)
    assert run("o", "--dtype", "int3").exit_code == 2


def test_sizes_are_read_as_people_write_them():
    assert [read_size(text) for text in ("2GB", "500 MB", "1GiB", "1.5kb", 7)] == [2 * 10**9, 5 * 10**8, 2**30, 1500, 7]
    for wrong in ("much", "0GB", "-1GB", "2XB"):
        assert read_size(wrong) is None
        with pytest.raises(ModelError, match="expected something like 2GB"):
            ShardWriter(Path(), wrong)
