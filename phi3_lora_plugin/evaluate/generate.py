"""Text from a model with an adapter on it, streamed, and stopped at the right token."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.encode import prompt_ids
from phi3_lora_plugin.lora_files.peft_files import PeftFilesError, loadable
from phi3_lora_plugin.model.tokenizer import stop_token_ids
from phi3_lora_plugin.store.adapter_folder import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with an adapter folder's weights on it, every one of them and in its place.

    Raises:
        AdapterError: the adapter does not go with the model, which PEFT alone would let pass with a warning.
    """
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with loadable(adapter) as folder:
                adapted = PeftModel.from_pretrained(model, str(folder))
        except PeftFilesError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise AdapterError(f"{adapter} does not fit {model.name_or_path}: {reason}") from error
    if missing := [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message)]:
        raise AdapterError(f"{adapter} does not fit {model.name_or_path}: {missing[0][:300]}")
    return adapted.eval()


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    **encoding: Any,
) -> Generator[str]:
    """Pieces of the next assistant turn as they are made; greedy at temperature 0.

    Closing the iterator, or an exception in the loop over it, ends the generation after the token at hand: a thread
    that still computes while the interpreter leaves would abort the process.

    Args:
        top_p: sample from the most likely tokens that together have this probability; no effect at temperature 0.
        encoding: what `prompt_ids` takes (system, control_tokens, template), which has to be as in training.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    ids = torch.tensor([prompt_ids(messages, tokenizer, **encoding)], device=model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    halt = Event()

    class Halted(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((len(ids),), halt.is_set(), device=ids.device)

    def work() -> None:
        try:
            generate_ids(
                model, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                streamer=streamer, stopping_criteria=StoppingCriteriaList([Halted()]),
            )  # fmt: skip
        except BaseException as error:  # carried over to the reader of the stream, who would wait forever otherwise
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        halt.set()
        thread.join()
    if failure:
        raise failure[0]


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a turn: the family's, and those of the model's own generation config."""
    published = model.generation_config.eos_token_id
    return stop_token_ids(tokenizer, [published] if isinstance(published, int) else list(published or ()))


def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    **options: Any,
) -> Any:
    """Token ids [batch, prompt + new] of one call to `generate` that stops at the family's stop tokens."""
    import torch

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    with torch.inference_mode():
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_ids(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **sampling,
            **options,
        )
