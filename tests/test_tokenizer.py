"""Tokenizers: published ids wherever the files lie, pad outside the stop tokens, nothing executed, nothing grown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from transformers import AutoTokenizer

from phi3_lora_plugin.model.families import UnsupportedModel
from phi3_lora_plugin.model.folder import ModelError
from phi3_lora_plugin.model.tokenizer import (
    TokenizerError,
    load_tokenizer,
    repair_tokenizer,
    save_tokenizer,
    stop_token_ids,
    tokenizer_fingerprint,
)

REAL = ["phi-3-mini-4k-instruct", "phi-3-mini-128k-instruct-apr2024", "phi-3-medium-4k-instruct"]
TEXTS = ["<|user|>\nHello<|end|>\n<|assistant|>\n", " two  spaces", "naïve 日本 🙂", "<|user|>", "", "a\n\nb"]


def saved(folder: Path, **changes: object) -> Path:
    tiny.tokenizer().save_pretrained(folder)
    tiny.edit(folder / "tokenizer_config.json", **changes)
    return folder


def ids(tokenizer: object) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]  # type: ignore[operator]


@pytest.mark.parametrize("name", REAL)
def test_real_pad_and_stop_tokens(shared_data: Path, tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    for one in (tokenizer, _again(tokenizer, tmp_path)):
        assert one.pad_token_id == 0 and len(one) == 32011 and one.padding_side == "right"
        assert {32000, 32007} <= set(stop_token_ids(one))
        assert stop_token_ids(one, [32000, 32001, 32007]) == [32000, 32001, 32007]


def test_pad_never_stops_and_the_vocabulary_never_grows(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = len(AutoTokenizer.from_pretrained(folder))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "<unk>" and len(tokenizer) == before
    assert tokenizer.pad_token_id not in stop_token_ids(tokenizer)
    again = _again(tokenizer, tmp_path / "again")
    assert (again.pad_token, len(again), again.padding_side) == ("<unk>", before, "right")


@pytest.mark.parametrize("name", ["phi-4-base", "phi-4-mini", "phi-4-mini-reasoning"])
def test_members_without_an_unknown_token_pad_with_a_reserved_one(shared_data: Path, tmp_path: Path, name: str) -> None:
    """Their vocabularies are not here; their control tokens on a small vocabulary decide the same."""
    config = json.loads((shared_data / "tokenizers" / name / "tokenizer_config.json").read_text())
    backend = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    size = len(backend["model"]["vocab"]) + len(backend["added_tokens"])
    tokens = [token for _, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    backend["added_tokens"] = [token | {"id": size + at, "single_word": False} for at, token in enumerate(tokens)]
    backend["model"]["unk_token"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == ("<|dummy_85|>" if name == "phi-4-base" else "<|endofprompt|>")
    assert tokenizer.pad_token_id not in stop_token_ids(tokenizer)
    assert len(_again(tokenizer, tmp_path / "again")) == len(tokenizer)


def test_a_vocabulary_whose_every_token_stops_cannot_be_padded(tmp_path: Path) -> None:
    folder = saved(tmp_path, unk_token=None)
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<unk>"]
    vocabulary = backend["model"]["vocab"]
    vocabulary["<was unknown>"] = vocabulary.pop("<unk>")
    backend["model"]["unk_token"] = None
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(TokenizerError, match="no token to pad with"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", REAL)
def test_published_vectors(shared_data: Path, tmp_path: Path, name: str) -> None:
    flag = "phi3_128k_apr2024_tokenizer_json_equal" if "128k" in name else "phi3_tokenizer_json_equal"
    rows = json.loads((shared_data / "tokenizers" / "phi-3-vectors.json").read_text())
    if "medium" in name:
        rows = [row for row in rows if "medium" in row.get("tokenizer", "")]
    rows = [row for row in rows if row.get(flag)]
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    alone = _again(tokenizer, tmp_path / "saved")
    for row in rows:
        wanted = row["ids"][1:] if row["ids"][:1] == [1] else row["ids"]
        for one in (tokenizer, alone):
            assert one(row["text"], add_special_tokens=False).input_ids == wanted, row["text"]
    assert rows or "medium" in name


@pytest.mark.parametrize("name", REAL)
def test_a_folder_without_config_json_gives_the_same_ids(shared_data: Path, tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_data / "tokenizers" / name / file, tmp_path)
    assert ids(load_tokenizer(tmp_path)) == ids(tokenizer)


@pytest.mark.parametrize("claimed", ["LlamaTokenizer", "GPT2Tokenizer", "TokenizersBackend", "PhiEvilTokenizer"])
def test_the_class_that_a_folder_claims_changes_nothing(tmp_path: Path, claimed: str) -> None:
    folder = saved(tmp_path, tokenizer_class=claimed, add_bos_token=True, add_eos_token=True, legacy=False)
    assert ids(load_tokenizer(folder)) == ids(tiny.tokenizer())


def test_what_we_save_any_loader_reads_to_the_same_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "base", tokenizer_class="LlamaTokenizer"))
    save_tokenizer(tokenizer, tmp_path / "a")
    save_tokenizer(tokenizer, tmp_path / "b")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "a")) == ids(tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template == tokenizer.chat_template
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_saved_truncation_and_padding_are_reset(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    backend["padding"] = {"strategy": {"Fixed": 128}, "direction": "Left", "pad_to_multiple_of": None}
    backend["padding"] |= {"pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"}
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = load_tokenizer(folder)
    text = "the quick brown fox jumps over the lazy dog"
    wanted = tiny.tokenizer()(text, add_special_tokens=False).input_ids
    assert tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids == wanted
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(load_tokenizer(saved(tmp_path / "clean")))


def test_code_beside_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    save_tokenizer(load_tokenizer(folder), tmp_path / "saved")
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_the_fingerprint_follows_ids_not_places(tmp_path: Path) -> None:
    one, two = load_tokenizer(saved(tmp_path / "a")), load_tokenizer(saved(tmp_path / "b"))
    assert len({tokenizer_fingerprint(each) for each in (one, two, _again(one, tmp_path / "c"))}) == 1
    tiny.tokenizer(rstrip=False).save_pretrained(tmp_path / "d")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "d")) != tokenizer_fingerprint(one)


def test_repairing_says_what_it_did_and_only_once() -> None:
    tokenizer = tiny.tokenizer()
    assert repair_tokenizer(tokenizer) == [
        "pads with <unk> instead of <|endoftext|>, which ends a turn or a text",
        "pads on the right",
    ]
    assert repair_tokenizer(tokenizer) == []


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    def message(path: object) -> str:
        with pytest.raises(ModelError) as caught:
            load_tokenizer(path)  # type: ignore[arg-type]
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "nowhere")
    assert "hub did not give it" in message("nobody/nothing")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer.model").write_bytes(b"x")
    assert "tokenizer.model alone is not enough" in message(tmp_path / "slow")
    broken = saved(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("<html>")
    assert "is not a tokenizer" in message(broken)
    assert "'<|no|>' is not in tokenizer.json" in message(saved(tmp_path / "foreign", eos_token="<|no|>"))
    config = saved(tmp_path / "config")
    (config / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json is not JSON" in message(config)


@pytest.mark.parametrize("kind", ["phi3small", "phi3_v", "phi4mm"])
def test_a_member_that_needs_remote_code_is_named_rather_than_its_missing_file(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedModel, match="remote code"):
        load_tokenizer(tmp_path)


def _again(tokenizer: object, folder: Path) -> object:
    save_tokenizer(tokenizer, folder)
    return load_tokenizer(folder)
