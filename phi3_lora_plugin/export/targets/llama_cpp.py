"""llama.cpp: a merged GGUF, or the base and a LoRA GGUF, and any of llama.cpp's quantised forms of the former."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from phi3_lora_plugin.export.adapted import Adapted
from phi3_lora_plugin.export.convert import convert
from phi3_lora_plugin.export.exporter import ExportError, Runtime, Shipped, Variant, Wanted, refuse, require
from phi3_lora_plugin.export.gguf import ARCHITECTURES, write_gguf_model
from phi3_lora_plugin.export.gguf_quantize import FORMS
from phi3_lora_plugin.model.families import rope_of, row_limit

#: llama.cpp rounds its context up to a multiple of this.
_ROUND = 256
_SUFFIX = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

#: As `--to` names it.
NAME = "llama.cpp"


def export(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    """Write GGUF files for llama.cpp; see `exporter`."""
    refuse(NAME, wanted, adapted.config.get("model_type"), kinds=ARCHITECTURES, quantize=FORMS, dtypes=tuple(_SUFFIX))
    require("llama-cpp", "gguf", *(("xllamacpp",) if wanted.prove else ()), what="a GGUF for llama.cpp")
    if wanted.merged is False:
        if wanted.quantize:
            raise ExportError("llama.cpp: --quantize makes forms of the merged model; leave out --adapter")
        return _adapter(adapted, wanted, folder)
    files, variants, notes = write_merged(adapted, wanted, folder)
    context = wanted.context or row_limit(None, adapted.config)
    commands = [f"llama-server -m {{out}}/{name} -c {context} --jinja" for name in files]
    commands.append(f"llama-cli -m {{out}}/{files[-1]} -c {context} --jinja --temp 0 -p 'Hello'")
    return Shipped(tuple(commands), variants, notes)


def write_merged(
    adapted: Adapted,
    wanted: Wanted,
    folder: Path,
    opened: Callable[[Path], AbstractContextManager[Runtime]] | None = None,
) -> tuple[list[str], tuple[Variant, ...], tuple[str, ...]]:
    """(file names, variants, notes) of the merged model in every form that was asked for.

    The proof in float32 is on a float32 file, which is shipped only if it was asked for.

    Args:
        opened: loads a file in its runtime; None is llama.cpp's own server.
    """
    context = wanted.context or row_limit(None, adapted.config)
    wanted.progress("merging")
    merged = adapted.merged()
    exact = adapted.scratch / "exact.gguf"
    wanted.progress("writing GGUF")
    _, notes = write_gguf_model(exact, merged, "float32", adapted.name)
    load = opened or (lambda file: open_gguf(file, context))
    variants = [Variant("float32", partial(load, exact))]
    files = []
    for form in wanted.quantize:
        files.append(f"{adapted.name}-{form}.gguf")
        wanted.progress(f"quantising to {form}")
        write_gguf_model(folder / files[-1], merged, form, adapted.name)
        variants.append(Variant(form, partial(load, folder / files[-1]), exact=False))
    if not files:
        dtype = adapted.dtype(wanted.dtype)
        files = [f"{adapted.name}-{_SUFFIX[dtype]}.gguf"]
        write_gguf_model(folder / files[0], merged, dtype, adapted.name)
        if dtype != "float32":
            variants.append(Variant(dtype, partial(load, folder / files[0]), exact=False))
    return files, tuple(variants), (*notes, *limits(adapted, context))


def _adapter(adapted: Adapted, wanted: Wanted, folder: Path) -> Shipped:
    """The base and the adapter as two files, for `--lora`, which llama-server can switch on and off."""
    context = wanted.context or row_limit(None, adapted.config)
    dtype = adapted.dtype(wanted.dtype)
    base, lora = f"base-{_SUFFIX[dtype]}.gguf", f"{adapted.name}-lora.gguf"
    exact = adapted.scratch / "exact-base.gguf"
    wanted.progress("writing GGUF")
    _, notes = write_gguf_model(exact, adapted.base_float32(), "float32", adapted.name)
    write_gguf_model(folder / base, adapted.base_float32(), dtype, adapted.name)
    convert(adapted.adapter, folder / lora, "gguf", base=str(adapted.base))
    variants = [Variant("float32 base with LoRA", partial(open_gguf, exact, context, folder / lora))]
    if dtype != "float32":
        opened = partial(open_gguf, folder / base, context, folder / lora)
        variants.append(Variant(f"{dtype} base with LoRA", opened, exact=False))
    line = f"llama-server -m {{out}}/{base} --lora {{out}}/{lora} -c {context} --jinja"
    return Shipped((line,), tuple(variants), (*notes, *limits(adapted, context)))


def limits(adapted: Adapted, context: int) -> tuple[str, ...]:
    """Where llama.cpp computes something else than training did.

    Raises:
        ExportError: a context in which llama.cpp takes longrope's long factors for short prompts too.
    """
    config, rope = adapted.config, rope_of(adapted.config)
    found = []
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings") or context
    if window and window < min(longest, context):
        found.append(
            f"llama.cpp ignores Phi-3's sliding window of {window} tokens, so answers differ beyond it; "
            f"--context {window} or less avoids that"
        )
    original = rope.get("original_max_position_embeddings", context)
    if rope["rope_type"] == "longrope" and -(-context // _ROUND) * _ROUND > original:
        raise ExportError(
            f"llama.cpp takes longrope's long factors for every prompt once its context is above {original}, so short "
            f"prompts get other answers than in training (0.40 in log-probability on a small model); "
            f"pass --context {original} or less"
        )
    return tuple(found)


@contextmanager
def open_gguf(file: Path, context: int, lora: Path | None = None) -> Iterator[Runtime]:
    """A GGUF in llama.cpp's own server, inside this process, computing in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = params.n_batch = params.n_ubatch = context
    if file.stat().st_size < 200e6:  # threads that wait for each other take longer than the work
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_parallel, params.warmup, params.verbosity, params.fit_params = 1, False, 0, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ExportError(f"llama.cpp does not load {file.name}: {error}") from error
    yield _Server(server)
    del server


class _Server:
    """llama-server through its HTTP interface: its template, its tokenizer, its log-probabilities."""

    measure = "log-probabilities"

    def __init__(self, server: Any) -> None:
        self._url = server.listening_address
        self._size = int(_json(f"{self._url}/v1/models")["data"][0]["meta"]["n_vocab"])
        self._keep = server

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text with control tokens in it."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return [int(each) for each in _json(f"{self._url}/tokenize", body)["tokens"]]

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.text_ids(_json(f"{self._url}/apply-template", {"messages": list(messages)})["prompt"])

    def next_scores(self, ids: Sequence[int]) -> Any:
        import numpy

        scores: Any = numpy.full(self._size, -numpy.inf, dtype=numpy.float32)
        for entry in self._complete(ids, 1, n_probs=self._size)["completion_probabilities"][0]["top_logprobs"]:
            scores[entry["id"]] = entry["logprob"]
        return scores

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        return [int(each) for each in self._complete(ids, max_new_tokens)["tokens"]]

    def log_probabilities(self, ids: Sequence[int], first: int) -> tuple[list[float], list[bool]]:
        """See `Runtime`; one request a token, whose logit bias makes the server say the token that it is to score."""
        found, likeliest = [], []
        for place in range(first, len(ids)):
            token = int(ids[place])
            said = self._complete(ids[:place], 1, n_probs=1, logit_bias=[[token, 1e4]])["completion_probabilities"][0]
            found.append(float(said["logprob"]))
            likeliest.append(int(said["top_logprobs"][0]["id"]) == token)
        return found, likeliest

    def _complete(self, ids: Sequence[int], most: int, **options: Any) -> dict[str, Any]:
        body = {"prompt": [int(each) for each in ids], "n_predict": most, "temperature": 0, "return_tokens": True,
                "cache_prompt": True, "samplers": ["top_k"], "top_k": 1}  # fmt: skip
        return _json(f"{self._url}/completion", body | options)


def _json(url: str, body: Any = None) -> dict[str, Any]:
    """What llama.cpp's server, in this process and on the loopback interface, answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business with loopback
    with opener.open(request, timeout=600) as answer:
        return dict(json.loads(answer.read()))
