"""Rows of an axolotl data set -> ids and labels, encoded as everywhere else in this package.

In an axolotl config: `datasets: [{path: chats.jsonl, type: phi3_lora_plugin.hosts.axolotl_rows}]`; the plugin of
hosts/axolotl.py writes that by itself.
"""

# A strategy of axolotl's is a subclass of something heavy; this module is imported only by axolotl.
from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.hosts.axolotl_options import RowOptions, read, row_options
from phi3_lora_plugin.hosts.published_ids import restore
from phi3_lora_plugin.hosts.rows import encode_rows
from phi3_lora_plugin.hosts.settings import read_settings
from phi3_lora_plugin.recipe.sections import ChatSection
from phi3_lora_plugin.seams import look_up

log = logging.getLogger("axolotl.phi3_lora_plugin")


class ChatRows(look_up("axolotl.rows")):  # type: ignore[misc]
    """Encodes a batch of rows; axolotl cuts or drops those longer than `sequence_len` afterwards."""

    def __init__(self, tokenizer: Any, data: ChatSection, options: RowOptions | None = None) -> None:
        super().__init__(None, tokenizer)
        self.options = options or RowOptions()
        self.data = self.options.data(data)
        for sentence in restore(tokenizer):
            log.warning("phi3_lora_plugin: %s", sentence)

    @property
    def supports_batched(self) -> bool:
        return True

    def tokenize_prompt(self, prompt: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        """Columns of up to 1,000 rows -> `input_ids`, `attention_mask` and `labels`.

        Raises:
            RowsError: rows that cannot be encoded, unless `phi3_lora.data.on_error: skip` drops them.
        """
        names = list(prompt)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*prompt.values(), strict=True)]
        encoded = encode_rows([read(row, self.options) for row in rows], self.tokenizer, self.data)
        return {
            "input_ids": [row["input_ids"] for row in encoded],
            "attention_mask": [[1] * len(row["input_ids"]) for row in encoded],
            "labels": [row["labels"] for row in encoded],
        }


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> ChatRows:
    """What axolotl calls for `type:`; `ds_cfg` is the data set's entry, as a mapping or as axolotl's own model."""
    rows: Mapping[str, Any] = ds_cfg or {} if isinstance(ds_cfg, Mapping | None) else ds_cfg.model_dump()
    options, _ = row_options(cfg, rows)
    return ChatRows(tokenizer, read_settings(cfg.get("phi3_lora")).data, options)
