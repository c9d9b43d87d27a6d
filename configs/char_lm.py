# SPDX-License-Identifier: Apache-2.0
"""A character transformer on Python's own source: `dho2 train configs/char_lm.py`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the experiment's fields."""
    config = config_dict.ConfigDict()
    config.seed = 0
    config.steps = 300
    config.batch_size = 32
    config.curvature_batch_size = 8
    config.log_every = 5
    config.eval_every = 25

    config.task = config_dict.ConfigDict()
    config.task.name = "char_lm"
    config.task.length = 64
    config.task.width = 96
    config.task.num_layers = 2
    config.task.num_heads = 4

    # Adam alone, validation loss after 300 steps, seed 0:
    #   constant       1e-3 2.430   2e-3 2.294   4e-3 2.309
    #   warmup_cosine  4e-3 2.378   8e-3 2.362   1.6e-2 2.442
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
