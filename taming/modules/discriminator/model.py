"""PatchGAN discriminator of pix2pix (Isola et al. 2017, arXiv:1611.07004).

Axis letters: B images, C channels, H W image, h w grid of overlapping patches.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from taming.modules.util import ActNorm


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
    """

    def __init__(
        self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False
    ) -> None:
        super().__init__()
        norm = ActNorm if use_actnorm else nn.BatchNorm2d
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
        self.min_size = 3 * 2**n_layers

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, input_nc, H, W) to logits (B, 1, h, w).

        Raises:
            ValueError: The image is smaller than a patch.
        """
        height, width = x.shape[-2:]
        if min(height, width) < self.min_size:
            raise ValueError(
                f"image is {height} x {width} pixels, but this discriminator needs at least "
                f"{self.min_size}: use larger images or a smaller disc_num_layers"
            )
        return self.main(x)
