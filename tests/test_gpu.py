"""The facts of `python -m benchmarks.gpu`, each a test on a card (`pytest -m gpu`), and the whole command on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch
from warm_process import MODULE, Warm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import throughput  # noqa: E402
from benchmarks.gpu.facts import Check, Clock, Fact, Found, LeftOut, Setup, check  # noqa: E402

pytestmark = pytest.mark.slow

#: Checks are named alike whatever device they are made for.
NAMES = [
    (part, one.name)
    for part in command.PARTS
    for one in command.checks(part)(Setup(torch.device("cuda:0"), False, Path()))
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize(("part", "name"), NAMES)
def test_on_a_card(part: str, name: str, tmp_path: Path) -> None:
    setup = Setup(torch.device("cuda:0"), False, tmp_path)
    (one,) = [each for each in command.checks(part)(setup) if each.name == name]
    fact = check(one, setup, Clock(600))
    if fact.ok is None:
        pytest.skip(fact.said)
    assert fact.ok, f"{fact.said}\n{fact.figures.get('traceback', fact.figures)}"


@pytest.fixture
def forked_trl(warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that TRL is measured in is a fork."""

    def call(command: list[str], stdout: TextIO, env: dict[str, str], timeout: int, **_: object) -> int:
        assert command[:3] == [sys.executable, "-m", "benchmarks.variants"]
        done = warm.run(MODULE, *command[2:], cwd=ROOT, timeout=timeout, **env | {"PYTHONPATH": str(ROOT)})
        stdout.write(done.stdout + done.stderr)
        return done.returncode

    known = {"TimeoutExpired": subprocess.TimeoutExpired, "STDOUT": subprocess.STDOUT}
    monkeypatch.setattr(throughput, "subprocess", SimpleNamespace(call=call, **known))


def test_the_whole_command_in_tiny_sizes(
    forked_trl: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["gpu", "--tiny", "--minutes", "30", "--out", str(tmp_path)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    code = command.main()
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == ["0", "1a", "1b", "2", "3"]
    facts = {fact["name"]: fact for line in lines for fact in line["facts"]}
    assert code == 0, [fact for fact in facts.values() if fact["ok"] is False]
    assert {name for name, fact in facts.items() if fact["ok"] is None} <= {
        "waits for the card",  # a card's alone
        "plan against the measured peak: phi3-mini-4k-lora",
        "plan against the measured peak: phi3-mini-4k-qlora",
        "NF4 as its dequantised twin",  # bitsandbytes
        "NF4 unpacked ahead as in turn",
        "NF4, 8k tokens a step",
        "DPO",  # TRL
        "TRL with its defaults",
    }
    assert set(facts) <= {name for _, name in NAMES}
    assert f"{sum(fact['ok'] is True for fact in facts.values())} PASS, 0 FAIL" in said.splitlines()[-1]
    profile, speed = facts["profile of one step"]["figures"], facts["8k tokens a step, activations kept"]["figures"]
    assert len(profile["top"]) == 25 and 0 < profile["busy"] <= 1
    assert speed["ours"]["tokens_per_second"] > 0 and len(speed["ours"]["losses"]) == 4


def test_a_fault_in_the_package_is_a_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient is found in float32, in 16 bits and beside the packs, and the command's exit code says so."""
    from phi3_lora_plugin.speed import loss

    real = loss.supervised_rows

    def wrong(*args: Any, **kwargs: Any) -> Any:
        rows, *others = real(*args, **kwargs)
        return (rows * 1.02, *others)

    monkeypatch.setattr(loss, "supervised_rows", wrong)
    setup = Setup(torch.device("cpu"), True, tmp_path)
    made = {one.name: one for one in command.checks("1a")(setup)}
    names = [
        f"{kind}: shared keys" for kind in ("float32, each part alone and all", "packed as alone, padded as packed")
    ]
    facts = [check(made[name], setup, Clock(600)) for name in [*names, "16 bits, error against float32: shared keys"]]
    assert [fact.ok for fact in facts] == [False] * 3, facts
    assert command.table({"1a": facts}, tmp_path) == 1


def test_whatever_a_check_does_the_next_one_is_run(tmp_path: Path) -> None:
    setup = Setup(torch.device("cpu"), True, tmp_path)

    def raises(error: BaseException) -> Any:
        def run(setup: Setup) -> Found:
            raise error

        return run

    def found(run: Any, seconds: float = 0.0, left: float = 60.0) -> Fact:
        return check(Check("one", seconds, run), setup, Clock(left))

    assert found(lambda setup: Found(True, "well", {"a": 1})).ok is True
    left_out = found(raises(LeftOut("trl is not installed")))
    assert left_out.ok is None and left_out.said == "trl is not installed"
    lost = found(raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")))
    assert lost.ok is False and lost.said == "out of memory: CUDA out of memory. Tried to allocate 2 GiB"
    wrong = found(raises(KeyError("x")))
    assert wrong.ok is False and "KeyError" in wrong.said and "raise error" in wrong.figures["traceback"]
    late = found(lambda setup: Found(True, ""), seconds=61)
    assert late.ok is None and "takes about 61 s" in late.said
