"""Checkpoints between machines without a common disk, and where Ray keeps them: without a cluster."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from warm_process import Warm

from phi3_lora_plugin import verify
from phi3_lora_plugin.hosts.ray_checkpoints import claim, newest_step, share
from phi3_lora_plugin.hosts.ray_settings import Cluster, RayError, storage_of
from phi3_lora_plugin.store.checkpoint import write_checkpoint

pytestmark = pytest.mark.slow


def write(machine: Path, step: int, content: bytes = b"weights") -> None:
    write_checkpoint(machine / "lora", step, {"adapter": content}, resume={"state": b"random"})


def two_machines(place: str) -> None:
    """One rank of two, each with a disk of its own: the first machine has step 6, the other step 3."""
    rank = int(os.environ["RANK"])
    machine = Path(place, f"machine-{rank}")
    write(machine, 6 if rank == 0 else 3)
    torch.distributed.init_process_group("gloo")
    share(machine, writes=True)
    found = {"first": newest_step(machine)}
    if rank == 1:
        adapter = machine / "lora" / "step-00000006" / "adapter"
        adapter.write_bytes(b"damaged")
    share(machine, writes=True)
    found["damaged"] = newest_step(machine)
    share(machine, writes=True)  # nothing to do
    Path(place, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


def test_every_machine_gets_the_newest_checkpoint_of_the_first(tmp_path: Path, warm: Warm) -> None:
    warm.ranks(tmp_path, two_machines, str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [{"first": 6, "damaged": 6}] * 2
    assert verify(tmp_path / "machine-1")
    assert (tmp_path / "machine-1" / "lora" / "LATEST").read_text() == "step-00000006\n"
    names = [sorted(path.name for path in (tmp_path / f"machine-{rank}" / "lora").iterdir()) for rank in range(2)]
    assert names == [["LATEST", "step-00000006"], ["LATEST", "step-00000003", "step-00000006"]]


def test_a_folder_left_over_on_a_machine_is_not_taken_for_this_run(tmp_path: Path) -> None:
    claim(tmp_path / "new", "this run")
    write(tmp_path / "new", 3)
    claim(tmp_path / "new", "this run")  # started again
    with pytest.raises(RayError, match=f"{tmp_path / 'new'} on .* has checkpoints of another run; pass --resume"):
        claim(tmp_path / "new", "next run")


def test_a_storage_is_a_folder_or_a_url_of_pyarrow_or_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    assert storage_of(Cluster(), run).path == str(run / "ray")
    given = ("kept", "local://kept", (tmp_path / "kept").as_uri())
    places = [storage_of(Cluster(storage_path=each), run) for each in given]
    assert [place.path for place in places] == [str(tmp_path / "kept")] * 3
    assert [place.filesystem.type_name for place in places] == ["local", "py::fsspec+('file', 'local')", "local"]
    assert not any(place.has_run() for place in places)
    (tmp_path / "kept" / "mine" / "checkpoint_1").mkdir(parents=True)
    assert all(place.has_run() for place in places)
    assert not replace(places[1], name="other").has_run()
    with pytest.raises(
        RayError, match=r"storage_path=nowhere://bucket: neither pyarrow .* nor fsspec .* can use it"
    ) as refused:
        storage_of(Cluster(storage_path="nowhere://key:secret@bucket"), run)
    assert "secret" not in str(refused.value)
