"""PatchGAN discriminator of pix2pix (Isola et al. 2017, arXiv:1611.07004).

Axis letters: B images, C channels, H W image, h w grid of overlapping patches.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from taming.modules.distributed import differentiable_sum_over_ranks, is_distributed
from taming.modules.util import ActNorm


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of the images of all ranks.

    Unlike `torch.nn.SyncBatchNorm`, it also runs on CPUs.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if not self.training or not is_distributed():
            return super().forward(input)
        each = (1, -1, 1, 1)
        ones = input.new_full((1,), input.numel() / input.shape[1])
        *sums, count = differentiable_sum_over_ranks(torch.cat([input.sum((0, 2, 3)), ones]))
        mean = torch.stack(sums) / count  # (C,)
        centred = input - mean.view(each)
        variance = differentiable_sum_over_ranks(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(each) + self.bias.view(each)


def weights_init(module: nn.Module) -> None:
    """Initialise a module as in pix2pix; for ``Module.apply``.

    Convolutions get weights from N(0, 0.02), batch norms from N(1, 0.02) and a bias of 0.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class NLayerDiscriminator(nn.Module):
    """Give each patch of an image one logit, high where it looks real.

    Args:
        input_nc: C of the image, including that of a concatenated condition.
        ndf: Channels of the first layer; they double per layer, up to 8 times.
        n_layers: Strided convolutions; 3 gives patches of 70 x 70 pixels.
        use_actnorm: Normalise by `ActNorm` instead of batch norm.
        sync_batchnorm: Take batch norm's statistics over all ranks; False: over each rank's own
            images, as the original does.
    """

    def __init__(
        self,
        input_nc: int = 3,
        ndf: int = 64,
        n_layers: int = 3,
        use_actnorm: bool = False,
        sync_batchnorm: bool = True,
    ) -> None:
        super().__init__()
        batch_norm = BatchNorm2d if sync_batchnorm else nn.BatchNorm2d
        norm = ActNorm if use_actnorm else batch_norm
        widths = [ndf * min(2**i, 8) for i in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1)]
        layers += [nn.LeakyReLU(0.2, inplace=True)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < n_layers else 1
            # A bias has no effect before batch norm.
            layers += [nn.Conv2d(before, after, 4, stride, padding=1, bias=use_actnorm)]
            layers += [norm(after), nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1)]
        self.main = nn.Sequential(*layers)
        self.input_nc = input_nc
        self.min_size = 3 * 2**n_layers

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, input_nc, H, W) to logits (B, 1, h, w).

        Raises:
            ValueError: The image has other channels, or is smaller than a patch.
        """
        if (channels := x.shape[1]) != self.input_nc:
            raise ValueError(
                f"images have {channels} channels, but this discriminator takes {self.input_nc}: "
                f"set disc_in_channels: {channels} in the loss's params"
            )
        height, width = x.shape[-2:]
        if min(height, width) < self.min_size:
            raise ValueError(
                f"image is {height} x {width} pixels, but this discriminator needs at least "
                f"{self.min_size}: use larger images or a smaller disc_num_layers"
            )
        return self.main(x)
