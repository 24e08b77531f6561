"""What ms-swift learns from us: templates that encode as this package does, and `--callbacks phi3_lora`.

Settings come from the environment, for ms-swift has no place for them: `PHI3_LORA_SETTINGS='{data: {system: fold}}'`,
with the keys of `hosts.settings.HostSettings`.
"""

# A template of ms-swift's is a subclass of something heavy; this module is imported only by ms-swift.
from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

from phi3_lora_plugin.chat.encode import prompt_ids
from phi3_lora_plugin.chat.templates import template_for
from phi3_lora_plugin.hosts.pairs import conversation, encoded
from phi3_lora_plugin.hosts.published_ids import restore
from phi3_lora_plugin.hosts.settings import HostSettings, checkpoint_callback, read_settings
from phi3_lora_plugin.model.tokenizer import repair_tokenizer
from phi3_lora_plugin.seams import look_up

VARIABLE = "PHI3_LORA_SETTINGS"
CALLBACK = "phi3_lora"
# ms-swift's names for the templates of the family; it finds them by the model's type, so nothing more has to be set.
TEMPLATES = ("phi3", "phi4")
_ROLES = {"tool_call": "assistant", "tool_response": "tool"}
_TRAIN_ON = {"default": "assistant", "last_round": "last_turn", "all": "all"}
log = logging.getLogger("swift")


class Phi3Template(look_up("swift.template")):  # type: ignore[misc]
    """Ids of the published template, labels from where tokens start; what it has no words for it leaves to ms-swift."""

    def init_processor(self, processor: Any) -> None:
        if processor is not None and not self._processor_inited:
            for sentence in restore(processor) + repair_tokenizer(processor):
                log.warning("phi3_lora: %s", sentence)
        super().init_processor(processor)

    def _encode(self, inputs: Any) -> dict[str, Any]:
        scale = self.loss_scale
        if not self.use_chat_template or self.task_type != "causal_lm" or inputs.is_multimodal or inputs.tools:
            return dict(super()._encode(inputs))
        if type(scale).__name__ != "LossScale":
            _say_once(f"--loss_scale {self._loss_scale} is ms-swift's own, so ms-swift encodes these rows")
            return dict(super()._encode(inputs))
        data = settings().data
        system = inputs.system if inputs.system is not None else self.template_meta.default_system
        messages = [_message(message) for message in inputs.messages if message.get("content") is not None]
        turns = conversation(messages, system, None, _ROLES)
        if not self.is_training:
            return {
                "input_ids": prompt_ids(turns, self.tokenizer, **data.rendering),
                "labels": None,
                "loss_scale": None,
            }
        train_on = _TRAIN_ON[scale.base_strategy] if data.train_on == "assistant" else data.train_on
        return {**encoded(turns, self.tokenizer, data, train_on=train_on), "loss_scale": None}


@dataclass
class Phi3TemplateMeta(look_up("swift.meta")):  # type: ignore[misc]
    """The stop token is the template's own, which the tokenizer knows."""

    def init(self, tokenizer: Any) -> None:
        kind = template_for(tokenizer, settings().data.template)
        self.suffix = [kind.stop or tokenizer.eos_token]
        super().init(tokenizer)


def settings() -> HostSettings:
    """The settings of the environment; read again each time, since they are short.

    Raises:
        SettingsError: what is wrong with it.
    """
    import yaml

    return read_settings(yaml.safe_load(os.environ.get(VARIABLE, "")))


def register() -> None:
    """Register all of it; once more changes nothing."""
    look_up("swift.encode")
    if settings().masks:
        for name in TEMPLATES:
            if name in look_up("swift.templates"):
                meta = Phi3TemplateMeta(
                    name, [], ["{{QUERY}}"], ["\n"], suffix=["<|end|>"], system_prefix=["{{SYSTEM}}"],
                    template_cls=Phi3Template,
                )  # fmt: skip
                look_up("swift.register")(meta, exist_ok=True)
        log.info("phi3_lora: templates %s render and mask as published", ", ".join(TEMPLATES))
    look_up("swift.callbacks")[CALLBACK] = _callback


def _callback(args: Any, trainer: Any) -> Any:
    """ms-swift asks for callbacks while the Trainer is being made."""
    callback = checkpoint_callback(settings())
    if callback is None:
        from transformers import TrainerCallback

        return TrainerCallback()
    callback.bind(trainer)
    return callback


@cache
def _say_once(sentence: str) -> None:
    log.warning("phi3_lora: %s", sentence)


def _message(message: Any) -> dict[str, Any]:
    """Role, content, and `train: False` where ms-swift's `loss` is false."""
    turn = {"role": message["role"], "content": message["content"]}
    return turn | ({"train": False} if message.get("loss") in (False, 0) else {})
