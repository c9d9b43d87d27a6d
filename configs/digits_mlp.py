# SPDX-License-Identifier: Apache-2.0
"""A small classifier of handwritten digits: `dho2 train configs/digits_mlp.py`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the experiment's fields."""
    config = config_dict.ConfigDict()
    config.seed = 0
    config.steps = 300
    config.batch_size = 256
    config.curvature_batch_size = 64
    config.log_every = 5
    config.eval_every = 10

    config.task = config_dict.ConfigDict()
    config.task.name = "digits_mlp"
    config.task.widths = (64, 64)

    # Adam alone, validation loss after 300 steps, median of seeds 0 to 2:
    #   constant  2e-3 0.087   4e-3 0.081   8e-3 0.084   1.6e-2 0.092   3.2e-2 0.092
    #   cosine    2e-3 0.124   4e-3 0.088   8e-3 0.080   1.6e-2 0.083   3.2e-2 0.087
    config.base_learning_rate = 8e-3
    config.base_schedule = "cosine"

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.base = "adam"
    config.optimizer.learning_rate = 1e-3  # a start: the curvature sets the rate
    config.optimizer.num_largest = 8
    config.optimizer.refresh = "external"
    config.optimizer.refresh_period = 100
    config.optimizer.early_refreshes = (20, 50)  # curvature changes fastest at first
    config.optimizer.base_rate = "curvature"
    return config
