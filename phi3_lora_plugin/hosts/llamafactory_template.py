"""A LLaMA-Factory template that encodes as this package does: the published template's ids, exact labels."""

# A template of LLaMA-Factory's is a subclass of something heavy; this module is imported only inside functions.
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_lora_plugin.hosts.pairs import conversation, encoded, pairs
from phi3_lora_plugin.hosts.published_ids import restore
from phi3_lora_plugin.model.tokenizer import repair_tokenizer, stop_token_ids
from phi3_lora_plugin.recipe.sections import ChatSection
from phi3_lora_plugin.seams import look_up

NAME = "phi3_lora"
log = logging.getLogger(__name__)
_ROLES = {"function": "assistant", "observation": "tool"}


def register(data: ChatSection) -> None:
    """Register `template: phi3_lora`, which encodes as configured by `data`; calling it again replaces it."""

    class Phi3Template(look_up("llamafactory.template")):  # type: ignore[misc]
        def encode_multiturn(
            self,
            tokenizer: Any,
            messages: Sequence[Mapping[str, Any]],
            system: str | None = None,
            tools: str | None = None,
            discarding_history_cot: bool = False,
        ) -> list[tuple[list[int], list[int]]]:
            row = encoded(conversation(messages, system or self.default_system, tools, _ROLES), tokenizer, data)
            cut = pairs(row["input_ids"], row["labels"])
            # It is `mask_history` too: LLaMA-Factory then trains the last pair alone, which must not be empty.
            return cut[:-1] if discarding_history_cot and not cut[-1][1] else cut

        def encode_oneturn(
            self,
            tokenizer: Any,
            messages: Sequence[Mapping[str, Any]],
            system: str | None = None,
            tools: str | None = None,
        ) -> tuple[list[int], list[int]]:
            turns = conversation(messages, system or self.default_system, tools, _ROLES)
            row = encoded(turns, tokenizer, data, train_on="last_turn")
            return next(pair for pair in pairs(row["input_ids"], row["labels"]) if pair[1])

        def fix_special_tokens(self, tokenizer: Any) -> None:
            """Keep the eos token as published; pad with a token that ends nothing; use the published ids."""
            for sentence in restore(tokenizer) + repair_tokenizer(tokenizer):
                log.warning("%s", sentence)

        def get_stop_token_ids(self, tokenizer: Any) -> list[int]:
            return stop_token_ids(tokenizer)

    look_up("llamafactory.templates").pop(NAME, None)
    look_up("llamafactory.register")(name=NAME, template_class=Phi3Template)
