# SPDX-License-Identifier: Apache-2.0
"""An autoencoder of photograph patches: `dho2 train configs/patch_autoencoder.py`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the experiment's fields."""
    config = config_dict.ConfigDict()
    config.seed = 0
    config.steps = 1000
    config.batch_size = 512
    config.curvature_batch_size = 128
    config.eval_every = 25

    config.task = config_dict.ConfigDict()
    config.task.name = "patch_autoencoder"
    config.task.widths = (128, 64, 16)  # mirrored by the decoder

    # Adam alone, validation loss after 1000 steps, seed 0 (1.5e-3 to 3e-3: median of
    # seeds 0 to 2):
    #   constant  5e-4 1.680   1e-3 1.483   1.5e-3 1.461   2e-3 1.403   3e-3 1.443
    #             4e-3 1.474   8e-3 1.743
    #   cosine    5e-4 2.100   1e-3 1.735   2e-3 1.586   4e-3 1.668   8e-3 1.914
    config.base_learning_rate = 2e-3
    config.base_schedule = "constant"

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.base = "adam"
    config.optimizer.learning_rate = 1e-3  # a start: the curvature sets the rate
    config.optimizer.num_largest = 24
    config.optimizer.refresh = "external"
    config.optimizer.refresh_period = 100
    config.optimizer.early_refreshes = (20, 50)  # curvature changes fastest at first
    config.optimizer.base_rate = "curvature"
    return config
