"""The least tokenizer that TRL takes: it is never asked to tokenise, the rows are ids already."""

from __future__ import annotations

from typing import Any


def words() -> Any:
    """Three words; one pads and one ends."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")
