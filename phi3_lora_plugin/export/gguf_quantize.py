"""llama.cpp's quantised forms: which tensor gets how many bits, and its own code to round the rows.

Which type a tensor gets follows llama.cpp's src/llama-quant.cpp without an importance matrix: the head has more bits,
some layers' attention and down projections too, and rows whose length does not fit a type get the next larger one. The
rows are rounded by ggml's `ggml_quantize_chunk`, out of the llama.cpp that the xllamacpp wheel brings; without it, the
`gguf` package rounds the plain forms.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError

#: Forms by the name that llama-quantize gives them: (the type of most tensors, of the better ones).
_TYPES = {
    "q8_0": ("Q8_0", "Q8_0"),
    "q6_k": ("Q6_K", "Q6_K"),
    "q5_k_m": ("Q5_K", "Q6_K"),
    "q5_k_s": ("Q5_K", "Q5_K"),
    "q4_k_m": ("Q4_K", "Q6_K"),
    "q4_k_s": ("Q4_K", "Q5_K"),
    "q5_0": ("Q5_0", "Q5_0"),
    "q4_0": ("Q4_0", "Q4_0"),
}
FORMS = tuple(_TYPES)
_FILE_TYPES = {"q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q4_k_m": 15, "q4_k_s": 14, "q5_0": 8, "q4_0": 2,
               "float32": 0, "float16": 1, "bfloat16": 32}  # fmt: skip
_LARGER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_PLAIN = ("Q8_0", "Q5_1", "Q5_0", "Q4_0")


class QuantizeError(Phi3LoraError):
    """A quantised form that cannot be written here; says what is missing."""


def file_type(form: str) -> int:
    """llama.cpp's number of a form or a dtype, for `general.file_type`."""
    return _FILE_TYPES[form]


def tensor_type(form: str, name: str, shape: tuple[int, ...], layers: int, tied: bool) -> str:
    """The GGML type that a form gives a tensor.

    Args:
        name: in the GGUF file, such as `blk.0.attn_qkv.weight`.
        shape: its last number is the length of a row.
        layers: of the model.
        tied: the embeddings are the head too.
    """
    usual, better = _TYPES[form]
    if len(shape) < 2 or not name.endswith(".weight") or "_norm" in name or "ffn_gate_inp" in name or "rope" in name:
        return "F32"
    kind = usual
    layer = int(found[1]) if (found := re.match(r"blk\.(\d+)\.", name)) else -1
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = "Q8_0" if usual == "Q8_0" or shape[-1] % _block(usual) else "Q6_K"
    elif re.search(r"\.(attn_qkv|attn_v)\.", name):
        more = _more_bits(layer, layers) if form.endswith("_m") else form == "q4_k_s" and layer < 4
        kind = better if more else usual
    elif ".ffn_down" in name:
        more = _more_bits(layer, layers) if form.endswith("_m") else form == "q4_k_s" and layer < layers // 8
        kind = better if more else usual
    if shape[-1] % _block(kind):
        kind = _LARGER.get(kind, "F16")
    return kind if shape[-1] % _block(kind) == 0 else "F16"


def quantize_rows(array: Any, kind: str) -> Any:
    """Float32 rows [..., length] (numpy) as bytes [..., bytes of a row] of a GGML type, `F32` and `F16` included.

    Raises:
        QuantizeError: a type that only llama.cpp rounds, and it is not installed.
    """
    import gguf
    import numpy

    flat = numpy.ascontiguousarray(array, dtype=numpy.float32)
    if kind in ("F32", "F16"):
        return flat if kind == "F32" else flat.astype(numpy.float16)
    quantize = _ggml()
    number = gguf.GGMLQuantizationType[kind]
    if quantize is None:
        if kind not in _PLAIN:
            raise QuantizeError(f'{kind} needs llama.cpp: pip install "phi3-lora-plugin[llama-cpp]"')
        return numpy.asarray(gguf.quants.quantize(flat, number))
    block, size = gguf.GGML_QUANT_SIZES[number]
    length = flat.shape[-1]
    rows = flat.size // length
    out = numpy.empty((*flat.shape[:-1], length // block * size), dtype=numpy.uint8)
    written = quantize(int(number), flat.ctypes.data, out.ctypes.data, 0, rows, length, None)
    if written != out.nbytes:
        raise QuantizeError(f"llama.cpp wrote {written} bytes of {kind} instead of {out.nbytes}")
    return out


def _block(kind: str) -> int:
    return 256 if kind.endswith("_K") else 1 if kind.startswith("F") else 32


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of layers with more bits: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


@cache
def _ggml() -> Any:
    """ggml's `ggml_quantize_chunk`, of its public interface (ggml.h), or None where llama.cpp is not installed."""
    try:
        from xllamacpp import xllamacpp
    except ImportError:
        return None
    try:
        quantize = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    except (OSError, AttributeError):  # a build that does not show it
        return None
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p)
    return quantize
