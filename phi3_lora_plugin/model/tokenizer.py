"""A tokenizer that gives the published ids from any folder: pinned class, right padding, pad outside the stop tokens.

Left to itself, `AutoTokenizer` takes another class for a folder without config.json next to the tokenizer (every saved
adapter is one), and 30 of 92 published vectors then change. Here tokenizer.json alone decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.model.families import FAMILIES, recognise
from phi3_lora_plugin.model.folder import ModelError, find_folder, read_json
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizerError(ModelError):
    """A tokenizer that is not there, cannot be read, or has no token to pad with."""


def load_tokenizer(path_or_id: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, a saved adapter or a hub repository, with the published ids.

    Saved truncation and padding are reset, `auto_map` and tokenizer classes are ignored, nothing is executed. Padding
    is on the right with a token that exists and does not stop generation; the vocabulary never grows.

    Args:
        path_or_id: folder with tokenizer.json, `embedded:NAME`, or hub id.
        revision: branch, tag or commit, for a hub id.

    Raises:
        ModelError: nothing there, or a file that is not JSON; TokenizerError, one of these: see there.
        UnsupportedModel: tokenizer.json is missing, because the model is not one of the family.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    folder = _folder(path_or_id, revision)
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust side raises a bare Exception for whatever is wrong with the file
        raise TokenizerError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    config = _json(folder / "tokenizer_config.json")
    named = _json(folder / "special_tokens_map.json") | {k: v for k, v in config.items() if k in _NAMED}
    options = {name: text for name in _NAMED if (text := _text(named.get(name))) is not None}
    missing = [f"{name} {text!r}" for name, text in options.items() if backend.token_to_id(text) is None]
    if missing:
        raise TokenizerError(
            f"{folder}: {', '.join(missing)} is not in tokenizer.json; adding it would grow the vocabulary. "
            "Take tokenizer.json and tokenizer_config.json from the same model."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=int(config.get("model_max_length") or 10**30),
        clean_up_tokenization_spaces=False,
        **options,
    )
    template = folder / "chat_template.jinja"
    given = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    tokenizer.chat_template = _template(given)
    tokenizer.name_or_path = str(path_or_id)
    repair_tokenizer(tokenizer)
    return tokenizer


def repair_tokenizer(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Make pad a token outside the stop set and padding right-sided, in place; return a sentence for each change.

    Raises:
        TokenizerError: every token of the vocabulary that could pad stops generation or opens a turn.
    """
    done = []
    stops = stop_token_ids(tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None or pad in stops or pad == tokenizer.bos_token_id:
        token = _pad_token(tokenizer, stops)
        done.append(f"pads with {token} instead of {tokenizer.pad_token}, which ends a turn or a text")
        tokenizer.pad_token = token
    if tokenizer.padding_side != "right":
        tokenizer.padding_side = "right"
        done.append("pads on the right")
    return done


def stop_token_ids(tokenizer: Any, generation_eos: Sequence[int] = ()) -> list[int]:
    """Ids at which generation stops: end of turn, end of text, and those that the model was published with; never pad.

    Args:
        generation_eos: `eos_token_id` of the published generation_config.json, if there is one.
    """
    vocabulary = tokenizer.get_added_vocab()
    known = {token for family in FAMILIES.values() for token in family.stop}
    ids = {vocabulary[token] for token in known if token in vocabulary} | set(generation_eos)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def whole_texts(tokenizer: Any) -> Any:
    """The Rust tokenizer inside, set to cut and pad nothing.

    It remembers the truncation and padding of the last call, whatever code made it; transformers sets both again at
    each call of its own.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write the tokenizer so that any loader gets the same ids from the folder alone; equal tokenizers, equal bytes."""
    folder = Path(folder)
    whole_texts(tokenizer)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("auto_map", "name_or_path", "tokenizer_file", "is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """File name -> content of what `save_tokenizer` writes; of other processors, what they write themselves.

    Nothing for None and for what cannot be saved.
    """
    if not hasattr(tokenizer, "save_pretrained"):
        return {}
    with TemporaryDirectory() as folder:
        if hasattr(tokenizer, "backend_tokenizer"):
            save_tokenizer(tokenizer, folder)
        else:
            tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over everything that decides ids (vocabulary, merges, added tokens, normaliser) and over the pad id."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    state["pad"] = tokenizer.pad_token_id
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _folder(name: str | Path, revision: str | None) -> Path:
    place = find_folder(name, revision, [*FILES, "config.json"])
    if (place / "tokenizer.json").is_file():
        return place
    # Members that run only through remote code mostly have a tokenizer of the kind too: name the model, not the file.
    config = _json(place / "config.json")
    if "model_type" in config:
        recognise(config)
    there = listed(sorted(entry.name for entry in place.iterdir()), 8) or "nothing"
    advice = "give the folder that holds the tokenizer"
    if (place / "tokenizer.model").is_file():
        advice = "a tokenizer.model alone is not enough, take tokenizer.json from the model's repository"
    raise TokenizerError(f"{place} has no tokenizer.json, only {there}; {advice}")


def _pad_token(tokenizer: Any, stops: Sequence[int]) -> str:
    vocabulary = tokenizer.get_added_vocab()
    named = dict.fromkeys(token for family in FAMILIES.values() for token in family.pad)
    reserved = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if any(word in token.content for word in ("placeholder", "dummy", "reserved", "unused", "pad"))
    ]
    for token in [tokenizer.unk_token, *named, *reserved]:
        if token in vocabulary and vocabulary[token] not in stops and vocabulary[token] != tokenizer.bos_token_id:
            return str(token)
    raise TokenizerError(
        f"{tokenizer.name_or_path or 'the tokenizer'} has no token to pad with: every candidate stops generation. "
        "Set pad_token in tokenizer_config.json to a token of the vocabulary that the model never writes."
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else str(text)


def _template(given: Any) -> str | None:
    """The chat template of a tokenizer_config.json, which older files may hold as a list of named ones."""
    if isinstance(given, list):
        given = next((one.get("template") for one in given if one.get("name") == "default"), None)
    return None if given is None else str(given)
