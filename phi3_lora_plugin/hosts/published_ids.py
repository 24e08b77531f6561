"""Give a host's tokenizer the published ids, where the class that it was loaded as gives others.

`AutoTokenizer` rebuilds a tokenizer from the class that tokenizer_config.json names. In some versions of transformers
(5.6, for one) words after a role token then begin with other pieces than in tokenizer.json.
"""

from __future__ import annotations

from typing import Any

from phi3_lora_plugin.model.tokenizer import load_tokenizer
from phi3_lora_plugin.seams import changed

_PROBES = ("<|user|>\nSamantha<|end|>\n<|assistant|>\n It is.<|end|>\n", "Samantha", " a", "\n  b\n")


def restore(tokenizer: Any) -> list[str]:
    """Put tokenizer.json's own rules into `tokenizer`, in place, if it encodes differently; a sentence if it did.

    Raises:
        TokenizerError: the tokenizer's own files cannot be read; the message names them.
        ActivationError: this version of transformers keeps the rules elsewhere.
    """
    published = load_tokenizer(tokenizer.name_or_path).backend_tokenizer
    mine = tokenizer.backend_tokenizer
    same = all(
        mine.encode(text, add_special_tokens=False).ids == published.encode(text, add_special_tokens=False).ids
        for text in _PROBES
    )
    if same:
        return []
    if not hasattr(tokenizer, "_tokenizer"):
        raise changed("transformers.backend", f"has no {type(tokenizer).__name__}._tokenizer")
    tokenizer._tokenizer = published
    return [f"the tokenizer was loaded as {type(tokenizer).__name__}, which gives other ids; tokenizer.json's are used"]
