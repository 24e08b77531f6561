"""Loading the base: native classes, nothing executed, nothing random, stop tokens right, quantised by one argument."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from phi3_lora_plugin.model.config import read_config
from phi3_lora_plugin.model.families import RopeError, UnsupportedModel
from phi3_lora_plugin.model.fingerprint import base_fingerprint
from phi3_lora_plugin.model.folder import ModelError
from phi3_lora_plugin.model.load import load_model, set_stop_tokens
from phi3_lora_plugin.model.tokenizer import load_tokenizer


def edit(folder: Path, **changes: object) -> Path:
    tiny.edit(folder / "config.json", **changes)
    return folder


def test_generation_stops_at_end_of_turn_and_pads_with_something_else(tmp_path: Path) -> None:
    model = load_model(tiny.base(tmp_path / "base"))
    tokenizer = load_tokenizer(tmp_path / "base")
    rows = model.get_input_embeddings().weight.shape[0]
    stops = set(tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"]))
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    for one in (model.generation_config.to_dict(), again.generation_config.to_dict(), written):
        assert stops <= set(one["eos_token_id"]) and one["pad_token_id"] == tokenizer.pad_token_id == 0
    assert rows == again.get_input_embeddings().weight.shape[0] == 512


@pytest.mark.parametrize(
    "name", ["phi-3-mini-4k-instruct", "phi-3-mini-128k-instruct-apr2024", "phi-3-medium-4k-instruct"]
)
def test_real_tokenizers_on_a_tiny_model(shared_data: Path, tmp_path: Path, name: str) -> None:
    tiny.model(vocab_size=32064, eos_token_id=32000, pad_token_id=32000).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_data / "tokenizers" / name / file, tmp_path)
    model = load_model(tmp_path)
    assert {32000, 32007} <= set(model.generation_config.eos_token_id)
    assert model.generation_config.pad_token_id == 0 and model.get_input_embeddings().num_embeddings == 32064
    (tmp_path / "generation_config.json").unlink()
    published = load_model(tmp_path).generation_config  # none is published for two of them
    assert {32000, 32007} <= set(published.eos_token_id) and published.pad_token_id == 0
    assert published.use_cache is not False  # off is for training, and would make every host generate slowly


def test_loading_never_executes_code_and_saves_no_auto_map(tmp_path: Path) -> None:
    evil = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_phi3.Evil")
    folder = edit(tiny.base(tmp_path / "base"), auto_map=evil)
    (folder / "modeling_phi3.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    model = load_model(folder)
    model.save_pretrained(tmp_path / "saved")
    assert type(model).__module__ == "transformers.models.phi3.modeling_phi3"
    assert not (tmp_path / "ran").exists()
    assert not any("auto_map" in path.read_text() for path in (tmp_path / "saved").glob("*.json"))


def test_a_model_with_su_gives_the_logits_of_longrope(tmp_path: Path) -> None:
    factors = {name: tiny.LONGROPE["rope_parameters"][name] for name in ("short_factor", "long_factor")}
    reference = tiny.model(**tiny.LONGROPE)
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    for kind in ("su", "yarn", "longrope"):
        folder = tmp_path / kind
        reference.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("rope_parameters", None)
        config |= {"rope_theta": 10000.0, "rope_scaling": {"type": kind, **factors}}
        (folder / "config.json").write_text(json.dumps(config))
        model = load_model(folder)
        for length in (20, 40):
            assert torch.equal(model(ids[:, :length]).logits, reference(ids[:, :length]).logits)


def test_weights_are_native_typed_and_placed_for_the_machine(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path)
    assert load_model(folder, device="cpu").dtype == torch.float32
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(folder).config._attn_implementation == "sdpa"
    assert load_model(folder, attention="eager").config._attn_implementation == "eager"
    assert not load_model(folder).config.use_cache


def test_a_flash_attention_that_cannot_run_gives_way_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(tiny.base(tmp_path), attention="flash_attention_2", device="cpu")
    assert model.config._attn_implementation == "sdpa"
    assert "flash_attention_2 needs a CUDA device; sdpa is used instead" in caplog.text


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_leave_embeddings_and_head_alone(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(tiny.base(tmp_path, hidden_size=64, intermediate_size=128), quantize=kind)
    layer = model.model.layers[0]
    name = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    assert {type(module).__name__ for module in (layer.self_attn.qkv_proj, layer.mlp.down_proj)} == {name}
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.dtype == torch.float32
    if kind == "nf4":
        state = layer.mlp.down_proj.weight.quant_state
        assert state.quant_type == "nf4" and state.nested


def test_quantising_without_bitsandbytes_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r'pip install "phi3-lora-plugin\[qlora\]"'):
        load_model(tiny.base(tmp_path), quantize="nf4")


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    def message(path: object, kind: type[Exception] = ModelError, **options: str) -> str:
        with pytest.raises(kind) as caught:
            load_model(path, **options)  # type: ignore[arg-type]
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "nowhere")
    assert "the hub did not give it" in message("nobody/nothing")
    (tmp_path / "empty").mkdir()
    assert "has no config.json; it holds nothing" in message(tmp_path / "empty")

    def base(name: str) -> Path:
        return tiny.base(tmp_path / name)

    pickled = base("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in message(pickled)
    adapter = base("adapter")
    (adapter / "config.json").rename(adapter / "adapter_config.json")
    assert "is an adapter, not a base model" in message(adapter)
    cut = base("cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cut off or damaged" in message(cut)
    partial = base("partial")
    tensors = load_file(partial / "model.safetensors")
    del tensors["model.layers.0.self_attn.qkv_proj.weight"]
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights, which would be random numbers" in message(partial)
    assert "mismatch" in message(edit(base("shape"), intermediate_size=96)).lower()
    (base("json") / "config.json").write_text("<html>")
    assert "config.json is not JSON" in message(tmp_path / "json")
    assert "remote code" in message(edit(base("small"), model_type="phi3small"), UnsupportedModel)
    bad = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4}
    short = edit(base("rope"), rope_scaling=bad, rope_parameters=None)
    assert "short_factor has 3 numbers; expected 4" in message(short, RopeError)
    assert "hidden_size=[32]: should be a valid integer" in message(edit(base("odd"), hidden_size=[32]))
    assert "cannot be loaded: KeyError: 'nope'" in message(edit(base("act"), hidden_act="nope"))
    if not torch.cuda.is_available():
        assert "no CUDA device" in message(base("cuda"), device="cuda")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = load_model(tiny.base(tmp_path))
    small = tiny.model(vocab_size=300, pad_token_id=0)
    with pytest.raises(ModelError, match="ids up to 404, the model 300 rows"):
        set_stop_tokens(small, tiny.tokenizer())
    assert set_stop_tokens(model, load_tokenizer(tmp_path)) == []


def test_a_fingerprint_follows_weights_not_files(tmp_path: Path) -> None:
    one = tiny.base(tmp_path / "a")
    model = tiny.model(eos_token_id=400, pad_token_id=400)
    model.save_pretrained(tmp_path / "b", max_shard_size="40KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert base_fingerprint(one) == base_fingerprint(tmp_path / "b")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "c")
    assert base_fingerprint(tmp_path / "c") != base_fingerprint(one)
    big = {"w": torch.zeros(3_000_000)}
    for name, place in (("d", None), ("e", 0), ("f", 2_999_999)):
        folder = tmp_path / name
        shutil.copytree(one, folder)
        if place is not None:
            big["w"][place] = 1
        save_file(big, folder / "model.safetensors")
    assert len({base_fingerprint(tmp_path / name) for name in "def"}) == 3


def test_config_is_loaded_without_touching_the_weights(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path)
    (folder / "model.safetensors").unlink()
    assert read_config(folder / "config.json").hidden_size == 32
