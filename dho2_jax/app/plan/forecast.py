# SPDX-License-Identifier: Apache-2.0
"""`dho2 plan`: what a training run will need on machines that need not be there.

Asks `measure`, in a process of its own for each topology, remembers the answers, and
lays them out as a table.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import dho2_jax
from dho2_jax.app.errors import UserError
from dho2_jax.app.fields import Config
from dho2_jax.app.plan import topology
from dho2_jax.app.plan.topology import Topology
from dho2_jax.app.run import experiment
from dho2_jax.app.show.writers import finite

Measured = dict[str, Any]  # from `measure`, or only `refused`: a sentence


def plan(path: str, overrides: Sequence[str], name: str) -> dict[str, Measured]:
    """Measures a config on a topology, and on ones with half and double the chips.

    Args:
      path: The config file, or the name of one that is shipped.
      overrides: `--config.NAME=VALUE` arguments.
      name: The topology, such as "v5e:16x16".

    Returns:
      What `measure.measure` returns, by the names of the topologies from the smallest;
      only `refused`, a sentence, where half or double the chips cannot be had.

    Raises:
      UserError: If the config or the topology cannot be used.
    """
    middle = topology.parse(name)
    topology.check_compiler(middle)
    config = experiment.read_config(path, overrides)
    # First the one that was asked for: if it fails, the others need not be tried.
    measured = {middle.name: _measured(path, overrides, config, middle)}
    for other in (topology.half(middle), topology.double(middle)):
        if other is None:
            continue
        more = _other_mesh(config, middle)
        try:
            measured[other.name] = _measured(
                path, [*overrides, *more], config, other, more
            )
        except UserError as error:
            measured[other.name] = {"refused": str(error)}
    return dict(
        sorted(measured.items(), key=lambda item: topology.parse(item[0]).chips)
    )


def _other_mesh(config: Config, middle: Topology) -> list[str]:
    """Returns the override that fits a mesh of fixed shape to other numbers of chips.

    The longest axis grows and shrinks.
    """
    shape = tuple(config.mesh_shape)
    if not shape or -1 in shape:
        return []
    longest = shape.index(max(shape))
    shape = (*shape[:longest], -1, *shape[longest + 1 :])
    return [f"--config.mesh_shape={shape}".replace(" ", "")]


def _measured(
    path: str,
    overrides: Sequence[str],
    config: Config,
    target: Topology,
    changes: Sequence[str] = (),
) -> Measured:
    """Measures one topology, or remembers having done so."""
    file = _cache_file(config, target, changes)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    measured = _ask(path, overrides, target)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: another process may read at the same time.
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(finite(measured)), encoding="utf-8")
        part.replace(file)
    except OSError:
        pass  # a memory is a convenience
    return measured


def _cache_file(
    config: Config, target: Topology, changes: Sequence[str]
) -> pathlib.Path:
    """Returns where an answer is kept: its name tells all that it depends on."""
    depends = {
        "config": config.to_dict(),
        "changes": list(changes),
        "topology": target.name,
        "versions": [
            (name, _version(name)) for name in ("jax", "jaxlib", "libtpu", "optax")
        ]
        + [("flax", _version("flax")), ("python", sys.version)],
        "source": _source_hash(),
    }
    text = json.dumps(depends, sort_keys=True, default=str)
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return pathlib.Path(root) / "dho2_jax" / "plan" / f"{name}.json"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _source_hash() -> str:
    """Returns a hash over the source of this package."""
    root = pathlib.Path(dho2_jax.__file__).parent
    whole = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        whole.update(str(file.relative_to(root)).encode())
        whole.update(file.read_bytes())
    return whole.hexdigest()


def _ask(path: str, overrides: Sequence[str], target: Topology) -> Measured:
    """Starts a process for the topology, shows its progress and returns its answer."""
    request = {
        "config": path,
        "overrides": list(overrides),
        "topology": target.name,
    }
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as complaints:  # libtpu's are many
        process = subprocess.Popen(
            [sys.executable, "-m", "dho2_jax.app.plan.measure"],
            env=topology.environment(target),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
        )
        assert process.stdin and process.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # it died; why, is read below
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                last = json.loads(line)
                if "compiling" in last:
                    print(
                        f"Compiling for {target.name}: {last['compiling']} ...",
                        file=sys.stderr,
                    )
            process.wait()
        finally:
            process.kill()
            process.wait()
        if "error" in last:
            raise UserError(last["error"])
        if "crash" in last:
            raise UserError(
                f"compiling for `{target.name}` failed ({last['crash']}); what "
                "`dho2 train` compiles is the same, so please report this."
            )
        if "result" in last:
            return last["result"]
        complaints.seek(0)
        lines = [line.strip() for line in complaints if line.strip()]
    raise UserError(
        f"compiling for `{target.name}` failed with exit status "
        f"{process.returncode} ({lines[-1] if lines else 'nothing was said'}); try a "
        "smaller topology or model."
    )
