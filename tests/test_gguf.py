"""GGUF files hold what llama.cpp expects: names, shapes, values, settings, and a vocabulary that cuts text the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
import tiny
import torch
from lora_runs import adapter_on, load
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from phi3_lora_plugin.export.convert import convert
from phi3_lora_plugin.export.gguf import GGUFError, write_gguf_model
from phi3_lora_plugin.export.gguf_vocab import VocabularyError, read_vocabulary
from phi3_lora_plugin.model.shards import Weights

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SHORT = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def llama_name(weight: str) -> str:
    """What llama.cpp's phi3 calls a weight of transformers', written down here once more."""
    path = weight.removeprefix("model.").removesuffix(".weight")
    match = re.match(r"layers\.(\d+)\.(.+)", path)
    return f"blk.{match[1]}.{SHORT[match[2]]}.weight" if match else f"{SHORT[path]}.weight"


def read(file: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors in torch's order of dimensions, settings) of a GGUF file."""
    reader = gguf.GGUFReader(file)
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            data = torch.from_numpy(numpy.array(tensor.data).view(numpy.int16)).view(torch.bfloat16)
        else:
            data = torch.from_numpy(numpy.array(tensor.data))
        tensors[tensor.name] = data.reshape(shape)
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def adapted(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load(base), str(adapter))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base") / "Phi-3-tiny", num_key_value_heads=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"qkv_proj": 6}, "alpha_pattern": {"o_proj": 3, "layers.1.mlp.down_proj": 40}},
        {"target_modules": ["qkv_proj"], "layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns", "one-module"],
)
def test_an_adapter_reads_back_as_the_same_update_under_llama_cpp_s_rule(base, tmp_path, options):
    adapter = adapter_on(base, tmp_path / "adapter", **options)
    report = convert(adapter, tmp_path / "lora.gguf", "gguf", base=base)
    tensors, settings = read(tmp_path / "lora.gguf")
    assert settings["general.type"] == "adapter" and settings["adapter.type"] == "lora"
    assert settings["general.architecture"] == "phi3"
    model = adapted(base, adapter)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(tensors) == 2 * len(layers) == 2 * len(report.rows)
    for module, layer in layers.items():
        name = llama_name(f"{module}.weight")
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        # llama.cpp: scale = alpha / rank of this module (src/llama-adapter.h)
        delta = b @ a * (settings["adapter.lora.alpha"] / b.shape[1])
        torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


def test_a_split_adapter_is_fused_on_its_way_and_a_16_bit_one_is_rounded(base, tmp_path):
    from phi3_lora_plugin.export.base_layouts import convert_base

    convert_base(base, tmp_path / "llama", "llama-base")
    adapter = adapter_on(tmp_path / "llama", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    convert(adapter, tmp_path / "lora.gguf", "gguf", base=base, dtype="bfloat16")
    tensors, _ = read(tmp_path / "lora.gguf")
    assert set(tensors) == {f"blk.{n}.attn_qkv.weight.lora_{x}" for n in (0, 1) for x in "ab"}
    assert tensors["blk.0.attn_qkv.weight.lora_a"].dtype == torch.bfloat16
    assert not tensors["blk.0.attn_qkv.weight.lora_b"][32:48].any()  # the key's rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "GGUF adapters have no DoRA"),
        ({"lora_bias": True}, "GGUF adapters have no bias"),
        (
            {"target_modules": ["o_proj", "embed_tokens"]},
            "trained in full or by token, which gguf files do not hold|embedding",
        ),
        ({"modules_to_save": ["lm_head"]}, "which gguf files do not hold"),
    ],
    ids=["dora", "bias", "embedding", "full"],
)
def test_what_llama_cpp_would_drop_is_refused(base, tmp_path, options, message):
    adapter = adapter_on(base, tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=message):
        convert(adapter, tmp_path / "lora.gguf", "gguf", base=base)
    assert not (tmp_path / "lora.gguf").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("dtype", "kind"), [("auto", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_a_model_reads_back_with_every_tensor_and_the_settings(base, tmp_path, dtype, kind):
    file = tmp_path / "model.gguf"
    convert(base, file, "gguf", dtype=dtype)
    tensors, settings = read(file)
    weights = Weights(base)
    assert set(tensors) == {llama_name(name) for name in weights}
    for name in weights:
        got, wanted = tensors[llama_name(name)], weights.read(name)
        assert torch.equal(got, wanted.to(got.dtype)), name
        assert got.dtype == torch.float32 if wanted.dim() == 1 else kind in ("F32", "F16", "BF16")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_qkv.weight"] == kind and kinds["blk.0.attn_norm.weight"] == "F32"
    config = json.loads((base / "config.json").read_text())
    assert settings["phi3.attention.head_count"] == 4 and settings["phi3.attention.head_count_kv"] == 2
    assert settings["phi3.embedding_length"] == 32 and settings["phi3.feed_forward_length"] == 64
    assert settings["phi3.rope.dimension_count"] == 8 and settings["phi3.rope.freq_base"] == 10000.0
    assert settings["phi3.context_length"] == config["max_position_embeddings"]
    assert settings["phi3.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    assert settings["phi3.attention.sliding_window"] == 0
    words = tiny.tokenizer()
    end, eos = words.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    assert settings["tokenizer.ggml.eos_token_id"] == eos and settings["tokenizer.ggml.eot_token_id"] == end
    assert settings["tokenizer.chat_template"] == tiny.MINI_4K_TEMPLATE
    assert settings["tokenizer.ggml.add_bos_token"] is False
    tokens = settings["tokenizer.ggml.tokens"]
    assert len(tokens) == 512 and tokens[-1] == "[PAD511]" and tokens[end] == "<|end|>"
    assert [settings["tokenizer.ggml.token_type"][i] for i in (0, 3, 511, end)] == [2, 6, 5, 3]


def test_a_tied_model_has_no_output_and_longrope_brings_its_factors(tmp_path):
    base = tiny.base(tmp_path / "base", **tiny.LONGROPE, tie_word_embeddings=True, sliding_window=100)
    write_gguf_model(tmp_path / "m.gguf", base)
    tensors, settings = read(tmp_path / "m.gguf")
    assert "output.weight" not in tensors
    for which in ("short", "long"):
        factors = torch.tensor(tiny.LONGROPE["rope_parameters"][f"{which}_factor"])
        torch.testing.assert_close(tensors[f"rope_factors_{which}.weight"], factors)
    scaling = load(base).model.rotary_emb.attention_scaling
    assert settings["phi3.rope.scaling.attn_factor"] == pytest.approx(scaling, rel=1e-6)
    assert settings["phi3.rope.scaling.original_context_length"] == 32
    assert settings["phi3.attention.sliding_window"] == 100


def test_experts_that_are_stored_one_by_one_come_stacked(tmp_path):
    tiny.moe(num_hidden_layers=1).save_pretrained(tmp_path / "moe")
    tiny.tokenizer().save_pretrained(tmp_path / "moe")
    _, notes = write_gguf_model(tmp_path / "m.gguf", tmp_path / "moe")
    assert any("weighs PhiMoE's experts" in note for note in notes)
    tensors, settings = read(tmp_path / "m.gguf")
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    assert settings["general.architecture"] == "phimoe" and settings["phimoe.expert_count"] == 4
    for part, name in (("w1", "ffn_gate_exps"), ("w2", "ffn_down_exps"), ("w3", "ffn_up_exps")):
        one = [stored[f"model.layers.0.block_sparse_moe.experts.{n}.{part}.weight"] for n in range(4)]
        assert torch.equal(tensors[f"blk.0.{name}.weight"], torch.stack(one))
    assert {"blk.0.ffn_gate_inp.weight", "blk.0.attn_q.bias", "blk.0.attn_norm.bias", "output.bias"} <= set(tensors)


def spm_ids(settings: dict, text: str) -> list[int]:
    """llama.cpp's rule for "llama" vocabularies, from the settings of a GGUF file alone (src/llama-vocab.cpp)."""
    tokens, scores = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.scores"]
    types, name = settings["tokenizer.ggml.token_type"], settings["general.name"].lower()
    ids = {token: index for index, token in enumerate(tokens)}
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (2, 3, 4)]
    strips = "phi-3" in name or "phi3" in name
    pieces = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)
    result = []
    for place, piece in enumerate(pieces):
        if place % 2:
            result.append(ids[piece])
            continue
        if strips and place and pieces[place - 1] not in ("<unk>", "<s>", "<|endoftext|>"):
            piece = piece.lstrip(" \t\n\r\v\f")
        if not piece:
            continue
        symbols = list((" " + piece).replace(" ", "▁"))
        while True:
            pairs = [
                (-scores[ids[left + right]], at)
                for at, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
                if left + right in ids
            ]
            if not pairs:
                break
            at = min(pairs)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            result += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return result


@pytest.mark.parametrize(
    "name", ["phi-3-mini-4k-instruct", "phi-3-medium-4k-instruct", "phi-3-mini-128k-instruct-apr2024"]
)
def test_real_vocabularies_cut_text_as_the_tokenizer_does(shared_data, tmp_path, name):
    source = shared_data / "tokenizers" / name
    base = tmp_path / "model"
    tiny.model(vocab_size=32064, eos_token_id=32000, pad_token_id=32000).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / file, base / file)
    rows, notes = write_gguf_model(tmp_path / "m.gguf", base, name=name)
    _, settings = read(tmp_path / "m.gguf")
    real = Tokenizer.from_file(str(source / "tokenizer.json"))
    vectors = json.loads((shared_data / "tokenizers" / "phi-3-vectors.json").read_text())
    vectors = vectors if isinstance(vectors, list) else next(v for v in vectors.values() if isinstance(v, list))
    texts = [vector["text"] for vector in vectors if len(vector["text"]) < 400]
    texts += ["<|user|>\nHello, café 😀?<|end|>\n<|assistant|>\n  Fine\n\n\tnow<|end|>\n<|endoftext|> x </s> y <s> z"]
    assert len(texts) > 50
    wrong = [text for text in texts if spm_ids(settings, text) != real.encode(text).ids]
    assert wrong == []
    assert settings["tokenizer.ggml.eos_token_id"] == 32000 and settings["tokenizer.ggml.eot_token_id"] == 32007
    assert ("phi-3" in settings["general.name"].lower()) == (name != "phi-3-mini-128k-instruct-apr2024")
    assert not [note for note in notes if "SentencePiece" in note]


@pytest.mark.parametrize("rstrip", [True, False])
def test_the_name_says_whether_role_tokens_swallow_white_space(tmp_path, rstrip):
    base = tiny.base(tmp_path / ("tiny" if rstrip else "Phi-3-tiny"), rstrip=rstrip)
    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["rstrip"] = rstrip and token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    (base / "tokenizer.json").write_text(json.dumps(state))
    _, notes = write_gguf_model(tmp_path / "m.gguf", base)
    _, settings = read(tmp_path / "m.gguf")
    assert settings["general.name"] == ("Phi-3 tiny" if rstrip else "Phi 3-tiny")
    assert any("general.name is" in note for note in notes)


def byte_level(folder: Path, pattern: str) -> Path:
    """A tiny Phi-3 with a byte-level vocabulary, as Phi-4 has it."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    texts = ["the quick brown fox jumps over the lazy dog " * 4, "I'll say 12345 things\n\n"]
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|endoftext|>", "<|im_end|>")])
    tiny.model().save_pretrained(folder)
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    words.save_pretrained(folder)
    return folder


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(("pattern", "name"), [(CL100K, "dbrx"), (O200K, "gpt-4o")], ids=["phi-4", "phi-4-mini"])
def test_byte_level_vocabularies_have_merges_and_the_name_of_their_rule(tmp_path, pattern, name):
    base = byte_level(tmp_path / "phi-4", pattern)
    write_gguf_model(tmp_path / "m.gguf", base)
    _, settings = read(tmp_path / "m.gguf")
    assert settings["tokenizer.ggml.model"] == "gpt2" and settings["tokenizer.ggml.pre"] == name
    state = json.loads((base / "tokenizer.json").read_text())
    assert settings["tokenizer.ggml.merges"] == [" ".join(pair) for pair in state["model"]["merges"]]
    assert "tokenizer.ggml.scores" not in settings
    assert settings["tokenizer.ggml.tokens"][settings["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"


def test_vocabularies_without_an_equal_in_llama_cpp_are_refused_or_noted(tmp_path):
    with pytest.raises(VocabularyError, match="a rule that llama.cpp has no known name for"):
        read_vocabulary(byte_level(tmp_path / "odd", r"\w+|\s+"), 512)
    with pytest.raises(VocabularyError, match="has tokens up to .* the embedding only 100 rows"):
        read_vocabulary(tmp_path / "odd", 100)
    base = tiny.base(tmp_path / "base")
    assert any("was not made by SentencePiece" in note for note in read_vocabulary(base, 512).notes)
    (base / "tokenizer.json").unlink()
    with pytest.raises(VocabularyError, match="has no tokenizer.json"):
        convert(base, tmp_path / "m.gguf", "gguf")
    assert not (tmp_path / "m.gguf").exists() and not list(tmp_path.glob(".*"))


def test_models_that_llama_cpp_does_not_know_are_refused(base, tmp_path):
    from phi3_lora_plugin.export.base_layouts import convert_base

    convert_base(base, tmp_path / "llama", "llama-base")
    with pytest.raises(GGUFError, match="model_type is 'llama'; expected phi3 or phimoe"):
        convert(tmp_path / "llama", tmp_path / "m.gguf", "gguf")
    copy = shutil.copytree(base, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.surprise.weight": torch.zeros(2)}, copy / "model.safetensors")
    with pytest.raises(GGUFError, match="llama.cpp has no place for model.layers.0.self_attn.surprise.weight"):
        convert(copy, tmp_path / "m.gguf", "gguf")


def test_without_the_gguf_package_the_error_names_the_extra(base, tmp_path, warm):
    adapter = adapter_on(base, tmp_path / "adapter")
    script = f"""
import sys
sys.modules["gguf"] = None
from phi3_lora_plugin.export.convert import convert
try:
    convert({str(adapter)!r}, {str(tmp_path / "x.gguf")!r}, "gguf", base={str(base)!r})
except ValueError as error:
    print(error)
"""
    done = warm.run(script, cwd=tmp_path)
    assert 'pip install "phi3-lora-plugin[gguf]"' in done.stdout, done.stderr[-1500:]
    assert not (tmp_path / "x.gguf").exists()


def test_llama_cpp_itself_gives_transformers_probabilities(shared_data, tmp_path):
    """Where llama.cpp is installed (as `xllamacpp`), it loads model and adapter and agrees with transformers."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (xllamacpp) is not installed")
    base = shared_data / "models" / "phi3-stories260K"
    adapter = adapter_on(base, tmp_path / "adapter", use_rslora=True, alpha_pattern={"o_proj": 3})
    convert(base, tmp_path / "m.gguf", "gguf")
    convert(adapter, tmp_path / "lora.gguf", "gguf", base=base)
    model = adapted(base, adapter).eval()
    ids = [1, 403, 407, 261, 378]
    with torch.inference_mode():
        wanted = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1], -1)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(tmp_path / "m.gguf"), 256, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(tmp_path / "lora.gguf"), 1.0)]
    request = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 5}
    answer = xllamacpp.Server(params).handle_completions(request)
    for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][:3]:
        assert token["logprob"] == pytest.approx(float(wanted[token["id"]]), abs=1e-4)
