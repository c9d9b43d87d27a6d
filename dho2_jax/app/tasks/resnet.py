# SPDX-License-Identifier: Apache-2.0
"""ResNet with bottlenecks (50, 101, 152 layers) as a network and as a task."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dho2_jax.app.data import images
from dho2_jax.app.tasks.interface import Task, check_sizes, classification, split_module
from dho2_jax.app.tasks.models import apply_in_turn


class BatchNorm(nnx.Module):
    """Normalization by the batch's own statistics, in training and in evaluation.

    `nnx.BatchNorm` keeps running averages besides: state, which a loss that is a
    function of the parameters alone has no place for.
    """

    def __init__(self, width: int):
        """Builds scales of one and shifts of zero for `width` channels."""
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes each channel, the last axis, over all the others."""
        axes = tuple(range(x.ndim - 1))
        return jax.nn.standardize(x, axes, epsilon=1e-5) * self.scale + self.bias


class ConvNorm(nnx.Module):
    """A convolution without bias, and the normalization after it."""

    def __init__(
        self, fan_in: int, fan_out: int, edge: int, *, stride: int = 1, rngs: nnx.Rngs
    ):
        """Builds a kernel `(edge, edge, fan_in, fan_out)` and its normalization."""
        self.conv = nnx.Conv(
            fan_in,
            fan_out,
            (edge, edge),
            strides=stride,
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            rngs=rngs,
        )
        self.norm = BatchNorm(fan_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, height, width, fan_in)` to `(..., fan_out)`."""
        return self.norm(self.conv(x))


class Bottleneck(nnx.Module):
    """Convolutions of edge 1, 3 and 1, the middle one narrow, beside a shortcut."""

    def __init__(self, fan_in: int, width: int, *, stride: int, rngs: nnx.Rngs):
        """Builds a block that maps `fan_in` channels to `4 * width`."""
        self.reduce = ConvNorm(fan_in, width, 1, rngs=rngs)
        self.mix = ConvNorm(width, width, 3, stride=stride, rngs=rngs)
        self.expand = ConvNorm(width, 4 * width, 1, rngs=rngs)
        self.shortcut = (
            ConvNorm(fan_in, 4 * width, 1, stride=stride, rngs=rngs)
            if stride > 1 or fan_in != 4 * width
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(batch, height, width, fan_in)` to a smaller image if it strides."""
        y = jax.nn.relu(self.mix(jax.nn.relu(self.reduce(x))))
        beside = x if self.shortcut is None else self.shortcut(x)
        return jax.nn.relu(self.expand(y) + beside)


class ResNet(nnx.Module):
    """A stem, stages of bottlenecks that halve the image, and a linear end."""

    def __init__(
        self,
        num_classes: int,
        *,
        stage_sizes: Sequence[int],
        width: int,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        """Builds the layers.

        Args:
          num_classes: Number of classes.
          stage_sizes: Bottlenecks in each stage.
          width: Narrowest channels of the first stage; each stage doubles them.
          remat: Whether derivatives compute each block again instead of storing it.
          rngs: Source of the initial weights.
        """
        self.remat = remat
        self.stem = ConvNorm(3, width, 7, stride=2, rngs=rngs)
        self.blocks = nnx.List()
        channels = width
        for stage, size in enumerate(stage_sizes):
            for number in range(size):
                stride = 2 if stage and not number else 1
                narrow = width * 2**stage
                block = Bottleneck(channels, narrow, stride=stride, rngs=rngs)
                self.blocks.append(block)
                channels = 4 * narrow
        self.output = nnx.Linear(
            channels, num_classes, kernel_init=nnx.initializers.normal(0.01), rngs=rngs
        )

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps images `(batch, height, width, 3)` to logits `(batch, classes)`."""
        x = jax.nn.relu(self.stem(pixels))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = apply_in_turn(self.blocks, x, self.remat)
        return self.output(x.mean((1, 2)))


def resnet(
    batch_size: int,
    *,
    image_size: int = 224,
    num_classes: int = 1000,
    num_validation: int = 256,
    stage_sizes: Sequence[int] = (3, 8, 36, 3),
    width: int = 64,
    remat: bool = False,
) -> Task:
    """Builds ResNet-152, or another size, on images from `images.scenes`.

    Batch normalization uses the statistics of the batch at hand always, on validation
    and curvature batches too, so that the loss is a function of the parameters alone.
    With the batch sharded over a mesh they are those of the whole batch.

    Args:
      batch_size: Images in a training batch.
      image_size: Edge of an image in pixels.
      num_classes: Logits; the data has ten classes.
      num_validation: Images held out.
      stage_sizes: Bottlenecks in each stage; (3, 4, 6, 3) is ResNet-50.
      width: Narrowest channels of the first stage.
      remat: Whether derivatives compute each block again instead of storing it.

    Returns:
      The task; its loss is in nats per image.
    """
    stage_sizes = check_sizes("stage_sizes", stage_sizes)
    init, apply = split_module(
        lambda rngs: ResNet(
            num_classes, stage_sizes=stage_sizes, width=width, remat=remat, rngs=rngs
        )
    )
    dataset = images.scenes(
        batch_size,
        image_size=image_size,
        num_classes=num_classes,
        num_validation=num_validation,
    )
    return classification(init, apply, dataset)
