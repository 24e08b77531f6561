"""The published chat templates with marked turns, recognised by what a tokenizer's own template renders.

The files next to this one carry two kinds of marks: `{% generation %}` around what the assistant says, as transformers
and TRL understand it, and `{# turn #}` ... `{# end #}` around what the others say, comments to everybody else.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from phi3_lora_plugin.chat import template_process
from phi3_lora_plugin.chat.tool_formats import AUTO, ToolFormat
from phi3_lora_plugin.error import Phi3LoraError

Span = tuple[int, int]


class TemplateError(Phi3LoraError):
    """A chat template that is unknown, missing or refused; says which there are and how to choose one."""


@dataclass(frozen=True)
class Template:
    """One chat template.

    Attributes:
        name: as `data.template` takes it.
        stop: the token that ends an assistant turn; None: the tokenizer's eos token.
        system: whether it has a place for a system message.
        empty_system: whether an empty system message is rendered at all.
        system_first: whether system messages come before all others, wherever they stand.
        tools: whether it has a place for tool messages and declared tools.
        refused: why models with this template cannot be trained, if so.
        preamble: text that every conversation begins with, such as the instructions of Phi-4-reasoning.
    """

    name: str
    stop: str | None = "<|end|>"
    system: bool = True
    empty_system: bool = True
    system_first: bool = False
    tools: bool = False
    refused: str | None = None
    preamble: str = ""

    @property
    def text(self) -> str:
        """Jinja text that renders as the published one and marks what the assistant says (for TRL as well)."""
        if not self.preamble:
            return _read(self.name)
        literal = self.preamble.encode("unicode_escape").decode("ascii").replace("'", r"\'")
        return f"{{{{- '{literal}' -}}}}{_read(self.name.removesuffix(_BEHIND))}"

    @property
    def turns(self) -> str:
        """The same with every turn marked, whoever speaks."""
        marked = re.sub(r"\{#- turn -#\}", "{%- generation -%}", self.text)
        return re.sub(r"\{#- end -#\}", "{%- endgeneration -%}", marked)


_BEHIND = " with a preamble"
_REMOTE = "Phi-3-{} runs only through remote code, which is never executed here"
TEMPLATES = {
    template.name: template
    for template in (
        Template("phi-3-mini-4k"),
        Template("phi-3.5-mini", empty_system=False),
        Template("phi-3-mini-128k-apr2024", system=False),
        Template("phi-3-medium", system=False),
        Template("phi-4", stop="<|im_end|>"),
        Template("phi-4-dec2024", stop="<|im_end|>"),
        Template("phi-4-mini", tools=True),
        Template("phi-4-mini-reasoning", tools=True, system_first=True),
        Template("plain", stop=None),
        Template("phi-3-small", refused=_REMOTE.format("small")),
        Template("phi-3-vision", refused=_REMOTE.format("vision")),
    )
}

# Conversations on which any two of the templates above differ, and which show what an edit of one would change.
_PROBES: tuple[tuple[tuple[str, ...], ...], ...] = (  # (role, content) or (role, content, tools)
    (("user", "u"),),
    (("user", " u \n"), ("assistant", "\n a ")),
    (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")),
    (("system", ""), ("user", ""), ("assistant", "")),
    (("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")),
    (("user", "u"), ("system", "s"), ("assistant", "a")),
    (("user", "u"), ("assistant", "a"), ("tool", "t"), ("assistant", "b")),
    (("system", "s", "[t]"), ("user", "u"), ("assistant", "a")),
    (("assistant", "a"), ("user", "u"), ("assistant", "b"), ("user", "v"), ("assistant", "c"), ("user", "w")),
)

_OUT_OF_BOUNDS = (
    f"the tokenizer's chat template takes more than {template_process.SECONDS} s or "
    f"{template_process.MEMORY // 1024**3} GiB for a chat of a few words; set data.template to a known one"
)
# Of the published ones, byte by byte: these are known to be safe.
_PUBLISHED = frozenset(
    {
        "dcaee66df77bfbb789ec541fe713218da30225a526f1db97138fc39ee6dc56aa",  # Phi-3-mini-4k and -128k
        "268b6082ceb7176dc6ed80557a2f7837f9f0339592fbee677d405a553af15f88",  # Phi-3-mini-128k of April 2024
        "605841622bcb6572225608f09ec2afcdfb9fb50844ef52715a12689f7b9278b1",  # Phi-3-medium
        "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90",  # Phi-3.5-mini
        "fe4120415a3858b873955c92ce3a103a95bc97c2cb00b72e62659aaf0f891ee5",  # Phi-4
        "febf589225c9728ab791f52e8897d7607a823d45368f0a4c92fa68997b40cce9",  # Phi-4-mini
        "cbb504cb43fec3f8877d709d9f7a729441e56f41cb4fddd382675fab35de7fe1",  # Phi-4-mini-reasoning
    }
)
_LONGEST = 200_000  # characters of a template; the published ones have hundreds
_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}


def template_for(tokenizer: Any, name: str | None = None) -> Template:
    """The template of a tokenizer, recognised by its renders, or the one that `name` says.

    A tokenizer without a template and without Phi-3's role tokens gets `plain`: roles as text. Nothing can keep a user
    from writing such roles; a base model that was never taught role tokens has no others.

    Raises:
        TemplateError: unknown, refused, or none where there should be one.
    """
    if name is not None:
        if name not in TEMPLATES:
            raise TemplateError(f"data.template: {name!r} is not one of {', '.join(_usable())}")
        found = TEMPLATES[name]
    elif tokenizer.chat_template is None:
        vocabulary = tokenizer.get_added_vocab()
        if "<|end|>" in vocabulary or "<|im_end|>" in vocabulary:
            raise TemplateError(
                "the tokenizer has Phi-3's role tokens but no chat template; "
                f"set data.template to the one that its model was trained with, of {', '.join(_usable())}"
            )
        found = TEMPLATES["plain"]
    else:
        found = _recognise(_text(tokenizer.chat_template))
    if found.refused:
        raise TemplateError(f"template {found.name}: {found.refused}")
    stop = found.stop or tokenizer.eos_token
    if stop is None or tokenizer.convert_tokens_to_ids(stop) in (None, tokenizer.unk_token_id):
        raise TemplateError(
            f"template {found.name} ends a turn with {stop}, which the tokenizer does not have as a token"
        )
    return found


def serving_text(template: Template, how: ToolFormat) -> str:
    """Jinja text for servers: renders as the published template, without the marks for training.

    Where the model is one for tools, also their declarations, given separately from the messages, and the calls of
    earlier turns, in the form of `data.tool_format`: byte for byte what a row of the training has.
    """
    if template.name not in AUTO or how.alone:
        return re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template.text)
    item, key = how.separators
    parts = {"before": how.before, "after": how.after, "gap": how.gap, "item": item, "key": key}
    settings = "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in parts.items())
    return f"{settings}{_read(f'{template.name}.serving')}"


def template_fingerprint(tokenizer: Any) -> str:
    """sha256 of what the tokenizer's template renders for fixed conversations; of nothing where it has none."""
    rendered = _renders(_text(tokenizer.chat_template)) if tokenizer.chat_template else ()
    return hashlib.sha256("\0".join(rendered).encode()).hexdigest()


def render(
    template_text: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    tokens: Mapping[str, Any],
    add_generation_prompt: bool = False,
    marked: bool = False,
) -> tuple[list[str], list[list[Span]]]:
    """Texts of conversations and, if `marked`, the character ranges between the marks, by transformers' own sandbox.

    Args:
        tokens: `bos_token`, `eos_token` and others that templates name.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[list(map(dict, conversation)) for conversation in conversations],
        chat_template=template_text,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=add_generation_prompt,
        **tokens,
    )
    return list(texts), [[tuple(span) for span in one] for one in spans] if marked else []


def _usable() -> list[str]:
    return [template.name for template in TEMPLATES.values() if not template.refused]


def _text(chat_template: Any) -> str:
    """One template of a tokenizer that may have several by name."""
    return str(chat_template["default"] if isinstance(chat_template, dict) else chat_template)


@cache
def _read(name: str) -> str:
    file = files("phi3_lora_plugin.chat").joinpath("templates", f"{name}.jinja")
    return file.read_text(encoding="utf-8").rstrip("\n")


@lru_cache(maxsize=256)
def _recognise(text: str) -> Template:
    wanted = _renders(text)
    for template in TEMPLATES.values():
        if _renders(template.text) == wanted:
            return template
    if (found := _behind_preamble(wanted)) is not None:
        return found
    alike = {
        name: sum(mine == theirs for mine, theirs in zip(_renders(template.text), wanted, strict=True))
        for name, template in TEMPLATES.items()
        if not template.refused
    }
    nearest = max(alike, key=lambda name: alike[name])
    raise TemplateError(
        f"the tokenizer's chat template renders like none that is known; {nearest} is nearest, with {alike[nearest]} "
        f"of {len(wanted)} probes equal. A mask cannot be proved for it. If the model was trained with one of "
        f"{', '.join(_usable())}, set data.template={nearest}"
    )


def _behind_preamble(wanted: Sequence[str]) -> Template | None:
    """A known template with one and the same text before each conversation, as Phi-4-reasoning's is Phi-4's.

    Where a system message is rendered in any other way than by the known template, it counts as one without a place.
    """
    heard = [any(turn[0] == "system" for turn in probe) for probe in _PROBES for _ in range(2)]  # by probe and prompt
    for template in TEMPLATES.values():
        ours = _renders(template.text)
        preamble = wanted[0].removesuffix(ours[0])
        if template.refused or template.stop is None or not preamble or preamble == wanted[0]:
            continue
        if any(token in preamble for token in _TOKENS.values()):
            continue  # not one text: it differs with the tokenizer
        equal = [theirs == preamble + mine for theirs, mine in zip(wanted, ours, strict=True)]
        if all(same for same, system in zip(equal, heard, strict=True) if not system):
            name = template.name + _BEHIND
            return replace(template, name=name, preamble=preamble, system=template.system and all(equal))
    return None


@lru_cache(maxsize=256)
def _renders(text: str) -> tuple[str, ...]:
    """What a template makes of the probes; an error of its own is an answer too.

    Templates are programs: those of strangers run in a process with bounds on its time and memory.

    Raises:
        TemplateError: a stranger's that does not keep to them.
    """
    probes = [[dict(zip(("role", "content", "tools"), turn, strict=False)) for turn in probe] for probe in _PROBES]
    ours = text in {template.text for template in TEMPLATES.values()}
    if sys.executable and not ours and hashlib.sha256(text.encode()).hexdigest() not in _PUBLISHED:
        return _renders_apart(text, probes)
    made = []
    for messages in probes:
        for prompt in (False, True):
            try:
                (got,), _ = render(text, [messages], _TOKENS, prompt)
            except Exception as error:
                got = f"error {type(error).__name__}"
            made.append(got)
    return tuple(made)


def _renders_apart(text: str, probes: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[str, ...]:
    if len(text) > _LONGEST:
        raise TemplateError(
            f"the tokenizer's chat template has {len(text):,} characters; at most {_LONGEST:,} are read"
        )
    asked = json.dumps({"template": text, "conversations": probes, "tokens": _TOKENS})
    command = [sys.executable, "-P", template_process.__file__]
    try:
        done = subprocess.run(
            command, input=asked, capture_output=True, text=True, encoding="utf-8", timeout=3 * template_process.SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TemplateError(_OUT_OF_BOUNDS) from None
    if done.returncode > 0 and "MemoryError" not in done.stderr:
        why = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise TemplateError(f"the tokenizer's chat template could not be rendered in a process of its own: {why}")
    made = json.loads(done.stdout) if done.returncode == 0 else ["error MemoryError"]
    if any(one in ("error MemoryError", "error TooLong") for one in made):
        raise TemplateError(_OUT_OF_BOUNDS)
    return tuple(made)
