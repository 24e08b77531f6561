"""The spellings that one LoRA parameter has: in loralib, in a PEFT model, in PEFT's files, inside wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
#: Children that torch.compile, FSDP1 and activation checkpointing put into the middle of names.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# DDP and DeepSpeed put `module` in front only, where a layer of the model may have that name too.
_IN_FRONT = re.compile(r"^(?:module\.|base_model\.model\.)+")
# loralib looks for `lora_` anywhere, which would match `explora_net.weight` too.
_LORA = re.compile(r"(?:^|[._])lora_|(?:^|\.)modules_to_save\.|\.trainable_tokens_delta(?:$|\.)")
_FACTOR = re.compile(r"^(?P<path>(?:.*\.)?)(?P<part>lora_\w+)(?:\.(?P<rest>.+))?$")
_SAVED = re.compile(r"^(?P<path>(?:.*\.)?)modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)$")
_TOKENS = re.compile(r"^(?P<path>.*\.trainable_tokens_delta)(?:\.(?P<adapter>[^.]+))?$")


#: A checkpoint asks for the same few thousand names each time, and splitting them takes longer than writing the file.
_remembered = lru_cache(maxsize=1 << 16)


@dataclass(frozen=True)
class Spelling:
    """A key split into what all its spellings share, and the adapter that it names, if it names one."""

    shared: str
    adapter: str | None


@_remembered
def without_wrappers(name: str) -> str:
    """A name without what torch.compile, FSDP1 and activation checkpointing put into the middle of it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@_remembered
def bare(key: str) -> str:
    """A key of a file or state without wrappers, without `module.` and `base_model.model.` in front."""
    return _IN_FRONT.sub("", without_wrappers(key))


@_remembered
def is_lora(name: str) -> bool:
    """Whether a parameter belongs to LoRA, or to what PEFT trains next to it (modules_to_save, tokens)."""
    return _LORA.search(name) is not None


@_remembered
def spelling(name: str) -> Spelling:
    """Split a key, already without wrappers, of loralib, a PEFT model or a PEFT file."""
    name = name.removeprefix(PREFIX)
    if match := _TOKENS.match(name):
        return Spelling(match["path"], match["adapter"])
    if match := _SAVED.match(name):
        return Spelling(match["path"] + match["rest"], match["adapter"])
    match = _FACTOR.match(name)
    if match is None:
        return Spelling(re.sub(r"\.base_layer\.bias$", ".bias", name), None)
    part = match["part"].replace("lora_embedding_", "lora_")  # PEFT's name in an Embedding; loralib has one name
    rest = (match["rest"] or "").split(".") if match["rest"] else []
    leaf = rest.pop() if rest and (len(rest) > 1 or rest[0] in ("weight", "bias")) else "weight"
    adapter = rest.pop(0) if rest else None
    return Spelling(".".join([match["path"] + part, *rest, *(["bias"] if leaf == "bias" else [])]), adapter)


@_remembered
def file_key(name: str) -> str:
    """How PEFT's files spell a parameter of a model: with `base_model.model.`, without the adapter's name."""
    plain = name.removeprefix(PREFIX)
    if match := _TOKENS.match(plain):
        plain = match["path"]
    elif match := _SAVED.match(plain):
        plain = match["path"] + match["rest"]
    elif (match := _FACTOR.match(plain)) and match["rest"]:
        rest = match["rest"].split(".")
        if len(rest) > 1 or rest[0] not in ("weight", "bias"):
            rest.pop(0)
        if match["part"] == "lora_magnitude_vector":  # once a bare parameter, and files have kept that
            rest = [each for each in rest if each != "weight"]
        plain = ".".join([match["path"] + match["part"], *rest])
    return f"{PREFIX}{plain}"


@_remembered
def read_key(key: str) -> Spelling:
    """A key of any file as PEFT's files spell it, but without `base_model.model.`, and the adapter that it names."""
    plain = bare(key)
    name = file_key(plain).removeprefix(PREFIX)
    weight = ".weight" if name.endswith((".lora_A", ".lora_B")) else ""  # which loralib leaves out
    return Spelling(name + weight, spelling(plain).adapter)


def factor_of(name: str) -> str | None:
    """The module that a tensor named as by `read_key` is a factor of, or None."""
    match = re.match(r"(.+)\.lora_(?:embedding_)?[AB](?:\.(?:weight|bias))?$", name)
    return match[1] if match else None


@dataclass
class Index:
    """The parameters of a model by what all spellings of their names share."""

    default: str | None
    names: dict[str, dict[str | None, str]] = field(default_factory=dict)

    def match(self, state: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str], list[str]]:
        """(key -> name of the parameter, keys that nothing takes, what is ambiguous)."""
        spelled = {key: self._spelled(key) for key in state}
        named = {each.adapter for each in spelled.values() if each.adapter is not None}
        chosen: dict[str, str] = {}
        owners: dict[str, str] = {}
        unexpected, problems = [], []
        for key, each in spelled.items():
            candidates = self.names.get(each.shared, {})
            name = self._pick(candidates, each.adapter, len(named) == 1)
            if name is None and candidates and each.adapter is None:
                problems.append(f"  {key} could be for any of {', '.join(sorted(candidates.values()))}: pass adapter=")
            elif name is None:
                unexpected.append(key)
            elif name in owners and not _same(state[key], state[owners[name]]):
                problems.append(f"  {key} and {owners[name]} are both for {name}, and differ")
            else:
                owners.setdefault(name, key)
                if owners[name] == key:
                    chosen[key] = name
        return chosen, unexpected, problems

    def expected(self, chosen: Iterable[str]) -> list[str]:
        """The LoRA parameters that a state has to fill: all of the adapters that it fills any of."""
        touched = {spelling(name).adapter for name in chosen} or {self.default}
        return [
            name
            for each in self.names.values()
            for adapter, name in each.items()
            if is_lora(name) and (adapter in touched or adapter is None)
        ]

    def _spelled(self, key: str) -> Spelling:
        found = spelling(without_wrappers(key))
        return found if found.shared in self.names else spelling(bare(key))

    def _pick(self, candidates: Mapping[str | None, str], adapter: str | None, alone: bool) -> str | None:
        if adapter in candidates:
            return candidates[adapter]
        if adapter is not None and not alone:
            return None
        if self.default in candidates:
            return candidates[self.default]
        return next(iter(candidates.values())) if len(candidates) == 1 else None


def index_of(names: Mapping[str, Any], default: str | None, aliases: Mapping[str, str] | None = None) -> Index:
    """Index parameters by plain name; `aliases` are further names of tied ones -> the first name."""
    index = Index(default)
    for name in names:
        each = spelling(name)
        index.names.setdefault(each.shared, {})[each.adapter] = name
    for alias, name in (aliases or {}).items():
        each = spelling(alias)
        index.names.setdefault(each.shared, {}).setdefault(each.adapter, name)
    return index


def _same(one: Any, other: Any) -> bool:
    shapes = getattr(one, "shape", None), getattr(other, "shape", None)
    return None not in shapes and shapes[0] == shapes[1] and bool((one == other).all())
