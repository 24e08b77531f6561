"""Quantised base weights through bitsandbytes; all else of a quantised run is the code of a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.model.folder import ModelError
from phi3_lora_plugin.seams import is_installed

#: Bytes a weight: 4 bits and, double quantised, 0.127 bits of scales (QLoRA, arXiv 2305.14314, section 3); 8 bits.
PACKED_BYTES = {"nf4": 4.127 / 8, "int8": 1.0}


def quantized_by(config: Mapping[str, Any]) -> str | None:
    """What the weights of a model folder are quantised by and to, such as `gptq, 4 bits`; None: they are not."""
    given = config.get("quantization_config")
    if not given:
        return None
    said = given if isinstance(given, Mapping) else {}
    bits = said.get("bits") or (4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else None)
    return f"{said.get('quant_method', 'an unnamed method')}{f', {bits} bits' if bits else ''}"


#: What transformers needs to load weights that are quantised already: modules, and what to install.
_LOADERS = {
    "aqlm": (("aqlm",), "aqlm"),
    "auto-round": (("auto_round",), "auto-round"),
    "awq": (("gptqmodel",), "gptqmodel"),
    "bitsandbytes": (("bitsandbytes",), '"phi3-lora-plugin[qlora]"'),
    "compressed-tensors": (("compressed_tensors",), "compressed-tensors"),
    "eetq": (("eetq",), "eetq"),
    "gptq": (("optimum", "gptqmodel"), "optimum gptqmodel"),
    "hqq": (("hqq",), "hqq"),
    "quanto": (("optimum.quanto",), "optimum-quanto"),
    "torchao": (("torchao",), "torchao"),
    "vptq": (("vptq",), "vptq"),
}


def require_loader(config: Mapping[str, Any], where: str) -> None:
    """Raise `ModelError` where weights are quantised already and what loads them is not installed."""
    by = quantized_by(config)
    if by is None:
        return
    given = config["quantization_config"]
    method = str(given.get("quant_method", "")) if isinstance(given, Mapping) else ""
    modules, package = _LOADERS.get(method, ((), ""))
    instead = "take the unquantised model, with model.quantize: nf4 to train it in 4 bits"
    if missing := [module for module in modules if not is_installed(module)]:
        needs = f"{' and '.join(missing)}: pip install {package}; or {instead}"
        raise ModelError(f"{where}: the weights are quantised by {by}, which needs {needs}")
    if not modules and method not in ("fp8", "mxfp4"):
        raise ModelError(f"{where}: the weights are quantised by {by}, which cannot be trained here; {instead}")


def quantization_config(kind: str, compute: Any) -> Any:
    """The `BitsAndBytesConfig` of "nf4" or "int8"; embeddings and head stay as they are.

    Args:
        compute: dtype that nf4 weights are multiplied in.

    Raises:
        ModelError: bitsandbytes is not installed, or an unknown kind.
    """
    from transformers import BitsAndBytesConfig

    if not is_installed("bitsandbytes"):
        raise ModelError(f'quantize: {kind} needs bitsandbytes: pip install "phi3-lora-plugin[qlora]"')
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=["lm_head"],
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    raise ModelError(f"quantize: {kind!r} is not one of none, nf4, int8")


def keep_trainable_on_cpu(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights of a model in place when it is evaluated on a CPU.

    On CPUs with AVX512-BF16 it does so (0.50) at the first forward pass in evaluation mode. Packed weights have no
    backward pass, so that training on after an evaluation would stop short at them without a word, and layers whose
    sizes are not multiples of 32 and 64 fail. Unpacked ones are multiplied as in training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
