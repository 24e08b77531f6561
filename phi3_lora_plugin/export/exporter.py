"""What an exporter gets and gives: the contract of `register_exporters`, for the built-in targets and for others.

An exporter is a function `export(adapted, wanted, folder) -> Shipped`. It writes a folder that a runtime loads, and
says how to open that runtime, so that the command can prove that the same prompts give the same words there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.seams import is_installed


class ExportError(Phi3LoraError):
    """An export that cannot be done as asked, with every reason; nothing was written."""


class Runtime(Protocol):
    """A model loaded by the program that will serve it."""

    #: What `next_scores` gives: "logits", "log-probabilities" where the runtime has nothing else, or "" for nothing.
    measure: str

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a chat that ends with the user, by the runtime's own template and tokenizer."""

    def next_scores(self, ids: Sequence[int]) -> Any:
        """Scores [vocabulary] of the next token after `ids`, as a numpy array; None where `measure` is empty."""

    def answer(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy ids after a prompt, the stop token included."""

    def log_probabilities(self, ids: Sequence[int], first: int) -> tuple[list[float], list[bool]]:
        """For each of `ids[first:]`: its log-probability after all before it, and whether it was the likeliest."""


@dataclass(frozen=True)
class Variant:
    """One model that an export ships.

    Attributes:
        name: as people know it, such as `float32` or `q4_k_m`.
        open: loads it in its runtime, for as long as the context lasts.
        exact: it must give the same words as the adapter; otherwise the difference is measured and shown.
    """

    name: str
    open: Callable[[], AbstractContextManager[Runtime]]
    exact: bool = True


@dataclass(frozen=True)
class Shipped:
    """What an exporter wrote.

    Attributes:
        commands: lines that run it; `{out}` stands for the folder's final name.
        variants: what to compare with the adapter.
        notes: what else a person should know, above all where the runtime differs from training.
        unproven: why nothing is compared, where `variants` is empty.
        after: called with the folder once it is proved and has its name; what it returns is reported.
    """

    commands: tuple[str, ...]
    variants: tuple[Variant, ...] = ()
    notes: tuple[str, ...] = ()
    unproven: str = ""
    after: Callable[[Path], str] | None = None


@dataclass(frozen=True)
class Wanted:
    """What was asked for on the command line; a target refuses what it does not have.

    Attributes:
        merged: ship the merged model (True), the adapter (False), or what the target prefers (None).
        quantize: names of quantised forms, as the target calls them.
        dtype: of unquantised weights; `auto` is the target's choice.
        context: tokens that the runtime is to be set up for; None is the model's own length.
        system: a system message to ship with the model; None is the one that training had in every row.
        push: the hub repository to push to.
        prove: whether variants will be opened, so whether the runtime has to be there.
        progress: called with a sentence at the start of each long step.
    """

    merged: bool | None = None
    quantize: tuple[str, ...] = ()
    dtype: str = "auto"
    context: int | None = None
    system: str | None = None
    push: str | None = None
    prove: bool = True
    progress: Callable[[str], None] = field(default=lambda text: None)


class Exporter(Protocol):
    """An export target: writes `folder`, which exists and is empty, and says how to run it."""

    def __call__(self, adapted: Any, wanted: Wanted, folder: Path) -> Shipped: ...


def require(extra: str, *modules: str, what: str) -> None:
    """Refuse where a module is missing, with the pip command that brings it.

    Raises:
        ExportError: at least one of `modules` is not installed.
    """
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        raise ExportError(
            f'{what} needs {", ".join(missing)}, not installed here: pip install "phi3-lora-plugin[{extra}]"'
        )


def refuse(target: str, wanted: Wanted, kind: Any = None, **allowed: Any) -> None:
    """Refuse models and options that a target does not have.

    Args:
        kind: the base's `model_type`.
        allowed: `kinds`: of models; `quantize`, `dtypes`: the names that it knows; `one`: why it takes one quantised
            form only; `forms`: of True (merged) and False (adapter); `push`: whether it pushes.

    Raises:
        ExportError: every option that is not allowed.
    """
    problems = []
    if "kinds" in allowed and kind not in allowed["kinds"]:
        problems.append(f"model_type {kind!r} is not exported; expected {' or '.join(allowed['kinds'])}")
    if "one" in allowed and len(wanted.quantize) > 1:
        problems.append(f"{allowed['one']}; pass one form to --quantize")
    known = allowed.get("quantize", ())
    if odd := [name for name in wanted.quantize if name not in known]:
        problems.append(f"--quantize {', '.join(odd)}: available: {', '.join(known) or 'none'}")
    dtypes = ("auto", *allowed.get("dtypes", ()))
    if wanted.dtype not in dtypes:
        problems.append(f"--dtype {wanted.dtype}: available: {', '.join(dtypes)}")
    if wanted.merged is not None and wanted.merged not in allowed.get("forms", (True, False)):
        problems.append("--merged: this target ships the adapter" if wanted.merged else "--adapter: not available")
    if wanted.push and not allowed.get("push"):
        problems.append("--push: only the hub target pushes")
    if problems:
        raise ExportError("\n".join(f"{target}: {problem}" for problem in problems))
