"""`inspect`: every kind of folder is told for what it is, every problem is named with its fix, nothing is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from phi3_lora_plugin.inspect.inspect import InspectError, Problem, inspect, lines
from phi3_lora_plugin.lora.inject import add_lora
from phi3_lora_plugin.model.base_size import parameters
from phi3_lora_plugin.model.load import load_model
from phi3_lora_plugin.model.tokenizer import load_tokenizer, save_tokenizer
from phi3_lora_plugin.recipe import load_recipe
from phi3_lora_plugin.recipe.layers import shipped_names

TRUNCATION = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}


def clean(folder: Path) -> Path:
    """A model folder without a problem: what our own loader would save."""
    tiny.base(folder / "published")
    load_model(folder / "published").save_pretrained(folder / "clean")
    save_tokenizer(load_tokenizer(folder / "published"), folder / "clean")
    return folder / "clean"


def whats(problems: tuple[Problem, ...]) -> str:
    return "\n".join(problem.what for problem in problems)


def adapter(folder: Path, trained: bool = True, targets: tuple[str, ...] = ("qkv_proj", "o_proj")) -> Path:
    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=list(targets)))
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = "somebody/phi"
    model.save_pretrained(folder)
    return folder


def test_a_clean_model_has_no_problem_and_says_what_it_is(tmp_path: Path) -> None:
    found = inspect(clean(tmp_path))
    assert found.problems == () and found.kinds == ("model", "tokenizer")
    assert found.family == "phi3 (a model of the Phi-3 architecture)" and found.template == "phi-3-mini-4k"
    assert found.max_length == 256 and found.pad_token == "<unk> (0)"
    assert [each.path for each in found.projections][0] == "self_attn.qkv_proj"
    assert any("<|end|>" in stop for stop in found.stop_tokens)
    told = "\n".join(lines(found))
    assert "  q_proj 0:32, k_proj 32:64, v_proj 64:96\n" in told and "problems     none" in told


def test_a_published_model_is_offered_its_own_presets_only(shared_data: Path, tmp_path: Path) -> None:
    for name in ("phi-3-medium-4k-instruct", "phi-3-mini-128k-instruct"):
        (tmp_path / "config.json").write_text((shared_data / "configs" / f"{name}.json").read_text())
        found = {preset for row in inspect(tmp_path).trainable for preset in row.presets}
        bases = {preset: load_recipe(preset).model.path.lower() for preset in shipped_names()}
        assert found == {preset for preset, base in bases.items() if base == f"microsoft/{name}"} != set()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "fp8"}, "(fp8)"),
    ],
)
def test_a_quantised_base_is_named_in_its_folder_and_under_its_adapter(tmp_path: Path, given: dict, said: str) -> None:
    base = clean(tmp_path)
    tiny.edit(base / "config.json", quantization_config=given)
    assert said in whats(inspect(base).problems)
    on = adapter(tmp_path / "adapter")
    tiny.edit(on / "adapter_config.json", base_model_name_or_path=str(base))
    assert said in whats(inspect(on).problems)


def test_embeddings_in_an_adapter_are_named_with_their_size(tmp_path: Path) -> None:
    base, on = clean(tmp_path), adapter(tmp_path / "adapter")
    tiny.edit(on / "adapter_config.json", base_model_name_or_path=str(base))
    file = on / "adapter_model.safetensors"
    saved = load_file(file)
    save_file(saved | {"base_model.model.model.embed_tokens.weight": torch.ones(512, 32)}, file)
    found = inspect(on)
    assert found.adapter["embeddings"] == ["model.embed_tokens 512 x 32"]
    assert "model.embed_tokens.weight: saved in full" in whats(found.problems)
    save_file(saved | {"base_model.model.lm_head.weight": torch.ones(520, 32)}, file)
    assert "lm_head.weight has 520 rows, its base 512" in whats(inspect(on).problems)


def test_presets_say_the_parameters_that_they_really_train(tmp_path: Path) -> None:
    found = inspect(clean(tmp_path))
    assert len(found.trainable) >= 3
    for row in found.trainable:
        lora = load_recipe(row.presets[0]).lora
        model = add_lora(tiny.model(), lora.targets, lora.r, lora.alpha)
        dense = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sliced = any(name in row.targets for name in ("q_proj,", "gate_proj"))
        assert row.parameters == dense or (sliced and row.parameters < dense), row
        assert row.bytes == 16 * row.parameters
    model = tiny.model()
    assert found.parameters == model.num_parameters()
    held = {row.held: row.base_bytes for row in found.trainable}
    assert held["float32"] == 2 * held["bfloat16"] == 4 * found.parameters
    assert held["nf4"] < held["bfloat16"]


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
        ("config.json", {"model_type": "phi3small"}, "Phi-3-small"),
        ("config.json", {"rope_parameters": {"rope_type": "linear"}}, "rope type 'linear'"),
        ("generation_config.json", {"eos_token_id": 400}, "continues after the end of a turn"),
        ("generation_config.json", {"pad_token_id": 403}, "pad id 403 is a stop token"),
        ("tokenizer_config.json", {"pad_token": "<|end|>"}, "pads with <|end|>, which is a stop token"),
        ("tokenizer_config.json", {"eos_token": "<|no|>"}, "<|no|>"),
        ("tokenizer.json", {"truncation": TRUNCATION}, "truncation saved in it"),
    ],
)
def test_each_problem_is_found_with_its_fix(tmp_path: Path, file: str, changes: dict[str, object], says: str) -> None:
    folder = clean(tmp_path)
    tiny.edit(folder / file, **changes)
    found = inspect(folder)
    assert says in whats(found.problems)
    assert all(problem.fix for problem in found.problems)
    assert says in "\n".join(lines(found))


def test_a_template_that_is_unknown_or_drops_system_messages_is_named(tmp_path: Path) -> None:
    folder = clean(tmp_path)
    (folder / "chat_template.jinja").write_text(tiny.MINI_4K_TEMPLATE + " ")
    assert "nearest" in whats(inspect(folder).problems)
    (folder / "chat_template.jinja").write_text(tiny.MEDIUM_TEMPLATE)
    assert "drops system messages" in whats(inspect(folder).problems)


def test_missing_and_pickled_weights_are_named(tmp_path: Path) -> None:
    folder = clean(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickles" in whats(inspect(folder).problems)
    (folder / "pytorch_model.bin").unlink()
    assert "the folder has no weights" in whats(inspect(folder).problems)


def test_a_tokenizer_that_auto_tokenizer_would_misread_is_named(tmp_path: Path) -> None:
    save_tokenizer(tiny.tokenizer(), tmp_path)
    tiny.edit(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert "AutoTokenizer then gives other ids" in whats(inspect(tmp_path).problems)


def test_an_adapter_is_described_and_its_faults_are_named(tmp_path: Path) -> None:
    good = inspect(adapter(tmp_path / "good"))
    assert good.problems == () and good.adapter["r"] == 4 and good.adapter["targets"] == ["o_proj", "qkv_proj"]
    assert good.adapter["base"] == "somebody/phi" and good.adapter["tensors"] == 8
    assert "changes nothing" in whats(inspect(adapter(tmp_path / "untrained", trained=False)).problems)
    broken = adapter(tmp_path / "broken")
    file = broken / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * torch.nan}, file)
    assert f"1 tensors are not finite, such as {name}" in whats(inspect(broken).problems)
    save_file({f"module.{key}": tensor for key, tensor in tensors.items()}, file)
    assert "8 keys are spelled in a way that PEFT silently ignores" in whats(inspect(broken).problems)
    split = {key.replace("qkv_proj", "q_proj"): tensor for key, tensor in tensors.items()}
    save_file(split, file)
    assert "adapts q_proj, fused in Microsoft's Phi-3" in whats(inspect(broken).problems)
    file.write_bytes(file.read_bytes()[:-10])
    assert "cut off or damaged" in whats(inspect(broken).problems)
    file.unlink()
    assert "the folder has no adapter weights" in whats(inspect(broken).problems)


def test_parameters_of_whole_models(shared_data: Path, tmp_path: Path) -> None:
    counts = {
        "phi-3-mini-4k-instruct": 3_821_079_552,
        "phi-3-medium-128k-instruct": 13_960_238_080,
        "phi-4-mini-reasoning": 3_836_021_760,  # tied
    }
    for name, count in counts.items():
        assert parameters(json.loads((shared_data / "configs" / f"{name}.json").read_text())) == count
    model = tiny.moe()
    assert parameters(model.config.to_dict()) == model.num_parameters()


@pytest.mark.parametrize(
    ("edit_of", "says", "fix"),
    [
        ({"hidden_size": None}, "has a size that is not a number", "copy it again from where"),
        ({"num_attention_heads": 0}, "has a size that is not a number", "copy it again from where"),
        ({"vocab_size": 300}, "ids up to 404, the model 300 rows", "same repository"),
        ({"intermediate_size": 65}, "4 weights have another shape than in config.json", "same model"),
        ({"num_hidden_layers": 3}, "6 of 21 weights are missing", "fetch the weights again"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights_is_named(
    tmp_path: Path, edit_of: dict[str, object], says: str, fix: str
) -> None:
    folder = clean(tmp_path)
    tiny.edit(folder / "config.json", **edit_of)
    (problem,) = [each for each in inspect(folder).problems if says in each.what]
    assert fix in problem.fix


def test_weights_that_were_not_fetched_whole_are_named(tmp_path: Path) -> None:
    folder = clean(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content, says in (
        (whole[:-10], "is cut off or damaged"),
        (b"", "is cut off or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ((9).to_bytes(8, "little") + b"{broken}}" + whole, "its header cannot be read"),
    ):
        file.write_bytes(content)
        (problem,) = inspect(folder).problems
        assert says in problem.what and (problem.fix == "run git lfs pull") == ("LFS" in says)
    file.write_bytes(whole)
    file.rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "1 of 2 shards are missing, such as model-00002" in whats(inspect(folder).problems)


def test_an_adapter_is_held_against_the_base_that_it_names(tmp_path: Path) -> None:
    folder, base = adapter(tmp_path / "run" / "adapter"), clean(tmp_path)
    tiny.edit(folder / "adapter_config.json", base_model_name_or_path=str(base))
    found = inspect(tmp_path / "run")  # the folder of a run
    assert found.problems == () and found.family == "phi3 (a model of the Phi-3 architecture)"
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: each for name, each in tensors.items() if "layers.1" not in name}, file)
    assert "2 modules that the config names have no tensors" in whats(inspect(folder).problems)
    save_file({n: each[:, :7].contiguous() if "lora_A" in n else each for n, each in tensors.items()}, file)
    assert "do not fit the model's weight (96, 32)" in whats(inspect(folder).problems)
    tiny.edit(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"), r="four")
    assert "its base model is not found" in whats(inspect(folder).problems)
    assert "adapter_config.json: r='four': should be a valid integer" in whats(inspect(folder).problems)
    for broken in ("{", "[]"):
        (folder / "adapter_config.json").write_text(broken)
        assert "adapter_config.json" in whats(inspect(folder).problems)


def test_a_tokenizer_alone_says_whose_template_it_has(tmp_path: Path) -> None:
    save_tokenizer(tiny.tokenizer(), tmp_path)
    assert inspect(tmp_path).family == "by its template, of Phi-3-mini-4k-instruct, Phi-3-mini-128k-instruct"


def test_nothing_to_look_at_is_said(tmp_path: Path) -> None:
    with pytest.raises(InspectError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(InspectError, match="found: nothing"):
        inspect(tmp_path)


def test_published_folders_are_recognised(shared_data: Path) -> None:
    found = inspect(shared_data / "tokenizers" / "phi-3-mini-128k-instruct-apr2024")
    assert found.family == "phi-3-mini-128k (Phi-3-mini-128k-instruct)" and found.template == "phi-3-mini-128k-apr2024"
    assert "'su'" in whats(found.problems)
    all_linear = next(row for row in found.trainable if row.targets == "all-linear, r 16")
    assert all_linear.parameters == 25_165_824


def test_a_published_model_is_described_before_it_is_downloaded() -> None:
    found = inspect("microsoft/Phi-3-mini-4k-instruct")
    assert not found.downloaded and found.kinds == ("model",) and not found.problems
    assert found.family == "phi-3-mini-4k (Phi-3-mini-4k-instruct)" and found.parameters == 3_821_079_552
    (plain,) = [row for row in found.trainable if "phi3-mini-4k-lora" in row.presets]
    assert plain.parameters == 25_165_824 and plain.base_bytes == pytest.approx(7.64e9, rel=0.001)
    told = lines(found)
    first = next(index for index, line in enumerate(told) if line.startswith("not here"))
    assert told[first + 1].strip() == "hf download microsoft/Phi-3-mini-4k-instruct"
    assert max(map(len, told)) <= 80
    with pytest.raises(InspectError, match="somebody/unknown is neither a folder nor in the hub's cache"):
        inspect("somebody/unknown")


def test_an_adapter_of_mlx_is_recognised_and_says_how_to_convert_it(tmp_path: Path) -> None:
    shapes = {"lora_a": (16, 4), "lora_b": (4, 48)}
    name = "model.layers.0.self_attn.qkv_proj"
    save_file({f"{name}.{key}": torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "adapters.safetensors")
    config = {"model": "microsoft/phi-4", "fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = inspect(tmp_path)
    about = {"format": "MLX", "base": "microsoft/phi-4", "r": 4, "alpha": 8.0, "targets": ["qkv_proj"], "tensors": 2}
    assert found.adapter == about
    [problem] = found.problems
    assert problem.what.startswith("written by mlx-lm") and "convert SRC DST --to peft" in problem.fix
    (tmp_path / "adapters.safetensors").unlink()
    assert any("no adapters.safetensors" in problem.what for problem in inspect(tmp_path).problems)
