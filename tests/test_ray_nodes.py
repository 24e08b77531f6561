"""Ray on several nodes: real raylets of this machine, one added, one killed, checkpoints in S3 (moto), Tune."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs as arrow
from safetensors.torch import load_file
from warm_process import Warm

from phi3_lora_plugin import verify
from phi3_lora_plugin.hosts.ray_checkpoints import bring
from phi3_lora_plugin.hosts.ray_settings import RayError

pytestmark = pytest.mark.long

BIN = Path(sys.executable).parent
SCALE = Path(__file__).parents[1] / "docs" / "scale.md"
STEPS = 60
RECIPE = f"""
extends: tiny-cpu
data: {{max_length: 64}}
training: {{max_steps: {STEPS}, per_device_train_batch_size: 4, logging_steps: 4, num_train_epochs: null}}
checkpoint: {{every_steps: 3, keep_last: 9}}
"""


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server on this machine, as `--ray storage_path=` names it."""

    url: str
    filesystem: arrow.FileSystem

    def steps(self, folder: str) -> dict[int, str]:
        """Step -> path of the complete checkpoints of a run."""
        selector = arrow.FileSelector(folder, allow_not_found=True, recursive=True)
        manifests = [info.path for info in self.filesystem.get_file_info(selector) if info.base_name == "manifest.json"]
        found = {}
        for path in manifests:
            if not path.endswith("resume/manifest.json"):
                with self.filesystem.open_input_stream(path) as stream:
                    found[int(json.loads(stream.read())["step"])] = path.removesuffix("/manifest.json")
        return found


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    pytest.importorskip("moto.server", reason="needs moto's server: pip install 'moto[s3]' flask flask-cors")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("RAY_raylet_start_wait_time_s", "300")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DEDUP_LOGS", "0")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
        filesystem, _ = arrow.FileSystem.from_uri("s3://loras?region=us-east-1&allow_bucket_creation=true")
        filesystem.create_dir("loras")
        yield Bucket("s3://loras/runs", filesystem)
    server.stop()


@pytest.fixture(scope="module")
def cluster(bucket: Bucket) -> Iterator[Any]:
    """A head without room for workers; nodes are added by the tests."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    done = warm.command("train", "r.yaml", "output_dir=one", "--samples", "0", "--no-check", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def wait_for(process: subprocess.Popen[bytes], said: Path, what: Callable[[], Any]) -> Any:
    while not (found := what()):
        assert process.poll() is None, said.read_text(encoding="utf-8")[-6000:]
        time.sleep(0.2)
    return found


def test_a_run_grows_and_outlives_its_first_node(one: Path, cluster: Any, bucket: Bucket) -> None:
    first = cluster.add_node(num_cpus=1)
    said = one / "nodes.txt"
    settings = f"num_workers=1-2,resize_seconds=1,address={cluster.address},storage_path={bucket.url}"
    options = ["output_dir=nodes", "--samples", "0", "--no-check", "--ray", settings]
    with said.open("wb") as stream:
        process = subprocess.Popen(
            [str(BIN / "phi3-lora"), "train", "r.yaml", *options], cwd=one, stdout=stream, stderr=stream,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PHI3_LORA_CACHE": "off"},
        )  # fmt: skip
    try:
        wait_for(process, said, lambda: bucket.steps("loras/runs/nodes"))
        cluster.add_node(num_cpus=1)
        wait_for(process, said, lambda: "workers: 2" in said.read_text(encoding="utf-8"))
        grown = max(bucket.steps("loras/runs/nodes"))
        wait_for(process, said, lambda: max(bucket.steps("loras/runs/nodes")) > grown)
        kept = max(bucket.steps("loras/runs/nodes"))
        cluster.remove_node(first, allow_graceful=False)
        assert process.wait(900) == 0, said.read_text(encoding="utf-8")[-6000:]
    finally:
        process.kill()
    text = said.read_text(encoding="utf-8")
    assert [line.split("workers: ")[1][0] for line in text.splitlines() if "workers: " in line] == ["1", "2", "1"]
    resumed = [int(step) for step in re.findall(r"resuming from .*, step (\d+)", text)]
    assert len(resumed) == 2 and resumed[0] >= 3 and resumed[1] >= kept > resumed[0]  # nothing that was saved is lost
    ends = [one / name / "lora" / f"step-{STEPS:08d}" for name in ("one", "nodes")]
    assert all(verify(path) for path in ends)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in ends)
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, atol=1e-4, rtol=0)


def test_what_comes_back_from_s3_is_checked(one: Path, bucket: Bucket, tmp_path: Path) -> None:
    from ray.train import Checkpoint

    newest, older = (one / "one" / "lora" / f"step-{step:08d}" for step in (STEPS, STEPS - 3))
    paths = ["loras/copies/newest", "loras/copies/older"]
    for path, folder in zip(paths, (newest, older), strict=True):
        arrow.copy_files(str(folder), path, destination_filesystem=bucket.filesystem, use_threads=False)
    kept = [Checkpoint(path, bucket.filesystem) for path in paths]
    said: list[str] = []
    assert bring(kept, tmp_path / "whole", said.append) == tmp_path / "whole" / "lora" / newest.name
    assert verify(tmp_path / "whole") and not said
    assert bring(kept, tmp_path / "whole", said.append) is None  # it is here already

    def damage(path: str) -> None:
        with bucket.filesystem.open_input_stream(f"{path}/adapter_model.safetensors") as stream:
            content = bytearray(stream.read())
        content[-1] ^= 1
        with bucket.filesystem.open_output_stream(f"{path}/adapter_model.safetensors") as stream:
            stream.write(bytes(content))

    damage(paths[0])
    assert bring(kept, tmp_path / "older", said.append) == tmp_path / "older" / "lora" / older.name
    assert verify(tmp_path / "older") and len(said) == 1 and "copies/newest: adapter_model.safetensors" in said[0]
    damage(paths[1])
    with pytest.raises(RayError, match="every checkpoint that Ray keeps of this run is damaged: .*newest.*older"):
        bring(kept, tmp_path / "none", said.append)
    assert not list((tmp_path / "none" / "lora").iterdir())
    assert (tmp_path / "whole" / "lora" / "LATEST").read_text() == f"{newest.name}\n"


def test_a_storage_has_one_run_of_a_name(one: Path, bucket: Bucket, warm: Warm) -> None:
    bucket.filesystem.create_dir("loras/runs/taken/checkpoint_1")
    taken = ["train", "r.yaml", "output_dir=taken", "--ray", f"storage_path={bucket.url}"]
    done = warm.command(*taken, cwd=one)
    assert done.returncode == 2
    assert "s3://loras/runs/taken has checkpoints of a run; pass --resume, or another storage_path" in done.stderr


def test_the_search_of_the_docs_keeps_the_best_adapter(
    cluster: Any, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from peft import PeftConfig

    if not cluster.worker_nodes:
        cluster.add_node(num_cpus=1)
    snippet = re.search(r"```python\n(.*?)```", SCALE.read_text(encoding="utf-8"), re.DOTALL)
    assert snippet
    monkeypatch.chdir(tmp_path)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
    try:
        found: dict[str, Any] = {}
        exec(compile(snippet[1], str(SCALE), "exec"), found)
    finally:
        ray.shutdown()
    results, best = found["results"], found["best"]
    assert not results.errors and sorted(each.config["lora.r"] for each in results) == [4, 8]
    assert all(each.metrics["step"] == 4 for each in results)
    assert best.metrics["eval_loss"] == min(each.metrics["eval_loss"] for each in results)
    assert verify(tmp_path / "best-adapter")
    assert PeftConfig.from_pretrained("best-adapter").r == best.config["lora.r"]
    assert all("s3" in each.checkpoint.filesystem.type_name for each in results)
