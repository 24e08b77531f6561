"""The base model: native class, repaired config, no remote code, placed and typed for the machine it is on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.embedded import locate
from phi3_lora_plugin.model.base_size import size_of_files
from phi3_lora_plugin.model.config import read_config
from phi3_lora_plugin.model.device import Device, read_device
from phi3_lora_plugin.model.folder import SINGLE, ModelError, model_folder, read_json, weight_files
from phi3_lora_plugin.model.precision import Precision, precision_of
from phi3_lora_plugin.model.quantize import keep_trainable_on_cpu, quantization_config, require_loader
from phi3_lora_plugin.model.tokenizer import load_tokenizer, repair_tokenizer, stop_token_ids
from phi3_lora_plugin.wording import listed

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
    return load_model(spec.path, **spec.model_dump(exclude={"path", "loader"})), tokenizer


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
        dtype: of the frozen weights; "auto" is decided by `model.precision` from the device and the size of the base.
        attention: "auto" is sdpa. An implementation that cannot run here is replaced by sdpa, which is logged.
        quantize: "nf4" (QLoRA, arXiv 2305.14314: 4-bit, double quantisation) or "int8" through bitsandbytes.
        device: "auto" is the accelerator if there is one. In a distributed run the host places the model.

    Raises:
        ModelError: missing, incomplete or unsafe weights, or a request this machine cannot meet.
        UnsupportedModel: not a model of the family.
        RopeError: rotary settings that no revision has.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder = model_folder(path_or_id, revision, download=True)
    config = read_config(folder / "config.json")
    require_loader(read_json(folder / "config.json"), str(folder / "config.json"))
    place = read_device(device)
    precision = precision_of(dtype, place, folder, quantize)
    for note in precision.notes:
        log.warning("%s", note)
    kind = precision.torch_dtype
    options: dict[str, Any] = {
        "dtype": kind,
        "attn_implementation": _attention(attention, place, kind),
        "quantization_config": None if quantize == "none" else quantization_config(quantize, kind),
        "device_map": _device_map(place, quantize),
    }
    native = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with _weights_to_convert(folder, place, precision, quantize) as weights:
            files = str(folder) if weights is None else None
            model, info = native.from_pretrained(
                files, state_dict=weights, config=config, output_loading_info=True, **options
            )
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{folder} cannot be loaded: {error}") from error
    except (KeyError, TypeError, ArithmeticError, AssertionError) as error:  # sizes or names that make no model
        raise ModelError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    except SafetensorError as error:
        raise ModelError(f"{folder} has weights that are cut off or damaged: {error}; fetch them again") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights, which would be random numbers: "
            f"{listed(missing)}; fetch the model again"
        )
    if quantize == "nf4" and place.kind == "cpu":
        keep_trainable_on_cpu(model)
    model.name_or_path = locate(path_or_id)
    model.config.name_or_path = model.name_or_path
    if not (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_model_config(model.config)
    elif weights is not None:  # loaded without its folder
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    model.config.use_cache = False  # for training; generation follows its own config
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
    inside = model.get_input_embeddings().modules()  # PEFT wraps an embedding that it trains, wholly or by tokens
    rows = next(one.num_embeddings for one in inside if hasattr(one, "num_embeddings"))
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {highest}, the model {rows} rows of embeddings; the two do not match"
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


@contextmanager
def _weights_to_convert(
    folder: Path, place: Device, precision: Precision, quantize: str
) -> Iterator[dict[str, Any] | None]:
    """Tensors to be read one by one where each is converted on the CPU; None where the files are better mapped.

    transformers maps the files. That is free while weights keep their dtype; once they are converted, the pages of
    the files stay in memory next to the result until loading ends: 1.5 times the weights for bfloat16 to float32.
    """
    import inspect

    from safetensors import safe_open

    saved = size_of_files(folder)
    mapped = place.kind != "cpu" or saved is None or (saved.dtype == precision.weights and quantize == "none")
    # `backend` came with safetensors 0.8; transformers takes tensors that are not read yet since 5.
    can = "backend" in inspect.signature(safe_open).parameters and find_spec("transformers.core_model_loading")
    if mapped or not can:
        yield None
        return
    places = weight_files(folder)
    names = [SINGLE] if places is None else sorted(set(places.values()))
    with ExitStack() as stack:
        # One tensor at a time: four threads with buffers of their own take a tenth more than the result.
        stack.enter_context(environment_kept("HF_DEACTIVATE_ASYNC_LOAD", "1"))
        opened = [stack.enter_context(safe_open(folder / name, framework="pt", backend="pread")) for name in names]
        yield {key: file.get_slice(key) for file in opened for key in file.keys()}


@contextmanager
def environment_kept(name: str, value: str | None = None) -> Iterator[None]:
    """Take back whatever becomes of an environment variable in the block, which begins with `value` in it, if given."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _attention(attention: str, place: Device, dtype: Any) -> str:
    import torch
    from transformers.utils import is_flash_attn_2_available

    if attention == "flex_attention" and place.kind == "cpu":
        log.warning("attention %s has no backward pass on a CPU; sdpa is used instead", attention)
        return "sdpa"
    if not attention.startswith("flash_attention"):
        return "sdpa" if attention == "auto" else attention
    if place.flash and dtype in (torch.bfloat16, torch.float16) and is_flash_attn_2_available():
        return attention
    why = "needs the package flash-attn and 16-bit weights"
    if not place.flash:
        why = "needs a CUDA device" if place.kind != "cuda" else "needs a card of compute capability 8.0 or more"
    log.warning("attention %s %s; sdpa is used instead", attention, why)
    return "sdpa"


def _device_map(place: Device, quantize: str) -> dict[str, Any] | None:
    """Where to put the model; a distributed run places it itself, unless its weights are packed.

    A card is given by its index: Trainer takes {"": "cuda"} for a model that is spread over several devices.
    """
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if place.kind == "cpu":
        return None if quantize == "none" or many else {"": "cpu"}
    if many and quantize == "none":
        return None
    return {"": place.kind if place.kind == "mps" else int(os.environ.get("LOCAL_RANK", "0"))}
