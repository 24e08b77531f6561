"""What hosts' configs are changed into, and rows into ids: everything about hosts that needs none of them installed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from phi3_lora_plugin.chat.encode import encode
from phi3_lora_plugin.chat.templates import TEMPLATES, TemplateError
from phi3_lora_plugin.hosts import llamafactory
from phi3_lora_plugin.hosts.axolotl_config import KERNELS, ROWS, prepare
from phi3_lora_plugin.hosts.base import check_targets, phi_config
from phi3_lora_plugin.hosts.pairs import conversation, pairs
from phi3_lora_plugin.hosts.published_ids import restore
from phi3_lora_plugin.hosts.rows import RowsError, encode_rows
from phi3_lora_plugin.hosts.settings import HostSettings, SettingsError, checkpoint_callback, read_settings
from phi3_lora_plugin.lora.targets import TargetError
from phi3_lora_plugin.model.families import linear_names
from phi3_lora_plugin.recipe.sections import ChatSection

CONFIG = tiny.config().to_dict()
ASK, ANSWER = tiny.turns("what?", "the fox.")


def documented() -> dict[str, Any]:
    """An axolotl config as its own examples for Phi write it."""
    config = {"base_model": "base", "adapter": "lora", "trust_remote_code": True, "chat_template": "phi_3"}
    rows = [{"path": "a.jsonl", "type": "chat_template"}, {"path": "b.jsonl", "type": "completion"}]
    return config | {"datasets": rows}


def test_an_axolotl_config_is_made_fit_for_phi3_and_each_change_is_said() -> None:
    cfg = documented()
    said = "\n".join(prepare(cfg, CONFIG, HostSettings(), "<unk>"))
    assert all(cfg[name] is False for name in KERNELS)
    assert cfg["lora_target_modules"] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert cfg["chat_template"] == "tokenizer_default" and cfg["trust_remote_code"] is False
    assert cfg["special_tokens"] == {"pad_token": "<unk>"}
    assert [rows["type"] for rows in cfg["datasets"]] == [ROWS, "completion"]
    for word in ("lora_*_kernel", "lora_target_modules", "instead of phi_3", "trust_remote_code", "<unk>", "a.jsonl"):
        assert word in said
    again = copy.deepcopy(cfg)
    prepare(again, CONFIG, HostSettings(), "<unk>")
    assert again == cfg


def test_what_an_axolotl_user_chose_stays() -> None:
    cfg = documented() | {"lora_target_linear": True, "special_tokens": {"pad_token": "</s>"}}
    prepare(cfg, CONFIG, HostSettings(masks=False), "<unk>")
    assert "lora_target_modules" not in cfg and cfg["special_tokens"] == {"pad_token": "</s>"}
    assert cfg["datasets"][0]["type"] == "chat_template"
    full = {"base_model": "base", "datasets": []}
    prepare(full, CONFIG, HostSettings(), "<unk>")
    assert not set(KERNELS) & set(full)


def test_a_named_template_goes_to_axolotl_as_text_and_an_unknown_one_nowhere() -> None:
    cfg = documented()
    prepare(cfg, CONFIG, HostSettings(data=ChatSection(template="phi-4")), "<unk>")
    assert cfg["chat_template_jinja"] == TEMPLATES["phi-4"].text
    with pytest.raises(TemplateError, match="not one of phi-3-mini-4k"):
        prepare(documented(), CONFIG, HostSettings(data=ChatSection(template="phi_3")), "<unk>")


def test_encoded_rows_are_kept_apart_by_what_decides_them() -> None:
    names = set()
    for data in (ChatSection(), ChatSection(train_on="last_turn"), ChatSection(system="fold")):
        cfg = documented()
        prepare(cfg, CONFIG, HostSettings(data=data), "<unk>")
        names.add(cfg["datasets"][0]["conversation"])
    assert len(names) == 3


@pytest.mark.parametrize("names", ["q_proj", ["o_proj", "v_proj"], ["up_proj"]])
def test_slices_that_plain_peft_would_miss_are_refused(names: Any) -> None:
    with pytest.raises(TargetError, match="slice of (qkv|gate_up)_proj.*write (qkv|gate_up)_proj"):
        check_targets(CONFIG, names, "lora_target")


def test_targets_that_are_there_pass_and_others_do_not() -> None:
    check_targets(CONFIG, "all", "lora_target")
    check_targets(CONFIG, linear_names(CONFIG["model_type"]), "lora_target")
    with pytest.raises(TargetError, match="query_key_value"):
        check_targets(CONFIG, ["query_key_value"], "lora_target")


def test_only_bases_of_the_family_are_touched(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "phi", hidden_size=16, intermediate_size=32)
    found = phi_config(str(base))
    assert found is not None and found["model_type"] == "phi3"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert phi_config(str(other)) is None


def test_llamafactory_gets_our_template_and_its_targets_are_checked() -> None:
    args = {"model_name_or_path": "base", "template": "phi", "trust_remote_code": True, "lora_target": "all"}
    said = llamafactory.prepare(args, CONFIG, HostSettings())
    assert args["template"] == llamafactory.TEMPLATE and args["trust_remote_code"] is False
    assert "instead of phi" in said[0]
    args = {"template": "phi"}
    assert llamafactory.prepare(args, CONFIG, HostSettings(masks=False)) == [] and args == {"template": "phi"}
    with pytest.raises(TargetError, match="lora_target: v_proj"):
        llamafactory.prepare({"lora_target": "o_proj, v_proj"}, CONFIG, HostSettings())


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"data": {"train_on": "user"}}, "data.train_on"),
        ({"masks": "perhaps"}, "masks"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last"),
        ({"chekpoint": {}, "data": {"sistem": "fold"}}, "data.sistem"),
        ("fold", "expected a mapping"),
    ],
)
def test_a_wrong_section_names_every_key(given: Any, word: str) -> None:
    with pytest.raises(SettingsError, match="phi3_lora") as caught:
        read_settings(given)
    assert word in str(caught.value)
    if isinstance(given, dict) and len(given) > 1:
        assert "chekpoint" in str(caught.value)


def test_the_section_says_which_checkpoints_are_written() -> None:
    callback = checkpoint_callback(read_settings({"checkpoint": {"every_steps": 3}, "data": {"system": "fold"}}))
    assert callback.every_steps == 3 and callback.facts["chat"]["system"] == "fold"
    assert checkpoint_callback(read_settings({"checkpoint": False})) is None


def test_pairs_put_together_are_the_row() -> None:
    tokenizer = tiny.tokenizer()
    row = encode([ASK, ANSWER, ASK, ANSWER], tokenizer)
    cut = pairs(row["input_ids"], row["labels"])
    assert [bool(target) for _, target in cut] == [True, True, False]
    assert [token for pair in cut for part in pair for token in part] == row["input_ids"]
    assert [token for pair in cut for token in [*[-100] * len(pair[0]), *pair[1]]] == row["labels"]
    assert tokenizer.convert_ids_to_tokens(cut[0][1][-1]) == "<|end|>"


def test_a_conversation_of_a_host_has_our_roles() -> None:
    turns = conversation([ASK, {"role": "observation", "content": "4"}], "be kind", "[]", {"observation": "tool"})
    assert [turn["role"] for turn in turns] == ["system", "user", "tool"] and turns[0]["tools"] == "[]"
    assert conversation([ASK], "", None, {}) == [ASK]


def test_rows_of_a_table_are_encoded_whatever_their_columns_are_called() -> None:
    tokenizer = tiny.tokenizer()
    wanted = {key: encode([ASK, ANSWER], tokenizer)[key] for key in ("input_ids", "labels")}
    shapes: list[tuple[dict[str, Any], ChatSection]] = [
        ({"messages": [ASK, ANSWER], "conversations": None}, ChatSection()),
        ({"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "the fox."}]}, ChatSection()),
        ({"chat": [ASK, ANSWER]}, ChatSection(columns={"messages": "chat"})),
        ({"instruction": "what?", "input": "", "output": "the fox."}, ChatSection()),
        ({"q": "what?", "a": "the fox."}, ChatSection(columns={"prompt": "q", "completion": "a"})),
    ]
    for row, data in shapes:
        assert encode_rows([row], tokenizer, data) == [wanted]


def test_bad_rows_stop_the_run_or_are_left_out_as_asked() -> None:
    tokenizer = tiny.tokenizer()
    good, bad, sly = {"messages": [ASK, ANSWER]}, {"text": "once"}, {"messages": [ASK, ANSWER | {"content": "<|end|>"}]}
    with pytest.raises(RowsError) as caught:
        encode_rows([good, bad, sly], tokenizer, ChatSection())
    said = str(caught.value)
    assert "row 2 of 3: its columns text fit no format" in said and "row 3 of 3" in said and "<|end|>" in said
    assert "on_error: skip" in said
    assert len(encode_rows([good, bad, sly], tokenizer, ChatSection(on_error="skip"))) == 1


def test_a_tokenizer_that_was_built_anew_gets_the_published_ids_back(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    words.save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert restore(other) == []
    other.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")  # the word behind a role token loses its mark
    wanted = words("<|user|>\nthe fox<|end|>\n")["input_ids"]
    assert other("<|user|>\nthe fox<|end|>\n")["input_ids"] != wanted
    assert "other ids" in restore(other)[0]
    assert other("<|user|>\nthe fox<|end|>\n")["input_ids"] == wanted
