"""The base model: native class, repaired config, no remote code, placed and typed for the machine it is on."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.embedded import locate
from phi3_lora_plugin.model.config import read_config
from phi3_lora_plugin.model.folder import ModelError, model_folder
from phi3_lora_plugin.model.tokenizer import load_tokenizer, repair_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from phi3_lora_plugin.recipe import Recipe

log = logging.getLogger(__name__)


def load(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(model, tokenizer) of a recipe; the loader that this package registers as `phi3`.

    Raises:
        ModelError, TokenizerError, UnsupportedModel, RopeError: see there.
    """
    spec = recipe.model
    tokenizer = load_tokenizer(spec.path, spec.revision)
    model = load_model(
        spec.path,
        revision=spec.revision,
        dtype=spec.dtype,
        attention=spec.attention,
        quantize=spec.quantize,
        device=spec.device,
    )
    return model, tokenizer


def load_model(
    path_or_id: str | Path,
    revision: str | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    quantize: str = "none",
    device: str = "auto",
) -> PreTrainedModel:
    """The base model of a folder or hub repository, by its native class whatever `auto_map` says.

    Args:
        path_or_id: folder, `embedded:NAME`, or hub id; `revision` goes with a hub id.
        dtype: of the frozen weights; "auto" is bfloat16 on hardware that computes in it, else float32.
        attention: "auto" is sdpa. An implementation that cannot run here gives way to sdpa, and the log says so.
        quantize: "nf4" (QLoRA, arXiv 2305.14314: 4-bit, double quantisation) or "int8" through bitsandbytes.
        device: "auto" is the accelerator if there is one. In a distributed run the host places the model.

    Raises:
        ModelError: missing, incomplete or unsafe weights, or a request this machine cannot meet.
        UnsupportedModel: not a model of the family.
        RopeError: rotary settings that no revision has.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder = model_folder(path_or_id, revision, download=True)
    config = read_config(folder / "config.json")
    place = _device(device)
    kind = weights_dtype(dtype, place)
    options: dict[str, Any] = {"dtype": kind, "attn_implementation": _attention(attention, place, kind)}
    if quantize != "none":
        from phi3_lora_plugin.model.quantize import quantization_config

        options["quantization_config"] = quantization_config(quantize, kind)
    if (map_ := _device_map(place, quantize)) is not None:
        options["device_map"] = map_
    try:
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            str(folder), config=config, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{folder} cannot be loaded: {error}") from error
    except (KeyError, TypeError, ArithmeticError, AssertionError) as error:  # sizes or names that make no model
        raise ModelError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # the Rust side's class, which has moved between versions
            raise
        raise ModelError(f"{folder} has weights that are cut off or damaged: {error}; fetch them again") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights, which would be random numbers: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; fetch the model again"
        )
    if quantize == "nf4" and place == "cpu":
        from phi3_lora_plugin.model.quantize import keep_trainable_on_cpu

        keep_trainable_on_cpu(model)
    model.name_or_path = locate(path_or_id)
    model.config.name_or_path = model.name_or_path
    if not (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.config.use_cache = False  # for training; generation keeps what its own config says
    if (folder / "tokenizer.json").is_file():
        set_stop_tokens(model, load_tokenizer(folder))
    return model.eval()


def set_stop_tokens(model: Any, tokenizer: Any, repair: bool = True) -> list[str]:
    """Make generation stop at the end of a turn and pad outside the stop tokens; return a sentence for each change.

    Args:
        repair: the tokenizer as well; False where rows have been padded by it already.

    Raises:
        ModelError: the tokenizer has ids that the embedding has no row for.
    """
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {highest}, the model {rows} rows of embeddings; they are of different models"
        )
    done = repair_tokenizer(tokenizer) if repair else []
    generation = model.generation_config
    known = generation.eos_token_id
    before = [known] if isinstance(known, int) else sorted(known or ())
    stops = stop_token_ids(tokenizer, [token for token in before if token != tokenizer.pad_token_id])
    if stops != before:
        done.append(f"generation stops at {', '.join(tokenizer.convert_ids_to_tokens(stops))} instead of ids {before}")
        generation.eos_token_id = stops
    if generation.pad_token_id != tokenizer.pad_token_id:
        done.append(f"generation pads with {tokenizer.pad_token}")
    generation.pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    return done


def _device(device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device: cuda, but torch sees no CUDA device; write auto or cpu")
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator.type if accelerator else "cpu"
    return device


def weights_dtype(dtype: str, place: str) -> Any:
    """The torch dtype that a recipe's `model.dtype` means on "cpu" or "cuda"."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if place == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def _attention(attention: str, place: str, dtype: Any) -> str:
    import torch
    from transformers.utils import is_flash_attn_2_available

    if not attention.startswith("flash_attention"):
        return "sdpa" if attention == "auto" else attention
    if place == "cuda" and dtype in (torch.bfloat16, torch.float16) and is_flash_attn_2_available():
        return attention
    why = "needs a CUDA device" if place != "cuda" else "needs the package flash-attn and 16-bit weights"
    log.warning("attention %s %s; sdpa is used instead", attention, why)
    return "sdpa"


def _device_map(place: str, quantize: str) -> dict[str, Any] | None:
    """Where to put the model; a distributed run places it itself, unless its weights are packed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return {"": int(os.environ.get("LOCAL_RANK", "0"))} if quantize != "none" and place != "cpu" else None
    return None if place == "cpu" and quantize == "none" else {"": place}
