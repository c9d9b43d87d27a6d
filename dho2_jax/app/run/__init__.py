# SPDX-License-Identifier: Apache-2.0
"""From a config to runs: devices, programs, the training loop, checkpoints."""
