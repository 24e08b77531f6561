"""axolotl: active by itself where the base is a Phi, through axolotl's entry points (0.21 and later).

Before 0.21, `plugins: [phi3_lora_plugin.hosts.axolotl.Phi3LoraPlugin]`. The config is corrected before axolotl
validates it (axolotl_config.py), chats are encoded with exact masks, LoRA-only checkpoints are saved and the stop
tokens set. Any other base is left alone. `phi3_lora: false` in the config, or PHI3_LORA_ACTIVATE=0, switches it off.
"""

# A plugin of axolotl's is a subclass of something heavy; this module is imported only by axolotl.
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from phi3_lora_plugin.hosts.axolotl_config import prepare
from phi3_lora_plugin.hosts.base import phi_config_if_found
from phi3_lora_plugin.hosts.settings import HostSettings, checkpoint_callback, read_settings
from phi3_lora_plugin.hosts.switch import switched
from phi3_lora_plugin.seams import look_up

log = logging.getLogger("axolotl.phi3_lora_plugin")  # below axolotl's, so that it is shown as axolotl's are
_OFF = "phi3_lora: false in the config or PHI3_LORA_ACTIVATE=0 switches it off"


class Phi3LoraArgs(BaseModel):
    """The config section that axolotl adds to its own schema."""

    phi3_lora: HostSettings | Literal[False] | None = None


class Phi3LoraPlugin(look_up("axolotl.plugin")):  # type: ignore[misc]
    """See the top of this file; hook by hook as axolotl calls them."""

    def __init__(self) -> None:
        super().__init__()
        self._active = False
        self._settings = HostSettings()

    def register(self, cfg: Any) -> None:
        """Correct the raw config.

        Raises:
            SettingsError, TargetError, TemplateError, TokenizerError: what is wrong, before anything is loaded.
        """
        self._active = False
        base, section = cfg.get("base_model"), cfg.get("phi3_lora")
        config = phi_config_if_found(str(base), cfg.get("revision_of_model")) if base else None
        if config is None:
            # axolotl asks every installed plugin, so only who named this one, or set it up, wants an answer.
            asked = section or any(Phi3LoraPlugin.__name__ in str(name) for name in cfg.get("plugins") or ())
            (log.info if asked else log.debug)(
                "phi3_lora_plugin: %s is not a supported Phi model; nothing changed", base
            )
            return
        if section is False or switched() is False:
            log.info("phi3_lora_plugin: switched off; %s is trained as axolotl alone does", base)
            return
        self._settings = read_settings(section)
        self._active = True
        log.info("phi3_lora_plugin: active, because %s is a %s model; %s", base, config["model_type"], _OFF)
        from phi3_lora_plugin.model.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(str(cfg.get("tokenizer_config") or base))
        for sentence in prepare(cfg, config, self._settings, str(tokenizer.pad_token)):
            log.warning("phi3_lora_plugin: %s", sentence)

    def get_input_args(self) -> str:
        return f"{__name__}.{Phi3LoraArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        callback = checkpoint_callback(self._settings) if self._active and cfg.get("adapter") else None
        if callback is None:
            return []
        callback.bind(trainer)
        return [callback]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Stop tokens, which axolotl leaves as the base's config has them."""
        if self._active and getattr(trainer, "processing_class", None) is not None:
            from phi3_lora_plugin.model.load import set_stop_tokens

            for sentence in set_stop_tokens(trainer.model, trainer.processing_class):
                log.warning("phi3_lora_plugin: %s", sentence)

    def post_lora_merge(self, cfg: Any, adapter_path: str, output_path: str) -> None:
        """Give the merged model the stop tokens of its tokenizer, which axolotl copies from the base as published."""
        if not self._active:
            return
        from phi3_lora_plugin.export.merge import write_generation_config
        from phi3_lora_plugin.small_file import read_json

        merged = Path(output_path)
        write_generation_config(merged, merged, read_json(merged / "config.json"))
        log.info(
            "phi3_lora_plugin: %s stops where its template ends a turn; next: phi3-lora export %s --to ollama",
            output_path,
            adapter_path,
        )
