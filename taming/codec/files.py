"""Files of a tokenizer's codes: choose the entropy model, keep to a size, and check what is read.

Axis letters: C channels, H W picture, h w grid, T turns.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import cache
from itertools import count
from typing import Any

from torch import Tensor

from taming.codec.container import Header, decode_file, encode_file
from taming.codec.context import Context
from taming.codec.levels import Levels
from taming.codec.models import EntropyModel, Raw, Static
from taming.codec.ranges import TOTAL
from taming.decoding import check_size
from taming.models.vqgan import MOST_SITES, VQModel
from taming.modules.context import ContextNetwork
from taming.modules.vqvae.base import Quantizer

MODES = {"raw": 0, "static": 1, "context": 2}


def fit(
    pack: Callable[[Any], bytes],
    codes_at: Callable[[int], Any],
    settings: range,
    bits: float,
    estimate: Callable[[Any], float],
) -> bytes:
    """Find the largest file within a size, writing as few as possible.

    Tried next is the largest setting that fits by its estimate, which is corrected by the last
    file's; now and then the one in the middle, lest estimates mislead.

    Args:
        pack: Codes -> file.
        codes_at: Setting -> codes.
        settings: All settings; a larger one gives a larger file, or nearly.
        bits: Size that is never exceeded.
        estimate: Codes -> about the bits of their file, or in proportion to them; fast.

    Raises:
        ValueError: The file of the smallest setting is larger; names its size.
    """
    expected = cache(lambda setting: max(1.0, estimate(codes_at(setting))))
    best, file, correction = None, b"", 1.0
    for attempt in count(1):
        fitting = bisect_right(settings, bits / correction, key=expected)
        tried = (len(settings) - 1) // 2 if attempt % 5 == 0 else max(0, fitting - 1)
        file = pack(codes_at(settings[tried]))
        correction = 8 * max(1, len(file)) / expected(settings[tried])
        if 8 * len(file) <= bits:
            best, settings = file, settings[tried + 1 :]
        else:
            settings = settings[:tried]
        if not settings:
            break
    if best is None:
        raise ValueError(f"{bits:g} bits are too few: the smallest file has {8 * len(file)} bits")
    return best


class Codec:
    """Turns images into files and files into codes, with a trained tokenizer.

    Codes are (h, w, T), or a tuple of those of all levels, the top first.

    Args:
        model: The tokenizer, in eval mode.
        context: Network that predicts the model's codes, if it has one.
        name: The tokenizer's, in messages.

    Attributes:
        tokenizer: 4 bytes of the fingerprint that the model has now; a `Codec` is for one call.

    Raises:
        ValueError: It has one, and several levels.
    """

    def __init__(
        self, model: VQModel, context: ContextNetwork | None = None, name: str = "this one"
    ) -> None:
        if context is not None and len(model.levels) > 1:
            raise ValueError(f"a context model is of one grid, not of {', '.join(model.levels)}")
        self.model, self.context, self.name = model, context, name
        self.tokenizer = bytes.fromhex(model.fingerprint())[:4]

    def entropy_model(self, name: str | None = None) -> EntropyModel:
        """Return an entropy model by name; None takes the best that the tokenizer has.

        Raises:
            ValueError: There is no such model, or the tokenizer has none.
        """
        quantizers = self.model.levels
        if name is None and self.context is None:
            tables = [quantizer.entropy for quantizer in quantizers.values()]
            right = (own is not None and own.learned and own.n_e <= TOTAL for own in tables)
            name = "static" if all(right) else "raw"
        models = {level: self._of_level(own, name) for level, own in quantizers.items()}
        if len(models) > 1:
            return Levels(models, self.model.quantize.factors)
        return models[""]

    def _of_level(self, quantizer: Quantizer, name: str | None) -> EntropyModel:
        """Return the entropy model of one level's codes by name."""
        sequence, tables = quantizer.sequence, quantizer.entropy
        if name in (None, "context"):
            if self.context is None:
                raise ValueError("this tokenizer has no context model: load one with it")
            return Context(self.context)
        if name == "static":
            if tables is None:
                kind = type(quantizer).__name__
                raise ValueError(f"a {kind} keeps no entropy tables: use raw")
            return Static(tables, sequence.dummies)
        if name != "raw":
            raise ValueError(f"entropy must be one of {', '.join(MODES)}, got {name!r}")
        fixed = sequence.fixed_length
        return Raw(sequence.max_loops, sequence.n_e, sequence.dummies, fixed)

    # --- image -> file ---------------------------------------------------------------------------

    def compress(
        self, x: Tensor, size: tuple[int, int], entropy: str | None, rates: Mapping[str, Any]
    ) -> bytes:
        """Compress an image.

        Args:
            x: (1, C, H', W') in [-1, 1], of whole sites.
            size: (H, W) of the picture within it.
            entropy: Name of the entropy model; None as for `entropy_model`.
            rates: At most one value, of ``bits`` or ``bpp``, which the file keeps to, or of an
                argument of `VQModel.encode` that sets a rate.

        Raises:
            ValueError: The rate cannot be met, or the name is unknown.
        """
        model = self.entropy_model(entropy)
        bits = rates.get("bits", rates.get("bpp", 0) * size[0] * size[1])
        if not {"bits", "bpp"} & rates.keys():
            return self.pack(self._codes_of(self.model.encode(x, **rates, size=size)), size, model)
        if not 0 < bits < math.inf:
            ((name, value),) = rates.items()
            raise ValueError(f"{name} must be a positive number, got {value}")

        def estimate(codes: Any) -> float:
            batch = tuple(own[None] for own in codes) if isinstance(codes, tuple) else codes[None]
            return float(self.model.bits_of(batch))

        return fit(lambda codes: self.pack(codes, size, model), *self._settings(x), bits, estimate)

    def _codes_of(self, quantized: Any) -> Any:
        """Return the codes in what the model's ``encode`` or its quantizer gave for one image."""
        top, *lower = (own[0].cpu() for own in self.model.codes_by_level(quantized).values())
        return (top, *lower) if lower else top

    def _settings(self, x: Tensor) -> tuple[Callable[[int], Any], range]:
        """Encode an image once; return its codes by a setting, and the settings.

        A larger one means more codes: as ``max_codes`` where a site has dummies, otherwise by a
        smaller lambda.
        """
        quantize: Any = self.model.quantize
        z = self.model.encode_to_prequant(x)  # (1, D, h, w)

        def codes_at(**rate: float) -> Any:
            return self._codes_of(quantize(z, **rate))

        if not quantize.variable_rate:
            return lambda setting: codes_at(), range(1)
        if quantize.sequence.dummies:
            sites, turns = z[0, 0].numel(), quantize.sequence.max_loops
            return lambda setting: codes_at(max_codes=setting), range(sites, sites * turns + 1)
        return lambda setting: codes_at(rate=2 ** (10 - setting / 8)), range(321)

    def pack(self, codes: Any, size: tuple[int, int], model: EntropyModel) -> bytes:
        """Write the codes of a picture of (H, W) pixels as a file."""
        segments = list(model.encode(codes))
        header = Header(model.mode, self.tokenizer, model.fingerprint(), size, len(segments))
        return encode_file(header, segments)

    # --- file -> codes ---------------------------------------------------------------------------

    def unpack(
        self,
        data: bytes,
        turns: int | None = None,
        partial: bool = False,
        max_pixels: int | None = None,
    ) -> tuple[Any, tuple[int, int]]:
        """Read the codes of a picture from a file.

        Args:
            data: The file.
            turns: Most turns to decode, of all levels together; None for all.
            partial: Decode the turns before a place that is damaged or cut off.
            max_pixels: Refuse larger pictures, as `taming.decoding.decode_image` does.

        Returns:
            The codes, int64, and (H, W). Where turns are missing, so may lower levels be.

        Raises:
            ValueError: It is not a whole file of this tokenizer.
        """
        header, segments = decode_file(data, partial)
        model = self._model_of(header)
        height, width = header.size
        check_size(width, height, max_pixels)
        site, finest = self.model.factor, self.model.quantize.factors[0]
        grid = -(-height // site), -(-width // site)
        h, w = grid[0] * finest, grid[1] * finest
        if h * w > MOST_SITES:
            raise ValueError(f"a grid of {h}x{w} sites has more than {MOST_SITES}")
        most = sum(level.sequence.max_loops for level in self.model.levels.values())
        if header.segments > most:
            raise ValueError(f"the file has {header.segments} turns, the tokenizer {most}")
        if turns is not None:
            if turns < 1:
                raise ValueError(f"turns must be at least 1, got {turns}")
            segments = segments[:turns]
        if len(segments) < header.segments and not model.progressive:
            raise ValueError(
                f"{len(segments)} of {header.segments} turns decode to nothing: a site of this "
                "tokenizer has its one code at its last turn"
            )
        return model.decode(segments, grid), header.size

    def _model_of(self, header: Header) -> EntropyModel:
        """Return the entropy model of a file, if it and the tokenizer are those that wrote it."""
        if header.tokenizer != self.tokenizer:
            theirs, own = header.tokenizer.hex(), self.tokenizer.hex()
            raise ValueError(f"the file is of the tokenizer {theirs}, and {self.name} is {own}")
        names = [name for name, mode in MODES.items() if mode == header.mode]
        if not names:
            raise ValueError(f"the file has the unknown mode {header.mode}")
        model = self.entropy_model(names[0])
        if header.entropy != (own := model.fingerprint()):
            theirs = f"the {names[0]} model {header.entropy.hex()}"
            raise ValueError(f"the file is of {theirs}, and that of {self.name} is {own.hex()}")
        return model
