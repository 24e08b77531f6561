"""TRL's trainers with activation: targets, masks and preferences of Phi-3 as our own run has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from phi3_lora_plugin import activate, deactivate, encode, latest_complete, verify
from phi3_lora_plugin.chat.preferences import preference
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.hosts.activate import PARTS
from phi3_lora_plugin.hosts.trl import TrlError, encoded, pairs

pytestmark = pytest.mark.slow

# The answer begins with white space, which `<|assistant|>` swallows where role tokens do.
CHAT = tiny.turns("what is two?", "\n it is.", "and?", "no.")
ASK = CHAT[0]


@pytest.fixture
def said() -> Iterator[list[str]]:
    sentences: list[str] = []
    activate(parts=list(PARTS), say=sentences.append)
    yield sentences
    deactivate()


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    common = dict(output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none")
    return common | dict(bf16=False, disable_tqdm=True, logging_steps=1, save_strategy="no") | more


@pytest.mark.skipif(not hasattr(SFTConfig, "assistant_only_loss"), reason="this TRL has no assistant_only_loss")
def test_sft_masks_are_those_of_our_own_encoder(said: list[str], tmp_path: Path) -> None:
    words = tiny.tokenizer(rstrip=True)
    # A space at the end renders alike and is another text, which TRL does not know.
    words.chat_template = words.chat_template.replace("{% for", "{#  #}{% for", 1)
    made = SFTTrainer(
        tiny.model(),
        SFTConfig(**settings(tmp_path, assistant_only_loss=True)),
        train_dataset=Dataset.from_list([{"messages": CHAT}] * 4),
        processing_class=words,
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"),
    )
    expected = encode(CHAT, tiny.tokenizer(rstrip=True))
    row = made.train_dataset[0]
    assert (list(row["input_ids"]), list(row["labels"])) == (expected["input_ids"], expected["labels"])
    made.train()
    adapter = latest_complete(tmp_path)
    assert adapter and verify(adapter)
    assert any(one.startswith("SFTTrainer: LoRA-only checkpoints") for one in said)


ANSWERS = {"chosen": [{"role": "assistant", "content": "two."}], "rejected": [{"role": "assistant", "content": "six."}]}
SHAPES = {
    "messages": {"prompt": [ASK], **ANSWERS},
    "implicit": {name: [ASK, *answer] for name, answer in ANSWERS.items()},
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASK["content"]}],
        "chosen": {"from": "gpt", "value": "two."},
        "rejected": {"from": "gpt", "value": "six."},
    },
    "alpaca": {"instruction": ASK["content"], "input": "", "chosen": "two.", "rejected": "six."},
    "texts": {"prompt": ASK["content"], "chosen": "two.", "rejected": "six."},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_preferences_are_read_in_every_shape_of_chats(shape: str) -> None:
    pair = preference(SHAPES[shape])
    assert pair.chosen == [ASK, *ANSWERS["chosen"]] and pair.rejected == [ASK, *ANSWERS["rejected"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [ASK], "chosen": "a"}, "no column 'rejected', only prompt, chosen"),
        ({"chosen": [ASK], "rejected": ANSWERS["chosen"]}, "differ from their first turn on"),
        ({"prompt": [ASK], "messages": [ASK], **ANSWERS}, "prompt twice, as prompt and messages"),
        ({"prompt": [ASK], "chosen": "a", "rejected": "a"}, "the same"),
        ({"prompt": [ASK], "chosen": [*ANSWERS["chosen"], ASK], "rejected": "a"}, "assistant, user after the prompt"),
    ],
)
def test_what_is_wrong_with_a_preference_is_said(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        preference(row)
    with pytest.raises(TrlError, match=f"row 1: .*{message}"):
        pairs(Dataset.from_list([row]), tiny.tokenizer())


def test_the_preset_is_read_by_the_parser_of_trl() -> None:
    from trl.scripts.dpo import make_parser

    preset = Path(__file__).parents[1] / "docs" / "trl" / "phi3-dpo-lora.yaml"
    given = ["--config", str(preset), *"--dataset_name my/preferences --output_dir out --use_cpu --bf16 0".split()]
    data, training, model, _ = make_parser().parse_args_and_config(given, fail_with_unknown_args=True)
    assert (data.dataset_name, training.beta, model.lora_r, model.use_peft) == ("my/preferences", 0.1, 16, True)
    assert model.lora_target_modules is None


@pytest.mark.parametrize("shape", ["implicit", "sharegpt"])
def test_dpo_compares_answers_and_their_stop_token_only(shape: str, said: list[str], tmp_path: Path) -> None:
    words = tiny.tokenizer(rstrip=True)
    made = DPOTrainer(
        tiny.model(),
        args=DPOConfig(**settings(tmp_path, learning_rate=1e-2)),
        train_dataset=Dataset.from_list([SHAPES[shape]] * 4),
        processing_class=words,
        peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"),
    )
    row = made.train_dataset[0]
    if "prompt_ids" not in row:
        pytest.skip("this TRL has other columns, and its own encoding stays")
    for name in ("chosen", "rejected"):
        whole = encode([ASK, *ANSWERS[name]], words)
        trained = [token for token, label in zip(whole["input_ids"], whole["labels"], strict=True) if label != -100]
        assert row[f"{name}_ids"] == trained and words.convert_ids_to_tokens(trained)[-1] == "<|end|>"
        assert whole["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the reference is the bare base
    adapter = latest_complete(tmp_path)
    assert adapter and verify(adapter) and any("DPOTrainer: speed: lora: on" in one for one in said)


def test_rows_that_say_what_is_not_to_be_learned_are_honoured_or_refused() -> None:
    words = tiny.tokenizer(rstrip=True)
    marked = [{"messages": [*CHAT[:1], CHAT[1] | {"loss": False}, *CHAT[2:]]}]
    row = encoded(Dataset.from_list(marked), words)[0]
    labels = encode([ASK, CHAT[1] | {"train": False}, *CHAT[2:]], words)["labels"]
    assert row["assistant_masks"] == [int(label != -100) for label in labels]
    for column, said in (({"label": False}, "row 1: has label: false"), ({"images": ["a"]}, "'images' holds pictures"),
                         ({"weight": 0.5}, "row 1 has a weight between 0 and 1")):  # fmt: skip
        with pytest.raises(TrlError, match=said):
            encoded(Dataset.from_list([{"messages": CHAT} | column]), words)
