# SPDX-License-Identifier: Apache-2.0
"""Config files: finds them by their path, or by the name of one that is shipped.

Those of `configs/` in a checkout are installed beside this file.
"""

import difflib
import importlib.util
import pathlib
from typing import Any

from ml_collections import config_dict

from dho2_jax.app.errors import UserError

HERE = pathlib.Path(__file__).parent


def shipped() -> dict[str, pathlib.Path]:
    """Returns the config files that come with the library, by name."""
    # In a checkout they are those that one edits, also where copies are installed.
    checkout = HERE.parents[1] / "configs"
    is_checkout = (checkout.parent / "pyproject.toml").is_file()
    directory = checkout if is_checkout else HERE / "configs"
    return {file.stem: file for file in sorted(directory.glob("*.py"))}


def find(name: str) -> pathlib.Path:
    """Finds a config file.

    Args:
      name: Its path; or, where there is no such file, the name of one of `shipped`.

    Returns:
      The path of a file that exists.

    Raises:
      UserError: If there is none; says which has the nearest name.
    """
    file, known = pathlib.Path(name), shipped()
    if file.is_file():
        return file
    if name in known:
        return known[name]
    beside = file.parent.glob("*.py") if file.parent.is_dir() else ()
    others = {one: one for one in known} | {one.stem: str(one) for one in beside}
    close = difflib.get_close_matches(file.stem, others, n=1, cutoff=0.7)
    remedy = f"did you mean `{others[close[0]]}`?" if close else _all(known)
    raise UserError(f"there is no config file `{name}`; {remedy}")


def _all(names: dict[str, pathlib.Path]) -> str:
    """Says what else may be asked for."""
    listed = ", ".join(f"`{one}`" for one in names)
    return f"give the path of a Python file, or one of the shipped names {listed}."


def load(name: str) -> Any:
    """Runs the `get_config()` of a config file.

    Args:
      name: As for `find`, of a Python file that defines `get_config()`.

    Returns:
      The config, a `ConfigDict`, as the file gives it.

    Raises:
      UserError: If there is no such file or it does not yield a config.
    """
    file = find(name)
    spec = importlib.util.spec_from_file_location(f"_dho2_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"the config file `{file}` must be a Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"the config file `{file}` must define `get_config()`.")
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:  # the user's own file may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"the config file `{file}` does not run ({reason}); correct it."
        ) from error
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"`get_config()` in `{file}` must return an ml_collections.ConfigDict, "
            f"got {type(config).__name__}."
        )
    return config
