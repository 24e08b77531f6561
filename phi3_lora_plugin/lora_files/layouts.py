"""Exact tensor maps between the layouts that LoRA on Phi comes in: fused projections, split ones, loralib's groups.

Everything here is a function from updates to updates. `peft_files`, `loralib_files` and `torchtune_files` read and
write the files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from torch import Tensor

    from phi3_lora_plugin.model.families import Projection

_LAYER = re.compile(r"^(.*\.layers\.\d+)\.(.+)$")


class LayoutError(Phi3LoraError):
    """An adapter cannot be expressed in the layout that was asked for; `problems` lists the reasons."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Lora:
    """One update of one module: `delta W = scaling * b @ a`, of an Embedding `delta W = scaling * (b @ a).T`.

    Attributes:
        module: path of the module in the base model, such as `model.layers.0.self_attn.qkv_proj`.
        a: (rank, in); of an Embedding (rank, rows of the table).
        b: (out, rank).
        alpha: scaling is alpha / rank, of rank-stabilised LoRA (arXiv 2312.03732) alpha / sqrt(rank).
        magnitude: (out,), the row lengths of DoRA (arXiv 2402.09353), or None.
        bias: (out,), the bias of the second factor (PEFT's lora_bias), or None.
    """

    module: str
    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False
    embedding: bool = False
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Tensor:
        """The update of the weight without DoRA's magnitude: (out, in) of a Linear, (rows, dim) of an Embedding."""
        product = (self.b.float() @ self.a.float()) * self.scaling
        return product.T if self.embedding else product


@dataclass(frozen=True)
class Row:
    """One line of a conversion report: source, result and the rule between them."""

    source: str
    target: str
    shape: tuple[int, ...]
    rule: str


def misfits(lora: Lora) -> list[str]:
    """What is wrong with the tensors of one update by themselves: their shapes and types."""
    a, b = tuple(lora.a.shape), tuple(lora.b.shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        return [f"{lora.module}: A {a} and B {b} do not belong together; expected A (r, in) and B (out, r)"]
    parts = {"A": lora.a, "B": lora.b, "the magnitude": lora.magnitude, "the bias": lora.bias}
    given = {name: part for name, part in parts.items() if part is not None}
    wrong = [
        f"{lora.module}: {name} is of type {str(part.dtype).removeprefix('torch.')}; expected floating-point numbers"
        for name, part in given.items()
        if not part.is_floating_point()
    ]
    return wrong + [
        f"{lora.module}: {name} has the shape {tuple(part.shape)}, B has {b[0]} rows"
        for name, part in given.items()
        if name not in ("A", "B") and tuple(part.shape) != (b[0],)
    ]


def with_scaling(lora: Lora, a: Tensor, b: Tensor) -> Lora:
    """`lora` with other factors, whose alpha keeps the scaling although the rank changed."""
    ratio = a.shape[0] / lora.rank
    alpha = lora.alpha * (math.sqrt(ratio) if lora.rslora else ratio)
    return replace(lora, a=a, b=b, alpha=round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha)


def fused_to_split(
    loras: Iterable[Lora], layout: Sequence[Projection], compact: bool = True
) -> tuple[list[Lora], list[Row]]:
    """Updates of fused projections as updates of their slices: each takes A as it is and its own rows of B.

    Args:
        layout: `families.projections` of the base; row boundaries come from there, also under grouped-query attention.
        compact: leave out ranks that a slice does not use (columns of its B that are zero) and slices that use none,
            so that an adapter that was fused from a split one comes back at its own ranks. Changes no weight.

    Raises:
        LayoutError: a B does not have the rows that the base's projection has.
    """
    result: list[Lora] = []
    rows: list[Row] = []
    problems: list[str] = []
    for lora in loras:
        projection = _fused(lora.module, layout)
        if projection is None:
            result.append(lora)
            rows.append(Row(lora.module, lora.module, tuple(lora.b.shape), "kept"))
            continue
        if problem := _misshapen(lora, projection.in_features, projection.out_features):
            problems.append(problem)
            continue
        whole_is_zero = not lora.b.any()
        for part in projection.slices:
            target = f"{lora.module.rpartition('.')[0]}.{part.name}"
            b = lora.b[part.start : part.stop].contiguous()
            rule = f"A shared, rows {part.start}-{part.stop - 1} of B"
            piece = replace(lora, module=target, b=b, magnitude=_cut(lora.magnitude, part), bias=_cut(lora.bias, part))
            live = b.any(dim=0)
            if compact and not whole_is_zero and not live.all():
                if not live.any() and piece.magnitude is None and (piece.bias is None or not piece.bias.any()):
                    rows.append(Row(lora.module, "-", tuple(b.shape), f"{part.name} is not adapted: its rows are zero"))
                    continue
                live[0] |= not live.any()
                piece = with_scaling(piece, piece.a[live].contiguous(), b[:, live].contiguous())
                rule += f", {int(live.sum())} of {len(live)} ranks in use"
            result.append(piece)
            rows.append(Row(lora.module, target, tuple(piece.b.shape), rule))
    if problems:
        raise LayoutError(problems)
    return result, rows


def split_to_fused(
    loras: Iterable[Lora], layout: Sequence[Projection], compact: bool = True
) -> tuple[list[Lora], list[Row]]:
    """Updates of split projections as updates of the fused ones: A stacked, B block-diagonal, alpha kept in step.

    Slices without an update get zero rows. The rank of the result is the sum of the slices' ranks, except that slices
    with one and the same A share it (`compact`), which makes it the exact inverse of `fused_to_split`.

    Raises:
        LayoutError: misshapen updates, a projection adapted both whole and in slices, DoRA on some slices only.
    """
    result: list[Lora] = []
    rows: list[Row] = []
    problems: list[str] = []
    groups: dict[str, tuple[Projection, dict[str, Lora]]] = {}
    for lora in loras:
        owner, _, name = lora.module.rpartition(".")
        projection = _owner(lora.module, layout)
        if projection is None:
            result.append(lora)
            rows.append(Row(lora.module, lora.module, tuple(lora.b.shape), "kept"))
            continue
        part = next(part for part in projection.slices if part.name == name)
        if problem := _misshapen(lora, projection.in_features, part.stop - part.start):
            problems.append(problem)
        groups.setdefault(f"{owner}.{projection.name}", (projection, {}))[1][name] = lora
    whole = {lora.module for lora in result}
    for module, (projection, pieces) in groups.items():
        if module in whole:
            problems.append(
                f"{module} is adapted as a whole and again by its slices {', '.join(pieces)}; merge one of them"
            )
            continue
        missing = [part.name for part in projection.slices if part.name not in pieces]
        if any(lora.magnitude is not None for lora in pieces.values()) and (
            missing or any(lora.magnitude is None for lora in pieces.values())
        ):
            others = ", ".join(missing) or "others"
            problems.append(
                f"{module}: DoRA on {', '.join(pieces)} alone cannot be fused: the rows of {others} would need the "
                "lengths of the base's own rows; merge this adapter instead"
            )
            continue
        if not problems:
            fused, rule = _fuse(module, pieces, projection, compact)
            result.append(fused)
            rows += [Row(lora.module, module, tuple(fused.b.shape), rule) for lora in pieces.values()]
    if problems:
        raise LayoutError(problems)
    return result, rows


def grouped_to_fused(lora: Lora, r: int, enable: Sequence[bool], compact: bool = True) -> Lora:
    """loralib's MergedLinear as one update of the whole projection: A kept, B block-diagonal, rank and alpha times k.

    Args:
        lora: `a` (r*k, in) and `b` (out/len(enable)*k, r) as loralib stores them for k enabled groups, alpha loralib's.
        compact: groups with one and the same A share it, as those of a slice under grouped-query attention do.

    Raises:
        LayoutError: the shapes do not belong to `r` and `enable`.
    """
    k = sum(enable)
    if not k or lora.a.shape[0] != r * k or lora.b.shape[1] != r or lora.b.shape[0] % k:
        flags = ",".join("T" if on else "F" for on in enable)
        raise LayoutError([
            f"{lora.module}: A {tuple(lora.a.shape)} and B {tuple(lora.b.shape)} do not belong to r={r} with "
            f"enable_lora={flags}; expected A ({r * k}, in) and B ({k or 1} x rows of a group, {r})"
        ])  # fmt: skip
    height = lora.b.shape[0] // k
    enabled = [group for group, on in enumerate(enable) if on]
    pieces = [
        (lora.a[place * r : (place + 1) * r], group * height, lora.b[place * height : (place + 1) * height])
        for place, group in enumerate(enabled)
    ]
    one = replace(lora, a=lora.a[:r], b=lora.b)  # at its own rank, so that alpha / rank is loralib's scaling
    return with_scaling(one, *_stack(pieces, height * len(enable), compact))


def fused_to_grouped(lora: Lora, projection: Projection) -> tuple[Lora, int, tuple[bool, ...]] | None:
    """The inverse of `grouped_to_fused`: (update as loralib stores it, r, enable_lora), or None where it has no blocks.

    Groups are equal in height, as loralib has them: under grouped-query attention the query takes several groups, each
    with a copy of the query's A.
    """
    import torch

    if lora.magnitude is not None or lora.bias is not None or not projection.slices:
        return None
    height = math.gcd(*(part.stop - part.start for part in projection.slices))
    rows = lora.b.unflatten(0, (-1, height)).ne(0).any(dim=1)  # (groups, rank): which ranks a group uses
    used = {group: mask for group, mask in enumerate(rows) if mask.any()}
    masks = torch.unique(rows[rows.any(dim=1)], dim=0)
    # Blocks on a diagonal: each rank serves one block, all have the same rank. One block over several groups is better
    # kept whole, with one A.
    if not used or int(masks.sum(dim=0).max()) > 1 or len(set(masks.sum(dim=1).tolist())) > 1:
        return None
    if len(masks) == 1 and len(used) > 1:
        return None
    r = int(masks[0].sum())
    a = torch.cat([lora.a[mask] for mask in used.values()])
    b = torch.cat([lora.b[group * height : (group + 1) * height, mask] for group, mask in used.items()])
    scaled = with_scaling(lora, lora.a[:r], lora.b[:, :r]).alpha
    enable = tuple(group in used for group in range(len(rows)))
    return replace(lora, a=a.contiguous(), b=b.contiguous(), alpha=scaled), r, enable


def one_alpha(loras: Iterable[Lora], alpha: float) -> list[Lora]:
    """The same updates under one alpha: where a module's scaling differs from alpha / rank, it goes into the B."""
    result = []
    for lora in loras:
        fitted = replace(lora, alpha=alpha, rslora=False)
        ratio = lora.scaling / fitted.scaling
        if not math.isclose(ratio, 1, rel_tol=1e-12):
            fitted = replace(fitted, b=_times(lora.b, ratio), bias=_times(lora.bias, ratio))
        result.append(fitted)
    return result


def uniform(loras: Sequence[Lora]) -> list[Lora]:
    """The same updates at one rank and one alpha, so that programs that read only these two compute them right."""
    rank = max(lora.rank for lora in loras)
    scaling = Counter(lora.scaling for lora in loras).most_common(1)[0][0]
    whole = round(scaling * rank)
    alpha = whole if whole and math.isclose(scaling * rank, whole, rel_tol=1e-12) else rank
    return one_alpha([padded(lora, rank) for lora in loras], alpha)


def padded(lora: Lora, rank: int) -> Lora:
    """The same update at a higher rank: further rows of A and columns of B are zero."""
    import torch

    if rank == lora.rank:
        return lora
    a = torch.cat([lora.a, lora.a.new_zeros(rank - lora.rank, lora.a.shape[1])])
    b = torch.cat([lora.b, lora.b.new_zeros(lora.b.shape[0], rank - lora.rank)], dim=1)
    return with_scaling(lora, a, b)


def is_split(loras: Iterable[Lora], layout: Sequence[Projection]) -> bool:
    """Whether any update is one of a slice of what the base has fused."""
    return any(_owner(lora.module, layout) is not None for lora in loras)


def unknown_modules(loras: Iterable[Lora], layout: Sequence[Projection], layers: int) -> list[str]:
    """What is wrong with modules that the base does not have, or has in another shape, in either vocabulary."""
    shapes: dict[str, tuple[int, int]] = {}
    for projection in layout:
        if not projection.experts:
            shapes[projection.path] = (projection.out_features, projection.in_features)
        for part in projection.slices:
            path = f"{projection.path.rpartition('.')[0]}.{part.name}"
            shapes[path] = (part.stop - part.start, projection.in_features)
    problems = []
    for lora in loras:
        if lora.embedding or lora.module in ("lm_head", "model.embed_tokens"):
            continue
        match = _LAYER.match(lora.module)
        number = int(match[1].rpartition(".")[2]) if match else -1
        if match is None or match[1] != f"model.layers.{number}" or match[2] not in shapes:
            problems.append(
                f"{lora.module} is not a projection of this model; it has {', '.join(shapes)} in model.layers.N"
            )
        elif number >= layers:
            problems.append(f"{lora.module}: the model has only {layers} layers")
        elif problem := _misshapen(lora, shapes[match[2]][1], shapes[match[2]][0]):
            problems.append(problem)
    return problems


def _fuse(module: str, pieces: Mapping[str, Lora], projection: Projection, compact: bool) -> tuple[Lora, str]:
    # What the others are scaled by; by zero, none could be.
    first = next((lora for lora in pieces.values() if lora.scaling), next(iter(pieces.values())))
    stacked = []
    biases: dict[str, Tensor | None] = {}
    folded = False
    for part in projection.slices:
        if (lora := pieces.get(part.name)) is not None:
            b, biases[part.name] = lora.b, lora.bias
            if not math.isclose(lora.scaling, first.scaling, rel_tol=1e-12):
                ratio, folded = lora.scaling / first.scaling, True
                b, biases[part.name] = _times(b, ratio), _times(lora.bias, ratio)
            stacked.append((lora.a, part.start, b))
    a, b = _stack(stacked, projection.out_features, compact)
    fused = replace(
        with_scaling(replace(first, module=module), a, b),
        magnitude=_join({name: lora.magnitude for name, lora in pieces.items()}, projection),
        bias=_join(biases, projection),
    )
    rank = a.shape[0]
    rule = "A shared, B joined" if rank == first.rank else f"A stacked, B block-diagonal, rank {rank}"
    missing = [part.name for part in projection.slices if part.name not in pieces]
    rule += f"; zero rows for {', '.join(missing)}" if missing else ""
    return fused, rule + ("; differing scalings multiplied into B" if folded else "")


def _stack(pieces: Sequence[tuple[Tensor, int, Tensor]], out: int, share: bool) -> tuple[Tensor, Tensor]:
    """(A stacked, B block-diagonal) of pieces: the A of each, and the first row and the rows that it writes into B.

    With `share`, pieces with one and the same A have it once. All else in B is zero.
    """
    import torch

    factors: list[Tensor] = []
    places = []
    for a, _, _ in pieces:
        known = next((place for place, factor in enumerate(factors) if share and torch.equal(factor, a)), None)
        places.append(len(factors) if known is None else known)
        if known is None:
            factors.append(a)
    dtype = reduce(torch.promote_types, (tensor.dtype for a, _, rows in pieces for tensor in (a, rows)))
    ends = [0, *accumulate(a.shape[0] for a in factors)]
    b = torch.zeros(out, ends[-1], dtype=dtype)
    for place, (_, start, rows) in zip(places, pieces, strict=True):
        b[start : start + rows.shape[0], ends[place] : ends[place + 1]] = rows.to(dtype)
    return torch.cat([a.to(dtype) for a in factors]), b


def _times(tensor: Any, ratio: float) -> Any:
    """The tensor (None stays None) times a number: in its own type where that holds the products, else in float32."""
    import torch

    if tensor is None:
        return None
    product = tensor.double() * ratio
    made = product.to(tensor.dtype)
    return made if torch.equal(made.double(), product) else product.to(torch.promote_types(tensor.dtype, torch.float32))


def _join(vectors: Mapping[str, Tensor | None], projection: Projection) -> Tensor | None:
    """Vectors over the rows of slices as one over the rows of the whole; slices without one get zeros."""
    import torch

    given = {name: vector for name, vector in vectors.items() if vector is not None}
    if not given:
        return None
    dtype = reduce(torch.promote_types, (vector.dtype for vector in given.values()))
    whole = torch.zeros(projection.out_features, dtype=dtype)
    for part in projection.slices:
        if part.name in given:
            whole[part.start : part.stop] = given[part.name]
    return whole


def _cut(vector: Tensor | None, part: Any) -> Tensor | None:
    return None if vector is None else vector[part.start : part.stop].contiguous()


def _misshapen(lora: Lora, in_features: int, out_features: int) -> str:
    a, b = tuple(lora.a.shape), tuple(lora.b.shape)
    if len(a) == 2 and len(b) == 2 and a == (b[1], in_features) and b[0] == out_features:
        return ""
    return (
        f"{lora.module}: A {a} and B {b} do not fit the model's weight ({out_features}, {in_features}); expected "
        f"A (r, {in_features}) and B ({out_features}, r)"
    )


def _fused(module: str, layout: Sequence[Projection]) -> Projection | None:
    match = _LAYER.match(module)
    return next((p for p in layout if p.slices and match and match[2] == p.path), None)


def _owner(module: str, layout: Sequence[Projection]) -> Projection | None:
    """The fused projection that `module` names a slice of."""
    match = _LAYER.match(module)
    folder, _, name = match[2].rpartition(".") if match else ("", "", "")
    here = [projection for projection in layout if projection.path.rpartition(".")[0] == folder]
    return next((projection for projection in here if name in {part.name for part in projection.slices}), None)
