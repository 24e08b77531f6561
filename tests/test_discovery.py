"""Discovery on real fake distributions: folders with METADATA and entry_points.txt that stand on sys.path."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import phi3_lora
from pages import blocks, page
from typer.testing import CliRunner

from phi3_lora_plugin import load_plugins
from phi3_lora_plugin.cli import app
from phi3_lora_plugin.plugins.discovery import PluginError, PluginWarning

Install = Callable[..., None]

GOOD = """
from phi3_lora_plugin import hookimpl

@hookimpl
def register_models(register):
    register("{0}-loader", lambda recipe: ("model", "tokenizer"))

@hookimpl
def register_dataset_adapters(register):
    register("{0}-rows", lambda row: [{{"role": "user", "content": row["text"]}}])
"""

REGISTERS = """
from phi3_lora_plugin import hookimpl

@hookimpl
def register_dataset_adapters(register):
    register("{0}", lambda row: [])
"""

COMPARES = """
from phi3_lora_plugin import hookimpl

class Odd:
    __hash__ = object.__hash__
    register_models = hookimpl(lambda self, register: register('odd', print))
    def __eq__(self, other): {0}

target = Odd()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(dist, name, source)` puts a distribution on sys.path whose entry point `name` is a module of `source`.

    `module` names the module, `target` replaces the whole value, `entries` the whole text of the group, `folder` the
    name of the metadata folder, `site` the folder under the test's own, and `requires` adds lines to METADATA.
    """
    monkeypatch.delenv("PHI3_LORA_BLOCK_PLUGINS", raising=False)
    before = set(sys.modules)

    def add(
        dist: str,
        name: str,
        source: str = "",
        *,
        version: str = "1.0",
        module: str | None = None,
        target: str | None = None,
        entries: str | None = None,
        folder: str | None = None,
        site: str = "site",
        requires: tuple[str, ...] = (),
        metadata: bool = True,
    ) -> None:
        module = module or f"fake_{dist}_{name}".replace("-", "_")
        home = tmp_path / site
        if not home.is_dir():
            home.mkdir()
            monkeypatch.syspath_prepend(str(home))
        if source:
            (home / f"{module}.py").write_text(source, encoding="utf-8")
        info = home / (folder or f"{dist.replace('-', '_')}-{version}.dist-info")
        info.mkdir(exist_ok=True)
        if metadata:
            lines = ["Metadata-Version: 2.1", f"Name: {dist}", f"Version: {version}"]
            lines += [f"Requires-Dist: {line}" for line in requires]
            (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = entries if entries is not None else f"{name} = {target or module}"
        (info / "entry_points.txt").write_text(f"[phi3_lora_plugin]\n{text}\n", encoding="utf-8")
        importlib.invalidate_caches()

    yield add
    for module in set(sys.modules) - before:
        if module.startswith("fake_"):
            del sys.modules[module]


def names(plugins: Any) -> list[str]:
    return [plugin.name for plugin in plugins.plugins]


def load_with_one_warning() -> tuple[Any, str]:
    """Load softly; return the plugins and the text of the one warning that there must be."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugins = load_plugins()
    # The finder of importlib_metadata, where something has imported that, has no find_spec, which Python warns of.
    caught = [warning for warning in caught if warning.category is not ImportWarning]
    assert [warning.category for warning in caught] == [PluginWarning]
    assert caught[0].filename == __file__  # it points at who called load_plugins, not into the library
    return plugins, str(caught[0].message)


# ---- loading


def test_our_own_plugin_comes_through_its_entry_point() -> None:
    ours = next(plugin for plugin in load_plugins().plugins if plugin.name == "phi3")
    assert (ours.distribution, ours.target) == ("phi3-lora-plugin", "phi3_lora_plugin.plugins.builtin")
    registers = ("register_dataset_adapters", "register_exporters", "register_models", "register_recipes")
    assert ours.hooks == (*registers, "trainer_callbacks")


def test_a_stranger_is_loaded_with_provenance(install: Install) -> None:
    install("good-dist", "good", GOOD.format("good"), version="2.5")
    plugins = load_plugins(strict=False)
    owner = plugins.owner("models", "good-loader")
    assert str(owner) == "plugin 'good' (good-dist 2.5)"
    assert plugins.registered(owner) == {"models": ["good-loader"], "dataset_adapters": ["good-rows"]}
    assert plugins.pick("models", "good-loader")(None) == ("model", "tokenizer")
    assert plugins.pick("dataset_adapters", "good-rows")({"text": "hi"}) == [{"role": "user", "content": "hi"}]


def test_strict_raises_the_first_failure_as_it_is_and_names_the_plugin(install: Install) -> None:
    install("broken-dist", "broken", "raise ZeroDivisionError('as it is')")
    with pytest.raises(ZeroDivisionError, match="as it is") as caught:
        load_plugins(strict=True)
    assert "plugin 'broken' (broken-dist 1.0" in caught.value.__notes__[0]


def test_a_wrong_signature_is_skipped_and_leaves_no_hook_behind(install: Install) -> None:
    source = GOOD.format("bad") + "\n@hookimpl\ndef trainer_callbacks(recipe, trainer): ...\n"
    install("bad-dist", "bad", source)
    plugins, warning = load_with_one_warning()
    assert "trainer_callbacks" in warning and "'trainer'" in warning
    assert "bad" not in names(plugins)
    assert "bad-loader" not in plugins.named("models")  # the hooks before the wrong one are gone too
    assert all(hook.plugin_name != "bad" for hook in plugins.manager.hook.register_models.get_hookimpls())


def test_an_unknown_hook_is_skipped_with_the_nearest_name(install: Install) -> None:
    install("typo-dist", "typo", GOOD.format("typo").replace("register_models", "register_modelz"))
    plugins, warning = load_with_one_warning()
    assert "unknown hook 'register_modelz'; did you mean 'register_models'?" in warning
    assert "typo" not in names(plugins) and "typo-rows" not in plugins.named("dataset_adapters")
    plugins.manager.check_pending()


def test_an_optional_hook_of_another_host_is_fine(install: Install) -> None:
    source = GOOD.format("two") + "\n@hookimpl(optionalhook=True)\ndef another_hosts_hook(thing): ...\n"
    install("two-dist", "two", source)
    assert "two" in names(load_plugins(strict=True))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("target = None", "None has no hook"),
        ("target = 5", "5 has no hook"),
        ("class Odd:\n  def __eq__(self, other): raise OSError('odd')\ntarget = Odd()", "unhashable"),
        ("class Odd:\n  def __hash__(self): raise OSError('odd')\ntarget = Odd()", "OSError: odd"),
        ("import pluggy\nimpl = pluggy.HookimplMarker('phi3-lora-plugin')", "has no attribute 'target'"),
        (COMPARES.format("return True"), "equals any other object"),
        (COMPARES.format("raise OSError('odd')"), "OSError: odd"),
    ],
)
def test_an_object_that_cannot_be_registered_is_skipped(install: Install, source: str, said: str) -> None:
    install("odd-dist", "odd", source, target="fake_odd_dist_odd:target")
    install("pretty-dist", "pretty", GOOD.format("pretty"))
    plugins, warning = load_with_one_warning()
    assert said in warning and "odd-dist 1.0" in warning
    assert "odd" not in names(plugins) and "pretty-loader" in plugins.named("models")


@pytest.mark.parametrize(
    "source",
    [
        "import pluggy\n@pluggy.HookimplMarker('phi3-lora-plugin')\ndef register_models(register): ...",
        "def register_models(register): ...",
        "def __getattr__(name): raise AttributeError(name)\ndef __dir__(): return ['register_models']",
    ],
    ids=["marker of another name", "no marker", "lazy module"],
)
def test_a_plugin_without_a_hook_of_ours_is_not_silent(install: Install, source: str) -> None:
    install("mute-dist", "mute", source)
    plugins, warning = load_with_one_warning()
    # Up to pluggy 1.6, looking for hooks runs the lazy module's `__getattr__`.
    assert "has no hook; expected functions marked" in warning or "AttributeError: register_models" in warning
    assert "mute" not in names(plugins)


def test_an_argument_that_a_default_switches_off_is_refused(install: Install) -> None:
    source = "from phi3_lora_plugin import hookimpl\n@hookimpl\ndef trainer_callbacks(recipe=None): ...\n"
    install("off-dist", "off", source)
    plugins, warning = load_with_one_warning()
    assert "trainer_callbacks gives argument 'recipe' a default, so pluggy never passes it" in warning
    assert "off" not in names(plugins)


def test_an_instance_with_methods_is_a_plugin_too(install: Install) -> None:
    source = (
        "from phi3_lora_plugin import hookimpl\n"
        "class Mine:\n"
        "  @hookimpl\n"
        "  def register_models(self, register): register('methodical', print)\n"
        "target = Mine()\n"
    )
    install("object-dist", "object", source, target="fake_object_dist_object:target")
    assert load_plugins(strict=True).pick("models", "methodical") is print


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("x = 1\n\nraise ValueError('why')", "fake_bad_dist_bad.py:3)"),
        ("def f(:\n  pass", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import sys; sys.exit()", "SystemExit"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("class Mine(BaseException): pass\nraise Mine('own')", "Mine: own"),
        ("raise ImportError('odd', name=5)", "ImportError: odd"),
        ("raise ModuleNotFoundError('odd', name=5)", "ModuleNotFoundError: odd"),
        ("class Odd(ModuleNotFoundError):\n  name = property(lambda self: 1 / 0)\nraise Odd('x')", "Odd: x"),
        ("class Odd(Exception):\n  def __str__(self): raise RuntimeError\nraise Odd", "Odd: its message cannot be"),
        ("class Odd(Exception):\n  def __str__(self): raise SystemExit\nraise Odd", "Odd: its message cannot be"),
        ("class Odd(Exception):\n  def __str__(self): return 5\nraise Odd", "Odd: its message cannot be shown"),
        ("class Odd(Exception):\n  add_note = None\nraise Odd('quiet')", "Odd: quiet"),
        ("raise type('\\x1b[31mRed', (Exception,), {})('\\x1b]0;title\\x07gone\\x1b[2J\\r\\nhere')", "Red: gone here"),
        ("raise ValueError('a' * 10_000_000)", "ValueError: aaa"),
    ],
)
def test_whatever_is_raised_at_import_costs_that_plugin_only(install: Install, source: str, said: str) -> None:
    install("bad-dist", "bad", source, version="0.3")
    install("good-dist", "good", GOOD.format("good"))
    plugins, warning = load_with_one_warning()
    assert said in warning and "plugin 'bad' (bad-dist 0.3" in warning
    assert len(warning) < 1000 and warning.isprintable()
    assert [failure.name for failure in plugins.failures] == ["bad"]
    assert {"phi3", "good"} <= set(names(plugins)) and "good-loader" in plugins.named("models")
    with pytest.raises(Exception):  # noqa: B017 - as it is where that is possible; never the end of the process
        load_plugins(strict=True)


def test_ctrl_c_leaves_and_says_which_plugin_was_imported(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("slow-dist", "slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_plugins()
    assert "plugin 'slow' was imported; PHI3_LORA_BLOCK_PLUGINS=slow skips it" in capsys.readouterr().err


def test_what_plugins_print_does_not_land_on_stdout(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    source = GOOD.format("loud") + "    print('registered')\nprint('imported')\n"
    source += "@hookimpl\ndef trainer_callbacks(recipe):\n    print('asked')\n    yield from ()\n"
    source = source.replace("lambda recipe: (", "lambda recipe: (print('loads') or ").replace(
        "lambda row: [", "lambda row: [*(print('adapts') or ()), "
    )
    install("loud-dist", "loud", source)
    plugins = load_plugins()
    plugins.callbacks(Wanted("loud-loader"), only="loud")
    assert plugins.load_model(Wanted("loud-loader")) == ("model", "tokenizer")
    plugins.adapters()["loud-rows"]({"text": "hi"})
    out, err = capsys.readouterr()
    assert out == "" and err.split() == ["imported", "asked", "loads", "registered", "adapts"]


class Wanted:
    """What `load_model` reads of a recipe."""

    def __init__(self, loader: str) -> None:
        self.model = type("Model", (), {"loader": loader})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no licence')", "failed: ValueError: no licence"),
        ("raise SystemExit(0)", "failed: SystemExit: 0"),
        ("return None", "gave None; expected (model, tokenizer)"),
        ("return 5 * 'x' / 2", "failed: TypeError"),
    ],
)
def test_a_loader_that_fails_is_named_with_its_plugin(install: Install, body: str, said: str) -> None:
    source = "from phi3_lora_plugin import hookimpl\n\n"
    source += f"def load(recipe):\n    {body}\n\n@hookimpl\ndef register_models(register): register('mine', load)\n"
    install("bad-dist", "bad", source, version="3.1")
    with pytest.raises(PluginError) as caught:
        load_plugins(strict=True).load_model(Wanted("mine"))
    assert "plugin 'bad' (bad-dist 3.1): model loader 'mine'" in str(caught.value) and said in str(caught.value)
    assert said.startswith("gave") or "fake_bad_dist_bad.py:4)" in str(caught.value)


def test_an_adapter_that_fails_is_named_with_its_plugin(install: Install) -> None:
    from phi3_lora_plugin.chat.adapt import adapted
    from phi3_lora_plugin.chat.turns import RowError

    install("bad-dist", "bad", REGISTERS.format("mine").replace("lambda row: []", "lambda row: row['absent']"))
    adapt = load_plugins(strict=True).adapters("mine")["mine"]
    with pytest.raises(RowError, match=r"data format 'mine': plugin 'bad' \(bad-dist 1.0\): KeyError: 'absent'"):
        adapted(adapt, {"text": "x"}, "mine")


def test_a_claim_on_a_preset_costs_that_name_and_not_the_list(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    source = REGISTERS.format("tiny-cpu").replace("dataset_adapters", "recipes").replace("lambda row: []", "'/x.yaml'")
    install("squat-dist", "squat", source + "    register('theirs', '/y.yaml')\n")
    with pytest.warns(PluginWarning, match="'tiny-cpu' is claimed twice"):
        assert phi3_lora("recipes", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert "phi3.5-mini-lora" in rows and "theirs" in rows
    assert rows["tiny-cpu"]["group"] == "broken" and "squat-dist" in rows["tiny-cpu"]["problems"][0]
    with pytest.warns(PluginWarning), pytest.raises(PluginError, match="'tiny-cpu' is claimed twice"):
        load_plugins().pick("recipes", "tiny-cpu")


def test_blocked_names_are_never_imported(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("hang-dist", "hangs", "raise SystemExit('imported')")
    install("hang-dist-2", "hangs-too", "raise SystemExit('imported')")
    monkeypatch.setenv("PHI3_LORA_BLOCK_PLUGINS", " hangs, hangs-too\tno-such-plugin,")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins = load_plugins()
    assert plugins.blocked == ("hangs", "hangs-too", "no-such-plugin")
    assert not any(module.startswith("fake_hang") for module in sys.modules)
    with pytest.raises(PluginError, match="blocked by PHI3_LORA_BLOCK_PLUGINS: hangs, hangs-too, no-such-plugin"):
        plugins.pick("models", "hung-model")


def test_our_own_plugin_can_be_blocked(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3_LORA_BLOCK_PLUGINS", "phi3")
    with pytest.raises(PluginError, match="(?s)available: none.*blocked by PHI3_LORA_BLOCK_PLUGINS: phi3"):
        load_plugins().pick("models", "phi3")


def test_plugins_load_sorted_by_name_whatever_the_folder_says(install: Install) -> None:
    for dist, name in [("a-dist", "zz"), ("z-dist", "aa"), ("m-dist", "mm")]:
        install(dist, name, GOOD.format(name))
    found = [name for name in names(load_plugins()) if name in ("zz", "aa", "mm")]
    assert found == ["aa", "mm", "zz"]


def test_loading_twice_is_harmless(install: Install) -> None:
    install("good-dist", "good", GOOD.format("good"))
    install("broken-dist", "broken", "raise ValueError('each time')")
    first, _ = load_with_one_warning()
    second, _ = load_with_one_warning()
    assert names(first) == names(second) and first.manager is not second.manager
    assert len(first.failures) == len(second.failures) == 1
    assert set(first.named("models")) == set(second.named("models"))


def test_a_failed_load_leaves_no_state(install: Install, tmp_path: Path) -> None:
    install("broken-dist", "broken", "raise ValueError('not yet')")
    with pytest.raises(ValueError, match="not yet"):
        load_plugins(strict=True)
    source = GOOD.format("repaired") + "\n# of another length, so that no stale byte code is taken for it\n"
    (tmp_path / "site" / "fake_broken_dist_broken.py").write_text(source, encoding="utf-8")
    importlib.invalidate_caches()
    assert "repaired-loader" in load_plugins(strict=True).named("models")


# ---- entry-point names


def test_an_entry_point_name_of_two_distributions_fails_naming_both(install: Install) -> None:
    install("first-dist", "same", "raise SystemExit('imported')", version="1.1")
    install("second-dist", "same", "raise SystemExit('imported')", version="2.2")
    plugins, warning = load_with_one_warning()
    for part in ("'same'", "first-dist 1.1", "second-dist 2.2", "claimed twice"):
        assert part in warning
    assert "same" not in names(plugins) and "phi3" in names(plugins)
    with pytest.raises(PluginError, match="claimed twice"):
        load_plugins(strict=True)


def test_an_entry_point_name_twice_in_one_distribution_fails(install: Install) -> None:
    install("one-dist", "same", entries="same = fake_one\nsame = fake_two")
    plugins, warning = load_with_one_warning()
    assert "claimed twice" in warning and "fake_one" in warning and "fake_two" in warning
    assert "same" not in names(plugins)


def test_the_same_line_twice_in_one_distribution_is_harmless(install: Install) -> None:
    install("one-dist", "same", GOOD.format("same"), module="fake_one", entries="same = fake_one\nsame = fake_one")
    assert names(load_plugins(strict=True)).count("same") == 1


def test_the_same_distribution_twice_on_the_path_is_no_clash(install: Install) -> None:
    install("Twin.Dist", "twin", GOOD.format("old"), version="1.0", module="fake_twin", site="later")
    install("twin-dist", "twin", GOOD.format("new"), version="2.0", module="fake_twin", site="earlier")
    plugins = load_plugins(strict=True)
    twins = [plugin for plugin in plugins.plugins if plugin.name == "twin"]
    assert [twin.version for twin in twins] == ["2.0"]  # the one that Python imports
    assert "new-loader" in plugins.named("models") and "old-loader" not in plugins.named("models")


def test_folder_names_that_agree_up_to_the_first_dash_are_two_strangers(install: Install) -> None:
    install("my-plugin", "mine", GOOD.format("mine"), folder="my-plugin-1.0.dist-info")
    install("my-other", "other", GOOD.format("other"), folder="my-other-1.0.dist-info")
    assert {"mine", "other"} <= set(names(load_plugins(strict=True)))


def test_one_module_under_two_names_is_loaded_once(install: Install) -> None:
    entries = "alpha = fake_once\nbeta = fake_once"
    install("two-names-dist", "alpha", GOOD.format("once"), module="fake_once", entries=entries)
    plugins, warning = load_with_one_warning()
    assert "'beta'" in warning and "the same object is loaded already, as plugin 'alpha'" in warning
    assert "alpha" in names(plugins) and "beta" not in names(plugins)
    assert "once-loader" in plugins.named("models")


@pytest.mark.parametrize("text", ["no equals sign", "x = \udcff"], ids=["malformed", "not utf-8"])
def test_a_strangers_unreadable_entry_points_cost_one_warning(install: Install, tmp_path: Path, text: str) -> None:
    install("torn-dist", "torn")
    path = tmp_path / "site" / "torn_dist-1.0.dist-info" / "entry_points.txt"
    path.write_bytes(f"[phi3_lora_plugin]\n{text}\n".encode("utf-8", "surrogateescape"))
    install("good-dist", "good", GOOD.format("good"))
    plugins, warning = load_with_one_warning()
    assert "entry_points.txt that cannot be read" in warning and "torn_dist" in warning
    assert {"good", "phi3"} <= set(names(plugins))
    with pytest.raises((TypeError, ValueError)):
        load_plugins(strict=True)


def test_a_distribution_without_metadata_still_loads(install: Install) -> None:
    install("bare-dist", "bare", GOOD.format("bare"), metadata=False)
    assert "bare-loader" in load_plugins(strict=True).named("models")
    pytest.importorskip("importlib_metadata")  # its distributions replace Python's own once it is imported
    assert "bare-loader" in load_plugins(strict=True).named("models")


# ---- registered names


def test_a_name_of_two_distributions_raises_at_request_naming_both(install: Install) -> None:
    install("first-dist", "first", REGISTERS.format("tickets"), version="1.1")
    install("second-dist", "second", REGISTERS.format("tickets"), version="2.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins = load_plugins()  # finding them is no error yet
    with pytest.warns(PluginWarning), pytest.raises(PluginError) as caught:
        plugins.pick("dataset_adapters", "tickets")
    for part in ("'tickets' is claimed twice", "'first' (first-dist 1.1)", "'second' (second-dist 2.2)", "=second"):
        assert part in str(caught.value)
    assert "tickets" not in plugins.named("dataset_adapters")  # it is nobody's
    assert "messages" in plugins.named("dataset_adapters")
    with pytest.raises(PluginError, match="claimed twice"):
        plugins.adapters("tickets")
    assert "first" in names(plugins) and "second" in names(plugins)
    with pytest.raises(PluginError) as caught:
        load_plugins(strict=True)
    assert any(entry.path.name == "fake_second_dist_second.py" for entry in caught.traceback)  # in its own line


@pytest.mark.parametrize("kind", ["models", "recipes"])
def test_every_kind_of_name_has_one_owner(install: Install, kind: str) -> None:
    for name in ("first", "second"):
        source = REGISTERS.format("contested").replace("dataset_adapters", kind)
        if kind == "recipes":
            source = source.replace("lambda row: []", "'/tmp/contested.yaml'")
        install(f"{name}-dist", name, source)
    with pytest.warns(PluginWarning), pytest.raises(PluginError, match=r"(?s)first-dist.*second-dist"):
        load_plugins().pick(kind, "contested")


def test_a_clash_costs_only_the_contested_name(install: Install) -> None:
    install("first-dist", "first", REGISTERS.format("tickets"))
    second = REGISTERS.format("fine") + "    register('tickets', lambda row: [])\n"
    install("second-dist", "second", second)
    install("third-dist", "third", REGISTERS.format("third"))
    plugins = load_plugins()
    with pytest.warns(PluginWarning, match="'second' .* cannot have a name: .*'tickets' is claimed twice"):
        plugins.pick("dataset_adapters", "third")
    assert plugins.owner("dataset_adapters", "fine").name == "second"
    with pytest.raises(PluginError, match="'tickets' is claimed twice"):
        plugins.pick("dataset_adapters", "tickets")


def test_a_plugin_that_swallows_the_clash_does_not_hide_it(install: Install) -> None:
    install("first-dist", "first", REGISTERS.format("tickets"))
    swallow = REGISTERS.format("tickets").replace(
        '    register("tickets", lambda row: [])',
        '    try:\n        register("tickets", lambda row: [])\n    except Exception:\n        pass',
    )
    install("second-dist", "second", swallow)
    plugins = load_plugins()
    with pytest.warns(PluginWarning), pytest.raises(PluginError, match="claimed twice"):
        plugins.pick("dataset_adapters", "tickets")
    with pytest.raises(PluginError, match="claimed twice"):
        load_plugins(strict=True)


@pytest.mark.parametrize("entries", [None, "one = fake_a\ntwo = fake_b"], ids=["one plugin", "two plugins"])
def test_a_name_twice_within_one_distribution_raises(install: Install, tmp_path: Path, entries: str | None) -> None:
    if entries is None:
        install("one-dist", "one", REGISTERS.format("x") + "    register('x', lambda row: [])\n")
    else:
        install("one-dist", "one", REGISTERS.format("x"), module="fake_a", entries=entries)
        (tmp_path / "site" / "fake_b.py").write_text(REGISTERS.format("x"), encoding="utf-8")
    plugins = load_plugins()
    with pytest.warns(PluginWarning), pytest.raises(PluginError, match="'x' is claimed twice: .*one-dist.*one-dist"):
        plugins.pick("dataset_adapters", "x")


def test_registering_the_same_thing_twice_is_harmless(install: Install) -> None:
    source = REGISTERS.format("x").replace("lambda row: []", "print") + "    register('x', print)\n"
    install("one-dist", "one", source)
    assert load_plugins(strict=True).pick("dataset_adapters", "x") is print


def test_a_failing_hook_leaves_the_other_plugins_and_its_own_other_hooks(install: Install) -> None:
    source = GOOD.format("half").replace(
        '    register("half-rows"', '    register("early", print); 1 / 0; register("half-rows"'
    )
    install("half-dist", "half", source)
    install("good-dist", "good", GOOD.format("good"))
    plugins = load_plugins()
    with pytest.warns(PluginWarning, match="'half' .* registers none of its dataset_adapters: ZeroDivisionError"):
        adapters = plugins.named("dataset_adapters")
    assert "good-rows" in adapters and "early" not in adapters
    assert "half-loader" in plugins.named("models")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins.named("dataset_adapters")  # once is enough
    with pytest.raises(ZeroDivisionError):
        load_plugins(strict=True)


def test_register_hooks_run_on_request_and_once(install: Install) -> None:
    install("lazy-dist", "lazy", REGISTERS.format("x") + "    calls.append(1)\ncalls = []\n")
    plugins = load_plugins()
    calls = sys.modules["fake_lazy_dist_lazy"].calls
    plugins.named("models")
    assert calls == []
    plugins.named("dataset_adapters")
    plugins.pick("dataset_adapters", "x")
    assert calls == [1]


def test_what_is_not_there_is_said_with_what_is_and_what_failed(install: Install) -> None:
    install("good-dist", "good", GOOD.format("good"))
    install("broken-dist", "broken", "raise ValueError('the reason')")
    plugins, _ = load_with_one_warning()
    with pytest.raises(PluginError) as caught:
        plugins.pick("models", "god-loader")
    said = str(caught.value)
    assert "no model loader is named 'god-loader'; did you mean 'good-loader'?" in said
    with pytest.raises(PluginError, match="'GOOD-LOADER'; did you mean 'good-loader'"):
        plugins.pick("models", "GOOD-LOADER")
    assert "available: good-loader, phi3" in said
    assert "plugin 'broken' (broken-dist 1.0" in said and "ValueError: the reason" in said


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(PluginError, match="models, dataset_adapters, recipes"):
        load_plugins().pick("model", "phi3")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("register('../up', print)", "'../up' cannot name a data format"),
        ("register('a/b', print)", "cannot name"),
        ("register('', print)", "cannot name"),
        ("register(5, print)", "cannot name"),
        ("register('text', 'not callable')", "'not callable'; expected something that can be called"),
    ],
)
def test_what_cannot_be_registered_is_refused(install: Install, line: str, said: str) -> None:
    install("odd-dist", "odd", REGISTERS.format("x") + f"    {line}\n")
    plugins = load_plugins()
    with pytest.warns(PluginWarning) as caught:
        plugins.named("dataset_adapters")
    assert said in str(caught[0].message)


def test_a_recipe_is_the_path_of_a_file(install: Install) -> None:
    source = REGISTERS.format("x").replace("dataset_adapters", "recipes").replace("lambda row: []", "{}")
    install("path-dist", "path", source.replace("{}", "'/some/where.yaml'"))
    assert load_plugins(strict=True).pick("recipes", "x") == Path("/some/where.yaml")
    install("dict-dist", "dict", source.replace("{}", "{'lora': 1}").replace('"x"', '"y"'))
    with pytest.raises(PluginError, match="expected the path of a YAML file"):
        load_plugins(strict=True)


@pytest.mark.parametrize(
    ("requires", "said"),
    [
        (("absent-package>=1 ; extra == 'speed'",), "pip install 'needy-dist[speed]'"),
        ((), "needy-dist needs 'absent_package', which is not installed"),
    ],
)
def test_a_missing_dependency_says_what_to_install(install: Install, requires: tuple[str, ...], said: str) -> None:
    install("needy-dist", "needy", "import absent_package.part", requires=requires)
    _, warning = load_with_one_warning()
    assert said in warning


def test_a_part_missing_from_a_package_that_is_there_is_not_called_uninstalled(install: Install) -> None:
    install("needy-dist", "needy", "import pluggy.part", requires=("pluggy ; extra == 'speed'",))
    _, warning = load_with_one_warning()
    assert "No module named 'pluggy.part'" in warning and "install" not in warning


# ---- callbacks

CALLBACKS = """
from phi3_lora_plugin import hookimpl
from transformers import TrainerCallback

class Mine(TrainerCallback):
    pass

SHARED = Mine()

@hookimpl
def trainer_callbacks(recipe):
    {0}
"""


@pytest.fixture
def without_ours(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own factory wants a real recipe; these tests are about strangers."""
    monkeypatch.setenv("PHI3_LORA_BLOCK_PLUGINS", "phi3")


@pytest.mark.usefixtures("without_ours")
def test_callbacks_are_flattened_in_order_and_none_is_fine(install: Install) -> None:
    install("b-dist", "bbb", CALLBACKS.format("return [Mine(), Mine()]"))
    install("a-dist", "aaa", CALLBACKS.format("yield Mine()"))
    install("n-dist", "nnn", CALLBACKS.format("return None"))
    install("e-dist", "eee", CALLBACKS.format("return ()"))
    callbacks = load_plugins(strict=True).callbacks(object())
    assert [type(callback).__module__ for callback in callbacks] == ["fake_a_dist_aaa", *["fake_b_dist_bbb"] * 2]


@pytest.mark.usefixtures("without_ours")
def test_the_recipe_arrives_and_the_same_instance_is_added_once(install: Install) -> None:
    install("b-dist", "bbb", CALLBACKS.format("SHARED.recipe = recipe; return [SHARED, SHARED, Mine()]"))
    # The same function again: SHARED is known by now, its Mine() is new.
    install("c-dist", "ccc", "from fake_b_dist_bbb import trainer_callbacks")
    recipe = object()
    callbacks = load_plugins(strict=True).callbacks(recipe)
    assert len(callbacks) == 3 and callbacks[0].recipe is recipe
    assert len({id(callback) for callback in callbacks}) == 3  # of one class, but each with a state of its own


@pytest.mark.usefixtures("without_ours")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [object()]", "expected instances of classes derived from transformers.TrainerCallback"),
        ("return [Mine]", "expected instances"),
        ("return Mine()", "expected a list of callbacks, or None"),
        ("return 'LoraCheckpoint'", "expected a list of callbacks, or None"),
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("yield 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_factory_that_fails_stops_the_run_and_names_the_plugin(install: Install, body: str, said: str) -> None:
    install("bad-dist", "bad", CALLBACKS.format(body), version="3.1")
    plugins = load_plugins(strict=True)
    with pytest.raises(PluginError) as caught:
        plugins.callbacks(object())
    assert "plugin 'bad' (bad-dist 3.1)" in str(caught.value) and said in str(caught.value)


@pytest.mark.usefixtures("without_ours")
def test_a_hook_wrapper_may_filter_the_callbacks_of_others(install: Install) -> None:
    install("b-dist", "bbb", CALLBACKS.format("return [Mine(), SHARED]"))
    wrapper = (
        "from phi3_lora_plugin import hookimpl\n"
        "@hookimpl(wrapper=True)\n"
        "def trainer_callbacks(recipe):\n"
        "    answers = yield\n"
        "    return [answer[:1] for answer in answers]\n"
    )
    install("w-dist", "wrapper", wrapper)
    assert len(load_plugins(strict=True).callbacks(object())) == 1


# ---- phi3-lora plugins


def listing(*arguments: str) -> tuple[int, str]:
    """The exit code of `phi3-lora plugins ARGUMENTS` and what it printed, warnings included."""
    result = CliRunner().invoke(app, ["plugins", *arguments])
    return result.exit_code, result.output


def test_the_command_lists_what_each_registers_and_what_failed(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("good-dist", "good", GOOD.format("good"), version="2.5")
    install("needy-dist", "needy", "import absent_package", requires=("absent-package; extra == 'speed'",))
    monkeypatch.setenv("PHI3_LORA_BLOCK_PLUGINS", "shy")
    code, output = listing()
    assert code == 0
    for part in ("good  good-dist 2.5", "models: good-loader", "dataset_adapters: good-rows"):
        assert part in output
    assert "failed: plugin 'needy' (needy-dist 1.0" in output and "pip install 'needy-dist[speed]'" in output
    assert "blocked by PHI3_LORA_BLOCK_PLUGINS: shy" in output
    assert listing("--strict")[0] == 1


def test_the_command_speaks_json(install: Install) -> None:
    install("good-dist", "good", GOOD.format("good"), version="2.5")
    half = GOOD.format("half").replace('register("half-rows"', 'raise OSError("full"); register("half-rows"')
    install("half-dist", "half", half)
    code, output = listing("--json")
    assert code == 0
    report = json.loads(output)
    row = next(row for row in report["plugins"] if row["name"] == "good")
    assert (row["distribution"], row["version"], row["callbacks"]) == ("good-dist", "2.5", False)
    registers = {"models": ["good-loader"], "dataset_adapters": ["good-rows"], "recipes": [], "exporters": []}
    assert row["registers"] == registers
    ours = next(row for row in report["plugins"] if row["name"] == "phi3")
    assert ours["callbacks"] and "phi3" in ours["registers"]["models"]
    assert ["OSError: full" in failure["problem"] for failure in report["failures"]] == [True]


def test_the_command_says_a_clash(install: Install) -> None:
    install("first-dist", "first", REGISTERS.format("tickets"))
    install("second-dist", "second", REGISTERS.format("tickets"))
    code, output = listing("--strict")
    assert code == 1 and "'tickets' is claimed twice" in output


def test_the_table_on_a_terminal_says_the_same(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("good-dist", "good", GOOD.format("good"), version="2.5")
    install("needy-dist", "needy", "import absent_package", requires=("absent-package; extra == 'speed'",))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    _, output = listing()
    assert "┃" in output and "models: good-loader" in output and "2.5" in output
    assert "needy-dist[speed]" in output


# ---- docs/plugins.md

DOCS = page("plugins")


def code_block(kind: str) -> str:
    """Return the one block of docs/plugins.md that is fenced as `kind`."""
    (block,) = blocks(DOCS, kind)
    return block


def test_the_docs_have_a_heading_for_every_hook_with_its_signature() -> None:
    manager = load_plugins().manager
    specs = [getattr(manager.hook, name).spec for name in vars(manager.hook) if not name.startswith("_")]
    expected = sorted(f"{spec.name}({', '.join(spec.argnames)})" for spec in specs)
    assert len(expected) == 5
    assert sorted(re.findall(r"^### `(.+)`$", DOCS, re.MULTILINE)) == expected


def test_the_plugin_in_the_docs_works_and_has_twenty_lines(install: Install) -> None:
    source, entry = code_block("python plugin"), tomllib.loads(code_block("toml"))
    assert len([line for line in source.splitlines() if line.strip()]) <= 20
    [(name, _)] = entry["project"]["entry-points"]["phi3_lora_plugin"].items()
    install("docs-dist", name, source)
    adapt = load_plugins(strict=True).pick("dataset_adapters", "tickets")
    assert adapt({"question": "why?", "reply": "so."})[1] == {"role": "assistant", "content": "so."}
    with pytest.raises(ValueError, match="without a reply"):
        adapt({"question": "why?"})


def test_the_host_in_the_docs_works(install: Install) -> None:
    names: dict[str, Any] = {}
    exec(code_block("python host"), names)
    assert names["recipe"].lora.r == 4 and callable(names["load"])
    assert names["adapt"]({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    assert [type(callback).__name__ for callback in names["callbacks"]] == ["LoraCheckpoint"]
