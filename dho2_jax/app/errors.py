# SPDX-License-Identifier: Apache-2.0
"""The one exception whose text is meant for the user."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that one sentence explains; the command line prints it and exits 2."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns a remedy for a misspelt `name`: its nearest neighbour, or all of `names`.

    Args:
      name: What was asked for.
      names: What there is.

    Returns:
      `did you mean ...?` when something is close, else `choose one of ...`, or where
      to look if there are many.
    """
    known = sorted(names)
    # Compare the last component too: "optimizer.num_larges" and "num_largest" both
    # mean "optimizer.num_largest".
    by_last = {one.rsplit(".", 1)[-1]: one for one in known}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if not close:
        last = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=1)
        close = [by_last[one] for one in last]
    if close:
        return f"did you mean `{close[0]}`?"
    if len(known) > 12:
        return "config.json, which every run writes, lists all fields."
    return "choose one of " + ", ".join(f"`{one}`" for one in known) + "."
