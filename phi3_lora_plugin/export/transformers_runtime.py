"""A model folder in transformers, as a runtime: for targets whose server reads the folder as transformers does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phi3_lora_plugin.export.exporter import Runtime
from phi3_lora_plugin.export.scores import ShowsLogits


@contextmanager
def open_transformers(folder: Path) -> Iterator[Runtime]:
    """A folder in transformers, float32 on the CPU, by its own class and without remote code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    yield Transformers(model, AutoTokenizer.from_pretrained(folder))


class Transformers(ShowsLogits):
    """transformers with the tokenizer, the template and the generation config of the folder."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        made = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        return [int(each) for each in made]

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        import torch

        prompt = torch.tensor([list(ids)])
        with torch.inference_mode():
            made = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False
            )
        return [int(each) for each in made[0, len(ids) :]]

    def _logits(self, ids: Sequence[int]) -> Any:
        import torch

        with torch.inference_mode():
            return self._model(input_ids=torch.tensor([list(ids)])).logits[0].float().numpy()
