"""Read YAML as people mean it: line numbers for every key, no tags, no surprises of YAML 1.1, every problem at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from phi3_lora_plugin.wording import shorten

Key = tuple[str, ...]

# A recipe is a page of text; beyond these it is the wrong file, or one that was written to exhaust the reader.
MAX_BYTES = 1_000_000
MAX_NODES = 2_000
MAX_DEPTH = 30


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe: `where` is `file:line`, `override a.b=c`, or a file name alone."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


@dataclass
class Layer:
    """One file or one override: data, the origin (`file:line`) of each key, what is wrong with it, what was changed."""

    data: dict[str, Any] = field(default_factory=dict)
    origin: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def where(self, key: Key) -> str:
        """The origin of `key`, or of the nearest thing around it."""
        while key and key not in self.origin:
            key = key[:-1]
        return self.origin.get(key, "")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `2e-4` is a number; `yes`, dates and `1:30` are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_INT = re.compile(r"[-+]?(0o[0-7]+|0x[0-9a-fA-F]+|[0-9]+(_[0-9]+)*)$")
_DIGITS = "[0-9]+(_[0-9]+)*"
_FLOAT = re.compile(rf"[-+]?((\.[0-9]+|{_DIGITS}(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$")
_TAG = "tag:yaml.org,2002:"
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"<<$"), ["<"])


def read_file(path: Path | Traversable) -> Layer:
    """Read a recipe file; whatever is wrong with the file itself comes back as a problem, never as an exception."""
    name = str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return _broken(name, "no such file")
    except IsADirectoryError:
        return _broken(name, "this is a folder; a recipe is a YAML file")
    except Exception as error:  # ValueError: a NUL byte in the name; and a plugin may register anything that opens
        return _broken(name, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if len(raw) > MAX_BYTES:
        return _broken(name, f"is larger than {MAX_BYTES // 1_000_000} MB; a recipe is a page of YAML")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _broken(name, "is UTF-16 text; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return _broken(f"{name}:{line}", f"byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8")
    return parse(text, name)


def parse(text: str, name: str) -> Layer:
    """Read one YAML mapping; `name` stands for the file in messages."""
    if text.lstrip()[:1] == "<" and not text.lstrip().startswith("<<"):
        return _broken(name, "looks like HTML or XML, not YAML: a web page saved in place of the raw file?")
    try:
        nodes = _composed(text)
    except yaml.MarkedYAMLError as error:
        mark = _place(error)
        return _broken(f"{name}:{mark.line + 1}" if mark else name, _syntax(error, text))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _broken(f"{name}:{line}", f"character {error.character!r} is not allowed in YAML")
    except RecursionError:
        return _broken(name, "is nested too deep")
    if not nodes:
        return _broken(name, "is empty; a recipe needs at least `extends: NAME`, or `model: {path: ...}`")
    if len(nodes) > 1:
        line = nodes[1].start_mark.line + 1
        return _broken(f"{name}:{line}", "a second YAML document begins here (`---`); a recipe is a single document")
    root = nodes[0]
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else f"the text {shorten(root.value)}"
        return _broken(f"{name}:{root.start_mark.line + 1}", f"expected `key: value` lines, found {found}")
    builder = _Builder(name)
    data = builder.build(root, ())
    return Layer(data if isinstance(data, dict) else {}, builder.origin, builder.problems)


def parse_value(text: str) -> Any:
    """Read the right side of an override as YAML; raises ValueError with a sentence.

    Text that YAML would take for an alias, a tag or a reserved character (`*.jsonl`, `@name`) is taken as it stands,
    because they are never meant on a command line.
    """
    if text[:1] in tuple("*&!%@`|>"):
        return text
    try:
        nodes = _composed(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{shorten(text)} is not YAML: {getattr(error, 'problem', None) or error}") from None
    if not nodes:
        return None
    if len(nodes) > 1:
        raise ValueError(f"{shorten(text)} holds several YAML documents")
    if isinstance(nodes[0], yaml.ScalarNode) and nodes[0].style is None and nodes[0].tag == _TAG + "str":
        return text.strip()  # whole, so that ` #` does not begin a comment
    builder = _Builder("")
    value = builder.build(nodes[0], ())
    if builder.problems:
        raise ValueError("; ".join(problem.message for problem in builder.problems))
    return value


def dump(data: Mapping[str, Any]) -> str:
    """Write plain data as YAML that this reader and any other read back as it was."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def dump_line(value: Any) -> str:
    """One value as YAML on one line, to follow a key or be one."""
    return yaml.dump([value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9)[1:-2]


@lru_cache(maxsize=64)
def _composed(text: str) -> tuple[yaml.Node, ...]:
    """The documents of a text as nodes, never changed: parents of many recipes are read over and over."""
    return tuple(yaml.compose_all(text, _Loader))


class _Builder:
    """Nodes to data, with one count over the whole document so that aliases cannot multiply it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.origin: dict[Key, str] = {}
        self.problems: list[Problem] = []
        self.nodes = 0
        self.gave_up = False

    def build(self, node: yaml.Node, key: Key) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(key) > MAX_DEPTH:
            if not self.gave_up:  # reported once; the rest of the document is not looked at
                self._say(
                    node, key[:2], f"more than {MAX_NODES} values or {MAX_DEPTH} levels; does it have nested aliases?"
                )
            self.gave_up, self.nodes = True, MAX_NODES
            return None
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.build(item, (*key, str(index))) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        self._say(node, key, f"the tag {node.tag!r} is not allowed; a recipe is plain data")
        return None

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        built: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            name = name_node.value if isinstance(name_node, yaml.ScalarNode) else None
            line = name_node.start_mark.line + 1
            if name is None or name_node.tag not in (_TAG + "str", _TAG + "merge", _TAG + "null", _TAG + "bool"):
                text = "this key" if name is None else f"the key {name}"
                self._say(name_node, key, f"{text} is not text" + ("" if name is None else f'; write "{name}"'))
            elif name_node.tag == _TAG + "merge":
                self._say(name_node, key, "merge keys (`<<`) are not supported; use `extends: NAME`")
            elif name in built:
                self._say(name_node, (*key, name), f"given twice, first on line {lines[name]}")
            else:
                lines[name] = line
                self.origin[(*key, name)] = f"{self.name}:{line}"
                built[name] = self.build(value_node, (*key, name))
        return built

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        text: str = node.value
        if node.tag in (_TAG + "str", _TAG + "merge"):
            return text
        if node.tag == _TAG + "null":
            return None
        if node.tag == _TAG + "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if node.tag == _TAG + "int" and _INT.match(text):
            digits = text.lstrip("-+0_")
            if re.match(r"[-+]?0[0-9_]", text):
                message = f"{text}: to some readers a leading zero means octal"
                self._say(node, key, f'{message}; write {digits or 0}, 0o{digits or 0}, or "{text}" for text')
                return None
            if len(digits) > 30:
                self._say(node, key, f"a number of {len(digits)} digits; quote it if it is text")
                return None
            return int(text, 0)
        if node.tag == _TAG + "float" and _FLOAT.match(text):
            return float(text.replace(".", "") if text[-1] in "fFnN" else text.replace("_", ""))
        self._say(node, key, f"the tag {node.tag!r} is not allowed here; a recipe is plain data")
        return None

    def _say(self, node: yaml.Node, key: Key, message: str) -> None:
        where = f"{self.name}:{node.start_mark.line + 1}" if self.name else ""
        self.problems.append(Problem(where, ".".join(key), message))


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML takes for a number, and writes floats that both take for floats (2.0e-05)."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    if not math.isfinite(value):
        return dumper.represent_float(value)
    mantissa, e, exponent = repr(value).partition("e")
    text = f"{mantissa}.0e{exponent}" if e and "." not in mantissa else repr(value)
    return dumper.represent_scalar(_TAG + "float", text)


def _str(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "'" if _INT.match(value) or _FLOAT.match(value) else None if value.isprintable() else '"'
    return dumper.represent_scalar(_TAG + "str", value, style=style)


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _str)


def _broken(where: str, message: str) -> Layer:
    return Layer(problems=[Problem(where, "", message)])


def _place(error: yaml.MarkedYAMLError) -> Any:
    """Where to look: what is never closed is found at its beginning, everything else where reading stopped."""
    unclosed = "stream end" in str(error.problem) or "end of stream" in str(error.problem)
    return (error.context_mark if unclosed else None) or error.problem_mark or error.context_mark


def _syntax(error: yaml.MarkedYAMLError, text: str) -> str:
    """PyYAML's complaint in the reader's words."""
    problem = error.problem or "cannot be read"
    mark = _place(error)
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or r"'\t'" in problem:
        return "a tab; YAML indents with spaces only"
    if "undefined alias" in problem or "alias" in problem:
        return f"{problem}; quote the text if it is meant to begin with `*`"
    if "mapping values are not allowed" in problem:
        return f"not YAML: a second `:` on one line, or wrong indentation, at {shorten(line.strip())}"
    return f"not YAML: {problem}, at {shorten(line.strip())}"
