"""Templates: ours render byte for byte as the published ones, and are recognised by that alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from read_rows import trained
from tiny import turns

from phi3_lora_plugin.chat import template_process, templates
from phi3_lora_plugin.chat.encode import EncodeError, encode, prompt_ids
from phi3_lora_plugin.chat.templates import (
    TEMPLATES,
    TemplateError,
    _recognise,
    render,
    template_fingerprint,
    template_for,
)

TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
FILES = {
    "phi-3-mini-4k": "phi-3-mini-4k-instruct",
    "phi-3.5-mini": "phi-3.5-mini-instruct",
    "phi-3-mini-128k-apr2024": "phi-3-mini-128k-instruct-apr2024",
    "phi-3-medium": "phi-3-medium-4k-instruct",
    "phi-4": "phi-4-base",
    "phi-4-mini": "phi-4-mini",
    "phi-4-mini-reasoning": "phi-4-mini-reasoning",
    "phi-3-small": "phi-3-small-8k-instruct",
    "phi-3-vision": "phi-3-vision-128k-instruct",
}

content = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["", " ", "\n", " a \n", "{{ x }}", "🙂"]
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": content},
    optional={"tools": st.none() | content},
)
conversations = st.lists(message, min_size=1, max_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=conversations, prompt=st.booleans())
def test_training_template_is_byte_identical(
    shared_data: Path, name: str, conversation: list[dict[str, str]], prompt: bool
) -> None:
    published = (shared_data / "chat_templates" / f"{FILES[name]}.jinja").read_text()
    for ours in (TEMPLATES[name].text, TEMPLATES[name].turns):
        assert render(ours, [conversation], TOKENS, prompt) == render(published, [conversation], TOKENS, prompt)


def test_expected_renders(shared_data: Path) -> None:
    rows = json.loads((shared_data / "chat_templates" / "expected_renders.json").read_text())
    rows = [row for row in rows if row.get("hf_jinja_equals_expected")]
    by_stem = {stem: name for name, stem in FILES.items()}
    assert len(rows) >= 10
    for row in rows:
        if row.get("template_file"):
            name = by_stem[Path(row["template_file"]).stem]
        elif row.get("template"):
            name = _recognise(row["template"]).name
        else:
            name = "phi-3-mini-4k"  # what ollama's template of that name stands for
        tokens = TOKENS if row.get("template_file") else {"bos_token": "", "eos_token": ""}
        (text,), _ = render(TEMPLATES[name].text, [row["messages"]], tokens, bool(row["add_generation_prompt"]))
        assert text == row["rendered"], row["source"]


@pytest.mark.slow
def test_published_templates_are_recognised_in_whatever_cosmetics(shared_data: Path) -> None:
    tokenizer = tiny.tokenizer()
    for name, stem in FILES.items():
        published = (shared_data / "chat_templates" / f"{stem}.jinja").read_text()
        for text in (published, "{# a comment #}" + published, published.replace("{% endfor %}", "{% endfor -%}")):
            tokenizer.chat_template = text
            if TEMPLATES[name].refused:
                with pytest.raises(TemplateError, match="remote code"):
                    template_for(tokenizer)
            elif TEMPLATES[name].stop == "<|end|>":
                assert template_for(tokenizer).name == name


@pytest.mark.parametrize(
    "edit", [lambda text: text + " ", lambda text: text.replace("user", "human"), lambda text: "x"]
)
def test_an_edited_template_is_an_error_that_says_how_to_opt_in(edit) -> None:  # type: ignore[no-untyped-def]
    tokenizer = tiny.tokenizer(template=edit(tiny.MINI_4K_TEMPLATE))
    with pytest.raises(TemplateError, match="data.template="):
        template_for(tokenizer)
    assert template_for(tokenizer, "phi-3.5-mini").name == "phi-3.5-mini"


def test_an_edit_that_only_trims_white_space_is_seen() -> None:
    trimmed = tiny.MINI_4K_TEMPLATE.replace("message['content']", "message['content'] | trim")
    with pytest.raises(TemplateError, match="nearest"):
        template_for(tiny.tokenizer(template=trimmed))


INSTRUCTIONS = "<|user|>\nYou're \\Phi 日🙂 {Thought}\n<think><|end|>\n"


@pytest.mark.parametrize("system", ["in its place", "nowhere", "for all"])
def test_a_known_template_behind_a_preamble_keeps_it(system: str) -> None:
    """Phi-4-reasoning's is Phi-4's behind instructions; copies of it differ in what they make of a system turn."""
    branch = "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif "
    assert branch in tiny.MINI_4K_TEMPLATE
    body = tiny.MINI_4K_TEMPLATE
    if system == "nowhere":
        body = body.replace(branch, "{% if ")
    if system == "for all":
        body = body.replace(branch, "{% if messages[0]['role'] == 'system' %}{{ " + repr(INSTRUCTIONS) + " }}{% elif ")
    tokenizer = tiny.tokenizer(template="{{ " + repr(INSTRUCTIONS) + " }}" + body)
    found = template_for(tokenizer)
    assert found.name == "phi-3-mini-4k with a preamble" and found.preamble == INSTRUCTIONS
    assert found.system == (system == "in its place")
    said = (" q\n", "\n a")
    chats = [turns(*said), turns(*said, *said), turns(*said, system="s")]
    for each in chats if found.system else chats[:2]:
        row = encode(each, tokenizer)
        assert row["input_ids"] == tokenizer.apply_chat_template(each, return_dict=True)["input_ids"]
        prompt = prompt_ids(each[:-1], tokenizer)
        assert row["input_ids"][: len(prompt)] == prompt
        assert trained(row, tokenizer).replace(" ", "").strip() == "a|" * (len(each) // 2)
    if not found.system:
        with pytest.raises(EncodeError, match="drops system messages"):
            encode(chats[2], tokenizer)


def test_what_changes_from_chat_to_chat_is_no_preamble() -> None:
    for lead in ("{{ messages | length }}", "{{ bos_token }}", "{{ messages[0]['role'] }}"):
        with pytest.raises(TemplateError, match="nearest"):
            template_for(tiny.tokenizer(template=lead + tiny.MINI_4K_TEMPLATE))


def test_no_template_is_plain_text_without_role_tokens_and_an_error_with_them(shared_data: Path) -> None:
    from phi3_lora_plugin.model.tokenizer import load_tokenizer

    with pytest.raises(TemplateError, match="role tokens but no chat template"):
        template_for(tiny.tokenizer(template=None))
    stories = load_tokenizer(shared_data / "models" / "phi3-stories260K")
    assert template_for(stories).name == "plain"
    with pytest.raises(TemplateError, match="does not have as a token"):
        template_for(stories, "phi-3-mini-4k")
    with pytest.raises(TemplateError, match="'phi3' is not one of phi-3-mini-4k"):
        template_for(stories, "phi3")


def test_a_named_template_among_several_is_the_default_one() -> None:
    tokenizer = tiny.tokenizer()
    plain = template_fingerprint(tokenizer)
    tokenizer.chat_template = {"default": tiny.MINI_4K_TEMPLATE, "rag": "x"}
    assert template_for(tokenizer).name == "phi-3-mini-4k"
    assert template_fingerprint(tokenizer) == plain != template_fingerprint(tiny.tokenizer(template=None))


def test_every_template_marks_what_the_assistant_says_for_other_hosts() -> None:
    tokenizer = tiny.tokenizer()
    chat = turns("hello", "fine")
    for template in TEMPLATES.values():
        if template.refused or template.stop != "<|end|>":
            continue
        tokenizer.chat_template = template.text
        got = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        said = [token for token, mask in zip(got["input_ids"], got["assistant_masks"], strict=True) if mask]
        assert tokenizer.decode(said).strip() == "fine<|end|>", template.name


def test_a_template_is_a_program_in_a_sandbox() -> None:
    evil = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TemplateError, match="like none that is known"):
        template_for(tiny.tokenizer(template=evil))


ODD = [
    "{% for m in messages %}{{ m.content | tojson(indent=1) }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}",
    "a\n\n  {% if true %}\n b\n  {% endif %}\n",
    "{{ raise_exception('no') }}",
    "{{ messages[0]['content'].__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ eos_token }}{{ nothing }}",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% set x = 1 %}{% endgeneration %}{{ x }}{% endfor %}",
    "{% for",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ODD)))
def test_a_process_of_its_own_renders_what_transformers_does(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = templates._renders.__wrapped__(ODD[number])
    monkeypatch.setattr(templates.sys, "executable", "")  # then there is none
    assert templates._renders.__wrapped__(ODD[number]) == apart


def test_our_own_templates_render_the_same_in_a_process_of_their_own() -> None:
    probes = [[dict(zip(("role", "content", "tools"), turn, strict=False)) for turn in p] for p in templates._PROBES]
    text = "\x00".join(each.turns for each in TEMPLATES.values())
    assert templates._renders_apart(text, probes) != ()
    for name in ("phi-4-mini-reasoning", "plain"):
        assert templates._renders_apart(TEMPLATES[name].turns, probes) == templates._renders(TEMPLATES[name].text)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a text": "{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a constant": "{{ 'a' * 10 ** 10 }}",
    "an output": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_cannot_take_all_time_or_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # of waiting, three of them; the process has ten of computing. What ends at a gigabyte has to get there.
    monkeypatch.setattr(template_process, "SECONDS", 0.2 if name == "loops" else 1)
    with pytest.raises(TemplateError, match="takes more than 10 s or 1 GiB .*data.template"):
        template_for(tiny.tokenizer(template=ENDLESS[name]))
    with pytest.raises(TemplateError, match="has 300,000 characters"):
        template_for(tiny.tokenizer(template="a" * 300_000))
