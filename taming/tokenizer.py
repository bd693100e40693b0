"""The tokenizer for people: pictures of any kind and size to codes, and back.

Axis letters: B pictures, C channels, H W picture, h w grid, T turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from PIL import Image
from torch import Tensor

from taming.codes import Codes as Codes
from taming.coding import decode_codes, encode_images
from taming.decoding import Colour, rgb_of
from taming.models.vqgan import VQModel
from taming.modules.tiling import set_tile
from taming.modules.vqvae.rate import one_rate
from taming.pictures import Picture, is_single, pad, to_picture, to_tensor
from taming.sharing import Shared, count_parameters
from taming.signatures import naming_nearest
from taming.util import at_least

if TYPE_CHECKING:
    from taming.codec.files import Codec
    from taming.modules.context import ContextNetwork


class Tokenizer(Shared):
    """Turns pictures into codes and codes into pictures, with a trained `VQModel`.

    A picture is a path, a PIL image, a NumPy array (H, W), (H, W, C) or a tensor (C, H, W); arrays
    of integers are scaled from their whole range, arrays of floats lie in [-1, 1]. Files and PIL
    images are converted to the model's channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA. The sides
    need not fit the grid: a picture is extended by reflection to whole sites and cut back when it
    is decoded.

    Args:
        model: The model, in any mode; it is switched to evaluation.
        batch_size: Largest number of pictures of one size that go through the model together.
        background: Colour under what is transparent, as for `taming.decoding.decode_image`.
        max_pixels: Refuse larger files, as `taming.decoding.decode_image` does.
        tile: Pictures of more pixels than a square of this side go through the networks in tiles
            that overlap. Tiles share the statistics of norms and 1,024 sites to attend to, from a
            sample of the picture, and show no seams; some codes in a hundred may differ from those
            of the whole. None sends every picture whole, in time quadratic in its sites.
        context: Network that predicts the model's codes, or None. It is saved along.

    Raises:
        ValueError: The model is not a tokenizer, one of label maps, or one level of several; or
            the batch size or the tile is not positive.

    Example:
        >>> import numpy as np, torch
        >>> from taming.models.vqgan import VQModel
        >>> sizes = dict(double_z=False, z_channels=4, resolution=16, in_channels=3, out_ch=3)
        >>> sizes |= dict(ch=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=[])
        >>> loss = {"target": "taming.modules.losses.DummyLoss"}
        >>> tokenizer = Tokenizer(VQModel(sizes, loss, n_embed=8, embed_dim=4))
        >>> codes = tokenizer.encode(np.zeros((20, 15, 3), np.uint8))
        >>> codes.indices.shape, codes.size, len(codes)
        (torch.Size([10, 8, 1]), (20, 15), 80)
        >>> tokenizer.decode(codes).size
        (15, 20)
    """

    def __init__(
        self,
        model: VQModel,
        batch_size: int = 16,
        background: Colour = "white",
        max_pixels: int | None = None,
        tile: int | None = 768,
        context: ContextNetwork | None = None,
    ) -> None:
        if getattr(model, "value_range", None) != (-1.0, 1.0) or model.whole is not model:
            raise ValueError(
                "a Tokenizer takes a tokenizer of pictures with values in [-1, 1], with all "
                f"levels, got a {type(model).__name__}"
            )
        at_least(1, batch_size=batch_size)
        self.model = model.eval()
        self.batch_size = batch_size
        self.background, self.max_pixels = rgb_of(background), max_pixels
        self.tile = tile
        self.context = None if context is None else context.eval()

    @property
    def tile(self) -> int | None:
        """Side of a tile in pixels, or None; it can be set, for all users of the model."""
        return self.model.encoder.tile

    @tile.setter
    def tile(self, tile: int | None) -> None:
        set_tile(self.model, tile)

    @classmethod
    def of_modules(cls, modules: Mapping[str, Any]) -> Tokenizer:
        """Return the tokenizer of a loaded ``model`` and, if there is one, its ``context``."""
        if "model" not in modules:
            raise ValueError(f"expected a tokenizer, got {', '.join(modules)}: use a Generator")
        return cls(modules["model"], context=modules.get("context"))

    def shared_modules(self) -> dict[str, Any]:
        """Return the ``model`` and, if there is one, its ``context``."""
        return {"model": self.model} | ({"context": self.context} if self.context else {})

    def facts(self) -> dict[str, Any]:
        """Return the facts of the model card that the configuration states: name -> value."""
        height, width = (self.model.factor * sites for sites in self.model.grid)
        return {
            "model": f"{type(self.model).__name__} of {count_parameters(self.model)} parameters",
            "pictures": f"{self.channels} channels, trained on {height} x {width} pixels",
            "a site": f"{self.model.factor} x {self.model.factor} pixels",
            **{
                f"codes {name}".rstrip(): f"{type(quantizer).__name__}: {quantizer.sequence.n_e} "
                f"in {quantizer.e_dim} dimensions, at most {quantizer.sequence.max_loops} a site"
                for name, quantizer in self.model.levels.items()
            },
        }

    @property
    def channels(self) -> int:
        """C, channels of a picture."""
        return self.model.channels

    def to_tensor(self, picture: Picture) -> Tensor:
        """Turn a picture into an image (C, H, W) float32 in [-1, 1] of the model's channels.

        Raises:
            ValueError: It is not a picture, or has other channels.
        """
        return to_tensor(picture, self.channels, self.background, self.max_pixels)

    @overload
    def encode(
        self,
        pictures: Picture,
        *,
        max_codes: int | None = None,
        target_psnr: float | None = None,
        threshold: float | None = None,
        rate: float | None = None,
        target_bits: float | None = None,
    ) -> Codes: ...
    @overload
    def encode(
        self,
        pictures: Sequence[Picture],
        *,
        max_codes: int | None = None,
        target_psnr: float | None = None,
        threshold: float | None = None,
        rate: float | None = None,
        target_bits: float | None = None,
    ) -> list[Codes]: ...

    @naming_nearest()
    @torch.no_grad()
    def encode(
        self,
        pictures: Any,
        *,
        max_codes: int | None = None,
        target_psnr: float | None = None,
        threshold: float | None = None,
        rate: float | None = None,
        target_bits: float | None = None,
    ) -> Any:
        """Encode pictures; a tokenizer of variable rate takes at most one rate.

        Args:
            pictures: One picture; or several of any sizes, or as an array of four axes.
            max_codes: Largest number of codes of a picture, at least one for each site.
            target_psnr: PSNR in dB to reach with as few codes as possible.
            threshold: Distance at which a loop ends, in the space of the latents.
            rate: lambda, by which bits count against squared distances: the larger, the fewer bits.
            target_bits: Largest number of bits of a picture, by the tokenizer's `EntropyTables`.

        Returns:
            The `Codes` of each picture: one for one picture, a list for several.

        Raises:
            ValueError: Something is not a picture or has other channels than the model's, the rate
                cannot be met, or the tokenizer has a fixed rate.
        """
        given = {"max_codes": max_codes, "target_psnr": target_psnr, "threshold": threshold}
        given |= {"rate": rate, "target_bits": target_bits}
        if is_single(pictures):
            return self.encode([pictures], **given)[0]
        images = [self.to_tensor(picture) for picture in pictures]
        return encode_images(self.model, images, self.batch_size, **given)

    @overload
    def decode(self, codes: Codes) -> Image.Image: ...
    @overload
    def decode(self, codes: Sequence[Codes]) -> list[Image.Image]: ...

    @torch.no_grad()
    def decode(self, codes: Any) -> Any:
        """Decode codes to pictures.

        Args:
            codes: The `Codes` of one picture, or of several.

        Returns:
            PIL images: one for one, a list for several. Those of 2 and 4 channels have alpha; of
            more channels, the model's ``to_rgb`` shows some.

        Raises:
            ValueError: They are not `Codes` of this tokenizer, or too few for their size.
        """
        if not isinstance(codes, (list, tuple)):
            return self.decode([codes])[0]
        images = decode_codes(self.model, codes, self.batch_size)
        pictures = {number: self.to_picture(image) for number, image in images}
        return [pictures[number] for number in range(len(codes))]

    def decode_image(self, codes: Codes) -> Tensor:
        """Decode the codes of one picture to an image of all the model's channels.

        Returns:
            (C, H, W) float32 in [-1, 1], rounded to the 256 levels of a file.

        Raises:
            ValueError: They are not codes of this tokenizer.
        """
        return next(decode_codes(self.model, [codes], 1))[1]

    def to_picture(self, image: Tensor) -> Image.Image:
        """Turn an image (C, H, W) of `decode_image` into the picture that `decode` shows."""
        if len(image) not in (2, 3, 4):
            image = self.model.to_rgb(image[None].to(self.model.device))[0]
        return to_picture(image)

    @naming_nearest(encode)
    @torch.no_grad()
    def compress(
        self,
        picture: Picture,
        *,
        bits: float | None = None,
        bpp: float | None = None,
        psnr: float | None = None,
        entropy: str | None = None,
        **rate: Any,
    ) -> bytes:
        """Compress a picture to the bytes of a file, at no more than one rate; see docs/codec.md.

        Args:
            picture: One picture.
            bits: Bits of the whole file, not exceeded.
            bpp: The same in bits per pixel.
            psnr: PSNR in dB to reach with few codes, the ``target_psnr`` of `encode`.
            entropy: ``"raw"`` bits, ``"static"`` tables of the quantizer, or the ``"context"``
                model; by default the last of them that has been learned.
            **rate: Another rate of `encode`, such as ``max_codes`` or ``threshold``.

        Raises:
            TypeError: There is no such rate; names the nearest.
            ValueError: As for `encode`; or no file is that small; names the smallest.
        """
        image = self.to_tensor(picture)
        size = image.shape[1], image.shape[2]
        x = pad(image, self.model.factor)[None].to(next(self.model.parameters()))
        del image  # a large one would stay beside x
        rates = one_rate({"bits": bits, "bpp": bpp, "psnr": psnr, **rate})
        if "psnr" in rates:
            rates = {"target_psnr": psnr}
        return self._codec().compress(x, size, entropy, rates)

    def decompress(
        self, data: bytes, turns: int | None = None, partial: bool = False
    ) -> Image.Image:
        """Decompress the bytes of `compress`; cut after a segment, they give fewer turns.

        Args:
            data: Bytes of a file.
            turns: Most turns to decode, as for a preview, of all levels together; None for all.
            partial: Decode a file that is damaged or cut off from the turns before that place.

        Raises:
            ValueError: They are damaged (names the place), of another tokenizer, or of a picture of
                more than ``max_pixels``.
        """
        return self.decode(self.unpack(data, turns, partial))

    def unpack(self, data: bytes, turns: int | None = None, partial: bool = False) -> Codes:
        """Return the codes in the bytes of `compress`; arguments and errors of `decompress`."""
        return Codes(*self._codec().unpack(data, turns, partial, self.max_pixels))

    def _codec(self) -> Codec:
        from taming.codec.files import Codec  # whose range coder is imported where it is used

        return Codec(self.model, self.context, self.name)
