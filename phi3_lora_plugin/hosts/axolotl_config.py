"""An axolotl config as Phi-3 needs it: plain data in, plain data changed in place, a sentence for each change.

Nothing of axolotl is imported here, so it is read and tested without.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from phi3_lora_plugin.chat.templates import TEMPLATES, TemplateError
from phi3_lora_plugin.hosts.axolotl_options import row_options
from phi3_lora_plugin.hosts.base import check_targets, no_remote_code
from phi3_lora_plugin.hosts.settings import HostSettings
from phi3_lora_plugin.model.families import linear_names

ROWS = "phi3_lora_plugin.hosts.axolotl_rows"
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# Types whose rows are chats, or become chats; the template is the same for all of them.
_CHATS = ("chat_template", "alpaca", "sharegpt", "messages")


def prepare(
    cfg: MutableMapping[str, Any], config: Mapping[str, Any], settings: HostSettings, pad_token: str
) -> list[str]:
    """Change a raw axolotl config, as read from YAML and not yet validated, for a base with this model config.

    Args:
        cfg: axolotl's keys; changed in place.
        config: the content of the base's config.json.
        pad_token: a token of the vocabulary to pad with, which ends nothing.

    Raises:
        TargetError: `lora_target_modules` names what the model does not have, or slices of its fused projections.
        TemplateError: `phi3_lora.data.template` is unknown.
    """
    done: list[str] = []
    if cfg.get("adapter") in ("lora", "qlora"):
        done += _kernels(cfg)
        done += _targets(cfg, config)
    done += no_remote_code(cfg)
    done += _template(cfg, settings)
    tokens = dict(cfg.get("special_tokens") or {})
    if "pad_token" not in tokens:
        cfg["special_tokens"] = tokens | {"pad_token": pad_token}
        done.append(f"special_tokens.pad_token: {pad_token}, which ends no turn and no text")
    if settings.masks and not cfg.get("rl"):
        done += _rows(cfg, settings)
    return done


def _kernels(cfg: MutableMapping[str, Any]) -> list[str]:
    """axolotl turns its fused LoRA kernels on by itself, and they look for q_proj, k_proj and v_proj."""
    asked = [name for name in KERNELS if cfg.get(name)]
    for name in KERNELS:
        cfg[name] = False
    said = f" (the config asked for {', '.join(asked)})" if asked else ""
    return [f"lora_*_kernel: false{said}, because they cannot patch a fused qkv_proj"]


def _targets(cfg: MutableMapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    named = cfg.get("lora_target_modules")
    if named:
        check_targets(config, named, "lora_target_modules")
        return []
    if cfg.get("lora_target_linear") or cfg.get("lora_target_parameters") or cfg.get("lora_model_dir"):
        return []
    cfg["lora_target_modules"] = linear_names(config["model_type"])
    return [f"lora_target_modules: {', '.join(cfg['lora_target_modules'])}, because none were set"]


def _template(cfg: MutableMapping[str, Any], settings: HostSettings) -> list[str]:
    """The tokenizer's own template unless one is named; no Phi-3-mini was trained with axolotl's phi_3."""
    wanted = settings.data.template
    if wanted is not None:
        if wanted not in TEMPLATES or TEMPLATES[wanted].refused:
            usable = ", ".join(name for name, template in TEMPLATES.items() if not template.refused)
            raise TemplateError(f"phi3_lora.data.template: {wanted!r} is not one of {usable}")
        cfg["chat_template"], cfg["chat_template_jinja"] = "jinja", TEMPLATES[wanted].text
        return [f"chat_template: {wanted}"]
    given = cfg.get("chat_template")
    if given in (None, "tokenizer_default"):
        return []
    cfg["chat_template"] = "tokenizer_default"
    cfg.pop("chat_template_jinja", None)
    return [f"chat_template: tokenizer_default instead of {given}, because the model was trained with its own"]


def _rows(cfg: MutableMapping[str, Any], settings: HostSettings) -> list[str]:
    """Have chats encoded by us; axolotl keeps encoded rows under a name made of `type` and `conversation` too."""
    changed: list[str] = []
    ignored: list[str] = []
    for key in ("datasets", "test_datasets"):
        for rows in cfg.get(key) or ():
            kind = rows.get("type")
            chats = isinstance(kind, str) and kind.split(".")[0].split(":")[0] in _CHATS
            if not (kind is None or kind == ROWS or chats):
                changed.append(f"rows of {rows.get('path')} ({_short(kind)}) are left to axolotl")
                continue
            options, sentences = row_options(cfg, rows)
            ignored += [f"ignored for rows of {rows.get('path')}: {sentence}" for sentence in sentences]
            if kind != ROWS:
                changed.append(f"rows of {rows.get('path')} ({_short(kind)}) are encoded with exact masks")
            rows["type"] = ROWS
            rows["conversation"] = f"phi3_lora {settings.digest()} {options.digest()}"
    return list(dict.fromkeys([*changed, *ignored]))


def _short(kind: Any) -> str:
    return kind if isinstance(kind, str) else "a format of its own" if kind is not None else "no type"
