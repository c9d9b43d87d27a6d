# SPDX-License-Identifier: Apache-2.0
"""A small ResNet on CIFAR-10, from the hub: `dho2 train configs/cifar10.py`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the experiment's fields."""
    config = config_dict.ConfigDict()
    config.seed = 0
    config.steps = 4000  # ten epochs
    config.batch_size = 128
    config.curvature_batch_size = 64
    config.log_every = 20
    config.eval_every = 200

    # Needs `pip install 'dho2-jax[data]'`, and the network the first time. For a copy:
    # --config.task.path=DIRECTORY, which holds train*.parquet and test*.parquet.
    config.task = config_dict.ConfigDict()
    config.task.name = "cifar10"
    config.task.path = "uoft-cs/cifar10"
    config.task.augment = True  # moved by up to 4 pixels, every other one mirrored
    config.task.stage_sizes = (3, 3, 3)  # ResNet-20
    config.task.width = 16

    # No rate here is tuned. The base has the rate and the momentum of ResNet's first
    # publication (arXiv 1512.03385), without the weight decay used there.
    config.base_learning_rate = 0.1
    config.base_schedule = "warmup_cosine"

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.base = "heavy_ball"
    config.optimizer.momentum = 0.9
    config.optimizer.learning_rate = 1e-2  # a start: the curvature sets the rate
    config.optimizer.num_largest = 8
    config.optimizer.refresh = "external"
    config.optimizer.refresh_period = 200
    config.optimizer.early_refreshes = (20, 50)  # curvature changes fastest at first
    config.optimizer.base_rate = "curvature"
    return config
