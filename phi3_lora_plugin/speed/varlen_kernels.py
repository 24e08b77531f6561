"""Kernels that attend within all documents of a row in one call: which are there, and which are proved right here.

torch has `varlen_attn` from 2.10 on, with other arguments in each version: 2.10 takes no scale and no window, 2.11
no `enable_gqa` (its kernel shares keys by itself). `flash_attn` has `flash_attn_varlen_func`. A kernel is used only
where it has given, with gradients, what one SDPA call a document gives, for this model on this card. That is tried
when documents are fused, never inside a training step: tensors saved there would land in an activation checkpoint.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.speed.sdpa import repeated
from phi3_lora_plugin.wording import named_line

#: What the kernels take: both formats of 16 bits. Others have no such kernel.
DTYPES = (torch.bfloat16, torch.float16)

# Of the documents that kernels are tried on, in tokens: one token, and ends inside and across the tiles of kernels.
_TRIED = (0, 1, 24, 200, 331)
_WINDOW = 70
_LARGEST_ERROR = 0.02  # of the norm; 16 bits give 0.002 to 0.01, a window off by one token 0.1


@dataclass(frozen=True)
class Kernel:
    """One way to call one library; `takes` are the arguments that its installed version knows."""

    library: str
    takes: frozenset[str]
    repeat: bool = False
    """Whether keys and values are repeated for each query head first, because the kernel does not share them."""

    def __str__(self) -> str:
        return _TITLES[self.library] + (" on repeated keys and values" if self.repeat else "")

    def obstacle(self, window: bool, scaling: float, head_size: int) -> str | None:
        """Why its arguments cannot express what is wanted; None if they can."""
        scale, windowed = ("scale", "window_size") if self.library == "torch" else ("softmax_scale", "window_size")
        if window and windowed not in self.takes:
            return "takes no window"
        if scale not in self.takes and abs(scaling * head_size**0.5 - 1) > 1e-6:
            return f"scales by the head size alone, and {scaling:g} is wanted"
        return None

    def __call__(
        self, query: Any, key: Any, value: Any, limits: Any, longest: int, scaling: float | None, window: int | None
    ) -> Any:
        """query [1, heads, tokens, size], key and value with as many or fewer heads -> [1, tokens, heads, size].

        Args:
            limits: int32 [documents + 1], on the device of the query.
            longest: tokens of the longest document.
            window: how many last tokens a token sees, itself included.
        """
        shared = query.shape[1] != key.shape[1]
        if self.repeat and shared:
            key, value = (repeated(part, query.shape[1]) for part in (key, value))
            shared = False
        # No `.contiguous()`: kernels take any strides as long as the last dimension is dense. Not `part[0]`, whose
        # gradient is written into zeros of the whole shape.
        rows = [part.squeeze(0).transpose(0, 1) for part in (query, key, value)]
        sees = (-1 if window is None else window - 1, 0)
        if self.library == "torch":
            options: dict[str, Any] = {"scale": scaling, "window_size": sees, "enable_gqa": shared, "is_causal": True}
        else:
            options = {"softmax_scale": scaling, "window_size": sees, "causal": True}
        options = {name: option for name, option in options.items() if name in self.takes}
        out = _function(self.library)(*rows, limits, limits, longest, longest, **options)
        return out[None]


@dataclass(frozen=True)
class Kernels:
    """What was proved for one model: (device, dtype, whether the window cuts documents) -> kernel, or why none.

    What is not in it attends with one SDPA call a document.
    """

    proved: dict[tuple[str, torch.dtype, bool], Kernel] = field(default_factory=dict)
    refused: dict[tuple[str, torch.dtype, bool], str] = field(default_factory=dict)

    def kernel_for(self, query: torch.Tensor, windowed: bool) -> Kernel | None:
        """The kernel for these queries, if one was proved."""
        return self.proved.get((str(query.device), query.dtype, windowed))

    def __str__(self) -> str:
        """Which attention runs, and why not a better one."""
        if not self.proved and not self.refused:
            return "one SDPA call a document: no GPU"
        said: dict[str, list[tuple[str, torch.dtype, bool]]] = {}
        for case, kernel in self.proved.items():
            said.setdefault(str(kernel), []).append(case)
        for case, reason in self.refused.items():
            said.setdefault(f"one SDPA call a document: {reason}", []).append(case)
        every = [*self.proved, *self.refused]
        return "; ".join(f"{_where(cases, every)}{what}" for what, cases in said.items())


def prove(
    devices: Iterable[torch.device], heads: int, key_heads: int, head_size: int, scaling: float, window: int | None
) -> Kernels:
    """Try each kernel that is installed on each of these devices, in both formats of 16 bits; see `Kernels`."""
    made = Kernels()
    devices = list(devices)
    if not devices:
        return made
    kernels, missing = _installed(shared=heads != key_heads)
    for device in devices:
        for dtype in DTYPES:
            for windowed in (False, True) if window is not None else (False,):
                case = (str(device), dtype, windowed)
                reasons = list(missing)
                for kernel in kernels:
                    reason = kernel.obstacle(windowed, scaling, head_size)
                    reason = reason or _fault(kernel, device, dtype, heads, key_heads, head_size, scaling, windowed)
                    if reason is None:
                        made.proved[case] = kernel
                        break
                    reasons.append(f"{kernel} {reason}")
                else:
                    made.refused[case] = ", ".join(reasons)
    return made


def _installed(shared: bool) -> tuple[list[Kernel], list[str]]:
    """(kernels, best first; what is missing)."""
    kernels, missing = [], []
    for library in _LIBRARIES:
        try:
            takes = frozenset(inspect.signature(_function(library)).parameters)
        except ImportError:
            missing.append(f"no {_TITLES[library]}" if library == "torch" else f"{library} is not installed")
            continue
        except Exception as error:  # a flash_attn built for another torch fails in many ways
            missing.append(f"{_TITLES[library]} cannot be imported ({named_line(error)})")
            continue
        kernels += [Kernel(library, takes, repeat) for repeat in ((False, True) if shared else (False,))]
    return kernels, missing


def _fault(
    kernel: Kernel, device: Any, dtype: Any, heads: int, key_heads: int, head_size: int, scaling: float, windowed: bool
) -> str | None:
    """What is wrong with this kernel here; None if it gives what one call a document gives, gradients included."""
    from phi3_lora_plugin.speed.sdpa import one_by_one

    try:
        with ExitStack() as stack:
            # Whoever calls may train under autocast, infer, checkpoint or trace; none of that is for this.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
            bounds, window = _TRIED, (_WINDOW if windowed else None)
            limits = torch.tensor(bounds, dtype=torch.int32, device=device)
            longest = max(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))
            draw = torch.Generator(device).manual_seed(0)
            shapes = [(1, count, bounds[-1], head_size) for count in (heads, key_heads, key_heads)]
            inputs = [torch.randn(shape, generator=draw, device=device, dtype=dtype) for shape in shapes]
            ahead = torch.randn((1, bounds[-1], heads, head_size), generator=draw, device=device, dtype=dtype)

            def with_gradients(call: Callable[..., Any], exact: bool) -> list[Any]:
                parts = [(part.float() if exact else part.clone()).requires_grad_() for part in inputs]
                # values as the layers have them: a slice of the fused projection, with strides of its own
                value = torch.cat([parts[2].transpose(1, 2)] * 2, dim=-1)[..., :head_size].transpose(1, 2)
                out = call(parts[0], parts[1], value)
                return [out, *torch.autograd.grad(out, parts, ahead.to(out.dtype))]

            got = with_gradients(lambda q, k, v: kernel(q, k, v, limits, longest, scaling, window), False)
            want = with_gradients(lambda q, k, v: one_by_one(q, k, v, bounds, scaling, 0.0, window), True)
            for name, mine, exact in zip(("output", "dQ", "dK", "dV"), got, want, strict=True):
                error = ((mine.float() - exact).norm() / exact.norm()).item()
                if not error <= _LARGEST_ERROR:  # NaN is not
                    return f"gives a wrong {name} here (off by {error:.1%})"
    except Exception as error:
        # Whatever a kernel raises, and libraries raise many kinds, there is another way.
        return f"does not run here ({named_line(error)})"
    return None


def _same(tensor: Any) -> Any:
    return tensor


def _where(cases: list[tuple[str, torch.dtype, bool]], every: list[tuple[str, torch.dtype, bool]]) -> str:
    """In which of all cases something holds: nothing for all of them, else `in float16 over the window: `."""
    if len(cases) == len(every):
        return ""
    parts = []
    for place, shown in ((0, "on {}"), (1, "in {}"), (2, "{}")):
        mine, all_ = {case[place] for case in cases}, {case[place] for case in every}
        if mine != all_:
            names = sorted(_WINDOWED.get(str(each), str(each).removeprefix("torch.")) for each in mine)
            parts.append(shown.format(", ".join(names)))
    return f"{' '.join(parts)} " if parts else ""


_WINDOWED = {"False": "within the window", "True": "over the window"}


def _torch() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _flash_attn() -> Any:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func


#: Best first.
_LIBRARIES: dict[str, Callable[[], Any]] = {"torch": _torch, "flash_attn": _flash_attn}
_TITLES = {
    "torch": f"varlen_attn in torch {torch.__version__.partition('+')[0]}",
    "flash_attn": "flash_attn_varlen_func of flash_attn",
}


def _function(library: str) -> Any:
    return _LIBRARIES[library]()
