# SPDX-License-Identifier: Apache-2.0
"""Executes notebooks with this Python and keeps their outputs small.

    python notebooks/execute.py                    # all, in place
    python notebooks/execute.py quickstart --fast  # one, small sizes, nothing written

Needs `ipykernel` and `nbclient`, no Jupyter server and no installed kernel.
"""

import argparse
import base64
import io
import os
import pathlib
import sys
import tempfile
import time

import nbclient
import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from PIL import Image
from traitlets.config import Config

HERE = pathlib.Path(__file__).resolve().parent
COLOURS = 64  # of a palette: enough for line drawings, a third of the bytes


class ThisPython(AsyncKernelManager):
    """Starts the kernel with the Python that runs this file, whatever is installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        """A kernel of `sys.executable`."""
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def execute(path: pathlib.Path, *, is_fast: bool) -> nbformat.NotebookNode:
    """Runs a notebook from top to bottom in a fresh kernel and an empty directory.

    Args:
      path: The notebook; it is not changed.
      is_fast: Whether to ask for the small sizes of tests.

    Returns:
      The notebook with its new outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | {"NPROC": "32"}
    environment.pop("DHO2_NOTEBOOK_FAST", None)
    if is_fast:
        environment |= {
            "DHO2_NOTEBOOK_FAST": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes most of the time
        }
    with tempfile.TemporaryDirectory() as directory:
        # Sockets in the file system: no open port. Works on Linux and macOS.
        sockets = str(pathlib.Path(directory, "kernel.json"))
        settings = {"transport": "ipc", "connection_file": sockets}
        work = pathlib.Path(directory, "work")
        work.mkdir()
        client = nbclient.NotebookClient(
            notebook,
            kernel_manager_class=ThisPython,
            config=Config(ThisPython=settings),
            timeout=600,
            record_timing=False,
            resources={"metadata": {"path": str(work)}},
        )
        client.execute(env=environment)
    for cell in notebook.cells:
        cell.get("outputs", [])[:] = map(_smaller, cell.get("outputs", []))
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _smaller(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Returns an output whose picture, if it has one, has a palette."""
    encoded = output.get("data", {}).get("image/png")
    if encoded:
        picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
        small = io.BytesIO()
        picture.quantize(COLOURS).save(small, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return output


def main() -> None:
    """Executes what the command line names, and says how long it took."""
    parser = argparse.ArgumentParser(
        description="Executes notebooks and keeps their outputs small."
    )
    everything = sorted(path.stem for path in HERE.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", default=everything, metavar="NAME")
    parser.add_argument("--fast", action="store_true", help="small; nothing is written")
    parser.add_argument("--pictures", type=pathlib.Path, help="save the PNGs here too")
    options = parser.parse_args()
    for name in options.names:
        began = time.monotonic()
        path = HERE / f"{name}.ipynb"
        notebook = execute(path, is_fast=options.fast)
        if not options.fast:
            text = nbformat.writes(notebook).rstrip("\n") + "\n"
            path.write_text(text, encoding="utf-8")
        if options.pictures:
            save_pictures(notebook, options.pictures / name)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def save_pictures(notebook: nbformat.NotebookNode, start: pathlib.Path) -> None:
    """Writes each picture of a notebook to a file.

    Args:
      notebook: With outputs.
      start: What the files' names begin with; a number and `.png` follow.
    """
    start.parent.mkdir(parents=True, exist_ok=True)
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    pictures = [one.data["image/png"] for one in outputs if "data" in one]
    for number, picture in enumerate(pictures, 1):
        path = start.with_name(f"{start.name}_{number}.png")
        path.write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main()
