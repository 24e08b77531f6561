"""The chat templates of the family in Go's text/template, as Ollama runs them, and a renderer for them without Go.

Ollama renders a chat by one Go template, which gets `.Messages` (each with `.Role`, `.Content` and `.ToolCalls`),
`.System` (all system messages, joined by a blank line) and `.Tools`. The files in `go_templates/` are the twins of the
Jinja templates in `chat/templates/`. The renderer here knows the part of the language that those files use; tests hold
it to Go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from phi3_lora_plugin.chat.templates import Template
from phi3_lora_plugin.chat.tool_formats import AUTO, ToolFormat
from phi3_lora_plugin.error import Phi3LoraError

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|:=|=|[()]|\$?\w*(?:\.\w+)+|\$\w*|\.|\w+')


class GoTemplateError(Phi3LoraError):
    """A chat template without a twin in Go, or a Go template outside the part of the language that is known here."""


def go_template(
    template: Template, tokens: Mapping[str, Any], system: str = "error", calls: ToolFormat | None = None
) -> str:
    """The Go twin of one of the family's templates.

    Args:
        tokens: `bos_token` and `eos_token` of the tokenizer, which some templates write.
        system: what training did with system messages that the template has no place for; `fold` puts them into the
            first user turn here too.
        calls: how training wrote tool calls, for a model that makes them. Ollama writes the arguments without blanks
            and in the order of their names, and `<` by its JSON escape.

    Raises:
        GoTemplateError: the template has no twin.
    """
    base = template.name.removesuffix(" with a preamble")
    name = f"{base}.fold.tmpl" if system == "fold" and not template.system else f"{base}.tmpl"
    file = files("phi3_lora_plugin.export").joinpath("go_templates", name)
    if not file.is_file():
        raise GoTemplateError(f"chat template {template.name} has no twin in Go's template language")
    text = file.read_text(encoding="utf-8").rstrip("\n")
    if calls is not None and not calls.alone and base in AUTO:
        text = text.replace("{{- .Content -}}", "{{- .Content -}}" + _calls_in(calls))
    for token in ("bos_token", "eos_token"):
        text = text.replace(f'"{token}', f'"{json.dumps(tokens.get(token) or "")[1:-1]}')
    if template.preamble:
        text = f"{{{{- {json.dumps(template.preamble, ensure_ascii=False)} -}}}}{text}"
    return text


def _calls_in(how: ToolFormat) -> str:
    file = files("phi3_lora_plugin.export").joinpath("go_templates", "tool_calls.tmpl")
    text = file.read_text(encoding="utf-8").rstrip("\n")
    item, key = how.separators
    for name, value in {"gap": how.gap, "before": how.before, "after": how.after, "item": item, "key": key}.items():
        text = text.replace(f"@{name}", json.dumps(value)[1:-1])
    return text


def render_go(template: str, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
    """What Go's text/template makes of one of this room's templates, given Ollama's data.

    Raises:
        GoTemplateError: a construct that none of them uses.
    """
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [
        {
            "Role": message["role"],
            "Content": message["content"],
            "ToolCalls": [
                {"Function": {"Name": call["function"]["name"], "Arguments": call["function"]["arguments"]}}
                for call in message.get("tool_calls", ())
            ],
        }
        for message in messages
    ]
    root = {"Messages": turns, "System": system, "Tools": tools}
    nodes, rest = _parse(list(_pieces(template)))
    if rest:
        raise GoTemplateError(f"{{{{{rest[0]}}}}} without its beginning")
    out: list[str] = []
    _run(nodes, root, {"$": root}, out)
    return "".join(out)


@dataclass(frozen=True)
class _Block:
    """`if` with its alternatives, or `range`: (condition, nodes) pairs; a condition of None is `else`."""

    kind: str
    branches: tuple[tuple[str | None, tuple[Any, ...]], ...]


def _pieces(template: str) -> Iterator[str | tuple[str, str]]:
    """Actions as ("action", code), text as it is, white space next to `-` markers removed."""
    place, trim = 0, False
    for match in re.finditer(r"\{\{(-\s)?(.*?)(\s-)?\}\}", template, re.DOTALL):
        text = template[place : match.start()]
        text = text.lstrip() if trim else text
        text = text.rstrip() if match[1] else text
        if text:
            yield text
        if not match[2].strip().startswith("/*"):
            yield ("action", match[2].strip())
        place, trim = match.end(), bool(match[3])
    tail = template[place:]
    if tail := tail.lstrip() if trim else tail:
        yield tail


def _parse(pieces: list[Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """(nodes up to an unmatched `end` or `else`, the rest that begins with it)."""
    nodes: list[Any] = []
    while pieces:
        piece = pieces[0]
        word, _, argument = piece[1].partition(" ") if isinstance(piece, tuple) else ("", "", "")
        if word in ("end", "else"):
            break
        pieces = pieces[1:]
        if word not in ("if", "range"):
            nodes.append(piece)
            continue
        branches: list[tuple[str | None, tuple[Any, ...]]] = []
        condition: str | None = argument
        while True:
            inner, pieces = _parse(pieces)
            branches.append((condition, inner))
            if not pieces:
                raise GoTemplateError(f"{{{{{word} {argument}}}}} without its end")
            closing, pieces = pieces[0][1], pieces[1:]
            if closing == "end":
                break
            condition = closing.removeprefix("else").strip().removeprefix("if").strip() or None
        nodes.append(_Block(word, tuple(branches)))
    return tuple(nodes), pieces


def _run(nodes: Sequence[Any], dot: Any, variables: dict[str, Any], out: list[str]) -> None:
    for node in nodes:
        if isinstance(node, str):
            out.append(node)
        elif isinstance(node, tuple):
            if assigned := re.match(r"(\$\w+) :?= (.+)", node[1]):
                variables[assigned[1]] = _value(assigned[2], dot, variables)
            else:
                out.append(str(_value(node[1], dot, variables)))
        elif node.kind == "range":
            ((items, inner),) = node.branches
            named = re.match(r"(\$\w+), (\$\w+) := (.+)", str(items))
            for number, item in enumerate(_value(named[3] if named else items, dot, variables) or ()):
                own = variables | {named[1]: number, named[2]: item} if named else variables
                _run(inner, item, own, out)
        else:
            for condition, inner in node.branches:
                if condition is None or _value(condition, dot, variables):
                    _run(inner, dot, variables, out)
                    break


def _value(code: str, dot: Any, variables: Mapping[str, Any]) -> Any:
    tokens = _TOKEN.findall(code)
    if "".join(tokens) != re.sub(r'("(?:[^"\\]|\\.)*")|\s+', lambda match: match[1] or "", code):
        raise GoTemplateError(f"{{{{{code}}}}} is not understood here")
    value, rest = _call(tokens, dot, variables)
    if rest:
        raise GoTemplateError(f"{{{{{code}}}}}: {rest[0]!r} is not understood here")
    return value


def _call(tokens: list[str], dot: Any, variables: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """One term, or a function with every argument up to the end or the closing bracket."""
    name, arguments, rest = tokens[0], [], tokens
    function = _FUNCTIONS.get(name)
    if function:
        rest = tokens[1:]
    while rest and rest[0] != ")":
        value, rest = _term(rest, dot, variables)
        arguments.append(value)
        if not function:
            return value, rest
    return (function(*arguments) if function else None), rest


def _term(tokens: list[str], dot: Any, variables: Mapping[str, Any]) -> tuple[Any, list[str]]:
    token, rest = tokens[0], tokens[1:]
    if token == "(":
        value, rest = _call(rest, dot, variables)
        return value, rest[1:]
    if token.startswith('"'):
        return json.loads(token), rest
    if token in ("true", "false"):
        return token == "true", rest
    start, *fields = token.split(".")
    if start.startswith("$") or token.startswith("."):
        value = variables[start] if start else dot
        for field in filter(None, fields):
            value = value[field]
        return value, rest
    raise GoTemplateError(f"{token!r} is not understood here")


_FUNCTIONS: Mapping[str, Any] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
    "json": lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
}
