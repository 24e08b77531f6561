"""axolotl: `plugins: [phi3_lora_plugin.hosts.axolotl.Phi3LoraPlugin]`, and an optional section `phi3_lora:`.

For a base of the family it corrects the config before axolotl validates it (see axolotl_config.py), encodes chats with
exact masks, saves LoRA-only checkpoints and sets the stop tokens. Any other base it leaves alone.
"""

# A plugin of axolotl's is a subclass of something heavy; this module is imported only by axolotl.
from __future__ import annotations

import logging
from typing import Any

from pydantic import BaseModel

from phi3_lora_plugin.hosts.axolotl_config import prepare
from phi3_lora_plugin.hosts.base import phi_config
from phi3_lora_plugin.hosts.settings import HostSettings, checkpoint_callback, read_settings
from phi3_lora_plugin.seams import look_up

log = logging.getLogger("axolotl.phi3_lora_plugin")  # below axolotl's, so that it is shown as axolotl's are


class Phi3LoraArgs(BaseModel):
    """The config section that axolotl adds to its own schema."""

    phi3_lora: HostSettings | None = None


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
        self._settings = read_settings(cfg.get("phi3_lora"))
        config = phi_config(str(cfg["base_model"]), cfg.get("revision_of_model"))
        self._active = config is not None
        if config is None:
            log.info("phi3_lora_plugin: %s is not a supported Phi model; nothing changed", cfg["base_model"])
            return
        from phi3_lora_plugin.model.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(str(cfg.get("tokenizer_config") or cfg["base_model"]))
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
