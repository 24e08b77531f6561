"""`preference.loss` kto, orpo and simpo: the first step's loss is that of TRL's own trainer, and runs go on exactly."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from lora_runs import Logs, same
from read_rows import trained
from rich.console import Console
from safetensors.torch import load_file
from tiny import turns, write
from transformers import set_seed

from phi3_lora_plugin import Recipe, RecipeError, add_lora, load_model, load_recipe, load_tokenizer, train
from phi3_lora_plugin.chat.dataset import DataError, load_data
from phi3_lora_plugin.training.arguments import lora_options
from phi3_lora_plugin.training.trl_trainers import ObjectiveError, trl_trainer

pytest.importorskip("trl.trainer.dpo_trainer")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    tiny.base(folder / "base")
    bad = turns("", "who knows")[1:]
    answers = [turns(f"what is {n}?", f"\n it is {n}.") for n in NUMBERS]
    pairs = [{"prompt": [asked], "chosen": [good], "rejected": bad} for asked, good in answers]
    write(folder / "pairs.jsonl", pairs)
    judged = [{"prompt": f"what is {n}?", "completion": f"it is {n}." if at % 2 else "who knows", "label": bool(at % 2)}
              for at, n in enumerate(NUMBERS)]  # fmt: skip
    write(folder / "judged.jsonl", judged)
    return folder


def recipe(place: Path, out: Path, loss: str, *more: str) -> Recipe:
    given = [
        f"model.path={place / 'base'}", "model.dtype=float32", "model.device=cpu", "data.eval_path=null",
        f"data.path={place / ('judged.jsonl' if loss == 'kto' else 'pairs.jsonl')}", f"preference.loss={loss}",
        "training.max_steps=4", "training.num_train_epochs=null", "training.per_device_train_batch_size=4",
        "training.learning_rate=1e-2", "training.logging_steps=1", "training.lr_scheduler_type=constant",
        "training.warmup_steps=0", "checkpoint.every_steps=2", "checkpoint.keep_last=9",
        f"output_dir={out}", "preference.beta=0.3",
    ]  # fmt: skip
    return load_recipe("tiny-cpu", [*given, *more])


def need(loss: str) -> None:
    """Skip where the installed TRL has no trainer for `loss`."""
    if loss == "kto":
        try:
            import phi3_lora_plugin.training.kto  # noqa: F401
        except ObjectiveError as missing:
            pytest.skip(str(missing))


def losses_of_trl(run: Recipe, name: str, **settings: Any) -> list[float]:
    """The losses of the first three steps of TRL's own trainer over the same encoded rows, in TRL's own columns."""
    words = load_tokenizer(run.model.path)
    rows = load_data(run, words, {}).train
    trainer, arguments = trl_trainer(name, "", "")
    own = arguments(
        output_dir=run.output_dir, per_device_train_batch_size=4, max_steps=3, use_cpu=True, report_to="none",
        bf16=False, gradient_checkpointing=False, disable_dropout=False, logging_steps=1, beta=0.3, seed=run.seed,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant",
        remove_unused_columns=False, **settings,
    )  # fmt: skip

    class Encoded(trainer):
        def tokenize_row(self, row: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return row

        def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
            return dataset

    set_seed(run.seed)
    made = Encoded(
        model=add_lora(load_model(run.model.path, dtype="float32"), **lora_options(run)),
        args=own, train_dataset=Dataset.from_list([columns(row) for row in rows]), processing_class=words,
    )  # fmt: skip
    if name == "KTO":  # as its `_prepare_dataset` pairs the answers of a batch
        rows = list(made.train_dataset)
        for start in range(0, len(rows), 4):
            batch = rows[start : start + 4]
            for at, row in enumerate(batch):
                row["KL_completion_ids"] = batch[at - 1]["completion_ids"]
        made.train_dataset = Dataset.from_list(rows)
    made.train()
    return [float(logs["loss"]) for logs in made.state.log_history if "loss" in logs]


def columns(row: dict[str, Any]) -> dict[str, Any]:
    ids, labels = row["input_ids"], row["labels"]
    if "label" in row:
        trained = [at for at, label in enumerate(labels) if label != -100]  # not what closes the chat behind it
        start, end = trained[0], trained[-1] + 1
        return {"prompt_ids": ids[:start], "completion_ids": ids[start:end], "label": row["label"]}
    made: dict[str, Any] = {}
    for name, part in (("chosen", slice(None, row["cut"])), ("rejected", slice(row["cut"], None))):
        made |= {f"{name}_input_ids": ids[part], f"{name}_attention_mask": [1] * len(ids[part]),
                 f"{name}_labels": labels[part]}  # fmt: skip
    # TRL's row functions look for texts, of which nothing is computed here.
    return made | {"prompt": "", "chosen": "", "rejected": ""}


CASES = {
    "kto": ("KTO", {"desirable_weight": 1.5, "max_length": None}, ("preference.desirable_weight=1.5",)),
    "orpo": ("ORPO", {}, ()),
    "simpo": ("CPO", {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0}, ("preference.gamma=0.7",)),
    "simpo with cpo": ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.4}, ("preference.cpo_alpha=0.4",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_first_losses_are_those_of_trl_itself(case: str, place: Path, tmp_path: Path) -> None:
    need(case)
    name, settings, more = CASES[case]
    run = recipe(place, tmp_path / "ours", case.split()[0], *more, "training.max_steps=3")
    logs = Logs()
    train(run, check=False, callbacks=[logs])
    ours = [each["loss"] for each in logs.said if "loss" in each]
    assert len(set(ours)) == 3 and ours == pytest.approx(losses_of_trl(run, name, **settings), abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("reload_in_fork")
@pytest.mark.parametrize("loss", ["kto", "orpo", "simpo"])
def test_a_run_learns_and_one_that_was_cut_off_goes_on_exactly(loss: str, place: Path, tmp_path: Path) -> None:
    need(loss)
    more = ("data.eval_fraction=0.25", "training.per_device_train_batch_size=2")
    whole, cut = (recipe(place, tmp_path / name, loss, *more) for name in ("whole", "cut"))
    result = train(whole)  # with the check that plain PEFT reloads the same logits
    assert result.eval_loss_after < result.eval_loss_before
    saved = load_file(Path(result.adapter) / "adapter_model.safetensors")
    assert not any(".ref." in name for name in saved)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/lora/step-00000004")
    assert train(cut, resume=True, check=False).steps == 4
    assert same(saved, load_file(tmp_path / "cut/lora/step-00000004/adapter_model.safetensors"))


def judged(place: Path, tmp_path: Path, *rows: dict[str, Any], more: tuple[str, ...] = ()) -> Any:
    path = write(tmp_path / "rows.jsonl", list(rows))
    run = recipe(place, tmp_path, "kto", f"data.path={path}", *more)
    return load_data(run, load_tokenizer(place / "base"), {})


HI = turns("Hi", "Ho")


def test_judged_rows_of_every_shape(place: Path, tmp_path: Path) -> None:
    data = judged(
        place, tmp_path,
        {"prompt": "Hi", "completion": "Ho", "label": True},
        {"prompt": "Hi", "completion": "Go", "label": "false"},
        {"prompt": [HI[0]], "completion": [HI[1]], "label": 0},
        {"prompt": "Hi", "completion": "Ho ho", "kto_tag": True},
    )  # fmt: skip
    assert list(data.train["label"]) == [True, False, False, True] and data.report.good == 2
    assert data.train[0]["input_ids"] == data.train[2]["input_ids"]  # judged both ways, so not a duplicate
    assert not data.report.duplicates
    chats = judged(
        place, tmp_path,
        {"messages": turns("Hi", "Ho", "so", "a"), "good": 1},
        {"messages": HI, "good": False}, more=("data.columns={label: good}",),
    )  # fmt: skip
    words = load_tokenizer(place / "base")
    assert trained(chats.train[0], words) == "a|"  # of a chat, its last answer is judged
    pairs = judged(place, tmp_path, {"prompt": "Hi", "chosen": "Ho", "rejected": "Go"}).train
    assert list(pairs["label"]) == [True, False]
    assert words.decode(pairs[1]["input_ids"]).endswith(" Go<|end|><|endoftext|>")


WRONG = {
    "no label": ({"prompt": "Hi", "completion": "Ho"}, "has no label (true or false), only prompt, completion"),
    "null": ({"prompt": "Hi", "completion": "Ho", "label": None}, "has no label"),
    "a score": ({"prompt": "Hi", "completion": "Ho", "label": 0.5}, "label is a number (0.5); expected true or false"),
    "twice": ({"prompt": "Hi", "completion": "Ho", "label": True, "kto_tag": False}, "twice, as label and kto_tag"),
    "no answer": ({"messages": [*HI, HI[0]], "label": True}, "ends with a turn of role user"),
    "a weight": ({"prompt": "Hi", "completion": "Ho", "weight": 0.5, "label": True}, "preference losses cannot use"),
    "a pair": ({"prompt": "Hi", "chosen": "Ho", "rejected": "Go"}, "is a pair, but the first row"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_judged_row_is_said_with_its_line(name: str, place: Path, tmp_path: Path) -> None:
    row, message = WRONG[name]
    first = {"messages": HI, "label": True} if "messages" in row else {"prompt": "a", "completion": "b", "label": True}
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{re.escape(message)}"):
        judged(place, tmp_path, first, row)


def test_labels_of_one_kind_are_refused_and_unbalanced_ones_told(place: Path, tmp_path: Path) -> None:
    row = {"prompt": "Hi", "completion": "Ho", "label": True}
    with pytest.raises(DataError, match="2 rows to train on, all with label: true; .* needs rows of both"):
        judged(place, tmp_path, row, row | {"prompt": "Ha"})
    data = judged(place, tmp_path, *[row | {"prompt": f"Hi {at}"} for at in range(6)], row | {"label": False})
    console = Console(width=200)
    with console.capture() as said:
        data.report.render(console)
    assert re.search(r"labels +6 good, 1 bad; preference.undesirable_weight: 6 makes both count alike", said.get())


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        ("kto", "data.packing=true", "judged rows are not packed"),
        ("kto", "training.per_device_train_batch_size=1", "kto compares rows of a batch; write at least 2"),
        ("kto", "training.train_sampling_strategy=group_by_length", "kto takes rows in their order"),
        ("kto", "lora.init=pissa", "pissa does not start at the base model"),
        ("kto", "preference.gamma=1", "has no effect with preference.loss: kto; it is for simpo"),
        ("orpo", "preference.desirable_weight=2", "it is for kto"),
        ("orpo", "preference.label_smoothing=0.1", "has no effect with preference.loss: orpo"),
        ("orpo", "training.use_liger_kernel=true", "Liger's loss is not the one of preference.loss: orpo"),
        ("simpo", "training.label_smoothing_factor=0.1", "has no effect with preference.loss: simpo"),
        ("simpo", "data.format=messages", "pairs are recognised by their columns"),
    ],
)
def test_settings_that_a_loss_cannot_honour_are_refused(loss: str, given: str, message: str, place: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe(place, Path("out"), loss, given)


def test_a_trainer_that_trl_does_not_have_is_named_with_what_to_install() -> None:
    with pytest.raises(ObjectiveError, match=r"preference.loss: kto needs KTOTrainer as TRL 9.9 .* 'trl>=9.9'"):
        trl_trainer("KTO", "preference.loss: kto", "9.9", lambda module: False)
    with pytest.raises(ObjectiveError, match="needs GhostTrainer"):
        trl_trainer("Ghost", "x", "1.0")
