# SPDX-License-Identifier: Apache-2.0
"""All tasks that a config may name: a new one is a file here and a line below."""

from collections.abc import Callable

from dho2_jax.app.tasks import cifar, gpt2, resnet, small, vit
from dho2_jax.app.tasks.interface import Task

TASKS: dict[str, Callable[..., Task]] = {
    "patch_autoencoder": small.patch_autoencoder,
    "digits_mlp": small.digits_mlp,
    "char_lm": small.char_lm,
    "hub_text": small.hub_text,
    "cifar10": cifar.cifar10,
    "gpt2": gpt2.gpt2,
    "resnet": resnet.resnet,
    "vit": vit.vit,
}
