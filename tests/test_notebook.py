"""examples/quickstart.ipynb runs from top to bottom in a kernel of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.long
NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what ships has none
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}, kernel_name="python3"
    ).execute()
    said = ["".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    assert "8 override" in said[0] and "did you mean 'lora.r'" in said[0]
    assert "30 steps" in said[1] and "adapter_config.json" in said[2] and said[3].strip()
    assert (tmp_path / "runs" / "notebook" / "lora").is_dir()
