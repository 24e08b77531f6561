"""Whether an adapter folder can be served as it is: what vLLM, TGI, LoRAX and llama.cpp refuse, or worse, ignore."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_lora_plugin.lora_files.peft_files import WEIGHTS, PeftFilesError, changes_base, read_config
from phi3_lora_plugin.lora_files.weights import shapes_of


def servable(folder: str | Path, max_rank: int = 64) -> list[str]:
    """What would keep vLLM, TGI, LoRAX or llama.cpp from serving this adapter as it is; empty if nothing.

    Args:
        max_rank: the largest rank that the server was started for (vLLM: `--max-lora-rank`, 16 by default).

    Raises:
        PeftFilesError: the folder has no adapter_config.json, or a damaged one, or damaged weights.
    """
    folder = Path(folder)
    config = read_config(folder)
    problems = []
    keys: list[str] = []
    ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; servers load LORA")
    if (folder / WEIGHTS).is_file():
        shapes = shapes_of(folder / WEIGHTS, PeftFilesError)
        keys = list(shapes)
        ranks += [shape[0] for key, shape in shapes.items() if shape and "lora_A" in key and "experts" not in key]
    else:
        problems.append(f"{WEIGHTS} is missing")
    targets = config.get("target_modules") or []
    targets = [targets] if isinstance(targets, str) else targets
    ends = {target.rpartition(".")[2] for target in targets}
    saved = list(config.get("modules_to_save") or [])
    if saved or any(".modules_to_save." in key for key in keys):
        problems.append(
            f"modules_to_save: {', '.join(saved) or 'in the file'} are trained in full; merge the adapter instead"
        )
    embeddings = sorted(ends & {"embed_tokens", "lm_head"})
    inside = (
        any(re.search(r"(embed_tokens|lm_head)\.", key) for key in keys if "token_adapter" not in key) and not saved
    )
    if embeddings or inside:
        problems.append(f"embeddings: {', '.join(embeddings) or 'embedding weights'} are in the adapter")
    if config.get("trainable_token_indices"):
        problems.append("trainable_token_indices: rows of the embedding are in the adapter; merge it instead")
    if config.get("use_dora") or any("lora_magnitude_vector" in key for key in keys):
        problems.append("use_dora: DoRA needs the base's weights at load; merge the adapter instead")
    if config.get("bias", "none") != "none" or config.get("lora_bias") or any(key.endswith(".bias") for key in keys):
        problems.append("bias: servers silently drop biases of adapters; merge the adapter instead")
    if config.get("target_parameters"):
        problems.append("target_parameters: expert weights are adapted, which servers do not apply")
    if changes_base(config):
        problems.append(
            f"init_lora_weights={config['init_lora_weights']!r}: meant for a changed base; save it again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if max(ranks) > max_rank:
        problems.append(f"rank {max(ranks)} is above the limit of {max_rank}")
    if _mixed_scaling(config):
        problems.append(
            "alpha_pattern, rank_pattern: modules are scaled differently, and servers read r and lora_alpha only; "
            "`phi3-lora convert ... --uniform` multiplies the differences into B"
        )
    if not config.get("base_model_name_or_path"):
        problems.append("base_model_name_or_path is empty, so a server cannot tell what it belongs to")
    return problems


def _mixed_scaling(config: Mapping[str, Any]) -> bool:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    root = math.sqrt if config.get("use_rslora") else float
    usual = (config.get("lora_alpha") or 1) / root(config.get("r") or 1)
    for key in {*ranks, *alphas}:
        scaling = alphas.get(key, config.get("lora_alpha") or 1) / root(ranks.get(key, config.get("r") or 1))
        if not math.isclose(scaling, usual, rel_tol=1e-9):
            return True
    return False
