"""What happens to a batch on the device, inside the jitted step, before the model sees it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from metaformer_jax.data.erasing import random_erasing
from metaformer_jax.data.mixing import Mixed, mix, soft_targets


def normalize(
    images: UInt8[Array, "b h w c"], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """Scales to [0, 1], subtracts the mean and divides by the standard deviation per channel."""
    pixels = images.astype(jnp.float32) / 255
    return (pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceTransform:
    """From uint8 images and labels to what the loss compares.

    Attributes:
        num_classes: classes of the targets.
        mean: per channel, of images scaled to [0, 1].
        std: likewise.
        label_smoothing: see `soft_targets`.
        mixup_alpha: this and the following: see `mix`.
        cutmix_alpha: 0, as `mixup_alpha`, leaves it out.
        switch_probability: of CutMix.
        mixing_probability: that a group is mixed at all.
        mixing_group_size: images that share a draw; at most a device's part of the batch.
        erasing_probability: see `random_erasing`.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    switch_probability: float = 0.5
    mixing_probability: float = 1.0
    mixing_group_size: int = 128
    erasing_probability: float = 0.0

    @property
    def group_size(self) -> int:
        """Images that share a draw: one where none are mixed."""
        mixes = max(self.mixup_alpha, self.cutmix_alpha) > 0 and self.mixing_probability > 0
        return self.mixing_group_size if mixes else 1

    def keys(self, key: Array, batch_size: int) -> tuple[Key[Array, " groups"], Key[Array, " b"]]:
        """The randomness of each mixing group and of each image, the same on any mesh."""
        mixing_key, erasing_key = jax.random.split(key)
        group_keys = jax.random.split(mixing_key, batch_size // self.group_size)
        return group_keys, jax.random.split(erasing_key, batch_size)

    def mix(
        self,
        images: UInt8[Array, "b h w c"],
        labels: Int[Array, " b"],
        group_keys: Key[Array, " groups"],
    ) -> Mixed:
        """The batch, or a device's part of it, mixed group by group."""
        return mix(
            images,
            labels,
            keys=group_keys,
            mixup_alpha=self.mixup_alpha,
            cutmix_alpha=self.cutmix_alpha,
            switch_probability=self.switch_probability,
            probability=self.mixing_probability,
        )

    def training(
        self, mixed: Mixed, image_keys: Key[Array, " b"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
        """Normalised and erased images, and their soft targets."""
        images = random_erasing(
            self.evaluation(mixed.images), keys=image_keys, probability=self.erasing_probability
        )
        targets = soft_targets(
            mixed.labels,
            mixed.partner_labels,
            mixed.weights,
            num_classes=self.num_classes,
            label_smoothing=self.label_smoothing,
        )
        return images, targets

    def evaluation(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalised images."""
        return normalize(images, mean=self.mean, std=self.std)


def check_groups(batch_size: int, num_devices: int, group_size: int) -> None:
    """Refuses mixing groups that would lie on two devices.

    Raises:
        ValueError: naming sizes that would do.
    """
    share, rest = divmod(batch_size, num_devices)
    if rest:
        raise ValueError(
            f"`batch_size` must divide by the {num_devices} devices, got {batch_size}. Use "
            f"{(share + 1) * num_devices}."
        )
    if share % group_size:
        raise ValueError(
            f"`config.mixing.group_size` must divide each device's part of the batch, {share} of "
            f"{batch_size} images, got {group_size}. Use {math.gcd(share, group_size)}, or a batch "
            f"of {group_size * num_devices}."
        )
