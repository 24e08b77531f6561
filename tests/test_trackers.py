"""`report_to` for real, each tracker in its offline mode: one run, our figures, the adapter, and a run that failed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from warm_process import Warm

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.training.packages import MissingPackage, require_packages

pytestmark = pytest.mark.slow

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
HERE = [name for name in TRACKERS if find_spec(name) is not None]
FAILS = ("training.learning_rate=1.0e+30", "training.lr_scheduler_type=constant", "training.max_grad_norm=0")


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in HERE, reason=f"{name} is not installed: pip install {name}")


def offline(place: Path) -> dict[str, str]:
    """What keeps every tracker on this machine, in this folder."""
    return {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(place), "TRACKIO_DIR": str(place / "trackio"),
        "MLFLOW_TRACKING_URI": (place / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip


def start(warm: Warm, place: Path, out: str, *overrides: str) -> tuple[int, str, str]:
    if not (place / "base").is_dir():
        tiny.base(place / "base")
        tiny.write(place / "chats.jsonl", [tiny.chat("what is it?", "the fox.")] * 9)
        tiny.write(place / "held_out.jsonl", [tiny.chat("what is it?", "a dog")])
    words = [
        "train", "tiny-cpu", "--no-check", "--json", f"model.path={place / 'base'}", f"output_dir={place / out}",
        f"data.path={place / 'chats.jsonl'}", f"data.eval_path={place / 'held_out.jsonl'}", "training.max_steps=4",
        "training.num_train_epochs=null", "training.logging_steps=2", "training.eval_strategy=steps",
        "training.eval_steps=2",
    ]  # fmt: skip
    done = warm.command(*words, *overrides, cwd=place, **offline(place))
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """A folder with a run that went to every tracker that is here."""
    place = tmp_path_factory.mktemp("trackers")
    code, said, error = start(warm, place, "out", f"training.report_to=[{','.join(HERE)}]")
    assert code == 0, error
    assert json.loads(said)["steps"] == 4  # nothing but JSON on stdout, whatever trackers print
    return place


def artifacts(place: Path) -> set[str]:
    [adapter] = (place / "out" / "lora").glob("step-00000004")
    return {path.name for path in adapter.iterdir() if path.is_file()}


@needs("tensorboard")
def test_tensorboard_is_in_one_folder_with_every_figure(place: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {path.parent for path in place.rglob("events.out.tfevents*")}
    assert folders == {place / "out" / "tensorboard"}
    events = EventAccumulator(str(place / "out" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    figures = {"train/tokens_per_second", "train/peak_memory_gb", "train/loss", "final/eval_loss_after"}
    assert figures <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("eval/loss")][:3] == [0, 2, 4]
    assert {f"{name}/text_summary" for name in ("coverage", "data_report", "recipe", "adapter")} <= set(tags["tensors"])


@needs("mlflow")
def test_mlflow_has_one_run_with_the_adapter(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient((place / "mlruns").as_uri())
    [run] = client.search_runs(["0"], filter_string="attributes.run_name = 'out'")
    assert run.info.status == "FINISHED"
    figures = {"tokens_per_second", "peak_memory_gb", "final/eval_loss_after", "data/trained_tokens"}
    assert figures <= set(run.data.metrics)
    assert [one.step for one in client.get_metric_history(run.info.run_id, "eval_loss")][:2] == [0, 2]
    found = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"adapter", "report.html", "data_report.json", "coverage.json", "recipe.yaml"} <= found
    kept = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "adapter")}
    assert kept == artifacts(place)


@needs("wandb")
def test_wandb_has_one_run_with_the_adapter(place: Path) -> None:
    [run] = (place / "wandb").glob("offline-run-*")
    [file] = run.glob("*.wandb")
    content = file.read_bytes()
    for part in (b"train/tokens_per_second", b"final/eval_loss_after", b"trained_tokens", b"out-model", b"qkv_proj",
                 b"adapter_model.safetensors", b"report.html"):  # fmt: skip
        assert part in content, part


@needs("trackio")
def test_trackio_has_one_run_with_the_adapter(place: Path, warm: Warm) -> None:
    program = """
import json, trackio
[run] = trackio.Api().runs("phi3-lora")
found = [one.name for one in run.logged_artifacts()] if hasattr(run, "logged_artifacts") else None
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("phi3-lora", run.name)
print(json.dumps([run.name, sorted({name for log in logs for name in log}), str(run.config), found]))
"""
    done = warm.run(program, cwd=place, **offline(place))
    assert done.returncode == 0, done.stderr
    name, logged, config, _ = json.loads(done.stdout.splitlines()[-1])
    assert name == "out" and {"train/tokens_per_second", "eval/loss", "final/eval_loss_after"} <= set(logged)
    assert "trained_tokens" in config and "qkv_proj" in config
    import sqlite3

    with sqlite3.connect(place / "trackio" / "phi3-lora.db") as database:
        kinds = database.execute("select name, type from artifacts").fetchall()
    assert set(kinds) == {("out-model", "model"), ("out-report", "report")}


@needs("mlflow")
def test_a_run_that_fails_is_a_failed_run_there_too(place: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, said = start(warm, place, "failed", "training.report_to=mlflow", *FAILS)
    assert code == 1 and "not finite" in said
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient((place / "mlruns").as_uri())
    [run] = client.search_runs(["0"], filter_string="attributes.run_name = 'failed'")
    assert run.info.status == "FAILED"


def problems(setting: str) -> str:
    with pytest.raises(MissingPackage) as raised:
        require_packages(load_recipe("tiny-cpu", [f"training.report_to={setting}"]))
    return str(raised.value)


def test_wrong_names_are_told_the_nearest_before_anything_is_loaded() -> None:
    said = problems("tensorbord")
    assert "'tensorbord' is not one of" in said and "did you mean 'tensorboard'?" in said
    assert "did you mean 'trackio'?" in problems("[Trackio]")
    assert "expected a name or a list of names" in problems("[[wandb]]")
    require_packages(load_recipe("tiny-cpu", ["training.report_to=none"]))


def test_a_tracker_that_cannot_be_imported_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "trackio").mkdir()
    (tmp_path / "trackio" / "__init__.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    said = problems("trackio")
    assert "trackio is installed but cannot be imported" in said and "pip install --upgrade trackio" in said


@needs("wandb")
def test_wandb_without_an_account_is_said_so(tmp_path: Path, warm: Warm) -> None:
    recipe = "load_recipe('tiny-cpu', ['training.report_to=wandb'])"
    program = (
        "from phi3_lora_plugin import load_recipe\nfrom phi3_lora_plugin.training.packages import require_packages\n"
        f"try: require_packages({recipe})\nexcept ValueError as error: print(error)\nelse: print('ready')"
    )
    nobody = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "netrc")}
    assert "WANDB_MODE=offline" in warm.run(program, cwd=tmp_path, **nobody).stdout
    assert warm.run(program, cwd=tmp_path, **(nobody | {"WANDB_MODE": "offline"})).stdout.splitlines()[-1] == "ready"
