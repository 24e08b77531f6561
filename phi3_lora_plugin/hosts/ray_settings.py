"""The settings of `--ray KEY=VALUE`, and where Ray keeps checkpoints: a folder, or a URL of pyarrow or fsspec."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import closest


class RayError(Phi3LoraError):
    """Ray is not installed, a setting that it does not have, or a storage that cannot be used."""


@dataclass(frozen=True)
class Cluster:
    """The settings of `--ray KEY=VALUE`; `use_gpu` follows the recipe's device if not set."""

    num_workers: int | tuple[int, int] = 1  # (fewest, most): as many as the cluster has room for
    use_gpu: bool | None = None
    cpus_per_worker: int = 1
    max_failures: int = 3  # times that workers are started again; -1: without end
    resize_seconds: int = 60  # how often Ray looks for room for more workers
    storage_path: str | None = None  # where Ray keeps checkpoints: `ray/` in the run's folder
    address: str | None = None  # of a running cluster; None: RAY_ADDRESS, or a cluster of this machine

    @property
    def fewest(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


@dataclass(frozen=True)
class Storage:
    """Where the checkpoints of one run are kept: `path` without a scheme, on `filesystem` (pyarrow's)."""

    given: str
    path: str
    filesystem: Any
    name: str  # of the run's folder in `path`

    def has_run(self) -> bool:
        """Whether a run has left checkpoints there.

        Raises:
            RayError: the storage cannot be read.
        """
        from pyarrow.fs import FileSelector, FileType

        try:
            there = self.filesystem.get_file_info(FileSelector(f"{self.path}/{self.name}", allow_not_found=True))
            return any(entry.type == FileType.Directory for entry in there)
        except Exception as error:  # of pyarrow, and through fsspec of any library
            raise RayError(_without_secrets(f"storage_path={self.given} cannot be read: {error}")) from error

    def __str__(self) -> str:
        return f"{_without_secrets(self.given).partition('?')[0].rstrip('/')}/{self.name}"


def read_settings(texts: Sequence[str]) -> Cluster:
    """`["num_workers=2", ...]` -> `Cluster`.

    Raises:
        RayError: with everything that is wrong.
    """
    kinds = {field.name: str(field.type) for field in fields(Cluster)}
    found: dict[str, Any] = {}
    problems = []
    for text in (part for given in texts for part in given.split(",")):
        name, equals, value = text.strip().partition("=")
        if name not in kinds or not equals:
            near = closest(name, kinds)
            problems.append(f"{text!r} is not one of {', '.join(f'{kind}=' for kind in kinds)}")
            problems[-1] += f"; did you mean {near}=?" if near and near != name else ""
        elif kinds[name].startswith("bool"):
            if value.lower() not in ("true", "false"):
                problems.append(f"{name}: expected true or false, got {value!r}")
            found[name] = value.lower() == "true"
        elif name == "num_workers" and (match := re.fullmatch(r"(\d+)-(\d+)", value)):
            found[name] = int(match[1]), int(match[2])
            if not 1 <= found[name][0] <= found[name][1]:
                problems.append(f"{name}: expected the fewest and the most of at least 1, as in 1-4, got {value!r}")
        elif kinds[name].startswith("int"):
            lowest = -1 if name == "max_failures" else 1
            if not value.lstrip("-").isdigit() or int(value) < lowest:
                range_too = ", or a range such as 1-4" if name == "num_workers" else ""
                problems.append(f"{name}: expected a whole number of at least {lowest}{range_too}, got {value!r}")
            else:
                found[name] = int(value)
        else:
            found[name] = value
    if problems:
        raise RayError("--ray: " + "; ".join(problems))
    return Cluster(**found)


def storage_of(cluster: Cluster, output_dir: Path) -> Storage:
    """Where `cluster` keeps the checkpoints of the run that has this output folder.

    pyarrow knows `s3://`, `gs://`, `abfs://`, `hdfs://` and folders; any other scheme is fsspec's.

    Raises:
        RayError: no such scheme, or a package that it needs is not installed.
    """
    import pyarrow
    import pyarrow.fs

    here = pyarrow.fs.LocalFileSystem()
    if cluster.storage_path is None:
        return Storage(str(output_dir / "ray"), str(output_dir / "ray"), here, "run")
    given, name = cluster.storage_path, output_dir.name
    if "://" not in given:
        return Storage(given, str(Path(given).expanduser().resolve()), here, name)
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(given)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        filesystem, path = _of_fsspec(given, error)
    return Storage(given, path.rstrip("/"), filesystem, name)


def _of_fsspec(url: str, because: Exception) -> tuple[Any, str]:
    import pyarrow.fs
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(url)
    except Exception as error:  # no such scheme, a package that is missing, or whatever that one raises
        text = f"storage_path={url}: neither pyarrow ({because}) nor fsspec ({error}) can use it"
        raise RayError(_without_secrets(text)) from error
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def _without_secrets(text: str) -> str:
    """Without the user and password of a URL."""
    return re.sub(r"//[^/@\s]+@", "//", text)
