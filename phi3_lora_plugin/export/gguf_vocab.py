"""A tokenizer.json as llama.cpp wants it inside a GGUF file: pieces, scores or merges, types, special ids, template.

llama.cpp has two tokenizers for the family. "llama" (Phi-3) merges pairs by the score of the piece they give, where
tokenizer.json has ranks of pairs; "gpt2" (Phi-4) cuts by a regular expression that it knows by name. Both rules, the
names, and that Phi-3's white-space rule hangs on `general.name`, are as in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.folder import read_json
from phi3_lora_plugin.wording import first_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Regular expressions by what only they contain, and llama.cpp's name for the one that cuts the same.
_PRE = (
    ("[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "gpt-4o"),
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", "dbrx"),
)
# Tokens after which llama.cpp keeps white space even in a Phi-3.
_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


class VocabularyError(Phi3LoraError):
    """A tokenizer that llama.cpp has no equal of; says in which point."""


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the GGUF file.

    Attributes:
        model: `llama` or `gpt2`.
        pre: llama.cpp's name of the cutting rule.
        tokens: pieces by id, filled up with `[PAD...]` to the rows of the embedding.
        scores: by id, for `llama`; merges: for `gpt2`.
        types: by id, as gguf.TokenType numbers them.
        special: `bos`, `eos`, `unk`, `pad`, `eot` -> id.
        swallows_space: white space after role tokens gives no token; decided in llama.cpp by the model's name.
        notes: where llama.cpp may cut differently.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    chat_template: str | None
    swallows_space: bool
    notes: tuple[str, ...] = ()


def read_vocabulary(folder: Path, size: int, stop_ids: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary of a model folder.

    Args:
        size: rows of the embedding, at least as many as tokens.
        stop_ids: eos ids of the generation config; the one that ends a turn becomes `eot`.

    Raises:
        VocabularyError: no tokenizer.json, another kind of tokenizer, or more tokens than rows.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise VocabularyError(f"{folder} has no tokenizer.json")
    from tokenizers import Tokenizer

    tokenizer = read_json(path)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # of tokenizers' own making, without a class
        raise VocabularyError(f"{path} is no tokenizer that can be read: {first_line(error)}") from error
    model = tokenizer.get("model", {})
    if model.get("type", "BPE") != "BPE":
        raise VocabularyError(f"{path}: tokenizer type {model.get('type')!r}; the Phi family has BPE")
    pieces: dict[int, str] = {index: piece for piece, index in model["vocab"].items()}
    added: dict[int, Mapping[str, Any]] = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    pieces |= {index: entry["content"] for index, entry in added.items()}
    if max(pieces) >= size:
        raise VocabularyError(f"{path} has tokens up to {max(pieces)}, the embedding only {size} rows")
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    tokens = tuple(pieces.get(index, f"[PAD{index}]") for index in range(size))
    types = tuple(_type(index, pieces, added, model) for index in range(size))
    notes: list[str] = []
    scores: tuple[float, ...] = ()
    byte_level = _find(tokenizer.get("pre_tokenizer"), "ByteLevel") is not None
    if byte_level:
        kind, pre = "gpt2", _cutting_rule(tokenizer, path)
    else:
        if not model.get("byte_fallback"):
            raise VocabularyError(f"{path}: neither byte-level nor with byte fallback; llama.cpp has no such tokenizer")
        kind, pre = "llama", "default"
        scores = _scores(tokens, types, merges, notes)
    rules = {entry["content"]: bool(entry.get("rstrip")) for entry in added.values()}
    swallows = kind == "llama" and any(rules.get(name) for name in ("<|user|>", "<|assistant|>", "<|end|>"))
    if swallows and ("</s>" not in rules or not set(_KEEPS_SPACE) <= set(rules)):
        notes.append("role tokens swallow white space here, which llama.cpp does only for Phi-3's own set of tokens")
        swallows = False
    if swallows and (odd := [name for name, strips in rules.items() if strips == (name in _KEEPS_SPACE)]):
        notes.append(f"white space after {', '.join(odd)} is cut differently by llama.cpp")
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    special = _special(settings, pieces, read_json(folder / "config.json"), stop_ids)
    # A space inside a part would end its merge, and is written as its byte-level twin.
    lines = tuple(" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges) if byte_level else ()
    return Vocabulary(
        kind, pre, tokens, types, scores, lines, special,
        _adds_bos(backend, special.get("bos")), _template(folder, settings), swallows, tuple(notes),
    )  # fmt: skip


def _type(
    index: int, pieces: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any]
) -> int:
    if index not in pieces:
        return UNUSED
    piece = pieces[index]
    if piece == model.get("unk_token"):
        return UNKNOWN
    if index in added:
        return CONTROL if added[index].get("special") else USER_DEFINED
    if model.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return BYTE
    return NORMAL


def _scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, ...]], notes: list[str]
) -> tuple[float, ...]:
    """Scores under which merging the best-scored pair first does what the ranks of pairs do.

    A piece scores by the rank of the first merge that gives it. That is the same rule if every way to cut a known
    piece in two known ones is a merge, and the ranks of one piece's merges stand together; SentencePiece models
    converted to tokenizer.json, as Phi-3's, are so.
    """
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    rank: dict[str, int] = {}
    ways: dict[str, int] = {}
    last, scattered = "", 0
    for left, right in merges:
        piece = left + right
        scattered += piece in rank and piece != last
        rank.setdefault(piece, len(rank))
        ways[piece] = ways.get(piece, 0) + 1
        last = piece
    missing = sum(
        sum(piece[:cut] in known and piece[cut:] in known for cut in range(1, len(piece))) > ways.get(piece, 0)
        for piece in known
        if len(piece) > 1
    )
    if missing or scattered:
        notes.append(
            f"the tokenizer was not made by SentencePiece: {missing + scattered} of its pieces merge by rules that "
            "scores cannot express, so llama.cpp may cut some words differently"
        )
    lowest = len(rank)
    return tuple(
        -1000.0 if kind in (CONTROL, USER_DEFINED) else -10000.0 if kind == UNUSED
        else 0.0 if kind in (BYTE, UNKNOWN) else float(-rank.get(token, lowest))
        for token, kind in zip(tokens, types, strict=True)
    )  # fmt: skip


def _cutting_rule(tokenizer: Mapping[str, Any], path: Path) -> str:
    split = _find(tokenizer.get("pre_tokenizer"), "Split")
    pattern = str((split or {}).get("pattern", {}).get("Regex", ""))
    for mark, name in _PRE:
        if mark in pattern:
            return name
    raise VocabularyError(
        f"{path}: it cuts text by {pattern or 'a rule'!r}, a rule that llama.cpp has no known name for"
    )


def _find(step: Any, kind: str) -> Mapping[str, Any] | None:
    """The first step of a tokenizers pipeline that is of `kind`."""
    if not isinstance(step, Mapping):
        return None
    if step.get("type") == kind:
        return step
    for inner in [*step.get("pretokenizers", []), *step.get("normalizers", [])]:
        if found := _find(inner, kind):
            return found
    return None


def _special(
    settings: Mapping[str, Any], pieces: Mapping[int, str], config: Mapping[str, Any], stop_ids: Sequence[int]
) -> dict[str, int]:
    ids = {piece: index for index, piece in pieces.items()}
    special = {}
    for kind in ("bos", "eos", "unk", "pad"):
        named = settings.get(f"{kind}_token")
        named = named.get("content") if isinstance(named, Mapping) else named
        index = ids.get(named) if named else config.get(f"{kind}_token_id")
        if isinstance(index, int) and index in pieces:
            special[kind] = index
    ends = [ids[name] for name in ("<|end|>", "<|im_end|>") if name in ids]
    ends += [index for index in stop_ids if index in pieces]
    eot = next((index for index in ends if index != special.get("eos")), None)
    if eot is not None:
        special["eot"] = eot
    return special


def _adds_bos(backend: Any, bos: int | None) -> bool:
    """Whether the tokenizer itself puts the begin token in front, found out by asking it."""
    first = backend.encode("a").ids[:1]
    return bos is not None and first == [bos]


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
