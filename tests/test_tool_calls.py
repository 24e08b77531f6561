"""Tool calls in the form that is read back: rendered, tokenised, decoded, and parsed as the published parsers do."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from read_rows import read
from transformers.utils.chat_template_utils import render_jinja_template

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.chat.calls import calls_in
from phi3_lora_plugin.chat.dataset import load_data
from phi3_lora_plugin.chat.encode import EncodeError, Policy, encode, encode_batch, prompt_ids
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.prepare import control_pattern
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.chat.templates import TEMPLATES, serving_text, template_for
from phi3_lora_plugin.chat.tool_formats import AUTO, TOOL_FORMATS, lost_by, render_calls, said_and_called
from phi3_lora_plugin.cli.chat import _declared
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.hosts.pairs import conversation, encoded
from phi3_lora_plugin.model.tokenizer import load_tokenizer
from phi3_lora_plugin.recipe.sections import ChatSection

USER = {"role": "user", "content": "Go"}
MINI = tiny.tokenizer(template=TEMPLATES["phi-4-mini"].text)  # without the tokens for calls
_REAL: dict[str, Any] = {}


def mini(shared_data: Path) -> Any:
    if not _REAL:
        _REAL["it"] = load_tokenizer(shared_data / "tokenizers" / "phi-4-mini")
    return _REAL["it"]


def calling(*calls: dict[str, Any], said: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": said, "calls": list(calls)}


def said(row: dict[str, Any], tokenizer: Any) -> str:
    """The trained text of a row, without the token that ends the turn."""
    text = tokenizer.decode([label for label in row["labels"] if label != -100], skip_special_tokens=False)
    assert text.endswith("<|end|>")
    return str(text.removesuffix("<|end|>"))


# What the servers do, as far as it decides what they read.


def vllm(text: str) -> Any:
    """phi4_mini_json: one search that is not greedy, and JSON of what lies between."""
    found = re.search(r"functools\[(.*?)\]", text, re.DOTALL)
    try:
        return json.loads(f"[{found.group(1)}]") if found else None
    except ValueError:
        return None


def json_behind(marker: str) -> Any:
    """A decoder that stops where the value does, as those of vllm-mlx, SGLang and Foundry Local's sample."""

    def parse(text: str) -> Any:
        at = text.find(marker)
        return None if at < 0 else json.JSONDecoder().raw_decode(text, at + len(marker))[0]

    return parse


def between_tags(text: str) -> Any:
    """llama.cpp's and Ollama's: JSON between the two tokens."""
    found = re.search(r"<\|tool_call\|>(.*?)<\|/tool_call\|>", text, re.DOTALL)
    return json.loads(found.group(1)) if found else None


def alone(text: str) -> Any:
    value = json.loads(text)
    return value if isinstance(value, list) else [value]


READERS = {"functools": json_behind("functools"), "phi4-mini": between_tags, "text": alone}


def value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(6 if depth > 3 else 8)
    if kind < 3:
        some = [*'"\\\n]}é🙂 a\u2028', "[{", "日本", "<|end|>", "<|tool_call|>", "x y", "</s>"]
        return "".join(draw.choice(some) for _ in range(draw.randrange(5)))
    if kind < 6:
        return draw.choice([0, -1, 2**60, 1.5, -1e-7, 1e300, True, False, None])
    if kind == 6:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {value_name(draw): value(draw, depth + 1) for _ in range(draw.randrange(4))}


def value_name(draw: random.Random) -> str:
    return draw.choice(["city", "größe", "a b", '"', "x", "名", "]"])


def generated(count: int) -> list[list[dict[str, Any]]]:
    draw = random.Random(7)
    names = ["weather", "get_it", "a.b"]

    def call() -> dict[str, Any]:
        arguments = {value_name(draw): value(draw) for _ in range(draw.randrange(4))}
        return {"name": draw.choice(names), "arguments": arguments}

    return [[call() for _ in range(draw.choice([1, 1, 1, 2, 3]))] for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_ten_thousand_calls_are_read_back_as_they_were(shared_data: Path, name: str) -> None:
    tokenizer, all_calls = mini(shared_data), generated(10_000 if name == "functools" else 2_000)
    lost = []
    for start in range(0, len(all_calls), 500):
        some = all_calls[start : start + 500]
        rows = encode_batch([[USER, calling(*calls)] for calls in some], tokenizer, policy=Policy(tool_format=name))
        for calls, row in zip(some, rows, strict=True):
            text = said(row, tokenizer)
            assert READERS[name](text) == calls
            if name != "text":
                assert calls_in(text) == ("", calls)
            if name == "functools":
                assert (vllm(text) == calls) == (not lost_by(calls, TOOL_FORMATS[name]))
                lost += lost_by(calls, TOOL_FORMATS[name])
    assert bool(lost) == (name == "functools") and set(lost) <= {"vLLM phi4_mini_json"}


def test_each_form_as_it_is_published(shared_data: Path) -> None:
    tokenizer = mini(shared_data)
    calls = [{"name": "weather", "arguments": {"city": "Köln", "days": 2}}, {"name": "now", "arguments": {}}]
    written = {
        "auto": 'functools[{"name": "weather", "arguments": {"city": "Köln", "days": 2}}, '
        '{"name": "now", "arguments": {}}]',
        "phi4-mini": '<|tool_call|>[{"name":"weather","arguments":{"city":"Köln","days":2}},'
        '{"name":"now","arguments":{}}]<|/tool_call|>',
        "text": '[{"name": "weather", "arguments": {"city": "Köln", "days": 2}}, {"name": "now", "arguments": {}}]',
    }
    for name, text in written.items():
        row = encode([USER, calling(*calls)], tokenizer, tool_format=name)
        assert said(row, tokenizer) == text
        assert ([row["input_ids"].count(number) for number in (200025, 200026)] == [1, 1]) == (name == "phi4-mini")
        # The same calls as the model's own text, which people have in their files as well.
        again = read({"messages": [USER, {"role": "assistant", "content": text}]})
        assert encode(again, tokenizer, tool_format=name) == row
        behind = encode([USER, calling(*calls, said="I look.")], tokenizer, tool_format=name)
        assert said(behind, tokenizer) == "I look." + ("" if name == "phi4-mini" else "\n") + text
    one = encode([USER, calling(calls[1])], tokenizer, tool_format="text")
    assert said(one, tokenizer) == '{"name": "now", "arguments": {}}'


def test_auto_is_what_the_models_card_says_and_others_were_not_trained_for_tools() -> None:
    assert set(AUTO) <= set(TEMPLATES) and AUTO == {"phi-4-mini": "functools"}
    call = calling({"name": "f", "arguments": {}})
    for name in ("phi-3-mini-4k", "phi-4-mini-reasoning"):
        tokenizer = tiny.tokenizer(template=TEMPLATES[name].text)
        assert said(encode([USER, call], tokenizer), tokenizer) == '{"name": "f", "arguments": {}}'
    assert all(one.source for one in TOOL_FORMATS.values())


def test_a_tokenizer_without_the_tokens_for_calls_says_so() -> None:
    with pytest.raises(EncodeError, match=r"tool_format: phi4-mini needs the token <\|tool_call\|>"):
        encode([USER, calling({"name": "f", "arguments": {}})], MINI, tool_format="phi4-mini")


def test_a_control_token_in_an_argument_is_spelled_so_that_json_takes_it_back() -> None:
    calls = [{"name": "f", "arguments": {"x": "<|end|> and <|user|>"}}]
    text = render_calls(calls, TOOL_FORMATS["functools"], control_pattern(MINI))
    assert "<|" not in text and json.loads(text.removeprefix("functools")) == calls
    row = encode([USER, calling(*calls)], MINI)
    end = MINI.convert_tokens_to_ids("<|end|>")
    assert row["input_ids"].count(end) == 2 and json.loads(said(row, MINI).removeprefix("functools")) == calls


def test_results_follow_their_calls_by_id_or_by_order() -> None:
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in "abc"]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": name, "content": name.upper()} for name in "cab"]
    end = {"role": "assistant", "content": "Done."}
    made = read({"messages": [USER, asked, *results, end]})
    assert [turn["content"] for turn in made] == ["Go", "", "A", "B", "C", "Done."]
    assert all("id" not in turn and all("id" not in call for call in turn.get("calls", ())) for turn in made)
    plain = [{"role": "tool", "content": text} for text in "xy"]
    assert [turn["content"] for turn in read({"messages": [USER, asked, *plain, end]})[2:4]] == ["x", "y"]
    wrong = {"role": "tool", "tool_call_id": "z", "content": "Z"}
    with pytest.raises(RowError, match="a result for the call 'z', which it does not make"):
        read({"messages": [USER, asked, wrong, end]})
    with pytest.raises(RowError, match="two results for the call 'a'"):
        read({"messages": [USER, asked, results[1], results[1], end]})


def test_results_in_parts_of_a_message_as_anthropic_writes_them() -> None:
    asked = {"role": "assistant", "content": [
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "a", "name": "f", "input": {}},
        {"type": "tool_use", "id": "b", "name": "g", "input": {"x": 1}},
    ]}  # fmt: skip
    answered = {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "B"}]},
        {"type": "tool_result", "tool_use_id": "a", "content": "A", "is_error": False},
        {"type": "text", "text": "and now?"},
    ]}  # fmt: skip
    made = read({"messages": [USER, asked, answered, {"role": "assistant", "content": "so"}]})
    said = [(turn["role"], turn["content"]) for turn in made[1:]]
    assert said == [("assistant", "I look."), ("tool", "A"), ("tool", "B"), ("user", "and now?"), ("assistant", "so")]
    picture = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image", "source": {}}]}
    with pytest.raises(RowError, match="message 3 .tool. has a part of type image"):
        read({"messages": [USER, asked, {"role": "user", "content": [picture]}]})


def test_calls_in_the_shapes_of_other_tools() -> None:
    want = [{"name": "f", "arguments": {"x": [1]}}]
    text = '{"name": "f", "arguments": {"x": [1]}}'
    shapes: list[dict[str, Any]] = [
        {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": [1]}'}}]},
        {"content": "", "tool_calls": [{"name": "f", "arguments": {"x": [1]}}]},
        {"function_call": {"name": "f", "arguments": '{"x": [1]}'}},
        {"content": [{"type": "tool_use", "id": "i", "name": "f", "input": {"x": [1]}}]},
        {"content": [{"type": "tool_call", "value": text}]},
        {"content": f"functools[{text}]"},
        {"content": f"<|tool_call|>[{text}]<|/tool_call|>"},
        {"content": f"<|tool_call|>{text}<|/tool_call|>"},
    ]
    for shape in shapes:
        made = read({"messages": [USER, {"role": "assistant"} | shape]})
        assert made[1]["calls"] == want and made[1]["content"] == "", shape
    for words in ("functools[1]", "functools is a module", "functools[", 'functools[{"name": "f"}] and more'):
        turn = {"role": "assistant", "content": words}
        assert read({"messages": [USER, turn]})[1] == turn
    with pytest.raises(RowError, match="calls a tool with text that is not JSON"):
        read({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]})
    endless = [{"name": "f", "arguments": {"x": float("nan")}}]
    with pytest.raises(RowError, match="cannot be written as JSON"):
        read({"messages": [USER, {"role": "assistant", "tool_calls": endless}]})


def test_a_prompt_with_calls_is_the_beginning_of_the_row_that_goes_on(shared_data: Path) -> None:
    tokenizer = mini(shared_data)
    declared = '[{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]'
    chat = [{"role": "system", "content": "Help.", "tools": declared}, USER, calling({"name": "now", "arguments": {}}),
            {"role": "tool", "content": '{"t": 3}'}, {"role": "assistant", "content": "Three."}]  # fmt: skip
    for name in ("auto", "phi4-mini"):
        ids = encode(chat, tokenizer, tool_format=name)["input_ids"]
        for turns in (2, 4):
            prompt = prompt_ids(chat[:turns], tokenizer, tool_format=name)
            assert ids[: len(prompt)] == prompt
    text = tokenizer.decode(ids)
    assert f"<|system|>Help.<|tool|>{declared}<|/tool|><|end|>" in text and '<|tool|>{"t": 3}<|end|>' in text


def test_data_check_names_rows_that_a_server_cannot_read(tmp_path: Path, shared_data: Path) -> None:
    calls = [[{"name": "f", "arguments": {"x": value}}] for value in (1, [1])]  # the second is lost
    rows = [{"messages": [USER, {"role": "assistant", "tool_calls": call}]} for call in calls]
    path = tiny.write(tmp_path / "a.jsonl", rows)
    for name, count in (("auto", 1), ("phi4-mini", 0)):
        recipe = load_recipe("tiny-cpu", [f"data.path={path}", "data.eval_path=null", f"data.tool_format={name}"])
        report = load_data(recipe, mini(shared_data), ADAPTERS).report
        assert report.calls == 2 and len(report.unreadable) == count
        assert report.tool_format == ("functools" if name == "auto" else name)
        assert all(f"{path}:2" == left.place and "vLLM phi4_mini_json" in left.why for left in report.unreadable)
        assert type(report).from_json(report.to_json()) == report


def test_tools_of_a_file_are_declared_as_those_of_a_row(tmp_path: Path, shared_data: Path) -> None:
    tokenizer = mini(shared_data)
    now = {"name": "now", "parameters": {"properties": {"größe": {"enum": ["a"]}}}}
    tools = [{"type": "function", "function": now}]
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(tools, indent=2), encoding="utf-8")
    row = encode(read({"messages": [USER, {"role": "assistant", "content": "b"}], "tools": tools}), tokenizer)
    prompt = prompt_ids([{"role": "system", "content": ""} | _declared(file), USER], tokenizer)
    assert row["input_ids"][: len(prompt)] == prompt and "größe" in tokenizer.decode(prompt)
    file.write_text("{", encoding="utf-8")
    with pytest.raises(Phi3LoraError, match="tools.json: is not a JSON list of tools"):
        _declared(file)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_the_template_for_servers_renders_what_training_has(shared_data: Path, name: str) -> None:
    tokenizer, how = mini(shared_data), TOOL_FORMATS[name]
    serving = serving_text(TEMPLATES["phi-4-mini"], how)
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"größe": {"enum": ["a"]}}}}}]
    kept = [calls for calls in generated(60) if "<" not in json.dumps(calls)]
    for number, calls in enumerate(kept):
        said = ["", "I look.", "I look.\n", "Köln"][number % 4]
        openai = [{"id": str(n), "type": "function", "function": call} for n, call in enumerate(calls)]
        turns: list[dict[str, Any]] = [USER, {"role": "assistant", "content": said, "tool_calls": openai}]
        turns += [{"role": "tool", "content": "3", "tool_call_id": str(n)} for n in range(len(calls))]
        turns += [{"role": "assistant", "content": "Done."}]
        if number % 2:
            turns.insert(0, {"role": "system", "content": "Help."})
        row = {"messages": turns} | ({"tools": tools} if number % 3 else {})
        ids = encode(read(row), tokenizer, tool_format=name)["input_ids"]
        given = turns
        if name == "text":  # which stands in the content, as for a model that was not trained for tools
            written = said_and_called(said, calls, how, re.compile("(?!)"))
            given = [{"role": turn["role"], "content": written if "tool_calls" in turn else turn["content"]}
                     for turn in turns]  # fmt: skip
            if number % 3:
                continue
        asked = {"conversations": [given], "tools": row.get("tools"), "chat_template": serving}
        (text,), _ = render_jinja_template(**asked, **tokens)
        assert text == tokenizer.decode(ids), (number, name)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids
    shipped = tiny.tokenizer(template=serving)
    assert template_for(shipped).name == "phi-4-mini"


def test_a_hosts_turn_of_calls_is_written_as_the_model_writes_it(shared_data: Path) -> None:
    tokenizer = mini(shared_data)
    roles = {"function": "assistant", "observation": "tool"}
    said_by_host = [USER, {"role": "function", "content": '{"name": "f", "arguments": {"x": 1}}'},
                    {"role": "observation", "content": "3"}, {"role": "assistant", "content": "Three."}]  # fmt: skip
    row = encoded(conversation(said_by_host, None, None, roles), tokenizer, ChatSection())
    written = 'functools[{"name": "f", "arguments": {"x": 1}}]<|end|><|tool|>3<|end|>'
    assert written in tokenizer.decode(row["input_ids"])
    with pytest.raises(EncodeError, match="a turn of the role function: it calls a tool with text that is not JSON"):
        conversation([USER, {"role": "function", "content": "f(1)"}], None, None, roles)
