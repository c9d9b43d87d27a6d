# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and the small ResNet that is usual for it, as a network and as a task."""

from collections.abc import Sequence

import jax
from flax import nnx

from dho2_jax.app.data import hub
from dho2_jax.app.tasks.interface import Task, check_sizes, classification, split_module
from dho2_jax.app.tasks.models import apply_in_turn
from dho2_jax.app.tasks.resnet import ConvNorm


class BasicBlock(nnx.Module):
    """Two convolutions of edge 3 beside a shortcut."""

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs):
        """Builds a block that halves the image where it changes the channels."""
        stride = 1 if fan_in == fan_out else 2
        self.first = ConvNorm(fan_in, fan_out, 3, stride=stride, rngs=rngs)
        self.second = ConvNorm(fan_out, fan_out, 3, rngs=rngs)
        self.shortcut = (
            None
            if fan_in == fan_out
            else ConvNorm(fan_in, fan_out, 1, stride=stride, rngs=rngs)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, height, width, fan_in)` to `(..., fan_out)`."""
        y = self.second(jax.nn.relu(self.first(x)))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class SmallResNet(nnx.Module):
    """For images of 32 pixels: a stem that keeps their size, and stages of blocks."""

    def __init__(
        self,
        num_classes: int,
        *,
        stage_sizes: Sequence[int],
        width: int,
        rngs: nnx.Rngs,
    ):
        """Builds the layers.

        Args:
          num_classes: Number of classes.
          stage_sizes: Blocks in each stage.
          width: Channels of the first stage; each stage doubles them.
          rngs: Source of the initial weights.
        """
        self.stem = ConvNorm(3, width, 3, rngs=rngs)
        self.blocks = nnx.List()
        channels = width
        for stage, size in enumerate(stage_sizes):
            for _ in range(size):
                block = BasicBlock(channels, width * 2**stage, rngs=rngs)
                self.blocks.append(block)
                channels = width * 2**stage
        self.output = nnx.Linear(
            channels, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs
        )

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps images `(batch, height, width, 3)` to logits `(batch, classes)`."""
        x = jax.nn.relu(self.stem(pixels))
        x = apply_in_turn(self.blocks, x, remat=False)
        return self.output(x.mean((1, 2)))


def cifar10(
    batch_size: int,
    *,
    path: str = "uoft-cs/cifar10",
    subset: str = "",
    train_split: str = "train",
    validation_split: str = "test",
    image_column: str = "img",
    label_column: str = "label",
    image_size: int = 32,
    num_classes: int = 10,
    num_validation: int = 2000,
    augment: bool = True,
    stage_sizes: Sequence[int] = (3, 3, 3),
    width: int = 16,
) -> Task:
    """Builds ResNet-20, or another size, on CIFAR-10 or other small labelled images.

    Batch normalization uses the statistics of the batch at hand always, as in `resnet`.

    Args:
      batch_size: Images in a training batch.
      path: The dataset's name on the Hugging Face hub, or a directory of its files.
      subset: Which of its configurations; "" if it has one only.
      train_split: The split to train with; "train[:10%]" is a part of one.
      validation_split: The split to validate with.
      image_column: The column of the images.
      label_column: The column of the labels, integers from 0.
      image_size: Edge of all images in pixels.
      num_classes: Logits, and labels that there may be.
      num_validation: Images in the validation batch.
      augment: Whether training images are moved and mirrored at random.
      stage_sizes: Blocks of two layers in each stage; (3, 3, 3) is ResNet-20.
      width: Channels of the first stage.

    Returns:
      The task; its loss is in nats per image.

    Raises:
      UserError: If the data cannot be loaded or are something else.
    """
    stage_sizes = check_sizes("stage_sizes", stage_sizes)
    init, apply = split_module(
        lambda rngs: SmallResNet(
            num_classes, stage_sizes=stage_sizes, width=width, rngs=rngs
        )
    )
    dataset = hub.labelled_images(
        batch_size,
        path=path,
        subset=subset,
        splits=(train_split, validation_split),
        image_column=image_column,
        label_column=label_column,
        image_size=image_size,
        num_classes=num_classes,
        num_validation=num_validation,
        augment=augment,
    )
    return classification(init, apply, dataset)
