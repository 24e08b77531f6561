"""Activation from the environment: the folder on PYTHONPATH, the variable, and what is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny

from phi3_lora_plugin.chat.encode import EncodeError, encode
from phi3_lora_plugin.hosts import llamafactory, llamafactory_v1
from phi3_lora_plugin.hosts.activate import TARGETS
from phi3_lora_plugin.hosts.on_import import when_imported
from phi3_lora_plugin.hosts.startup import folder

# Olive's table, in the module that has it, so that a fresh interpreter need not import anything heavy.
_OLIVE = "MODELS_TO_LORA_TARGET_MODULES_MAPPING = {'phi3': ['o_proj', 'qkv_proj']}\n"
_SHOW = "from olive.common.hf.mappings import MODELS_TO_LORA_TARGET_MODULES_MAPPING as m; print(m['phi3'])"
_STOCK = "['o_proj', 'qkv_proj']"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    home = tmp_path / "packages"
    (home / "olive" / "common" / "hf").mkdir(parents=True)
    (home / "olive" / "common" / "hf" / "mappings.py").write_text(_OLIVE)
    return home


def python(program: str, *path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "PHI3_LORA_ACTIVATE")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), **variables}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_the_variable_switches_it_on_and_says_so_once(packages: Path) -> None:
    done = python(_SHOW, folder(), packages, PHI3_LORA_ACTIVATE="1")
    assert done.stdout.strip() == str(TARGETS["phi3"])
    first, second = done.stderr.splitlines()
    assert first == "phi3-lora: active, because PHI3_LORA_ACTIVATE=1; PHI3_LORA_ACTIVATE=0 switches it off"
    assert second.startswith("phi3-lora: Olive's LoRA pass goes to qkv_proj")


@pytest.mark.parametrize("variables", [{}, {"PHI3_LORA_ACTIVATE": "0"}, {"PHI3_LORA_ACTIVATE": ""}])
def test_it_is_never_on_by_itself(packages: Path, variables: dict[str, str]) -> None:
    done = python(_SHOW, folder(), packages, **variables)
    assert done.stdout.strip() == _STOCK and done.stderr == ""


def test_the_variable_alone_does_nothing(packages: Path) -> None:
    assert python(_SHOW, packages, PHI3_LORA_ACTIVATE="1").stdout.strip() == _STOCK


def test_a_wrong_value_ends_the_process_in_a_sentence() -> None:
    done = python("print('reached')", folder(), PHI3_LORA_ACTIVATE="maybe")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "SwitchError: PHI3_LORA_ACTIVATE=maybe: expected 1 or 0\n"


def test_a_process_that_imports_none_of_them_hears_nothing_and_loads_nothing() -> None:
    done = python("import sys; print('torch' in sys.modules)", folder(), PHI3_LORA_ACTIVATE="1")
    assert done.stdout.strip() == "False" and done.stderr == ""


@pytest.mark.parametrize("asks_for_plugins", [False, True])
def test_an_axolotl_that_asks_nobody_for_plugins_gets_ours_by_name(packages: Path, asks_for_plugins: bool) -> None:
    for module, text in {
        "cli/config": "def prepare_plugins(cfg): print(cfg['plugins'])\n",
        "integrations/base": "def get_builtin_plugins(): ...\n" if asks_for_plugins else "",
    }.items():
        (packages / "axolotl" / module).parent.mkdir(parents=True)
        (packages / "axolotl" / f"{module}.py").write_text(text)
    show = "from axolotl.cli.config import prepare_plugins as p; p({'plugins': ['theirs']})"
    done = python(show, folder(), packages, PHI3_LORA_ACTIVATE="1")
    ours = [] if asks_for_plugins else ["phi3_lora_plugin.hosts.axolotl.Phi3LoraPlugin"]
    assert done.stdout.strip() == str(["theirs", *ours])


def test_only_the_first_process_of_a_run_speaks(packages: Path) -> None:
    done = python(_SHOW, folder(), packages, PHI3_LORA_ACTIVATE="1", RANK="1")
    assert done.stdout.strip() == str(TARGETS["phi3"]) and done.stderr == ""


def test_the_sitecustomize_that_it_hides_runs_too(packages: Path) -> None:
    (packages / "sitecustomize.py").write_text("import sys; sys.hidden = 'ran'\n")
    done = python("import sys; print(sys.hidden)", folder(), packages, PHI3_LORA_ACTIVATE="1")
    assert done.stdout.strip() == "ran"


def test_a_python_without_this_package_starts_as_ever(packages: Path) -> None:
    environment = {"PYTHONPATH": str(folder()), "PHI3_LORA_ACTIVATE": "1", "PATH": os.environ.get("PATH", "")}
    # -S leaves site-packages out, and with them this package; sitecustomize is then imported by hand.
    program = "import sitecustomize; print('started')"
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "started" and done.stderr == ""


def test_asking_whether_a_module_exists_does_not_use_up_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waited_for.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[Any] = []

    def then(module: Any) -> Any:
        seen.append(module.value)
        return lambda: seen.clear()

    undo = when_imported("waited_for", then)
    assert find_spec("waited_for") is not None and not seen
    import waited_for  # type: ignore[import-not-found]  # noqa: F401

    assert seen == [1]
    undo()
    monkeypatch.delitem(sys.modules, "waited_for")
    assert seen == []


def test_llamafactory_s_own_command_gets_a_prepared_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.config().save_pretrained(tmp_path)
    monkeypatch.setattr(llamafactory, "look_up", lambda name: pytest.fail(f"{name} was asked for"))
    ran: list[Any] = []

    def run_exp(args: Any = None, callbacks: Any = None) -> None:
        ran.append((args, callbacks))

    run = llamafactory.wrapped(run_exp)
    given = {"model_name_or_path": str(tmp_path), "template": "phi", "phi3_lora": {"masks": False}}
    run(given, ["own"])
    (args, callbacks), *_ = ran
    assert "phi3_lora" not in args and callbacks[0] == "own" and type(callbacks[1]).__name__ == "LoraCheckpoint"
    run(given | {"phi3_lora": False})
    assert ran[1][1] == [] and ran[1][0]["template"] == "phi"
    with pytest.raises(SystemExit) as ended:
        run(given | {"lora_target": "q_proj"})
    assert ended.value.code == 2
    assert llamafactory.wrapped(run_exp).__wrapped__ is run_exp


def test_v1_renders_text_thoughts_and_calls_as_they_are_trained_everywhere_else() -> None:
    def part(kind: str, value: str) -> dict[str, str]:
        return {"type": kind, "value": value}

    tokenizer = tiny.tokenizer()
    chat = [
        {"role": "user", "content": [part("text", "what?")]},
        {"role": "assistant", "content": [part("text", "the "), part("text", "fox.")], "loss_weight": 0.0},
        {"role": "user", "content": [part("text", "the dog?")]},
        {"role": "assistant", "content": [part("text", "lazy.")]},
    ]
    plain = [{"role": turn["role"], "content": "".join(one["value"] for one in turn["content"])} for turn in chat]
    expected = encode(plain, tokenizer, train_on="last_turn")
    found = llamafactory_v1.render(tokenizer, chat)
    assert {key: found[key] for key in ("input_ids", "labels")} == expected
    assert found["loss_weights"] == [float(label != -100) for label in expected["labels"]]
    half = llamafactory_v1.render(tokenizer, [*chat[:3], chat[3] | {"loss_weight": 0.5}])
    assert half["loss_weights"] == [0.5 * float(label != -100) for label in expected["labels"]]
    prompt = llamafactory_v1.render(tokenizer, chat[:1], is_generate=True)
    assert prompt["input_ids"] == expected["input_ids"][: len(prompt["input_ids"])]
    with pytest.raises(EncodeError, match="part of type image_url"):
        llamafactory_v1.render(tokenizer, [{"role": "user", "content": [part("image_url", "x")]}, chat[1]])


def test_a_library_that_has_changed_is_named_and_its_import_is_left_alone(packages: Path) -> None:
    (packages / "olive" / "common" / "hf" / "mappings.py").write_text("")
    show = "import olive.common.hf.mappings; print('imported')"
    done = python(show, folder(), packages, PHI3_LORA_ACTIVATE="1")
    assert done.returncode == 0 and done.stdout.strip() == "imported" and "Traceback" not in done.stderr
    assert "not active in olive: olive-ai has no " in done.stderr and "switched off: every projection" in done.stderr
