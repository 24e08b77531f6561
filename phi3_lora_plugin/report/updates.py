"""How far training moved each module: the norm of what its adapter adds to the weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora_files.peft_files import parts, read_peft

#: Bytes of an adapter that are read for a report.
_LIMIT = 4_000_000_000


@dataclass(frozen=True)
class Update:
    """One module and the Frobenius norm of its update, `|scaling * B @ A|`; DoRA's magnitudes are left aside."""

    module: str
    rank: int
    norm: float


def largest_updates(adapter: Path, most: int = 12) -> list[Update]:
    """The modules of a PEFT adapter with the largest updates, largest first; none where it is not a plain one.

    The norm comes from the Gram matrices of A and B, so that no weight-sized matrix is made.
    """
    import torch

    try:
        if sum(file.stat().st_size for file in adapter.glob("*.safetensors")) > _LIMIT:
            return []
        loras = parts(read_peft(adapter)).loras
    except (Phi3LoraError, OSError):
        return []
    with torch.inference_mode():
        found = []
        for lora in loras:
            a, b = lora.a.double(), lora.b.double()
            square = ((b.T @ b) * (a @ a.T).T).sum().clamp(min=0)
            found.append(Update(lora.module, lora.rank, abs(lora.scaling) * float(square.sqrt())))
    return sorted(found, key=lambda update: -update.norm)[:most]
