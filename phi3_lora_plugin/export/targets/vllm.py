"""vLLM: an adapter that it serves as it stands, with the line that serves it; or the merged model."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.export.adapted import Adapted
from phi3_lora_plugin.export.exporter import ExportError, Runtime, Shipped, Variant, Wanted, refuse
from phi3_lora_plugin.export.recast import recast
from phi3_lora_plugin.export.transformers_runtime import open_transformers
from phi3_lora_plugin.lora.text_side import excluded_modules
from phi3_lora_plugin.lora_files import layouts, peft_files
from phi3_lora_plugin.lora_files.servable import servable
from phi3_lora_plugin.model.families import row_limit
from phi3_lora_plugin.seams import is_installed

if TYPE_CHECKING:
    from torch import Tensor

#: What vLLM takes as --max-lora-rank.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    """Write an adapter or a model for vLLM; see `exporter`.

    vLLM brings its own torch, so it is seldom installed next to this package. Where it is, it answers itself; elsewhere
    its arithmetic is recomputed from the files: alpha / r times B times A, added to the base, in transformers.
    """
    refuse("vllm", wanted, dtypes=("float32", "bfloat16", "float16"))
    if wanted.merged:
        return _merged(adapted, wanted, folder)
    found = peft_files.parts(peft_files.read_peft(adapted.adapter))
    if found.full or found.tokens:
        shown = ", ".join([*found.full, *found.tokens][:3])
        raise ExportError(
            f"vllm: {shown}: trained in full or by token, which vLLM's LoRA has no place for; pass --merged"
        )
    loras = layouts.uniform(found.loras)
    rank = max(lora.rank for lora in loras)
    limit = next((each for each in RANKS if each >= rank), None)
    if limit is None:
        raise ExportError(f"vllm: rank {rank} is above vLLM's largest, {RANKS[-1]}; pass --merged")
    parts = peft_files.Parts(tuple(loras))
    layers, outside = int(adapted.config["num_hidden_layers"]), excluded_modules(adapted.config)
    config = peft_files.peft_config(loras, adapted.base_name, layers=layers, exclude_modules=outside)
    peft_files.write_peft(folder, config, parts)
    adapted.write_tokenizer(folder)
    if problems := servable(folder, limit):
        raise ExportError("\n".join(f"vllm: {problem}" for problem in [*problems, "pass --merged"]))
    changed = [] if len(loras) == sum(a.b is b.b for a, b in zip(loras, found.loras, strict=True)) else [
        "ranks and scalings were made one for all modules, since vLLM reads r and lora_alpha alone"
    ]  # fmt: skip
    name = shlex.quote(adapted.name)
    line = f"vllm serve {shlex.quote(adapted.base_name)} --enable-lora --max-lora-rank {limit}"
    line += f" --lora-modules {name}={{out}} --max-model-len {wanted.context or row_limit(None, adapted.config)}"
    if adapted.other_template():
        line += " --chat-template {out}/chat_template.jinja"
    variants: tuple[Variant, ...] = ()
    if wanted.prove and is_installed("vllm"):
        base = adapted.base_float32()
        variants = (Variant("vLLM, float32 base with adapter", partial(open_vllm, base, folder, limit)),)
    elif wanted.prove:
        _recomputed(adapted, folder)
        recomputed = adapted.scratch / "recomputed"
        variants = (Variant("vLLM's arithmetic recomputed (vLLM is not installed here)",
                            partial(open_transformers, recomputed)),)  # fmt: skip
    if missing := sorted(set(adapted.stops()) - set(adapted.published_stops())):
        changed.append(f"the base's generation config does not stop at {missing}; send them as stop_token_ids")
    return Shipped((line, _ask(adapted.name)), variants, tuple(changed))


def _merged(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    dtype = adapted.dtype(wanted.dtype)
    recast(adapted.merged(), folder, dtype)
    context = wanted.context or row_limit(None, adapted.config)
    line = f"vllm serve {{out}} --served-model-name {shlex.quote(adapted.name)} --max-model-len {context}"
    here = is_installed("vllm")
    opened = partial(open_vllm, adapted.merged(), None, 0) if here else partial(open_transformers, adapted.merged())
    where = "vLLM" if here else "transformers (vLLM is not installed here)"
    variants = [Variant(f"{where}, float32", opened)]
    if dtype != "float32" and not here:
        variants.append(Variant(f"{where}, {dtype}", partial(open_transformers, folder), exact=False))
    return Shipped((line, _ask(adapted.name)), tuple(variants))


def _ask(name: str) -> str:
    body = f'{{"model": "{name}", "temperature": 0, "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return f"curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def _recomputed(adapted: Adapted, folder: Path) -> None:
    """Base + alpha / r * B @ A as vLLM's LoRA computes it, from the written files and by none of PEFT's code."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    out = adapted.scratch / "recomputed"
    out.mkdir()

    def adapt(name: str, tensor: Tensor) -> Tensor:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in tensors:
            return tensor
        a, b = tensors.pop(f"{module}.lora_A.weight"), tensors.pop(f"{module}.lora_B.weight")
        return tensor + scaling * (b.float() @ a.float())

    recast(adapted.base_float32(), out, "float32", adapt)
    if tensors:
        raise ExportError(f"vllm: the base has no module for {', '.join(sorted(tensors)[:3])}")


@contextmanager
def open_vllm(model: Path, adapter: Path | None, rank: int) -> Iterator[Runtime]:
    """A model folder in vLLM's offline engine, float32, with or without an adapter."""
    from vllm import LLM

    lora = {"enable_lora": True, "max_lora_rank": rank} if adapter is not None else {}
    engine = LLM(str(model), dtype="float32", enforce_eager=True, max_logprobs=-1, logprobs_mode="raw_logprobs", **lora)
    yield _Vllm(engine, adapter)
    del engine


class _Vllm:
    """vLLM's offline engine with its own template and tokenizer."""

    measure = "log-probabilities"

    def __init__(self, engine: Any, adapter: Path | None) -> None:
        self._engine, self._lora = engine, None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = LoRARequest("adapter", 1, str(adapter))

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        tokenizer = self._engine.get_tokenizer()
        made = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        return [int(each) for each in made]

    def next_scores(self, ids: Sequence[int]) -> Any:
        import numpy

        told = self._complete(ids, max_tokens=1, logprobs=-1).logprobs[0]
        scores: Any = numpy.full(max(told) + 1, -numpy.inf, dtype=numpy.float32)
        for token, entry in told.items():
            scores[token] = entry.logprob
        return scores

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        return [int(each) for each in self._complete(ids, max_tokens=max_new_tokens).token_ids]

    def log_probabilities(self, ids: Sequence[int], first: int) -> tuple[list[float], list[bool]]:
        told = self._request(ids, max_tokens=1, prompt_logprobs=1).prompt_logprobs
        rows = [
            (told[place][ids[place]].logprob, told[place][ids[place]].rank == 1) for place in range(first, len(ids))
        ]
        return [row[0] for row in rows], [row[1] for row in rows]

    def _complete(self, ids: Sequence[int], **options: Any) -> Any:
        return self._request(ids, **options).outputs[0]

    def _request(self, ids: Sequence[int], **options: Any) -> Any:
        from vllm import SamplingParams

        prompt = {"prompt_token_ids": [int(each) for each in ids]}
        params = SamplingParams(temperature=0.0, **options)
        return self._engine.generate([prompt], params, lora_request=self._lora, use_tqdm=False)[0]
