# SPDX-License-Identifier: Apache-2.0
"""Where the sweeps of `sweeps.py` are kept, and what they are made of."""

import json
import pathlib
import re

import fleet
import numpy as np
import workloads

SWEEPS = workloads.RESULTS / "sweeps"
FACTORS = {  # of the batch; digits are too few for more
    "autoencoder": (4, 16),
    "digits": (4,),
    "transformer": (4, 16),
    "resnet": (4,),
    "gpt2": (0.25,),
}


def path_of(kind: str, workload: str, contender: str) -> pathlib.Path:
    """Returns where a sweep is kept."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{workload} {contender}".lower()).strip("-")
    return SWEEPS / kind / f"{words}.json"


def load(kind: str, workload: str, contender: str) -> fleet.Fleet | None:
    """Returns a sweep that was made, if it was; None stands for what is not finite."""
    path = path_of(kind, workload, contender)
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    losses = np.array(found["losses"], float)
    settings = [fleet.Setting(**one) for one in found["settings"]]
    return fleet.Fleet(
        settings, np.array(found["steps"]), losses, np.array(found["cuts"])
    )
