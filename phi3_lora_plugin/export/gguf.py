"""GGUF files for llama.cpp and what is built on it: a LoRA adapter, or a whole model, by the `gguf` package alone.

Names, shapes and settings are those that llama.cpp's phi3 architecture loads (src/models/phi3.cpp,
src/llama-adapter.cpp): fused qkv stays fused, gate_up is called `ffn_up`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.export.gguf_quantize import FORMS, file_type, quantize_rows, tensor_type
from phi3_lora_plugin.export.gguf_vocab import Vocabulary, read_vocabulary
from phi3_lora_plugin.lora.finite import is_finite
from phi3_lora_plugin.lora_files.layouts import Lora, Row, one_alpha
from phi3_lora_plugin.model.families import repair_rope, rope_of
from phi3_lora_plugin.model.folder import model_folder, published_stops, read_json
from phi3_lora_plugin.model.quantize import quantized_by
from phi3_lora_plugin.model.shards import Weights
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from torch import Tensor

#: Dtype -> what ggml calls it.
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: `model_type` -> what the gguf package calls it.
ARCHITECTURES = {"phi3": "PHI3", "phimoe": "PHIMOE"}


class GGUFError(Phi3LoraError):
    """Something that llama.cpp cannot load or would compute differently; says what, nothing was written."""


def write_gguf_adapter(
    file: Path, loras: Sequence[Lora], config: Mapping[str, Any], dtype: str = "float32", name: str = ""
) -> list[Row]:
    """Write updates of a phi3 or phimoe model as a GGUF adapter; returns report rows.

    llama.cpp scales every module by one alpha over the module's own rank. What scales differently (rsLoRA,
    alpha_pattern) has the ratio multiplied into its B.

    Raises:
        GGUFError: embeddings, DoRA, biases or modules that llama.cpp's adapters do not have, gguf is not installed.
    """
    gguf = _gguf()
    arch = _architecture(gguf, config)
    names = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    problems: list[str] = []
    placed: dict[str, str] = {}
    for lora in loras:
        place = names.get_name(f"{lora.module}.weight", try_suffixes=(".weight",))
        if lora.magnitude is not None or lora.bias is not None:
            problems.append(
                f"{lora.module}: GGUF adapters have no {'DoRA' if lora.magnitude is not None else 'bias'}; merge it"
            )
        elif lora.embedding:
            problems.append(f"{lora.module}: an adapted embedding; merge it instead")
        elif place is None:
            problems.append(
                f"{lora.module} is not a weight of llama.cpp's {gguf.MODEL_ARCH_NAMES[arch]}; fuse split adapters first"
            )
        elif place in placed:
            problems.append(f"{lora.module} and {placed[place]} are the same weight in llama.cpp ({place})")
        else:
            placed[place] = lora.module
    if not loras:
        problems.append("there is nothing to write")
    if problems:
        raise GGUFError("\n".join(problems))
    alpha = float(loras[0].scaling * loras[0].rank) or 1.0
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(file_type(dtype))
    if name:
        writer.add_name(name)
    rows = []
    kind = gguf.GGMLQuantizationType[_TYPES[dtype]]
    for (place, module), lora, own in zip(placed.items(), one_alpha(loras, alpha), loras, strict=True):
        folded = "" if lora.b is own.b else f", B times {own.scaling * own.rank / alpha:g}"
        for factor, tensor in (("lora_a", lora.a), ("lora_b", lora.b)):
            array = _array(tensor, dtype)
            writer.add_tensor(f"{place}.{factor}", array, raw_shape=tuple(tensor.shape), raw_dtype=kind)
        rows.append(Row(module, f"{place}.lora_a, .lora_b", tuple(lora.b.shape), f"rank {lora.rank}{folded}"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rows


def write_gguf_model(
    file: Path, source: str | Path, dtype: str = "auto", name: str = ""
) -> tuple[list[Row], list[str]]:
    """Write a model folder (a merged one, or a base) as one GGUF file with its tokenizer; (report rows, notes).

    Matrices get `dtype` (`auto`: the folder's; or one of llama.cpp's quantised forms, see `gguf_quantize`), vectors are
    float32 as llama.cpp wants them. Tensors are read and written one at a time.

    Raises:
        GGUFError: not a phi3 or phimoe model, weights that llama.cpp does not know, gguf is not installed.
        VocabularyError: a tokenizer that llama.cpp has no equal of.
    """
    import numpy

    gguf = _gguf()
    folder = model_folder(source)
    config = read_json(folder / "config.json")
    if method := quantized_by(config):
        raise GGUFError(f"{folder} is quantised by {method}; export the unquantised model")
    arch = _architecture(gguf, config)
    weights = Weights(folder)
    dtype = weights.floating_type() if dtype == "auto" else dtype
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    vocabulary = read_vocabulary(folder, int(config["vocab_size"]), published_stops(generation, config))
    title, notes = _title(name or folder.resolve().name, vocabulary)
    if config.get("model_type") == "phimoe":
        notes.append(
            "llama.cpp weighs PhiMoE's experts by a softmax over the chosen two, transformers by sparsemixer; "
            "their answers differ"
        )
    plan = _placed(gguf, arch, weights, config)
    factors, attention = _rope(config)

    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(title)
    _add_settings(writer, config, dtype, attention)
    _add_vocabulary(writer, vocabulary)
    rows = []
    kinds: dict[str, Any] = {}
    for place, (sources, shape) in plan.items():
        raw = kinds[place] = _type_of(gguf, dtype, place, shape, config)
        block, size = gguf.GGML_QUANT_SIZES[raw]
        if block == 1:
            writer.add_tensor_info(place, shape, _numpy_type(size), math.prod(shape) * size, raw_dtype=raw)
        else:
            stored = (*shape[:-1], shape[-1] // block * size)
            writer.add_tensor_info(place, stored, _numpy_type(1), math.prod(stored), raw_dtype=raw)
        rows.append(Row(sources[0] + (" ..." if len(sources) > 1 else ""), place, shape, raw.name))
    for place, values in factors.items():
        writer.add_tensor_info(place, (len(values),), _numpy_type(4), len(values) * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for place, (sources, shape) in plan.items():
        tensor = _read(weights, sources, shape)
        if dtype in FORMS:
            writer.write_tensor_data(quantize_rows(_array(tensor, "float32"), kinds[place].name))
        else:
            writer.write_tensor_data(_array(tensor, dtype if len(shape) > 1 else "float32"))
    for values in factors.values():
        writer.write_tensor_data(numpy.array(values, dtype=numpy.float32))
    writer.close()
    return rows, [*notes, *vocabulary.notes]


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise GGUFError('writing GGUF needs the gguf package: pip install "phi3-lora-plugin[gguf]"') from error
    return gguf


def _architecture(gguf: Any, config: Mapping[str, Any]) -> Any:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise GGUFError(f"model_type is {kind!r}; expected {' or '.join(ARCHITECTURES)} (fuse a split model first)")
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    if head * heads != config["hidden_size"]:
        raise GGUFError(
            f"{heads} heads of {head} are not hidden_size {config['hidden_size']}, as llama.cpp's {kind} needs it"
        )
    return gguf.MODEL_ARCH[ARCHITECTURES[kind]]


def _placed(
    gguf: Any, arch: Any, weights: Weights, config: Mapping[str, Any]
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """GGUF name -> (names in the folder, shape); experts that are stored one by one come stacked."""
    names = gguf.get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    tied = bool(config.get("tie_word_embeddings"))
    plan: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    problems = []
    experts: dict[str, dict[int, str]] = {}
    for name in weights:
        if name == "lm_head.weight" and tied:
            continue  # llama.cpp takes the embedding where there is no output weight
        if match := re.fullmatch(r"(.+\.block_sparse_moe)\.experts\.(\d+)\.(w[123])\.weight", name):
            experts.setdefault(f"{match[1]}.experts.{match[3]}", {})[int(match[2])] = name
            continue
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            problems.append(name)
        else:
            plan[place] = ((name,), weights.shape(name))
    for stack, parts in experts.items():
        place = names.get_name(f"{stack}.weight", try_suffixes=(".weight",))
        ordered = tuple(parts[index] for index in sorted(parts))
        if place is None or len(parts) != config.get("num_local_experts"):
            problems.append(stack)
        else:
            plan[place] = (ordered, (len(parts), *weights.shape(ordered[0])))
    if problems:
        raise GGUFError(f"llama.cpp has no place for {listed(problems)}")
    return plan


def _read(weights: Weights, sources: Sequence[str], shape: Sequence[int]) -> Tensor:
    import torch

    if len(sources) == 1:
        return weights.read(sources[0])
    return torch.stack([weights.read(name) for name in sources]).reshape(tuple(shape))


def _add_settings(writer: Any, config: Mapping[str, Any], dtype: str, attention: float | None) -> None:
    rope = rope_of(config)
    heads = int(config["num_attention_heads"])
    longest = int(config.get("max_position_embeddings") or 4096)
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or longest
    writer.add_file_type(file_type(dtype))
    writer.add_context_length(longest)
    writer.add_rope_scaling_orig_ctx_len(int(original))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-5)))
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * config["hidden_size"]) // heads)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    # Older llama.cpp refuses a phi3 without this key; 0 says that there is no window.
    writer.add_sliding_window(int(config.get("sliding_window") or 0))
    if attention is not None:
        writer.add_rope_scaling_attn_factors(attention)
    if config.get("model_type") == "phimoe":
        writer.add_expert_count(int(config["num_local_experts"]))
        writer.add_expert_used_count(int(config.get("num_experts_per_tok", 2)))


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Sequence[float]], float | None]:
    """(longrope's factors by GGUF name, what it multiplies cosines and sines by), ({}, None) without longrope."""
    rope = repair_rope(config)["rope_parameters"]
    if rope["rope_type"] != "longrope":
        return {}, None
    short, long = rope.get("short_mscale"), rope.get("long_mscale")
    if short != long:
        raise GGUFError(f"short_mscale {short} and long_mscale {long} differ; llama.cpp has one factor for both")
    original = rope["original_max_position_embeddings"]
    stretch = (config.get("max_position_embeddings") or original) / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    factors = {"rope_factors_long.weight": rope["long_factor"], "rope_factors_short.weight": rope["short_factor"]}
    return factors, float(short or rope.get("attention_factor") or usual)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for kind, index in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _title(name: str, vocabulary: Vocabulary) -> tuple[str, list[str]]:
    """A name under which llama.cpp applies the right white-space rule: it looks for `phi-3` or `phi3` in it."""
    has = re.search(r"phi-?3", name, re.IGNORECASE) is not None
    if has == vocabulary.swallows_space:
        return name, []
    fitted = f"Phi-3 {name}" if vocabulary.swallows_space else re.sub(r"(?i)(phi)-?(3)", r"\1 \2", name)
    rule = "swallow" if vocabulary.swallows_space else "keep"
    return fitted, [
        f"general.name is {fitted!r}, so that llama.cpp's role tokens {rule} white space as this tokenizer's do"
    ]


def _array(tensor: Tensor, dtype: str) -> Any:
    """A tensor as a numpy array; bfloat16 travels as 16-bit integers, which numpy has."""
    import torch

    final = tensor.detach().to(getattr(torch, dtype)).contiguous()
    if not is_finite(final):
        raise GGUFError(f"values are not finite in {dtype}; use bfloat16 or float32")
    return (final.view(torch.int16) if dtype == "bfloat16" else final).numpy()


def _type_of(gguf: Any, dtype: str, place: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> Any:
    if dtype in FORMS:
        tied = bool(config.get("tie_word_embeddings"))
        name = tensor_type(dtype, place, shape, int(config["num_hidden_layers"]), tied)
    else:
        name = _TYPES[dtype] if len(shape) > 1 else "F32"
    return gguf.GGMLQuantizationType[name]


def _numpy_type(size: int) -> Any:
    import numpy

    return numpy.dtype({4: numpy.float32, 2: numpy.float16, 1: numpy.uint8}[size])
