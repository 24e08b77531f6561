"""Base against adapter: figures against their definitions, and whatever an evaluation may be pointed at."""

from __future__ import annotations

import json
import math
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import typer
from peft import PeftModel
from typer.testing import CliRunner

from phi3_lora_plugin import load_model, load_plugins, load_recipe, load_tokenizer, train
from phi3_lora_plugin.chat.dataset import DataError
from phi3_lora_plugin.chat.encode import encode, prompt_ids
from phi3_lora_plugin.cli.chat import chat_command
from phi3_lora_plugin.cli.evaluate import eval_command
from phi3_lora_plugin.evaluate.answers import answer, questions
from phi3_lora_plugin.evaluate.evaluate import Evaluation, Wanted, evaluate
from phi3_lora_plugin.evaluate.generate import stop_ids
from phi3_lora_plugin.evaluate.lm_eval_tasks import HarnessError, require_lm_eval
from phi3_lora_plugin.evaluate.target import find_target
from phi3_lora_plugin.evaluate.token_scores import NothingTrained, TokenScores, token_scores
from phi3_lora_plugin.export.convert import convert
from phi3_lora_plugin.export.merge import merge
from phi3_lora_plugin.inspect.inspect import inspect
from phi3_lora_plugin.store.adapter_folder import AdapterError

pytestmark = pytest.mark.slow

PLUGINS = load_plugins()
FEW = Wanted(answers=2, max_new_tokens=4)


def chats(count: int, first: int = 0) -> list[list[dict[str, str]]]:
    turns = [
        ("user", "how many apples?"),
        ("assistant", "three"),
        ("user", "and in basket {}?"),
        ("assistant", "#### {}"),
    ]
    return [[{"role": r, "content": text.format(n)} for r, text in turns] for n in range(first, first + count)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `test.jsonl`, `mine.yaml` and what training by it left in `out`."""
    place = tmp_path_factory.mktemp("eval")
    tiny.base(place / "base")
    write(place / "test.jsonl", chats(5, first=40))
    (place / "mine.yaml").write_text(
        f"model: {{path: {place / 'base'}, device: cpu}}\n"
        f"data: {{path: {write(place / 'train.jsonl', chats(16))}, eval_fraction: 0.25}}\n"
        "lora: {r: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}\n"
        "training: {max_steps: 6, learning_rate: 3.0e-2, lr_scheduler_type: constant}\n"
        f"output_dir: {place / 'out'}\n"
    )
    train(load_recipe(place / "mine.yaml"), check=False)
    return place


def measured(what: Path | str, *overrides: str, wanted: Wanted = FEW, base: str | None = None) -> Evaluation:
    found = find_target(str(what), overrides, lambda name: PLUGINS.pick("recipes", name), base)
    return evaluate(found, wanted, PLUGINS)


def encoded(place: Path, **options: Any) -> list[dict[str, list[int]]]:
    return [encode(chat, load_tokenizer(place / "base"), **options) for chat in chats(5, first=40)]


def by_hand(model: Any, rows: list[dict[str, list[int]]]) -> TokenScores:
    """From the whole logits of one row after the other, token by token."""
    losses: list[float] = []
    right = 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for place, label in enumerate(row["labels"][1:]):
            if label != -100:
                losses.append(-float(logits[place, label]))
                right += int(logits[place].argmax()) == label
    loss = sum(losses) / len(losses)
    return TokenScores(len(losses), loss, math.exp(loss), right / len(losses))


def same(one: TokenScores, other: TokenScores) -> None:
    assert (one.tokens, one.token_accuracy) == (other.tokens, other.token_accuracy)
    assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.perplexity == pytest.approx(
        other.perplexity, rel=1e-4
    )


@pytest.mark.parametrize("batch_size", [1, 3])
def test_token_scores_are_those_of_the_whole_logits(run: Path, batch_size: int) -> None:
    tokenizer, rows = load_tokenizer(run / "base"), encoded(run)
    rows += [{key: ids[:-7] for key, ids in rows[0].items()}]
    base = load_model(run / "base", device="cpu")
    same(token_scores(base, tokenizer, rows, batch_size), by_hand(base, rows))
    adapted = PeftModel.from_pretrained(base, find_target(str(run / "out"), [], lambda name: None).adapter).train()
    found = token_scores(adapted, tokenizer, rows, batch_size)
    assert adapted.training
    same(found, by_hand(adapted.eval(), rows))


def test_weights_count_in_the_loss_as_in_training() -> None:
    model, words = tiny.model(), tiny.tokenizer()
    chat = [{"role": "user", "content": "what is one?"}, {"role": "assistant", "content": "it is one.", "weight": 0.25},
            {"role": "user", "content": "so?"}, {"role": "assistant", "content": "so."}]  # fmt: skip
    rows = [encode(chat, words), encode(chat[:1] + chat[3:], words)]
    assert set(rows[0]["weights"]) == {0.0, 0.25, 1.0} and "weights" not in rows[1]
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            each = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels, reduction="none")
        weights = torch.tensor(row.get("weights", [1.0] * len(row["labels"])))[1:]
        losses += [float(a * b) for a, b, label in zip(each, weights, labels, strict=True) if label != -100]
    found, plain = token_scores(model, words, rows, 2), by_hand(model, rows)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5) and found.loss < plain.loss
    assert found.perplexity == pytest.approx(plain.perplexity, rel=1e-4)


def test_rows_on_both_sides_of_longropes_switch_are_not_mixed() -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0, 6.0, 4.0, 2.0]}
    model = tiny.model(max_position_embeddings=64, original_max_position_embeddings=16, rope_scaling=factors)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (30, 12, 17, 16, 9)]
    given = [{"input_ids": ids, "labels": ids} for ids in rows]
    same(token_scores(model, tiny.tokenizer(), given, 8), by_hand(model, given))


def test_nothing_trained_is_an_error() -> None:
    row = {"input_ids": [5, 6, 7], "labels": [5, -100, -100]}  # nothing stands before the trained one
    with pytest.raises(NothingTrained):
        token_scores(tiny.model(), tiny.tokenizer(), [row])


def test_a_question_is_the_prompt_of_its_last_turn(run: Path) -> None:
    tokenizer = load_tokenizer(run / "base")
    stops = stop_ids(load_model(run / "base", device="cpu"), tokenizer)
    whole = encoded(run)
    asked = questions(whole, tokenizer, stops, 3)
    for number, one in enumerate(asked):
        assert (one.row, list(one.ids)) == (number, prompt_ids(chats(5, 40)[number][:-1], tokenizer))
        assert one.expected == f"#### {40 + number}"
    assert len(asked) == 3
    # A turn that was cut off is no answer to compare with; the one before it is.
    (cut,) = questions(encoded(run, max_length=len(asked[0].ids) + 2)[:1], tokenizer, stops, 3)
    assert cut.expected == "three" and list(cut.ids) == prompt_ids(chats(1)[0][:1], tokenizer)
    assert questions([{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}], tokenizer, stops, 3) == []


def test_answers_do_not_depend_on_their_company_and_end_at_a_stop_token(run: Path) -> None:
    tokenizer, model = load_tokenizer(run / "base"), load_model(run / "base", device="cpu")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in stop_ids(model, tokenizer) and tokenizer.pad_token_id not in stop_ids(model, tokenizer)
    prompts = [list(one.ids) for one in questions(encoded(run), tokenizer, stop_ids(model, tokenizer), 5)]
    prompts += [prompts[0][:-3], prompts[1][:-3]]
    together = answer(model, tokenizer, prompts, max_new_tokens=6)
    assert together == [answer(model, tokenizer, [one], max_new_tokens=6)[0] for one in prompts]
    assert all(one.tokens == 6 and not one.stopped for one in together)
    # The token that it says second becomes the end of a turn: answers end there, and the token is not part of them.
    second = model.generate(torch.tensor([prompts[0]]), max_new_tokens=2, do_sample=False)[0, -1]
    with torch.no_grad():
        model.lm_head.weight[end] = model.lm_head.weight[second] * 1.01
    (one,) = answer(model, tokenizer, prompts[:1], max_new_tokens=6)
    assert (one.stopped, one.tokens) == (True, 2) and "<|end|>" not in one.text


def test_a_run_its_checkpoint_and_its_recipe_are_the_same_adapter(run: Path) -> None:
    from_run = measured(run / "out")
    assert from_run.rows == 4 and from_run.adapter_figures is not None and len(from_run.asked) == 2
    assert from_run.adapter_figures.loss < from_run.base_figures.loss
    assert from_run.adapter_figures.token_accuracy > from_run.base_figures.token_accuracy
    checkpoint = Path(from_run.adapter)
    for other in (measured(checkpoint), measured(run / "mine.yaml")):
        assert (other.base_figures, other.adapter_figures) == (from_run.base_figures, from_run.adapter_figures)
    alone = measured(run / "base", wanted=Wanted(data=str(run / "test.jsonl"), answers=2, max_new_tokens=4))
    assert alone.adapter_figures is None and alone.quantize == "none"
    on_test = measured(run / "out", wanted=Wanted(data=str(run / "test.jsonl"), answers=2, max_new_tokens=4))
    assert (alone.base_figures, alone.tokens) == (on_test.base_figures, on_test.tokens)
    untrained = measured(run / "mine.yaml", f"output_dir={run / 'other'}")
    assert untrained.adapter is None and "the base model only" in untrained.notes[0]
    assert untrained.base_figures == from_run.base_figures


def test_all_that_is_said_by_users_is_measured_but_not_asked_for(run: Path) -> None:
    everything = measured(run / "out", "data.train_on=all")
    assistant = measured(run / "out")
    assert everything.tokens > assistant.tokens
    assert [one.prompt for one in everything.asked] == [one.prompt for one in assistant.asked]


def test_a_foreign_adapter_finds_its_base_and_may_have_one_elsewhere(run: Path, tmp_path: Path) -> None:
    """A folder as plain PEFT writes it: no manifest, no recipe, no tokenizer."""
    source = Path(measured(run / "out").adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    given = Wanted(data=str(run / "test.jsonl"), answers=0)
    found = measured(tmp_path, wanted=given)
    assert found.adapter_figures == measured(run / "out", wanted=given).adapter_figures
    with pytest.raises(DataError, match="holds out no rows to evaluate on; pass some with --data"):
        measured(tmp_path)
    config = tmp_path / "adapter_config.json"
    moved = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    config.write_text(json.dumps(moved))
    with pytest.raises(AdapterError, match="gone, which no longer exists; pass its base with --base"):
        measured(tmp_path, wanted=given)
    assert measured(tmp_path, wanted=given, base=str(run / "base")).adapter_figures == found.adapter_figures


def test_another_base_is_told_or_refused(run: Path, tmp_path: Path) -> None:
    other = tiny.base(tmp_path / "other", tie_word_embeddings=True)
    told = measured(run / "out", wanted=Wanted(answers=0), base=str(other))
    assert any("another fingerprint" in note for note in told.notes)
    with pytest.raises(AdapterError, match="was trained on .*base, not on"):
        measured(run / "mine.yaml", f"model.path={other}")
    narrow = tiny.base(tmp_path / "narrow", hidden_size=16)
    with pytest.raises(AdapterError, match="does not fit"):
        measured(run / "out", wanted=Wanted(answers=0), base=str(narrow))
    shallow = tiny.base(tmp_path / "shallow", num_hidden_layers=3)
    with pytest.raises(AdapterError, match="does not fit .*missing adapter keys"):
        measured(run / "out", wanted=Wanted(answers=0), base=str(shallow))


DAMAGE = {
    "not JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "changed by hand": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"error"', '"drop"', 1)
    ),
    "another weight": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:-1] + b"\1"
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_is_the_same_error_everywhere_before_a_model_is_loaded(
    run: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(find_target(str(run / "out"), [], lambda name: None).adapter)
    folder = Path(shutil.copytree(source, tmp_path / "adapter"))
    DAMAGE[kind](folder)
    monkeypatch.setattr("phi3_lora_plugin.model.load.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    told = set()
    for function in (
        lambda: find_target(str(folder), [], lambda name: None),
        lambda: chat_command(str(folder), prompt="hello"),
        lambda: merge(folder, None, tmp_path / "merged"),
        lambda: convert(folder, tmp_path / "converted", "peft"),
    ):
        with pytest.raises(AdapterError) as error:
            function()
        told.add(str(error.value))
    assert len(told) == 1 and str(folder) in (text := told.pop()) and "another checkpoint" in text
    assert any(problem.what in text for problem in inspect(folder).problems)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(run: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    plain, rough = measured(run / "out"), measured(run / "out", f"model.quantize={kind}")
    assert rough.quantize == kind and rough.base_figures.loss != plain.base_figures.loss
    assert rough.adapter_figures.loss == pytest.approx(plain.adapter_figures.loss, rel=0.1)
    assert rough.adapter_figures.loss < rough.base_figures.loss


def invoke(*words: Any) -> Any:
    app = typer.Typer()
    app.command()(eval_command)
    return CliRunner().invoke(app, [*map(str, words)])


def test_the_command(run: Path, tmp_path: Path) -> None:
    told = invoke(run / "out", "--data", run / "test.jsonl", "--answers=3", "--max-new-tokens=4", "--gsm8k", "--json",
                  "--save-answers", tmp_path / "said.jsonl", "--rows=4")  # fmt: skip
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert (found["rows"], found["asked"], found["data"]) == (4, 3, [str(run / "test.jsonl")])
    assert set(found["adapter_figures"]["answers"]) == {"exact", "rouge_l", "gsm8k", "stopped"}
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [one["expected"] for one in said] == ["#### 40", "#### 41", "#### 42"]
    assert all("basket" in one["prompt"] and one["prompt"].rstrip().endswith("<|assistant|>") for one in said)
    told = invoke(run / "out", "--answers=0")
    assert told.exit_code == 0 and "4 rows" in told.stdout and "perplexity" in told.stdout


def test_wrong_input_is_named_before_anything_is_measured(run: Path, tmp_path: Path) -> None:
    plain = [[{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "three"}]]
    for words, reason in [
        ((run / "out", "--data", tmp_path / "no.jsonl"), "--data: .*no.jsonl: no such file"),
        (
            (run / "out", "--data", write(tmp_path / "plain.jsonl", plain), "--gsm8k"),
            "the number after '####', and there is none",
        ),
        ((tmp_path,), "has no LoRA adapter"),
        ((run / "out", "--lm-eval-args=3"), "--lm-eval-args: expected a mapping"),
        ((run / "out", "--save-answers", tmp_path / "no" / "file"), "no such folder"),
    ]:
        told = invoke(*words)
        assert isinstance(told.exception, ValueError) and type(told.exception).__module__.startswith(
            "phi3_lora_plugin."
        )
        assert told.exception.args and re.search(reason, str(told.exception)), told.exception
        assert "measuring" not in told.output


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the lm-evaluation-harness is installed")
def test_without_the_harness_the_error_says_what_to_install(run: Path) -> None:
    with pytest.raises(HarnessError, match=r'pip install "phi3-lora-plugin\[lm-eval\]"'):
        measured(run / "out", wanted=Wanted(tasks=("arc_easy",)))


def test_tasks_of_the_harness(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": "how many apples?", "choices": ["three", "fox"], "right": 0}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "apples.yaml").write_text(
        "task: apples\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{right}}'\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    options = {"include_path": str(tmp_path), "limit": 3}
    assert require_lm_eval(("apples",), options).all_tasks == ["apples"]  # not the thousands of the harness
    found = measured(run / "base", wanted=Wanted(tasks=("apples",), task_options=options))
    assert found.rows == 0 and found.base_figures.tasks["apples"]["acc,none"] in (0.0, 1.0)
    with pytest.raises(HarnessError, match="takes no limits, only"):
        measured(run / "base", wanted=Wanted(tasks=("apples",), task_options={"limits": 3}))


@pytest.mark.long  # the harness reads its 14,000 files
def test_tasks_that_the_harness_does_not_have_and_groups_of_those_that_it_has(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "mine.yaml").write_text("group: mine\ntask: [arc_easy]\n")
    options = {"include_path": str(tmp_path)}
    with pytest.raises(HarnessError, match="lm_eval knows no task pears"):
        measured(run / "base", wanted=Wanted(tasks=("pears",), task_options=options))
    assert {"mine", "arc_easy"} <= set(require_lm_eval(("mine",), options).all_tasks)
