"""Target names in either vocabulary, fused or split, resolved against a model's config into a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora.plan import LAYERS, Block, Target, TargetPlan, span
from phi3_lora_plugin.lora.text_side import excluded_modules
from phi3_lora_plugin.lora_files.peft_files import pattern_key, pattern_value
from phi3_lora_plugin.model.families import Projection, Slice, projections
from phi3_lora_plugin.wording import closest

ALL_LINEAR = "all-linear"
EXPERTS = "experts"
_ROUTER = "mlp.router"
_OUTSIDE = ("lm_head", "model.embed_tokens")
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


class TargetError(Phi3LoraError):
    """LoRA cannot be placed as asked: `problems` are all the reasons; the message adds the model's real names."""

    def __init__(self, problems: Sequence[str], layout: str = "") -> None:
        self.problems = tuple(problems)
        lines = ["LoRA cannot be placed as asked:", *(f"  - {problem}" for problem in self.problems)]
        super().__init__("\n".join([*lines, layout] if layout else lines))


@dataclass(frozen=True)
class _Place:
    """Something that a target can name: a projection as a whole (`part` None) or one slice of it."""

    projection: Projection
    part: Slice | None = None

    @property
    def path(self) -> str:
        """The path below the layer; for a slice, the one an unfused model would have."""
        if self.part is None:
            return self.projection.path
        return f"{self.projection.path.rpartition('.')[0]}.{self.part.name}"

    def full(self, layer: int) -> str:
        """The path in the model."""
        return f"{LAYERS}.{layer}.{self.path}"


def resolve_targets(
    model_or_config: Any,
    targets: str | Iterable[str],
    r: int,
    alpha: float,
    *,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers_to_transform: int | Iterable[int] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    target_parameters: Iterable[str] | None = None,
) -> TargetPlan:
    """Work out which modules of the model get LoRA, and with what rank, before anything is touched.

    A target is a name (`qkv_proj`, `self_attn.qkv_proj`), a slice of a fused projection by the name that it has on
    unfused models (`q_proj`, `up_proj`), `all-linear` (every projection of every layer, never a head or a router),
    `experts` (PhiMoE), or else a regular expression that must match a whole module path.

    Args:
        model_or_config: a transformers model, its config, or the config as a mapping.
        rank_pattern: PEFT's; the first pattern that ends a module's path wins. Slices go by their own names here.
        alpha_pattern: in the same way.
        layers_to_transform: only these layers. Nothing else may leave a layer out, except `exclude_modules`.
        exclude_modules: PEFT's: names, or one regular expression over whole module paths.
        target_parameters: PEFT's; on PhiMoE the stacked expert weights, which `experts` in `targets` names too.

    Raises:
        TargetError: with every problem: a name that matches nothing or not in every layer, a projection named both
            whole and by slices, heads, embeddings and routers, patterns that fit nothing, ranks that cannot be.
        UnsupportedModel: the model is not of the Phi family.
    """
    config = _as_mapping(model_or_config)
    layout = projections(config)
    layers = int(config["num_hidden_layers"])
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    problems = list(_number_problems(r, alpha, ranks, alphas))
    wanted = _wanted_layers(layers_to_transform, layers, problems)
    asked = [targets] if isinstance(targets, str) else list(targets)
    if target_parameters is not None:
        asked += _parameter_names(target_parameters, layout, problems)
    if not asked:
        problems.append("no target is named; `all-linear` means every projection")

    chosen: dict[_Place, set[int]] = {}
    for target in dict.fromkeys(asked):
        for place, found in _match(target, layout, layers, wanted, config, problems).items():
            chosen.setdefault(place, set()).update(found)
    _refuse_both_vocabularies(chosen, problems)
    _exclude(exclude_modules, chosen, problems)
    if not problems:
        resolved = [
            _target(projection, layer, chosen, r, alpha, rslora, ranks, alphas, problems)
            for layer in range(layers)
            for projection in layout
            if any(place.projection == projection and layer in found for place, found in chosen.items())
        ]
        problems += [*_unused("rank_pattern", ranks, chosen), *_unused("alpha_pattern", alphas, chosen)]
    if problems:
        raise TargetError(list(dict.fromkeys(problems)), describe(config))
    return TargetPlan(r, alpha, rslora, layers, tuple(resolved), excluded_modules(config))


def describe(config: Mapping[str, Any]) -> str:
    """One sentence with the real module names of each layer, and what the slices of the fused ones are called."""
    names = ", ".join(
        projection.path + (f" (= {', '.join(part.name for part in projection.slices)})" if projection.slices else "")
        for projection in projections(config)
    )
    return f"Each of the {config['num_hidden_layers']} layers of this {config.get('model_type')} model has {names}."


def _as_mapping(model_or_config: Any) -> Mapping[str, Any]:
    config = getattr(model_or_config, "config", model_or_config)
    mapping: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    return mapping


def _number_problems(r: Any, alpha: Any, ranks: Mapping[str, Any], alphas: Mapping[str, Any]) -> Iterator[str]:
    whole = {"r": r} | {f"rank_pattern[{key!r}]": value for key, value in ranks.items()}
    positive = {"alpha": alpha} | {f"alpha_pattern[{key!r}]": value for key, value in alphas.items()}
    yield from (
        f"{name}: expected a whole number of at least 1, got {value!r}"
        for name, value in whole.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    )
    yield from (
        f"{name}: expected a number above 0, got {value!r}"
        for name, value in positive.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
    )
    yield from (
        f"{option}: {key!r} is not a regular expression: {problem}"
        for option, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas))
        for key in patterns
        if (problem := _no_pattern(key))
    )


def _no_pattern(text: str) -> str | None:
    """Why a text is not a regular expression; None if it is."""
    try:
        re.compile(text)
    except re.error as error:
        return str(error)
    return None


def _wanted_layers(asked: int | Iterable[int] | None, layers: int, problems: list[str]) -> set[int]:
    if asked is None:
        return set(range(layers))
    numbers = [asked] if isinstance(asked, int) else list(asked)
    wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < layers]
    if wrong or not numbers:
        problems.append(f"layers_to_transform: expected layers of 0 to {layers - 1}, got {wrong or 'none at all'}")
    return set(numbers) - set(wrong)


def _match(
    target: str,
    layout: Sequence[Projection],
    layers: int,
    wanted: set[int],
    config: Mapping[str, Any],
    problems: list[str],
) -> dict[_Place, set[int]]:
    """The places that one target names, each with its layers; appends what is wrong to `problems`."""
    if target.lower() == ALL_LINEAR:
        return {_Place(projection): set(wanted) for projection in layout if not projection.experts}
    if target == EXPERTS and any(projection.experts for projection in layout):
        return {_Place(projection): set(wanted) for projection in layout if projection.experts}
    as_pattern = not _NAME.fullmatch(target)
    if as_pattern and (problem := _no_pattern(target)):
        problems.append(f"{target!r} is not a name or a regular expression: {problem}")
        return {}
    found = {
        place: {layer for layer in range(layers) if _fits(place.full(layer), target, as_pattern)}
        for place in _places(layout)
        # Stacked weights are far larger than such a name suggests, so only a path with `experts` means them.
        if as_pattern or not place.projection.experts or EXPERTS in target.split(".")
    }
    if as_pattern:
        found = _fused_or_slices(target, found, problems)
    outside = [name for name in _outside(config, layers) if _fits(name, target, as_pattern)]
    found = {place: each for place, each in found.items() if each}
    problems += _refusals(target, outside, config)
    if not found and not outside:
        problems.append(_unknown(target, layout))
    for place, each in found.items():
        if missing := wanted - each:
            problems.append(
                f"{target!r} matches {place.path} in {span(each)} but not in {span(missing)}; name it without a layer, "
                f"and choose layers by layers_to_transform={sorted(each)}"
            )
    return {place: each & wanted for place, each in found.items() if each & wanted}


def _fused_or_slices(target: str, found: dict[_Place, set[int]], problems: list[str]) -> dict[_Place, set[int]]:
    """A pattern that fits a fused projection and all its slices means the whole; one that fits some is unclear."""
    result = dict(found)
    for place in [place for place, each in found.items() if each and place.projection.slices and place.part is None]:
        parts = _parts(place.projection)
        hit = [part.path for part in parts if found[part]]
        if hit and len(hit) < len(parts):
            problems.append(
                f"{target!r} fits both {place.path} as a whole and, of its slices, only {', '.join(hit)}; write "
                r"`.*\.` before the name, so that `v_proj` does not fit the end of `qkv_proj`"
            )
        result |= {part: set() for part in parts}
    return result


def _refusals(target: str, outside: Sequence[str], config: Mapping[str, Any]) -> Iterator[str]:
    tied = bool(config.get("tie_word_embeddings"))
    names = [name.rpartition(".")[2] for name in outside if not name.endswith(_ROUTER)]
    if len(names) < len(outside):
        yield (
            f"{target!r} names the router of the experts: it returns a tuple that LoRA cannot wrap, and moving the "
            "routing of a trained mixture breaks it; leave it out"
        )
    for short in names:
        if tied:
            yield (
                f"{target!r}: {short} shares its weight with {'embed_tokens' if short == 'lm_head' else 'lm_head'} "
                "(tie_word_embeddings), so LoRA on one of them is lost or doubled by merging and saving; to train "
                "single tokens, use trainable_token_indices"
            )
        else:
            yield (
                f"{target!r}: LoRA on {short} is refused: memory-saving losses and TRL read its weight past the "
                f"adapter, and servers do not load it; modules_to_save=['{short}'] trains it in full, "
                "trainable_token_indices trains single tokens"
            )


def _unknown(target: str, layout: Sequence[Projection]) -> str:
    names = [place.path.rpartition(".")[2] for place in _places(layout)]
    near = closest(target.rpartition(".")[2], names, 0.75)
    hint = f"did you mean {near!r}?" if near else ""
    if any(projection.experts for projection in layout):
        if target in ("qkv_proj", "self_attn.qkv_proj"):
            hint = "attention is not fused here: q_proj, k_proj, v_proj"
        elif target.rpartition(".")[2] in ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"):
            hint = "the MLP is a mixture of experts here, whose stacked weights 'experts' names"
    elif target == EXPERTS:
        hint = "only PhiMoE has experts"
    elif "," in target:
        hint = f"several targets are a list: [{target}]"
    return f"{target!r} matches no module" + (f"; {hint}" if hint else "")


def _parameter_names(asked: Iterable[str], layout: Sequence[Projection], problems: list[str]) -> list[str]:
    names = [asked] if isinstance(asked, str) else list(asked)
    stacked = [projection.path for projection in layout if projection.experts]
    for name in names:
        if not any(_ends(f"{LAYERS}.0.{path}", re.sub(r"layers\.\d+", "layers.0", name)) for path in stacked):
            have = ", ".join(stacked) or "none: its projections are modules, which `targets` names"
            problems.append(f"target_parameters: {name!r} is not a stack of expert weights; this model has {have}")
    return [] if problems else names


def _refuse_both_vocabularies(chosen: Mapping[_Place, set[int]], problems: list[str]) -> None:
    for place in chosen:
        parts = [other.path for other in chosen if other.part is not None and other.projection == place.projection]
        if place.part is None and parts:
            problems.append(
                f"{place.path} is named both as a whole and by its slices {', '.join(parts)}; a whole has one A of "
                "rank r for all its rows, slices have one each: choose"
            )


def _exclude(asked: str | Iterable[str] | None, chosen: dict[_Place, set[int]], problems: list[str]) -> None:
    """Take PEFT's `exclude_modules` out of `chosen`: names by their ends, or one regular expression."""
    names = [] if asked is None else [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        hits = {
            place: {layer for layer in layers if _fits(place.full(layer), name, isinstance(asked, str))}
            for place, layers in chosen.items()
        }
        if not any(hits.values()):
            problems.append(f"exclude_modules: {name!r} excludes nothing that the targets name")
        for place, layers in hits.items():
            chosen[place] = chosen[place] - layers
    for place in [place for place, layers in chosen.items() if not layers]:
        del chosen[place]
    if names and not chosen and not problems:
        problems.append("exclude_modules leaves nothing to train")


def _unused(option: str, pattern: Mapping[str, Any], chosen: Mapping[_Place, set[int]]) -> Iterator[str]:
    """What is wrong with keys of PEFT's rank or alpha pattern that are of no use."""
    used = {pattern_key(pattern, place.full(layer)) for place, layers in chosen.items() for layer in layers}
    sliced = {
        place.projection.name: [p.name for p in place.projection.slices] for place in chosen if place.part is not None
    }
    for key in pattern:
        if key not in used:
            parts = sliced.get(key.rpartition(".")[2])
            hint = f"; its slices are the targets, so name {', '.join(parts)}" if parts else ""
            yield f"{option}: {key!r} fits none of the targets, or an earlier key fits all of its{hint}"


def _target(
    projection: Projection,
    layer: int,
    chosen: Mapping[_Place, set[int]],
    r: int,
    alpha: float,
    rslora: bool,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    problems: list[str],
) -> Target:
    name, module = projection.path.rpartition(".")[2], _Place(projection).full(layer)
    shape = (projection.in_features, projection.out_features)
    blocks, scalings = [], {}
    for part in projection.slices:
        place = _Place(projection, part)
        if layer in chosen.get(place, ()):
            path = place.full(layer)
            rank = pattern_value(ranks, path, r)
            blocks.append(Block(part.name, part.start, part.stop, rank))
            scalings[part.name] = pattern_value(alphas, path, alpha) / (math.sqrt(rank) if rslora else rank)
    if not blocks:
        rank, scaled = pattern_value(ranks, module, r), pattern_value(alphas, module, alpha)
        return Target(module, name, layer, *shape, rank, scaled, experts=projection.experts)
    if not math.isclose(min(scalings.values()), max(scalings.values()), rel_tol=1e-9):
        shown = ", ".join(f"{name} {scaling:g}" for name, scaling in scalings.items())
        problems.append(
            f"{projection.path}: its slices would be scaled differently ({shown}), but one PEFT module has one "
            "scaling; give them an alpha_pattern that keeps alpha / r equal"
        )
    total = sum(block.rank for block in blocks)
    scaled = next(iter(scalings.values())) * (math.sqrt(total) if rslora else total)
    return Target(module, name, layer, *shape, total, _tidy(scaled), tuple(blocks))


def _tidy(number: float) -> float:
    """A whole number as an int, so that the saved config reads `48` and not `48.0`."""
    return int(round(number)) if math.isclose(number, round(number), rel_tol=1e-12) else number


def _places(layout: Sequence[Projection]) -> list[_Place]:
    return [place for projection in layout for place in (_Place(projection), *_parts(projection))]


def _parts(projection: Projection) -> list[_Place]:
    return [_Place(projection, part) for part in projection.slices]


def _outside(config: Mapping[str, Any], layers: int) -> list[str]:
    routers = [f"{LAYERS}.{layer}.{_ROUTER}" for layer in range(layers)] if config.get("num_local_experts") else []
    return [*_OUTSIDE, *routers]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _fits(path: str, name: str, as_pattern: bool) -> bool:
    return bool(re.fullmatch(name, path)) if as_pattern else _ends(path, name)
