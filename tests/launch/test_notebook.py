"""Launch from a notebook, in a real kernel."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

#: What a reader of a notebook would type, cell by cell.
CELLS = [
    """
    import torch
    from plugframe import Lite
    """,
    """
    def train(lite, factor):
        lite.print(f"training on rank {lite.global_rank} of {lite.world_size}")
        model = torch.nn.Linear(2, 1)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        lite.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        return factor * lite.all_reduce(torch.tensor([1.0 + lite.global_rank]), reduce_op="sum").item()
    """,
    'Lite(accelerator="cpu", devices=2, strategy="ddp_notebook").launch(train, 2)',
    'Lite(accelerator="cpu", devices=2).launch(train, 3)',
    """
    def broken(lite):
        if lite.global_rank == 1:
            raise ValueError("no such colour")
        lite.barrier()

    Lite(accelerator="cpu", devices=2).launch(broken)
    """,
    'Lite(accelerator="cpu", devices=2).launch()',
    """
    import multiprocessing, os, tempfile
    print(multiprocessing.active_children(), torch.distributed.is_initialized())
    print([name for name in os.environ if name.startswith(("PLUGFRAME_", "TORCHELASTIC_", "RANK", "MASTER_"))])
    print([name for name in os.listdir(tempfile.gettempdir()) if name.startswith("plugframe-launch-")])
    """,
    """
    %%bash
    echo this cell is of another language
    """,
    """
    import types
    torch.accelerator.current_accelerator = lambda: torch.device("xpu")
    torch.get_device_module = lambda device: types.SimpleNamespace(is_initialized=lambda: True)
    class Weights:
        def xpu(self):
            return self
    """,
    """
    %precision 3
    weights = Weights()
    weights = weights.xpu()
    """,
    'Lite(accelerator="cpu", devices=2).launch(train, 4)',
]


def run(folder: Path) -> list[Any]:
    """Run the notebook in a new kernel, and return its cells."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(textwrap.dedent(source).strip()) for source in CELLS]
    )
    client = NotebookClient(
        notebook,
        timeout=100,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return list(notebook.cells)


def said(cell: Any) -> str:
    """Return the output a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def result(cell: Any) -> str:
    """Return the value of a cell's last line."""
    (found,) = [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
    return str(found)


def error(cell: Any) -> Any:
    """Return the error that a cell raised."""
    (found,) = [output for output in cell.outputs if output.output_type == "error"]
    return found


@pytest.mark.ranks
def test_a_notebook_launches_twice_and_shows_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are returned, output appears in the cell, failures are the error, and the kernel stays clean."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    _, _, first, second, broken, scriptless, left, _, _, _, used = run(tmp_path)
    assert (result(first), result(second)) == ("6.0", "9.0")
    assert all(said(cell).count("training on rank 0 of 2") == 1 for cell in (first, second))
    assert error(broken).ename == "RankFailedError"
    report = "\n".join(error(broken).traceback).splitlines()
    assert report[0] == f"rank 1 on {os.uname().nodename} failed: ValueError: no such colour"
    assert report[-2] == "ValueError: no such colour"
    assert report[-1].startswith("rank 0: ")
    assert "An interactive session has no file that ranks could run" in error(scriptless).evalue
    assert said(left).splitlines() == ["[] False", "[]", "[]"]
    assert re.search(
        r"has used a xpu device, by the look of the code in In \[10\], line 3 \(weights = weights\.xpu\(\)\): restart",
        error(used).evalue,
    )
