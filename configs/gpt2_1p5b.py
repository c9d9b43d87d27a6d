# SPDX-License-Identifier: Apache-2.0
"""GPT-2 1.5B, a shape for pods: `dho2 train configs/gpt2_1p5b.py`."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the experiment's fields."""
    config = config_dict.ConfigDict()
    config.seed = 0
    # The data are a stand-in, see the task: enough steps for a look at the speed.
    config.steps = 1000
    config.batch_size = 512  # of 1024 tokens, as GPT-2 was trained
    config.curvature_batch_size = 256  # at least one example a chip, up to 256 chips
    config.log_every = 10
    config.eval_every = 100

    config.task = config_dict.ConfigDict()
    config.task.name = "gpt2"
    config.task.length = 1024
    config.task.width = 1600
    config.task.num_layers = 48
    config.task.num_heads = 25
    config.task.remat = True  # a window's attention alone is 100 MB a layer
    config.task.scan_layers = True  # a product compiles ten times faster

    # No rate here is tuned. Rate, b2 and decay of the base are GPT-3's at 1.3B
    # (arXiv 2005.14165, table 2.1 and appendix B).
    config.base_learning_rate = 2e-4
    config.base_schedule = "warmup_cosine"

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.base = "adamw"
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
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
