"""The sections of a recipe as frozen pydantic models: every key of ours, its type, its range, and what it means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from phi3_lora_plugin.error import Phi3LoraError

Text = Annotated[str, Field(min_length=1)]
OneOrMore = Text | Annotated[list[Text], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]

# `yes` and `off` are text to our reader; where a switch is wanted they mean what they have always meant in YAML.
_SWITCH = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}
Switch = Annotated[bool, BeforeValidator(lambda v: _SWITCH.get(v.lower(), v) if isinstance(v, str) else v)]

# PEFT's names for what this package calls by a shorter one; both are read in `lora:`.
PEFT_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "init_lora_weights": "init",
}
INITS = ("default", "gaussian", "pissa", "olora", "eva", "loftq", "orthogonal", "mica", "random")
INIT = rf"({'|'.join(INITS)}|pissa_niter_[1-9]\d*)"


class Conflicts(Phi3LoraError):
    """Settings of a section that contradict each other, as (key, message) pairs."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {message}" for key, message in found))
        self.found = found


class Section(BaseModel):
    """Strict (`"8"` is not a number, though 1 is a fine float), closed (unknown keys are errors) and frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for what is wrong between keys that are right one by one."""
        yield from ()

    @model_validator(mode="after")
    def _hold_together(self) -> Self:
        if found := list(self.conflicts()):
            raise Conflicts(found)
        return self


class ModelSection(Section):
    """The base model and how to load it."""

    path: Text
    """A local folder, a hub id such as microsoft/Phi-3-mini-4k-instruct, or `embedded:NAME` for one that ships here."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; quote it if it looks like a number."""
    loader: Text = "phi3"
    """Name of a registered model loader (`phi3-lora plugins` lists them)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights; auto: bfloat16 where the hardware computes in it, else float16; on a CPU float32, or
    the model's own 16 bits from 1B parameters on."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Attention implementation; auto is sdpa, and one that cannot run here gives way to it with a warning."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """nf4 is QLoRA's 4-bit type with double quantisation, int8 is LLM.int8(); both need the extra `qlora`."""
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"
    """Where to train: auto takes the accelerator if there is one; mps is an Apple GPU, xpu an Intel one."""


class MixtureSource(Section):
    """One source of a mixture, an entry of the list `data.path`; what it leaves out comes from the rest of `data`."""

    path: OneOrMore
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Share of the mixture, relative to the other sources; 1 where only others have one."""
    max_rows: Count | None = None
    """Rows to take at most, drawn by `seed`."""
    format: Text | None = None
    columns: dict[str, Text] | None = None
    ignore: list[Text] | None = None
    split: Text | None = None


class ChatSection(Section):
    """How rows become chats, and chats become labels."""

    format: Text = "auto"
    """messages, sharegpt, alpaca, prompt_completion, query_response, conversation, chatgpt, segments, text, glaive,
    xlam, bfcl, a plugin's name, or auto."""
    columns: dict[str, Text] = {}
    """The format's own names to the file's: `{prompt: question, completion: answer}`."""
    ignore: list[Text] = []
    """Columns, and keys of messages, to ignore although their names suggest that they decide what is trained."""
    train_on: Literal["assistant", "last_turn", "all"] = "assistant"
    """Which tokens carry loss."""
    system: Literal["error", "fold", "drop"] = "error"
    """What to do with a system message where the template has no place for one."""
    control_tokens: Literal["error", "escape", "keep"] = "error"
    """What to do with control tokens such as <|end|> in the text of a message; keep is for rows of plain text only."""
    tools: Literal["error", "text", "drop"] = "error"
    """What to do with tool messages where the template has no place for them."""
    tool_format: Literal["auto", "functools", "phi4-mini", "text"] = "auto"
    """How calls are written: functools[...], <|tool_call|>[...]<|/tool_call|>, JSON; auto: as the model card says."""
    thoughts: Literal["error", "train", "context", "drop"] = "error"
    """What to do with the assistant's thoughts before an answer; context: keep them in the row, but not trained."""
    template: Text | None = None
    """Name of a chat template; None: the tokenizer's own, recognised by what it renders."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with malformed rows; skip counts and lists them."""

    @property
    def rendering(self) -> dict[str, Any]:
        """How messages become text, in training and when asking: options of `chat.encode` and of `prompt_ids`."""
        names = ("system", "control_tokens", "template", "tools", "tool_format", "thoughts")
        return {name: getattr(self, name) for name in names}


class DataSection(ChatSection):
    """The rows, how they become chats, and how chats become tokens."""

    path: Text | Annotated[list[Text | dict[str, Any]], Field(min_length=1)] | None = None
    """File, files, glob, folder, hub id, or `embedded:NAME`; a preset leaves it to the command line. Mappings
    in a list (path, weight, max_rows, format, columns, ignore, split) are the sources of a mixture."""
    split: Text = "train"
    """Split to train on, for hub ids and saved datasets."""
    eval_path: OneOrMore | None = None
    """Rows to evaluate on."""
    eval_split: Text | None = None
    """Split to evaluate on, of `eval_path` or else of `path`."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)] = 0.0
    """Share of `path` to hold out for evaluation, chosen by `seed`."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Longest row in tokens; longer ones are cut and counted. None: the model's original context."""
    packing: Switch = False
    """Fill rows up to the longest length with several chats, each attending to itself only."""
    max_rows: Count | None = None
    """Train on this many rows at most, from the top."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Rows for evaluation come from one place; a mixture sets for each source what it takes from it."""
        entries = self.path if isinstance(self.path, list) else []
        wrong = [
            f"source {number}: {message}"
            for number, entry in enumerate(entries, 1)
            for message in (_wrong_source(entry) if isinstance(entry, dict) else ())
        ]
        if wrong:
            yield "path", "; ".join(wrong)
        if self.max_rows is not None and any(isinstance(entry, dict) for entry in entries):
            yield "max_rows", "has no effect on a mixture; write max_rows into its sources"
        if self.eval_fraction and (self.eval_path is not None or self.eval_split is not None):
            other = "eval_path" if self.eval_path is not None else "eval_split"
            yield "eval_fraction", f"set together with data.{other}; write data.eval_fraction: 0, or drop data.{other}"


def _wrong_source(entry: dict[str, Any]) -> list[str]:
    try:
        MixtureSource.model_validate(entry)
    except ValidationError as error:
        return list(dict.fromkeys(map(_wrong_key, error.errors())))
    return []


def _wrong_key(complaint: Any) -> str:
    name = str(complaint["loc"][0])
    if complaint["type"] == "extra_forbidden":
        return f"unknown key {name!r}; available: {', '.join(MixtureSource.model_fields)}"
    return f"{name}: {complaint['msg'].replace('Input should be', 'must be')}"


class LoraSection(Section):
    """The adapter, in loralib's words; PEFT's names for the same things are read too."""

    r: Count = 16
    """Rank."""
    alpha: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32
    """The update is multiplied by alpha / r (alpha / sqrt(r) with `rslora`)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)] = 0.0
    """Dropout before A, while training."""
    targets: OneOrMore = "all-linear"
    """all-linear, module names (fused or split), or one regular expression over full names."""
    exclude_modules: OneOrMore | None = None
    """Names, or one regular expression, that `targets` must not reach."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train too."""
    init: Annotated[Text, Field(pattern=rf"^{INIT}$")] = "default"
    """How A and B are initialised, by PEFT's `init_lora_weights` names."""
    dora: Switch = False
    """Train a magnitude for each output row as well (DoRA, arXiv 2402.09353)."""
    rslora: Switch = False
    """Scale by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] | None = None
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354)."""
    rank_pattern: dict[str, Count] = {}
    """Module name or regular expression to rank."""
    alpha_pattern: dict[str, Count | Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Module name or regular expression to alpha."""
    layers_to_transform: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = None
    """Adapt these decoder layers only, counted from 0."""
    modules_to_save: list[Text] | None = None
    """Modules to train and save whole."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Token ids whose embedding rows train."""
    ensure_weight_tying: Switch = False
    """Train tied embedding and head as one."""
    target_parameters: list[Text] | None = None
    """Parameters (not modules) to adapt, such as the experts of Phi-3.5-MoE."""
    loftq_config: dict[str, Any] | None = None
    """`{loftq_bits: 4, loftq_iter: 1}`, for init: loftq."""
    eva_config: dict[str, Any] | None = None
    """PEFT's EvaConfig fields, for init: eva."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """What PEFT would refuse later, or silently accept."""
        if self.loftq_config is not None and self.init != "loftq":
            yield "loftq_config", f"has no effect with lora.init: {self.init}; write lora.init: loftq"
        if self.eva_config is not None and self.init != "eva":
            yield "eva_config", f"has no effect with lora.init: {self.init}; write lora.init: eva"
        if self.target_parameters and self.dropout:
            yield "dropout", "must be 0 with lora.target_parameters: PEFT has no dropout on parameters"
        for name in ("targets", "exclude_modules"):
            pattern = getattr(self, name)
            if isinstance(pattern, str) and pattern != "all-linear":
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield name, f"{pattern!r} is not a regular expression ({error})"


#: Losses of TRL's DPOTrainer, which compare with a reference.
DPO_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down")


class PreferenceSection(Section):
    """Train on which answers are better, and not on answers alone."""

    loss: Literal["none", "sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "kto", "orpo", "simpo"] = "none"
    """none: rows are chats; kto: chats with a `label` (arXiv 2402.01306); else rows have `chosen` and `rejected`,
    compared by a loss of TRL's DPOTrainer, by orpo (arXiv 2403.07691) or simpo (arXiv 2405.14734)."""
    beta: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.1
    """How close to stay to the base, which is the reference; of orpo the weight of its odds ratio, of simpo the scale
    of its rewards."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5, allow_inf_nan=False)] = 0.0
    """Share of pairs whose order is assumed to be wrong, for the losses sigmoid, robust and simpo."""
    desirable_weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Weight of rows with `label: true`, for kto."""
    undesirable_weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Weight of rows with `label: false`, for kto."""
    gamma: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.5
    """Margin that the chosen answer's reward is to have, for simpo."""
    cpo_alpha: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Weight of the chosen answer's own loss, for simpo; 0 is SimPO as published, more is CPO-SimPO."""

    @property
    def on(self) -> bool:
        """Whether rows say which answers are better."""
        return self.loss != "none"

    @property
    def rows(self) -> Literal["chats", "pairs", "judged"]:
        """What rows are: chats to learn, two answers each, or one answer with a label."""
        return "judged" if self.loss == "kto" else "pairs" if self.on else "chats"

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the base model."""
        return self.loss == "kto" or self.loss in DPO_LOSSES

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """What the loss would not look at."""
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "simpo"):
            yield "label_smoothing", f"has no effect with preference.loss: {self.loss}"
        of = {"desirable_weight": "kto", "undesirable_weight": "kto", "gamma": "simpo", "cpo_alpha": "simpo"}
        for name, loss in of.items():
            if self.loss != loss and getattr(self, name) != type(self).model_fields[name].default:
                yield name, f"has no effect with preference.loss: {self.loss}; it is for {loss}"


Finite = Annotated[float, Field(allow_inf_nan=False)]
#: A reward: one that ships here, or a function by its dotted path.
REWARD = r"^(format|gsm8k|python:[A-Za-z_]\w*(\.[A-Za-z_]\w*)+)$"
Reward = Annotated[str, Field(min_length=1, json_schema_extra={"pattern": REWARD})]


class GrpoSection(Section):
    """How answers are drawn and compared in training by `reward`; names and defaults are those of TRL's GRPOConfig."""

    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt, which are compared with each other."""
    max_completion_length: Count = 256
    """Longest answer in tokens; a longer one is cut and gets the reward of what is there."""
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Of drawing answers; more is more varied."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw from the most likely tokens that together have this probability."""
    beta: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """How close to stay to the base; at 0 no reference is computed."""
    epsilon: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.2
    """How far the ratio of probabilities may go before it is clipped."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How the tokens of answers of different lengths are averaged."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What a reward's distance from the mean is divided by: the deviation in its group, in its batch, or nothing."""
    mask_truncated_completions: Switch = False
    """Learn nothing from answers that were cut."""


class CheckpointSection(Section):
    """Which LoRA-only checkpoints are written and which are kept."""

    every_steps: Count | None = None
    """Save every this many steps; None: at the end, and at each evaluation."""
    keep_last: Count = 2
    """Newest ones to keep; never fewer than one good one."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Best ones to keep, by evaluation loss."""
    keep_every: Count | None = None
    """Keep for good each checkpoint whose step is a multiple of this."""
    format: Literal["peft", "loralib", "both"] = "peft"
    """peft: a folder that PEFT loads; loralib: one file with only `lora_` keys and its sidecar."""
    background: Switch = False
    """Write on a thread while training continues."""


class Deviation(Section):
    """One value that is not as published, and why."""

    key: Text
    published: Any
    ours: Any
    why: Text


class AboutSection(Section):
    """A preset's description, for `phi3-lora recipes`; it is not inherited and changes no run."""

    group: Text | None = None
    """Heading under which `phi3-lora recipes` lists it."""
    method: Text | None = None
    """LoRA, QLoRA, ..."""
    memory: Text | None = None
    """GPU memory that it is meant for."""
    needs: list[Text] = []
    """What has to be installed or given."""
    source: Text | None = None
    """Where its numbers come from."""
    deviations: list[Deviation] = []
    """Every value that differs from the published one."""
