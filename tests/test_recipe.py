"""Recipes: parents, overrides, provenance, digest, and every mistake reported at once with its place."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from phi3_lora_plugin.recipe import Recipe, RecipeError, load_recipe
from phi3_lora_plugin.recipe.layers import shipped_preset
from phi3_lora_plugin.shipped import shipped


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problems(*arguments: object, **options: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    found = [str(problem) for problem in caught.value.problems]
    assert all(problem in str(caught.value) for problem in found)
    return found


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, "mine.yaml", "model: {path: base}\n")


def test_defaults_are_those_of_the_sections(minimal: Path) -> None:
    recipe = load_recipe(minimal)

    assert (recipe.name, recipe.source) == ("mine", minimal)
    assert (recipe.output_dir, recipe.seed) == ("runs/mine", 42)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.targets) == (16, 32, "all-linear")
    assert (recipe.data.path, recipe.data.train_on, recipe.model.loader) == (None, "assistant", "phi3")
    assert recipe.training == {} and recipe.checkpoint.keep_last == 2 and recipe.speed == "auto"
    assert set(recipe.provenance.values()) == {"default", f"{minimal}:1"}


def test_parent_then_child_then_override(tmp_path: Path) -> None:
    text = "model: {path: base, dtype: float32}\nlora: {r: 4, targets: [a, b]}\nseed: 1\n"
    grand = write(tmp_path, "grand.yaml", text)
    write(tmp_path, "parent.yaml", "extends: grand.yaml\nlora:\n  r: 8\n  rank_pattern: {x: 1, y: 2}\nseed: 2\n")
    text = "lora:\n  targets: [c]\n  rank_pattern:\n    y: 3\ntraining:\n  learning_rate: 2e-4\n"
    child = write(tmp_path, "child.yaml", f"extends: ./parent.yaml\n{text}")

    recipe = load_recipe(child, ["training.learning_rate=1e-3", "lora.dora=true", "lora.dora=false"])

    assert (recipe.model.path, recipe.model.dtype, recipe.seed) == ("base", "float32", 2)
    assert (recipe.lora.r, recipe.lora.targets) == (8, ["c"])  # lists replace
    assert recipe.lora.rank_pattern == {"x": 1, "y": 3}  # mappings merge
    assert recipe.lora.dora is False  # the last override wins
    assert recipe.training == {"learning_rate": 1e-3}
    origin = recipe.provenance
    assert origin["model.path"] == f"{grand}:1"
    assert origin["lora.rank_pattern.x"] == f"{tmp_path / 'parent.yaml'}:4"
    assert origin["lora.rank_pattern.y"] == f"{child}:5"
    assert origin["training.learning_rate"] == origin["lora.dora"] == "override"
    assert origin["lora.alpha"] == "default"


def test_null_takes_the_default_back_and_an_empty_section_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, "parent.yaml", "model: {path: base}\nlora: {r: 4, alpha: 8}\ntraining: {max_steps: 3}\nseed: 7\n")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\nlora:\ntraining: {max_steps: null}\nseed: ~\n")

    recipe = load_recipe(child, ["lora.alpha="])

    assert (recipe.lora.r, recipe.lora.alpha, recipe.training, recipe.seed) == (4, 32, {}, 42)
    assert recipe.provenance["lora.alpha"] == recipe.provenance["seed"] == "default"


def test_rows_that_replace_the_embedded_ones_are_not_evaluated_on_those(tmp_path: Path) -> None:
    mine = load_recipe("tiny-cpu", ["data.path=mine.jsonl"])
    assert (mine.data.eval_path, mine.data.eval_fraction) == (None, 0.1)
    assert mine.provenance["data.eval_fraction"] == "override" and "data.eval_fraction=0.1" in mine.notes[-1]

    as_they_are = load_recipe("tiny-cpu")
    assert as_they_are.data.eval_path == "embedded:chats/held_out.jsonl"
    none = load_recipe("tiny-cpu", ["data.path=mine.jsonl", "data.eval_path="])
    assert (none.data.eval_path, none.data.eval_fraction) == (None, 0.0)
    assert not any("data." in note for note in as_they_are.notes + none.notes)  # of arguments there may be some
    for said, fraction in (("eval_fraction=0.5", 0.5), ("eval_fraction=0", 0.0), ("eval_split=test", 0.0)):
        other = load_recipe("tiny-cpu", ["data.path=mine.jsonl", f"data.{said}"])
        assert (other.data.eval_path, other.data.eval_fraction) == (None, fraction)
    own = load_recipe("tiny-cpu", ["data.path=mine.jsonl", "data.eval_path=embedded:chats/held_out.jsonl"])
    assert own.data.eval_path == "embedded:chats/held_out.jsonl"
    assert load_recipe("tiny-cpu", ["data.path=embedded:chats/held_out.jsonl"]).data.eval_path is not None
    # An evaluation file of a parent's own may be there for many children.
    write(tmp_path, "parent.yaml", "model: {path: base}\ndata: {path: a.jsonl, eval_path: b.jsonl}\n")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\ndata: {path: c.jsonl}\n")
    assert load_recipe(child).data.eval_path == "b.jsonl"


def test_overrides_are_yaml(minimal: Path) -> None:
    overrides = [
        "data.columns={prompt: question, completion: answer}",
        "data.path=*.jsonl",
        "data.packing=yes",
        "lora.r = 8",
        "lora.targets=[qkv_proj, o_proj]",
        "lora.dropout=5e-2",
        "model.revision='010'",
        "training.report_to=none",
        "output_dir=a=b",
    ]
    recipe = load_recipe(minimal, overrides)

    assert recipe.data.columns == {"prompt": "question", "completion": "answer"}
    assert (recipe.data.path, recipe.data.packing) == ("*.jsonl", True)
    assert (recipe.lora.r, recipe.lora.targets, recipe.lora.dropout) == (8, ["qkv_proj", "o_proj"], 0.05)
    assert (recipe.model.revision, recipe.output_dir) == ("010", "a=b")
    assert load_recipe(minimal, "lora.r=8").lora.r == 8  # one override may come alone


def test_a_recipe_with_many_mistakes_hears_of_all_of_them(tmp_path: Path) -> None:
    text = """\
model:
  path: base
  dtype: float33
lora:
  r: "8"
  dropuot: 0.1
  dropout: 1.0
data:
  eval_fraction: 0.1
  eval_path: held.jsonl
  path: [1]
training:
  learning_rat: 1e-4
  save_steps: 10
learning_rate: 1e-4
seed: 1
seed: 2
"""
    path = write(tmp_path, "bad.yaml", text)

    found = problems(path, ["lora.alpa=8", "lora", "checkpoint.every_steps=0"])

    assert found == [
        f"{path}:3: model.dtype: expected one of auto, float32, bfloat16, float16, found text 'float33'; "
        "did you mean 'float32'?",
        f"{path}:5: lora.r: expected a whole number at least 1, found text '8'; write it without quotes",
        f"{path}:6: lora.dropuot: unknown key; did you mean 'dropout'?",
        f"{path}:7: lora.dropout: expected a number at least 0.0 and below 1.0, found 1.0",
        f"{path}:11: data.path: expected text or a list of text or a mapping, found list [1]",
        f"{path}:13: training.learning_rat: the installed transformers has no such argument; did you mean "
        "'learning_rate'?",
        f"{path}:14: training.save_steps: does not belong here: write checkpoint.every_steps",
        f"{path}:15: learning_rate: unknown key; did you mean 'training.learning_rate'?",
        f"{path}:17: seed: given twice, first on line 16",
        "override lora: expected section.key=value, such as lora.r=8",
        "override lora.alpa=8: lora.alpa: unknown key; did you mean 'alpha'?",
        "override checkpoint.every_steps=0: checkpoint.every_steps: expected a whole number at least 1, found 0",
    ]


def test_a_parents_mistake_is_shown_in_the_parents_file(tmp_path: Path) -> None:
    parent = write(tmp_path, "parent.yaml", "model:\n  path: base\n  quantize: nf5\n")
    child = write(tmp_path, "child.yaml", "extends: parent.yaml\nlora: {r: 0}\n")

    child_says, parent_says = problems(child)

    assert child_says.startswith(f"{child}:2: lora.r")
    assert parent_says.startswith(f"{parent}:3: model.quantize") and "did you mean 'nf4'" in parent_says


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lora.r=true", "expected a whole number at least 1, found True"),
        ("lora.r=8.5", "found 8.5"),
        ("lora.r=[8]", "found list [8]"),
        ("lora.alpha=0", "above 0"),
        ("lora.alpha=.inf", "found inf"),
        ("lora.dropout=.nan", "found nan"),
        ("lora.dropout=-0.1", "at least 0.0"),
        ("lora.bias=nonee", "did you mean 'none'"),
        ("lora.init=pisa", "did you mean 'pissa'"),
        ("lora.init=pissa_niter_0", "pissa_niter_N"),
        ("lora.targets=[]", "expected text or a list of text"),
        ("lora.targets='*_proj'", "regular expression"),
        ("lora.rank_pattern={q_proj: x}", "a mapping of names to a whole number"),
        ("lora={r: 0}", "lora.r: expected"),
        ("lora=8", "lora: expected a mapping, found 8"),
        ("lora.loraplus_lr_ratio=0.5", "at least 1"),
        ("lora.loftq_config={loftq_bits: 4}", "lora.init: loftq"),
        ("lora.zzz=8", "available: r, alpha, dropout"),
        ("lora.rank=8", "did you mean 'lora.r'?"),
        ("training.lr=1", "did you mean 'training.learning_rate'?"),
        ("training.batch_size=1", "did you mean 'training.per_device_train_batch_size'?"),
        ("epochs=1", "did you mean 'training.num_train_epochs'?"),
        ("data.dataset=x", "did you mean 'data.path'?"),
        ("rows.csv", "such as data.path=rows.csv"),
        ("phi4-lora", "phi4-lora is a recipe; the recipe comes first"),
        ("optimiser=x", "did you mean 'training.optim'?"),
        ("zzz=x", "available: extends, model, data"),
        ("model.path=3", "quote it"),
        ("model.revision=1234567", "quote it"),
        ("model.device=gpu", "one of auto, cpu, cuda"),
        ("data.max_length=7", "at least 8"),
        ("data.eval_fraction=1", "below 1"),
        ("data.packing=maybe", "true or false"),
        ("data.columns=[question]", "expected a mapping of names to text"),
        ("data.train_on=asistant", "did you mean 'assistant'"),
        ("checkpoint.format=pef", "did you mean 'peft'"),
        ("seed=-1", "at least 0"),
        ("output_dir=/", "choose a folder for runs only"),
        ("output_dir=~/", "choose a folder for runs only"),
        ("output_dir=runs/../../../../../../../../../../..", "choose a folder for runs only"),
        ("speed={los: true}", "loss, attention, lora, layers, last_layer, masters, host"),
        ("dropout=0.1", "did you mean 'lora.dropout'"),
        ("lora.learning_rate=1", "did you mean 'training.learning_rate'"),
        ("modle.path=x", "did you mean 'model'"),
        ("training.bf16.x=1", "found {'x': 1}"),
        ("training.eval_strategy=steps", "nothing to evaluate on"),
        ("extends=other", "name that recipe instead"),
        ("lora.r", "expected section.key=value"),
        ("=8", "expected section.key=value"),
        ("lora..r=8", "expected section.key=value"),
        ("--lora.r=8", "without dashes: lora.r=8"),
        ("lora.targets=[a", "is not YAML"),
        ("seed=010", "leading zero"),
    ],
)
def test_a_wrong_override_says_what_was_expected(minimal: Path, override: str, says: str) -> None:
    (found,) = problems(minimal, [override])

    assert found.startswith(f"override {override}")
    assert says in found


def test_what_is_missing_is_said_unless_its_file_could_not_be_read(tmp_path: Path, minimal: Path) -> None:
    assert "model.path: is required" in problems(minimal, ["model.path="])[0]
    assert "model: is required" in problems(write(tmp_path, "r.yaml", "seed: 1\n"))[0]
    assert len(problems(write(tmp_path, "r.yaml", "extends: nobody\nseed: 1\n"))) == 1


def test_an_error_across_sections_needs_no_other_error_to_be_gone(minimal: Path) -> None:
    assert "contradicts" in problems(minimal, ["model.device=cuda", "training.use_cpu=true"])[0]
    both = problems(minimal, ["data.eval_fraction=0.1", "data.eval_split=test"])
    advice = "write data.eval_fraction: 0, or drop data.eval_split"
    said = f"data.eval_fraction: set together with data.eval_split; {advice}"
    assert both == [f"override data.eval_fraction=0.1: {said}"]


def test_pefts_names_are_read_and_both_names_are_an_error(tmp_path: Path) -> None:
    parent = write(tmp_path, "parent.yaml", "model: {path: base}\nlora: {alpha: 16, use_rslora: true}\n")
    text = "extends: parent.yaml\nlora: {lora_alpha: 64, target_modules: [o_proj], init_lora_weights: false}\n"
    recipe = load_recipe(write(tmp_path, "child.yaml", text))

    lora = recipe.lora
    assert (lora.alpha, lora.targets, lora.rslora, lora.init) == (64, ["o_proj"], True, "random")
    assert recipe.provenance["lora.alpha"] == f"{tmp_path / 'child.yaml'}:2"
    assert load_recipe(parent, ["lora.init_lora_weights=true"]).lora.init == "default"

    both = write(tmp_path, "both.yaml", "model: {path: base}\nlora:\n  alpha: 1\n  lora_alpha: 2\n")
    assert problems(both) == [
        f"{both}:4: lora.lora_alpha: is PEFT's name for lora.alpha, which is given too; keep one of them"
    ]


def test_old_training_names_are_translated_layer_by_layer(tmp_path: Path) -> None:
    parent = write(tmp_path, "parent.yaml", "model: {path: base}\ntraining:\n  warmup_ratio: 0.1\n  no_cuda: true\n")

    recipe = load_recipe(parent, ["training.warmup_steps=5"])

    assert recipe.training["warmup_steps"] == 5 and "warmup_ratio" not in recipe.training
    assert recipe.training["use_cpu"] is True
    assert recipe.provenance["training.use_cpu"] == f"{parent}:4"
    assert any("no_cuda" in note and note.startswith(f"{parent}:4") for note in recipe.notes)

    both = write(tmp_path, "both.yaml", "model: {path: base}\ntraining: {no_cuda: true, use_cpu: true}\n")
    assert "keep one of them" in problems(both)[0]


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "mine.yaml", "model: {path: base}\n")
    write(tmp_path, "below/mine.yml", "extends: ../mine.yaml\n")

    assert load_recipe("mine.yaml").name == "mine"
    assert load_recipe("./below/mine.yml").model.path == "base"
    assert load_recipe("tiny-cpu").source == Path(str(shipped_preset("tiny-cpu")))
    assert "for the file here write ./mine.yaml" in problems("mine")[0]
    assert "did you mean 'tiny-cpu'" in problems("tiny-cup")[0]
    assert "no such file" in problems("../nowhere")[0]
    assert "folder" in problems(tmp_path)[0]
    for name in ("a b", "", ".hidden", "a:b", "a\nb"):
        assert "is not a recipe name" in problems(name)[0]


def test_a_preset_extends_by_name_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "presets", tmp_path / "secret.yaml"
    write(tmp_path, "secret.yaml", "model: {path: secret}\n")
    write(inside, "good.yaml", "model: {path: base}\n")
    write(inside, "nosy.yaml", "extends: ../secret.yaml\n")
    write(inside, "rude.yaml", "extends: ../secret\n")
    mine = write(tmp_path, "mine.yaml", "extends: nosy\n")

    def find(name: str) -> Path | None:
        path = inside / f"{name}.yaml"
        return path if path.is_file() else None

    assert load_recipe("good", find=find).model.path == "base"
    assert load_recipe(outside, find=find).model.path == "secret"
    for recipe in ("nosy", "rude", mine):
        assert "is not a recipe name" in problems(recipe, find=find)[0]
    assert "is not a recipe name" in problems(write(tmp_path, "my.yaml", "extends: ../x\n"), find=find)[0]


def test_a_circle_and_an_unknown_parent_show_the_chain(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "extends: below/b.yaml\n")
    b = write(tmp_path, "below/b.yaml", "extends: ../below/../a.yaml\nlora: {r: x}\n")
    self_made = write(tmp_path, "self.yaml", "extends: self.yaml\n")
    orphan = write(tmp_path, "orphan.yaml", "# nothing\nextends: nobody-knows\nlora: {r: 0}\n")
    odd = write(tmp_path, "odd.yaml", "extends: [a, b]\n")

    circle = problems(tmp_path / "a.yaml")
    chain = "a -> below/b.yaml -> ../below/../a.yaml"
    assert f"{b}:1: extends: {chain}: recipes extend each other in a circle" in circle[0]
    assert circle[1].startswith(f"{b}:2: lora.r")  # and the rest is checked all the same
    assert "circle" in problems(self_made)[0]
    unknown, rank = problems(orphan)
    assert unknown.startswith(f"{orphan}:2: extends: orphan -> nobody-knows: no recipe named")
    assert rank.startswith(f"{orphan}:3: lora.r")
    assert "expected the name of one recipe" in problems(odd)[0]
    assert len(problems(odd)) == 1


def test_find_may_raise_with_its_own_words(minimal: Path) -> None:
    def find(name: str) -> Path:
        raise KeyError(f"nothing like {name} is registered")

    assert problems("some", find=find) == ["nothing like some is registered"]


def test_broken_files_are_recipe_errors(tmp_path: Path) -> None:
    for text, says in (
        ("", "is empty"),
        ("- a\n", "found a list"),
        ("<html>", "web page"),
        ("a: [1\n", "not YAML"),
        ("model:\n\tpath: x\n", "a tab"),
    ):
        (found,) = problems(write(tmp_path, "r.yaml", text))
        assert says in found and str(tmp_path / "r.yaml") in found


def test_a_recipe_is_frozen_and_crosses_processes(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["lora.r=4"])

    with pytest.raises(ValueError):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(ValueError):
        recipe.lora.r = 1  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe and again.digest() == recipe.digest() and again.provenance == recipe.provenance
    with pytest.raises(RecipeError) as caught:
        load_recipe(minimal, ["lora.r=0"])
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value) and error.problems == caught.value.problems


def test_the_resolved_recipe_loads_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("phi3-mini-4k-modelcard", ["model.revision='12e4'", "data.columns={a: 'yes'}", "lora.r=4"])
    path = write(tmp_path, "again.yaml", recipe.to_yaml())

    again = load_recipe(path)

    assert again.resolved() == recipe.resolved()
    assert again.digest() == recipe.digest()
    assert Recipe(**recipe.resolved()).digest() == recipe.digest()
    assert yaml.safe_load(recipe.to_yaml()) == json.loads(json.dumps(recipe.resolved()))


def test_the_digest_is_of_what_decides_the_result(minimal: Path) -> None:
    digest = load_recipe(minimal).digest()

    assert len(digest) == 64
    for same in ("output_dir=elsewhere", "about.memory=8 GB", "lora.r=16", "lora.dropout=0", "lora.lora_alpha=32"):
        assert load_recipe(minimal, [same]).digest() == digest, same
    others = {
        load_recipe(minimal, [other]).digest()
        for other in ("lora.r=8", "seed=1", "training.max_steps=1", "data.path=x", "model.revision=x", "speed=off")
    }
    assert len(others | {digest}) == 7


def test_about_is_not_inherited(tmp_path: Path) -> None:
    child = write(tmp_path, "child.yaml", "extends: phi3-mini-4k-modelcard\n")

    assert load_recipe("phi3-mini-4k-modelcard").about.deviations
    assert load_recipe("tiny-cpu", ["about.memory=1 GB"]).about.memory == "1 GB"
    assert load_recipe(child).about == Recipe(model={"path": "x"}).about  # type: ignore[arg-type]


def test_a_recipe_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match="learning_rat"):
        Recipe(model={"path": "x"}, training={"learning_rat": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        Recipe(model={"path": "x"}, training={"eval_strategy": "epoch"})  # type: ignore[arg-type]


def test_loading_a_recipe_imports_nothing_heavy() -> None:
    program = """
import sys
from phi3_lora_plugin.recipe import load_recipe
load_recipe("phi3-mini-4k-qlora-cookbook", ["training.warmup_ratio=0.2", "training.optim=adamw_torch"])
print({"torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers", "numpy"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_a_recipe_without_an_end_is_refused_in_a_screen_of_text(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("extends: tiny-cpu\nlora:\n" + "".join(f"  k{n}: 1\n" for n in range(15_000)))
    for number in range(1500):
        (tmp_path / f"p{number}.yaml").write_text(f"extends: ./p{number + 1}.yaml\nseed: {number}\n")
    (tmp_path / "some.yaml").write_text("extends: tiny-cpu\nlora:\n" + "".join(f"  k{n}: 1\n" for n in range(100)))
    for name, expected in (("keys", "more than 2000 values"), ("p0", "more than 16 parents"), ("some", "and 50 more")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / f"{name}.yaml")
        assert expected in str(caught.value) or any(expected in str(one) for one in caught.value.problems)
        assert len(str(caught.value)) < 25_000


def test_a_checkout_that_is_not_installed_has_its_recipes_and_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {folder: {file.name for file in shipped(folder).iterdir()} for folder in ("recipes", "docs")}

    def files(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("phi3_lora_plugin.shipped.files", files)
    for folder, names in installed.items():
        assert names <= {file.name for file in shipped(folder).iterdir()}
    assert load_recipe("tiny-cpu").name == "tiny-cpu"
