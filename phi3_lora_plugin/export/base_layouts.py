"""Whole models between Phi-3's fused layout and the split one of Llama and Mistral, shard by shard, logits compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.export.merge import write_generation_config
from phi3_lora_plugin.export.merge_check import sample_ids
from phi3_lora_plugin.lora_files.layouts import Row
from phi3_lora_plugin.model.families import projections, rope_of
from phi3_lora_plugin.model.folder import model_folder, read_json
from phi3_lora_plugin.model.logits import logit_limit
from phi3_lora_plugin.model.new_files import staged
from phi3_lora_plugin.model.quantize import quantized_by
from phi3_lora_plugin.model.shards import ShardWriter, Weights, copy_tokenizer, write_json
from phi3_lora_plugin.wording import listed, named_line

if TYPE_CHECKING:
    from torch import Tensor

    from phi3_lora_plugin.model.families import Projection

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "torch_dtype", "dtype",
)  # fmt: skip


class BaseLayoutError(Phi3LoraError):
    """A model cannot be expressed in the other layout, with every reason; nothing was written."""


def convert_base(
    source: str | Path,
    target: str | Path,
    to: str,
    max_shard: str | int = "2GB",
    overwrite: bool = False,
    check: bool = True,
) -> tuple[list[Row], list[str]]:
    """Write a model in the other layout; (rows, notes).

    Args:
        to: `llama-base` makes LlamaForCausalLM of a phi3 model, or MistralForCausalLM where it has a sliding window;
            `phi3-base` makes Phi3ForCausalLM of a Llama or Mistral model without biases, as unsloth's mirrors of Phi.

    Raises:
        BaseLayoutError: biases, a rope that the other layout does not have, or another kind of model.
    """
    folder = model_folder(source)
    config = read_json(folder / "config.json")
    split = to == "llama-base"
    settings, notes = _split_config(config) if split else _fused_config(config)
    fused = [projection for projection in projections(config if split else settings) if projection.slices]
    weights = Weights(folder)
    if biases := [name for name in weights if name.endswith(".bias")]:
        raise BaseLayoutError(f"{folder} has biases, which Phi-3 and Llama do not: {listed(biases, 3)}")
    rows: list[Row] = []
    with staged(Path(target), overwrite) as stage:
        writer = ShardWriter(stage, max_shard)
        for name in weights:
            for own, tensor in (_split if split else _joined)(name, weights, fused, rows):
                writer.add(own, tensor)
        writer.close()
        write_json(stage / "config.json", settings)
        copy_tokenizer([folder], stage)
        write_generation_config(stage, folder, settings)
        notes.append(_compare(folder, stage, settings) if check else "logits were not compared")
    return rows, notes


def _split(name: str, weights: Weights, fused: list[Projection], rows: list[Row]) -> Iterator[tuple[str, Tensor]]:
    """The rows of a fused projection under the names of its slices; every other weight as it is."""
    layer, path = _of_layer(name)
    whole, projection = weights.read(name), next((each for each in fused if each.path == path), None)
    if projection is None:
        rows.append(Row(name, name, weights.shape(name), "kept"))
        yield name, whole
        return
    for part in projection.slices:
        own, piece = f"{layer}.{_folder(path)}.{part.name}.weight", whole[part.start : part.stop]
        rows.append(Row(name, own, tuple(piece.shape), f"rows {part.start}-{part.stop - 1}"))
        yield own, piece


def _joined(name: str, weights: Weights, fused: list[Projection], rows: list[Row]) -> Iterator[tuple[str, Tensor]]:
    """The fused projection that begins with this slice; nothing for further slices; every other weight as it is."""
    import torch

    layer, path = _of_layer(name)
    inside = [each for each in fused if any(path == f"{_folder(each.path)}.{part.name}" for part in each.slices)]
    if not inside:
        rows.append(Row(name, name, weights.shape(name), "kept"))
        yield name, weights.read(name)
        return
    [projection] = inside
    parts = [f"{layer}.{_folder(path)}.{part.name}.weight" for part in projection.slices]
    if name != parts[0]:
        return
    if missing := [part for part in parts if part not in weights]:
        raise BaseLayoutError(f"{weights.folder} lacks {', '.join(missing)}")
    for part, rows_of in zip(parts, projection.slices, strict=True):
        wanted = (rows_of.stop - rows_of.start, projection.in_features)
        if tuple(weights.shape(part)) != wanted:
            raise BaseLayoutError(f"{part} has the shape {tuple(weights.shape(part))}; the config makes it {wanted}")
    whole = torch.cat([weights.read(part) for part in parts])
    own = f"{layer}.{projection.path}.weight"
    if whole.shape[0] != projection.out_features:
        raise BaseLayoutError(f"{own}: {whole.shape[0]} rows, where the config makes it {projection.out_features}")
    rows.extend(Row(part, own, tuple(whole.shape), "joined") for part in parts)
    yield own, whole


def _folder(path: str) -> str:
    return path.rpartition(".")[0]


def _compare(before: Path, after: Path, settings: Mapping[str, Any]) -> str:
    """Logits of both models in float32 on the same ids, also beyond the original context where that is short."""
    import torch

    window = settings.get("sliding_window") or settings.get("original_max_position_embeddings") or 0
    length = window + 8 if 24 < window + 8 <= min(512, settings["max_position_embeddings"]) else 24
    worst = 0.0
    for size in dict.fromkeys((min(24, settings["max_position_embeddings"]), length)):
        ids = sample_ids(settings["vocab_size"], size)
        with torch.inference_mode():
            wanted = _load(before)(input_ids=ids).logits
            got = _load(after)(input_ids=ids).logits
        worst = max(worst, float((wanted - got).abs().max()))
        if not worst <= logit_limit("float32", float(wanted.abs().max())):
            raise BaseLayoutError(
                f"the converted model's logits differ by {worst:.2e} on rows of {size} tokens; nothing was written"
            )
    return f"logits compared in float32: largest difference {worst:.2e}"


def _load(folder: Path) -> Any:
    """A model of either layout in float32 on the CPU, by transformers' own classes."""
    if read_json(folder / "config.json")["model_type"] == "phi3":
        from phi3_lora_plugin.model.load import load_model

        return load_model(str(folder), dtype="float32", attention="eager", device="cpu").eval()
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception as error:  # whatever transformers makes of a damaged folder
        raise BaseLayoutError(f"{folder} cannot be loaded: {named_line(error, 300)}") from error


def _shared(config: Mapping[str, Any], kind: str, class_name: str, norm: float) -> dict[str, Any]:
    """What both layouts have, with the values that stand for what is left out."""
    settings = {name: config[name] for name in _SHARED if config.get(name) is not None}
    settings |= {"model_type": kind, "architectures": [f"{class_name}ForCausalLM"]}
    settings["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    return {"num_key_value_heads": config["num_attention_heads"], "rms_norm_eps": norm} | settings


def _split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    problems, notes = [], []
    if config.get("model_type") != "phi3":
        raise BaseLayoutError(f"model_type is {config.get('model_type')!r}; only phi3 has fused projections to split")
    rope = rope_of(config)
    if (share := rope["partial_rotary_factor"]) != 1.0:
        problems.append(f"it rotates only {share:.0%} of each head, which neither Llama nor Mistral supports")
    if method := quantized_by(config):
        problems.append(f"it is quantised ({method}); convert the unquantised model")
    if problems:
        raise BaseLayoutError("\n".join(problems))
    longest = config.get("max_position_embeddings", 4096)
    window = config.get("sliding_window")
    kind = "mistral" if window and window < longest else "llama"
    settings = _shared(config, kind, kind.capitalize(), 1e-5)
    settings["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    settings.setdefault("max_position_embeddings", longest)
    settings["rope_theta"] = rope["rope_theta"]
    if kind == "mistral":
        settings["sliding_window"] = window
        notes.append(f"written as Mistral, because of the sliding window of {window} tokens")
    else:
        settings |= {"attention_bias": False, "mlp_bias": False}
        if window:
            notes.append(f"the sliding window of {window} tokens is dropped: it is not shorter than the context")
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        settings["original_max_position_embeddings"] = original
        settings["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": rope["short_factor"],
            "long_factor": rope["long_factor"],
            "original_max_position_embeddings": original,
            "factor": longest / original,
        }
        notes.append("longrope is written into the Llama config; transformers reads it there, many other hosts do not")
    return settings, notes


def _fused_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    problems, notes = [], []
    if config.get("model_type") not in ("llama", "mistral"):
        raise BaseLayoutError(
            f"model_type is {config.get('model_type')!r}; expected llama or mistral, which are split as Phi's mirrors"
        )
    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind not in ("default", "longrope"):
        problems.append(f"rope is {kind!r}; Phi-3 has default and longrope")
    problems += [
        f"{name} is set, but Phi-3 has no biases" for name in ("attention_bias", "mlp_bias") if config.get(name)
    ]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    if head * heads != config["hidden_size"]:
        problems.append(
            f"head_dim {head} x {heads} heads is not hidden_size {config['hidden_size']}, as Phi-3 needs it"
        )
    if method := quantized_by(config):
        problems.append(f"it is quantised ({method}); convert the unquantised model")
    if problems:
        raise BaseLayoutError("\n".join(problems))
    settings = _shared(config, "phi3", "Phi3", 1e-6)
    longest = settings.setdefault("max_position_embeddings", 2048 if config["model_type"] == "llama" else 131072)
    settings["sliding_window"] = config.get("sliding_window")
    settings["rope_theta"] = rope["rope_theta"]
    settings["original_max_position_embeddings"] = longest
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        settings["original_max_position_embeddings"] = original
        settings["rope_scaling"] = {
            "type": "longrope",
            "short_factor": rope["short_factor"],
            "long_factor": rope["long_factor"],
        }
        notes.append("longrope is kept")
    # Phi-3's own pad id is 32000, which is not a row of a smaller table.
    settings.setdefault("pad_token_id", None)
    return settings, notes


def _of_layer(name: str) -> tuple[str, str]:
    """(`model.layers.3`, `self_attn.qkv_proj`) of a weight's name; ("", module) outside the layers."""
    match = re.match(r"^(model\.layers\.\d+)\.(.+)\.weight$", name)
    return (match[1], match[2]) if match else ("", name)
