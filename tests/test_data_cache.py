"""Encoded rows kept by content: what is read back is what would be made afresh, or it is made afresh."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.chat import cache
from phi3_lora_plugin.chat.dataset import Data, DataError, load_data
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.templates import TEMPLATES

TOKENIZER = tiny.tokenizer()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PHI3_LORA_CACHE", raising=False)
    monkeypatch.setattr(cache, "WORTH", 0)
    return tmp_path / "cache" / "phi3_lora_plugin" / "data"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.jsonl")


def write(file: Path, *last: str) -> Path:
    rows = [{"prompt": f"what is {n % 30}?", "completion": f"it is {n % 30}" * (1 + n % 10)} for n in range(60)]
    return tiny.write(file, [*rows, "{broken", {"prompt": "x" * 90, "completion": "a"}, *last])


def load(file: Path, *overrides: str, tokenizer: Any = TOKENIZER, adapters: Any = ADAPTERS, **given: Any) -> Data:
    settings = [f"data.path={file}", "data.eval_path=null", "data.max_length=40", "data.on_error=skip", *overrides]
    return load_data(load_recipe("tiny-cpu", settings), tokenizer, adapters, **({"cache": True} | given))


def content(data: Data) -> Any:
    parts = [(part.features, part[:]) for part in (data.train, data.eval) if part is not None]
    return parts, data.report


def test_a_second_run_reads_what_a_fresh_one_makes(chats: Path, home: Path) -> None:
    for overrides in ([], ["data.eval_fraction=0.2"]):
        fresh = load(chats, *overrides, cache=False)
        first, second = load(chats, *overrides), load(chats, *overrides)
        assert fresh.cached is None and first.cached is None and second.cached is not None
        assert content(fresh) == content(first) == content(second)
        assert second.report.skipped and second.report.dropped and second.report.truncated and second.report.duplicates
        assert second.report.to_json() == fresh.report.to_json()
    assert len(list(home.iterdir())) == 2


def test_the_library_keeps_nothing_unless_asked_and_nothing_small(
    chats: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_data(load_recipe("tiny-cpu", [f"data.path={chats}", "data.on_error=skip"]), TOKENIZER, ADAPTERS)
    monkeypatch.setattr(cache, "WORTH", 1024**2)
    load(chats)
    monkeypatch.setattr(cache, "WORTH", 0)
    monkeypatch.setenv("PHI3_LORA_CACHE", "off")
    load(chats)
    assert not home.exists()


CHANGES: dict[str, Callable[[Path], Data]] = {
    "a byte of the file": lambda file: load(write(file, "")),  # an empty line
    "the name of the file": lambda file: load(file.rename(file.with_name("other.jsonl"))),
    "a setting": lambda file: load(file, "data.train_on=all"),
    "the seed": lambda file: load(file, "seed=7"),
    "the longest length": lambda file: load(file, "data.max_length=41"),
    "the tokenizer": lambda file: load(file, tokenizer=tiny.tokenizer(rstrip=False)),
    "the template": lambda file: load(file, tokenizer=tiny.tokenizer(template=TEMPLATES["phi-3.5-mini"].text)),
    "another file to evaluate on": lambda file: load(file, f"data.eval_path={file}"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_the_rows_makes_another_entry(what: str, chats: Path, home: Path) -> None:
    load(chats)
    assert CHANGES[what](chats).cached is None and len(list(home.iterdir())) == 2


def test_the_longest_length_that_the_model_gives_makes_another_entry(chats: Path, home: Path) -> None:
    for limit in (40, 41, None):
        data = load(chats, "data.max_length=null", max_length=limit)
        assert data.cached is None and data.report.max_length == limit
    assert load(chats, "data.max_length=null", max_length=40).cached is not None


def test_other_code_and_other_versions_make_another_entry(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(chats)
    monkeypatch.setattr(cache, "version", lambda name: "0" if name == "tokenizers" else "1")
    assert load(chats).cached is None and load(chats).cached is not None
    names = {file.name for file in cache._code()}
    assert {"encode.py", "messages.py", "turns.py", "dataset.py", "templates.py", "phi-3-mini-4k.jinja"} <= names
    monkeypatch.setattr(cache, "_code", lambda: [Path(cache.__file__)])
    assert load(chats).cached is None


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit flipped": lambda entry: flip(entry / "train.arrow"),
    "cut off": lambda entry: os.truncate(entry / "train.arrow", 100),
    "a file gone": lambda entry: (entry / "report.json").unlink(),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "another manifest": lambda entry: (entry / "manifest.json").write_text("[]"),
    "half a manifest": lambda entry: (entry / "manifest.json").write_text('{"train.arrow":'),
    "report of another age": lambda entry: resign(entry, "report.json", b'{"rows": 1}'),
    "no Arrow": lambda entry: resign(entry, "train.arrow", b"something else"),
    "manifest leads elsewhere": lambda entry: (entry / "manifest.json").write_text('{"../../../../etc/passwd": "x"}'),
}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def resign(entry: Path, name: str, data: bytes) -> None:
    (entry / name).write_bytes(data)
    sums = json.loads((entry / "manifest.json").read_text()) | {name: cache._sha256(entry / name)}
    (entry / "manifest.json").write_text(json.dumps(sums))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_ignored_and_written_again(
    damage: str, chats: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = load(chats)
    (entry,) = home.iterdir()
    DAMAGE[damage](entry)
    with caplog.at_level(logging.WARNING):
        again = load(chats)
    assert again.cached is None and content(again) == content(fresh)
    assert "damaged, so the data is encoded again" in caplog.text
    assert load(chats).cached == entry and [one.name for one in home.iterdir()] == [entry.name]


def test_wrong_data_is_wrong_again_and_never_kept(tmp_path: Path, home: Path) -> None:
    file = write(tmp_path / "a.jsonl")
    for _ in range(2):
        with pytest.raises(DataError, match="a.jsonl:61"):
            load(file, "data.on_error=stop")
    assert not home.exists()


def test_a_folder_that_cannot_be_written_costs_a_warning_and_not_the_run(
    chats: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.parent.mkdir(parents=True)
    home.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        data = load(chats)
    assert len(data.train) and "not kept for the next run" in caplog.text


def test_saved_data_sets_are_kept_and_hub_ids_never(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"q {n}", "completion": "a"} for n in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    load(tmp_path / "saved")
    assert load(tmp_path / "saved").cached is not None
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    for _ in range(2):
        assert load(Path("somebody/chats")).cached is None
    assert len(list(home.iterdir())) == 1


def test_a_strangers_adapter_is_part_of_the_key_by_its_source_or_switches_the_cache_off(
    tmp_path: Path, chats: Path, home: Path
) -> None:
    def stranger(suffix: str) -> Any:
        file = tmp_path / "stranger.py"
        file.write_text(f"""
def adapt(row):
    answer = row['completion'] + {suffix!r}
    return [{{'role': 'user', 'content': row['prompt']}}, {{'role': 'assistant', 'content': answer}}]

def make(suffix):
    return lambda row: adapt(row)

class Callable:
    def __call__(self, row):
        return adapt(row)
""")
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        spec = util.spec_from_file_location("stranger", file)
        assert spec is not None and spec.loader is not None
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.dont_write_bytecode = before
        return module

    def run(adapt: Any) -> Data:
        return load(chats, "data.format=stranger", adapters=ADAPTERS | {"stranger": adapt})

    one, again = run(stranger("!").adapt), run(stranger("!").adapt)
    other = run(stranger("?!").adapt)
    assert one.cached is None and again.cached is not None and other.cached is None
    assert other.train[:] != one.train[:] == again.train[:]
    module = stranger("!")

    def closed(row: Any) -> Any:
        return module.adapt(row)

    for adapt in (module.Callable(), closed, partial(module.adapt)):
        assert run(adapt).cached is None and run(adapt).cached is None
    assert len(list(home.iterdir())) == 2
    overridden = ADAPTERS | {"prompt_completion": closed}  # what "auto" finds would be the stranger's
    assert load(chats, adapters=overridden).cached is None and len(list(home.iterdir())) == 2


def test_the_entries_used_last_are_kept_and_left_overs_go(
    chats: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        load(chats, f"seed={seed}")
    entries = {entry.name for entry in home.iterdir()}
    load(chats, "seed=0")  # used again
    for dead, age in ((home / ".writing-old", 10**6), (home / ".writing-now", 0)):
        dead.mkdir()
        os.utime(dead, (dead.stat().st_mtime - age,) * 2)
    size = sum(file.stat().st_size for file in next(iter(home.glob("[!.]*"))).iterdir())
    monkeypatch.setattr(cache, "LIMIT", int(2.5 * size))
    load(chats, "seed=3")
    left = {entry.name for entry in home.iterdir()}
    assert len(left & entries) == 1 and len(left) == 3 and ".writing-now" in left
    assert load(chats, "seed=0").cached is not None and load(chats, "seed=1").cached is None


def _load_in_child(file: str) -> None:
    assert len(load(Path(file), "data.eval_fraction=0.2").train)


def test_processes_at_the_same_time_leave_one_whole_entry(chats: Path, home: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_load_in_child, args=(str(chats),)) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 6
    assert len(list(home.iterdir())) == 1 and load(chats, "data.eval_fraction=0.2").cached is not None
