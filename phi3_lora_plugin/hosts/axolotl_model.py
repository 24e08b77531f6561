"""What axolotl 0.21 and later has to know of the family: its LoRA kernels look for q_proj, k_proj and v_proj.

Named by the entry point `axolotl.model_support`; PhiMoE has those projections, so nothing is said of it.
"""

# A description of axolotl's is a subclass of its own; this module is imported only by axolotl.
from __future__ import annotations

from phi3_lora_plugin.hosts.switch import switched
from phi3_lora_plugin.seams import look_up


class Phi3Support(look_up("axolotl.model")):  # type: ignore[misc]
    """Fused LoRA kernels are off for `phi3`, with axolotl's own warning."""

    model_types = ("phi3",)
    capabilities = (
        {} if switched() is False else {"lora_kernels": look_up("axolotl.unsupported")("Its qkv_proj is fused.")}
    )
