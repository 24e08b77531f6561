"""Reading YAML: the right value or a clear error for each trap, with the line."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phi3_lora_plugin.recipe.yaml_file import MAX_NODES, dump, dump_line, parse, parse_value, read_file


def problems(text: str) -> list[str]:
    return [str(problem) for problem in parse(text, "r.yaml").problems]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2e-4", 2e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("+5", 5),
        ("-0", 0),
        ("1_000", 1000),
        ("1_0.5", 10.5),
        ("0x1F", 31),
        ("0o10", 8),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("2024-04-01", "2024-04-01"),
        ("12e", "12e"),
        ("e4", "e4"),
        ("nan", "nan"),
        ("'010'", "010"),
        ("!!str 010", "010"),
        ('"2e-4"', "2e-4"),
        ("a #b", "a"),
    ],
)
def test_a_plain_value_is_read_as_people_mean_it(written: str, meant: object) -> None:
    document = parse(f"key: {written}", "r.yaml")

    assert document.problems == []
    assert document.data == {"key": meant}
    assert type(document.data["key"]) is type(meant)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse("key: .nan", "r.yaml").data["key"])


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a: given twice, first on line 1"),
        ("s:\n  x: 1\n\n  x: 2\n", 4, "s.x: given twice, first on line 2"),
        ("a: 1\r\nb: 2\r\n\r\nb: 3\r\n", 4, "b: given twice, first on line 2"),
        ("a:\n\tb: 1\n", 2, "spaces"),
        ("a: 010\n", 1, "write 10, 0o10"),
        ("a: -007\n", 1, "leading zero"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "not allowed"),
        ("a: !mine x\n", 1, "not allowed"),
        ("a: !!binary aGk=\n", 1, "not allowed"),
        ("a: !!int x\n", 1, "not allowed"),
        ("x: *nobody\n", 1, "undefined alias"),
        ("a: {b: 1}\n<<: {c: 1}\n", 2, "extends"),
        ("7: x\n", 1, 'write "7"'),
        ("[1]: x\n", 1, "not text"),
        ("a: b: c\n", 1, "not YAML"),
        ("a: [1, 2\n", 1, "not YAML"),
        ("a: @x\n", 1, "not YAML"),
        ("- a\n- b\n", 1, "found a list"),
        ("hello\n", 1, "found the text 'hello'"),
        ("a: 1\n---\nb: 2\n", 3, "second YAML document"),
        ("a: '\x00'\n", 1, "not allowed in YAML"),
        ("a: " + "9" * 5000, 1, "5000 digits"),
    ],
)
def test_a_trap_is_an_error_with_its_line(text: str, line: int, says: str) -> None:
    found = problems(text)

    assert any(problem.startswith(f"r.yaml:{line}: ") and says in problem for problem in found), found
    assert len(found) == 1


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_says_what_a_recipe_needs(text: str) -> None:
    found = problems(text)

    assert len(found) == 1
    assert "recipe" in found[0] or "expected `key: value`" in found[0]


@pytest.mark.parametrize("text", ["<!DOCTYPE html>\n<html></html>", "\n <html lang='en'>"])
def test_a_web_page_is_recognised(text: str) -> None:
    assert "web page" in problems(text)[0]


def test_several_problems_come_together() -> None:
    assert len(problems("a: 010\na: 1\nb: !x y\n3: 4\n")) == 4


def test_aliases_work_but_do_not_multiply() -> None:
    assert parse("a: &x [1, 2]\nb: *x\n", "r.yaml").data == {"a": [1, 2], "b": [1, 2]}

    names = "abcdefghi"
    levels = [f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in itertools.pairwise(names)]
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(levels)  # 10^9 values
    found = problems(bomb)
    assert len(found) == 1 and str(MAX_NODES) in found[0]

    assert "levels" in problems("a: &a [*a]\n")[0]


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    assert problems("a: " + "[" * 5000)
    assert problems("a: " + "[" * 200 + "]" * 200)
    assert problems("a: " + "{b: " * 200 + "1" + "}" * 200)


def test_every_key_knows_its_line() -> None:
    document = parse("# head\nmodel:\n  path: x\nlora: {r: 1,\n  alpha: 2}\n", "r.yaml")

    assert document.origin == {
        ("model",): "r.yaml:2",
        ("model", "path"): "r.yaml:3",
        ("lora",): "r.yaml:4",
        ("lora", "r"): "r.yaml:4",
        ("lora", "alpha"): "r.yaml:5",
    }


def test_files_that_are_none(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        document = read_file(path)
        assert document.data == {}
        (problem,) = document.problems
        assert problem.where.startswith(str(path))
        return problem.message

    def written(raw: bytes) -> Path:
        path = tmp_path / "r.yaml"
        path.write_bytes(raw)
        return path

    assert "no such file" in said(tmp_path / "none.yaml")
    assert "folder" in said(tmp_path)
    assert "cannot be read" in said(tmp_path / "a.yaml" / "\x00")
    assert "UTF-16" in said(written("a: 1".encode("utf-16")))
    assert "larger" in said(written(b"a: " + b"x" * 1_000_001))

    broken = read_file(written(b"a: 1\nb: \xe9t\xe9\n"))
    assert broken.problems[0].where.endswith(":2")
    assert "0xe9" in broken.problems[0].message


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("﻿a: é\r\nb: 2\r\n".encode())

    assert read_file(path).data == {"a": "é", "b": 2}
    path.write_bytes("\ufeff<html>".encode())
    assert "web page" in read_file(path).problems[0].message


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("8", 8),
        ("2e-4", 2e-4),
        ("", None),
        ("null", None),
        ("true", True),
        ("yes", "yes"),
        ("[a, b]", ["a", "b"]),
        ("{prompt: question, completion: answer}", {"prompt": "question", "completion": "answer"}),
        ("*.jsonl", "*.jsonl"),
        ("@home", "@home"),
        ("chats #2.jsonl", "chats #2.jsonl"),
        ("'a #b'", "a #b"),
        ("~/chats.jsonl", "~/chats.jsonl"),
        (r".*\.(qkv|o)_proj", r".*\.(qkv|o)_proj"),
        ("C:\\chats", "C:\\chats"),
    ],
)
def test_the_right_side_of_an_override(text: str, meant: object) -> None:
    assert parse_value(text) == meant


@pytest.mark.parametrize("text", ["[a", "{a: 1", "{a: 010}", "a: 1\n---\nb: 2", "{a: !x b}"])
def test_an_override_that_is_not_yaml_says_so(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_value(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text(max_size=12)
    | st.sampled_from(["2e-4", "1e5", "010", "0o7", "yes", "null", "~", "1_0", ".5", "-.inf", "=", "<<", "1:30", "*a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=6), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), plain, min_size=1, max_size=4))
def test_what_is_written_reads_back_here_and_elsewhere(data: dict[str, object]) -> None:
    assert parse(dump(data), "r.yaml").data == data
    assert yaml.safe_load(dump(data)) == data
    for value in data.values():
        assert parse(f"key: {dump_line(value)}", "r.yaml").data == {"key": value}
