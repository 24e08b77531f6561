"""The drift alarm: hooks of installed hosts still have the names and arguments that this package hangs on."""

from __future__ import annotations

import json
from pathlib import Path

import host_hooks
import pytest

RECORDED = json.loads((Path(__file__).parent / "host_hooks.json").read_text(encoding="utf-8"))


def differences(host: str, found: dict[str, str]) -> list[str]:
    """A line for each hook of ours that is gone or is called in another way."""
    return [f"{name}: was {was}, is {found.get(name, 'absent')}" for name, was in RECORDED[host].items()
            if found.get(name, "absent") != was]  # fmt: skip


@pytest.mark.parametrize("host", host_hooks.HOOKS)
def test_a_host_calls_what_we_hang_on_as_it_did(host: str) -> None:
    found = host_hooks.installed(host)
    if found is None:
        pytest.skip(f"{host} is not installed here; PHI3_HOST_ENVS=FOLDER names environments of tools/host_matrix")
    changed = differences(host, found)
    assert not changed, "\n".join([f"{host} has changed; see hosts/ and docs/hosts.md:", *changed])


def test_the_alarm_hears_a_renamed_hook_a_new_argument_and_a_lost_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = dict(RECORDED["swift"])
    home = tmp_path / "swift" / "lib" / "python3.11" / "site-packages"
    sources = {
        "swift/__init__.py": "",
        "swift/callbacks/mapping.py": "callbacks = {}\n",
        "swift/trainers/mixin.py": "class SwiftMixin:\n    def _get_callbacks(self, args, extra): ...\n",
        "swift/template/register.py": "TEMPLATE_MAPPING: dict = {}\n"
        "def register_template(template_meta: object, *, exist_ok: bool = False) -> None: ...\n",
        "swift/template/template_meta.py": "class TemplateMeta:\n    def init(self, tokenizer): ...\n",
    }
    for name, text in sources.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    monkeypatch.setenv("PHI3_HOST_ENVS", str(tmp_path))
    monkeypatch.setattr("sys.path", [])

    found = host_hooks.installed("swift")
    assert found is not None and set(found) == set(recorded)
    said = "\n".join(differences("swift", found))
    assert "mapping.py:=callbacks_map: was there, is absent" in said
    assert "_get_callbacks: was (self, args), is (self, args, extra)" in said
    assert "base.py:Template._encode" in said
    assert "register_template" not in said and "TemplateMeta.init" not in said


def test_what_our_hosts_define_is_called_as_the_hosts_call_it() -> None:
    """Our own overrides take what the recorded hooks are given."""
    root = Path(host_hooks.__file__).parents[1] / "phi3_lora_plugin" / "hosts"
    ours = {
        "axolotl": ("axolotl.py", "Phi3LoraPlugin", "axolotl/integrations/base.py:BasePlugin"),
        "swift": ("swift/register.py", "Phi3Template", "swift/template/base.py:Template"),
    }
    checked = []
    for host, (file, name, theirs) in ours.items():
        for method, signature in host_hooks.signatures((root / file).read_text(encoding="utf-8")).items():
            owner, _, hook = method.partition(".")
            if owner == name and f"{theirs}.{hook}" in RECORDED[host]:
                assert signature == RECORDED[host][f"{theirs}.{hook}"], method
                checked.append(method)
    assert "Phi3LoraPlugin.register" in checked and "Phi3Template._encode" in checked
