# SPDX-License-Identifier: Apache-2.0
"""A byte transformer on any text of the hub: `dho2 train configs/hub_text.py`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the experiment's fields."""
    config = config_dict.ConfigDict()
    config.seed = 0
    config.steps = 1000
    config.batch_size = 32
    config.curvature_batch_size = 8
    config.log_every = 10
    config.eval_every = 100

    # Needs `pip install 'dho2-jax[data]'`, and the network the first time. Other text:
    # --config.task.path=NAME --config.task.subset=NAME, if need be with .text_column
    # and the two splits; or a directory of Parquet or text files, with an empty subset.
    config.task = config_dict.ConfigDict()
    config.task.name = "hub_text"
    config.task.path = "Salesforce/wikitext"
    config.task.subset = "wikitext-2-raw-v1"
    config.task.length = 128
    config.task.width = 128
    config.task.num_layers = 2
    config.task.num_heads = 4

    # The rate that is best for Adam in configs/char_lm.py, not tuned here.
    config.base_learning_rate = 2e-3
    config.base_schedule = "constant"

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.base = "adam"
    config.optimizer.learning_rate = 1e-3  # a start: the curvature sets the rate
    config.optimizer.num_largest = 8
    config.optimizer.refresh = "external"
    config.optimizer.refresh_period = 100
    config.optimizer.early_refreshes = (20, 50)  # curvature changes fastest at first
    config.optimizer.base_rate = "curvature"
    return config
