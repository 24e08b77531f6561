"""torchtune's adapter files: `layers.N.attn.q_proj.lora_a.weight` and so on, always split, without r and alpha.

Names as torchtune 0.6 builds them (`models/phi3`): w1 is the gate, w3 the up and w2 the down projection. Its Phi-3
rotates as transformers does, so unlike for its Llama no rows are permuted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora_files.layouts import Lora, Row
from phi3_lora_plugin.model.families import SPLIT

if TYPE_CHECKING:
    from torch import Tensor

_THEIRS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w3", "mlp.w2")
_NAMES = dict(zip(_THEIRS, SPLIT, strict=True))
_KEY = re.compile(r"^layers\.(\d+)\.(.+)\.(lora_a\.weight|lora_b\.weight|magnitude)$")


class TorchtuneError(Phi3LoraError):
    """A torchtune adapter cannot be read; lists everything that is wrong."""


def looks_like_torchtune(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a torchtune adapter."""
    return any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in keys)


def from_torchtune(tensors: Mapping[str, Tensor], alpha: float | None) -> tuple[list[Lora], list[Row]]:
    """The updates of split projections in a torchtune adapter.

    Raises:
        TorchtuneError: alpha is missing, or the file has keys that its Phi-3 builders do not make.
    """
    problems = []
    if alpha is None:
        problems.append(
            "alpha is missing: torchtune stores none with a Phi-3 adapter; pass --alpha (its recipes use 16)"
        )
    found: dict[str, dict[str, Tensor]] = {}
    sources = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None or match[2] not in _NAMES:
            problems.append(f"{key!r} is not a key of a torchtune Phi-3 adapter")
            continue
        module = f"model.layers.{match[1]}.{_NAMES[match[2]]}"
        sources[module] = f"layers.{match[1]}.{match[2]}"
        found.setdefault(module, {})[match[3]] = tensor
    loras, rows = [], []
    for module, each in found.items():
        a, b = each.get("lora_a.weight"), each.get("lora_b.weight")
        if a is None or b is None:
            problems.append(f"{sources[module]}: {'lora_a' if a is None else 'lora_b'} is missing")
            continue
        loras.append(Lora(module, a, b, alpha or 0, magnitude=each.get("magnitude")))
        rows.append(Row(sources[module], module, tuple(b.shape), "renamed"))
    if problems:
        raise TorchtuneError("\n".join(problems))
    return loras, rows
