# SPDX-License-Identifier: Apache-2.0
"""ViT-B/16 at 224 pixels, a shape for pods: `dho2 train configs/vit_b16.py`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the experiment's fields."""
    config = config_dict.ConfigDict()
    config.seed = 0
    # The data are a stand-in, see the task: enough steps for a look at the speed.
    config.steps = 1000
    config.batch_size = 1024  # DeiT's
    config.curvature_batch_size = 256  # at least one example a chip, up to 256 chips
    config.log_every = 10
    config.eval_every = 100

    config.task = config_dict.ConfigDict()
    config.task.name = "vit"
    config.task.image_size = 224
    config.task.patch_size = 16
    config.task.num_classes = 1000
    config.task.width = 768
    config.task.num_layers = 12
    config.task.num_heads = 12

    # No rate here is tuned. Rate and decay of the base are DeiT's for a batch of 1024
    # (arXiv 2012.12877, table 9), without its augmentation.
    config.base_learning_rate = 1e-3
    config.base_schedule = "warmup_cosine"

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.base = "adamw"
    config.optimizer.weight_decay = 0.05
    config.optimizer.learning_rate = 1e-3  # a start: the curvature sets the rate
    # Multiples of 8 rows of the basis tile a TPU's memory without padding; eight
    # products more than pairs, since m = k + 4 was enough on the small tasks.
    config.optimizer.num_largest = 16
    config.optimizer.num_matvecs = 24
    config.optimizer.refresh = "external"
    config.optimizer.refresh_period = 200
    config.optimizer.early_refreshes = (20, 50)  # curvature changes fastest at first
    config.optimizer.base_rate = "curvature"
    return config
