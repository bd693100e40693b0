"""The convolutional prior: a gated PixelCNN over the codes of a tokenizer.

Axis letters: B images, C channels, H W image, h w grid, T turns, V values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from taming.checkpoint import load_weights
from taming.models.prior import Prior, TokenizedBatch, decayed_adamw, is_cached
from taming.models.sampling import (
    Condition,
    Window,
    decode_codes,
    known_sites,
    sites_to_write,
    write_codes,
)
from taming.modules.pixelcnn.model import PixelCNN
from taming.modules.pixelcnn.site import SiteSymbols
from taming.modules.sequence.notations import RunLengthSequence, TokenSequence
from taming.modules.transformer.generate import SamplingParams, draw
from taming.modules.util import Labelator
from taming.util import instantiate_from_config


class PixelCNNPrior(Prior):
    """Gated PixelCNN (van den Oord et al. 2016, arXiv:1606.05328) over a frozen tokenizer's codes.

    A site's length is predicted first, then its codes in order; where a site has one code, only
    that. The likelihood is exact, lengths included, and logged in bits. Tokens are counted as the
    tokenizer's own sequence writes them, which makes `Net2NetTransformer`'s numbers comparable.

    Args:
        first_stage_config: ``{target, params}`` of the tokenizer, a `VQModel`.
        stacks_config: Of the `GatedStacks`.
        cond_stage_config: Of a `Labelator`, or ``"__is_unconditional__"``.
        ckpt_path: Checkpoint whose weights to start from.
        ignore_keys: Prefixes of keys to leave out of it.
        first_stage_key: Key of the image in a batch.
        cond_stage_key: Key of the class.
        scheduler_config: ``{target, params}`` of a factor of the learning rate by step.
        trust_checkpoint: See `load_checkpoint`, for ``ckpt_path``.

    Attributes:
        learning_rate: Set by the caller before training.
        sequence: How it writes codes: a count, then codes.
        n_classes: Number of classes; an unconditional prior has one.

    Raises:
        ValueError: The condition is no class.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        stacks_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str = "__is_unconditional__",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        first_stage_key: str = "image",
        cond_stage_key: str = "class_label",
        scheduler_config: Mapping[str, Any] | None = None,
        trust_checkpoint: bool = False,
    ) -> None:
        super().__init__(
            first_stage_config,
            cond_stage_config,
            permuter_config=None,
            sequence_config=None,
            first_stage_key=first_stage_key,
            cond_stage_key=cond_stage_key,
            downsample_cond_size=-1,
            sos_token=0,
            unconditional=False,
        )
        self.learning_rate = 4.5e-6
        self.n_classes = self._count_classes(cond_stage_config)
        own = self.first_stage_model.quantize.sequence
        sizes = own.n_e, own.max_loops, own.dummies
        self.sequence: TokenSequence = RunLengthSequence(*sizes)
        self.pixelcnn = PixelCNN(
            SiteSymbols(*sizes), self.n_classes, instantiate_from_config(stacks_config)
        )
        self.schedule = (
            None if scheduler_config is None else instantiate_from_config(scheduler_config)
        )
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys, trust_checkpoint)

    def _count_classes(self, config: Mapping[str, Any] | str) -> int:
        """Number of classes, after a look at what encodes them."""
        if self.be_unconditional:
            return 1
        if not isinstance(self.cond_stage_model, Labelator):
            raise ValueError(
                "cond_stage_config of a PixelCNNPrior: expected a block whose target is "
                f"taming.modules.util.Labelator, or '__is_unconditional__', got {config!r}"
            )
        return self.cond_stage_model.n_classes

    # --- training --------------------------------------------------------------------------------

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Measure how likely the codes of images are.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            c: (B,) their classes; anything (B, ...) for an unconditional prior.

        Returns:
            See `nll`.
        """
        return self.nll(self.encode_to_codes(x)[1], self.encode_to_c(c)[1])

    def nll(self, codes: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Measure how likely codes (B, h, w, T) are, given conditions (B, 1).

        Returns:
            -log p of each image's codes in nats, (B,) float32; their number of tokens, (B,) int64.
        """
        _, lengths = self.first_stage_model.quantize.sequence.encode(codes)
        return self.pixelcnn.nll(codes, condition[:, 0]), lengths

    def likelihood(self, seen: TokenizedBatch) -> tuple[Tensor, Tensor]:
        """See `Prior.likelihood`."""
        return self.nll(seen.codes, seen.condition)

    def configure_optimizers(self) -> Any:
        """AdamW with weight decay on convolutions and linear layers only."""
        layers = (nn.Conv2d, nn.Linear)
        return decayed_adamw(self.pixelcnn, layers, self.learning_rate, self.schedule)

    # --- sampling --------------------------------------------------------------------------------

    def write(
        self,
        codes: Tensor,
        condition: Tensor,
        drawing: SamplingParams,
        known: int | Tensor = 0,
        callback: Callable[[], None] | None = None,
    ) -> Iterator[int]:
        """Draw codes site by site, in place; see `PixelCNN.write`.

        Args:
            codes: (B, h, w, T) int64, of any grid.
            condition: (B, 1) int64 classes.
            drawing: How symbols are drawn.
            known: See `write_codes`.
            callback: Called for every symbol.

        Yields:
            See `PixelCNN.write`.

        Raises:
            ValueError: Guidance is asked for.
        """
        if drawing.guidance != 1:
            raise ValueError(f"a PixelCNNPrior has no guidance, got {drawing.guidance}")
        rows, grid = torch.arange(len(codes), device=codes.device), codes.shape[1:3]
        kept = known_sites(known, (grid[0], grid[1]), codes.device)

        def draw_symbols(logits: Tensor) -> Tensor:
            if callback is not None:
                callback()
            return draw(logits, drawing, rows)

        return self.pixelcnn.write(codes, condition[:, 0], draw_symbols, kept.view(grid))

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], temperature: float = 1.0, top_k: int = 100, **unused: Any
    ) -> dict[str, Tensor]:
        """Pictures of a batch: what is known, half of it completed, and new images.

        Returns:
            Name -> (B, 3, H, W) in [-1, 1], for at most 4 images.
        """
        batch = {k: v[:4].to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        seen = self.tokenize_batch(batch)

        def drawn(known: int, greedy: bool = False) -> Tensor:
            table, drawing = seen.codes.clone(), SamplingParams(temperature, top_k, greedy=greedy)
            for _ in self.write(table, seen.condition, drawing, known):
                pass
            return decode_codes(self, table)

        pictures = {
            "reconstructions": decode_codes(self, seen.codes),
            "samples_half": drawn(seen.grid[0] * seen.grid[1] // 2),
            "samples_nopix": drawn(0),
            "samples_det": drawn(0, greedy=True),
        }
        if not is_cached(batch):
            pictures = {"inputs": self.get_input(self.first_stage_key, batch)} | pictures
        return {name: self.show(picture) for name, picture in pictures.items()}


@write_codes.register
def _(
    model: PixelCNNPrior,
    condition: Condition,
    codes: Tensor,
    drawing: SamplingParams,
    known: int | Tensor = 0,
    longest: int | None = None,
    callback: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """See `write_codes`; convolutions need no window."""
    _, h, w, _ = codes.shape
    left = sites_to_write(known_sites(known, (h, w), codes.device))
    tokens, drawn = condition(Window(0, 0, h, w)), 0

    def count() -> None:
        nonlocal drawn
        drawn += 1
        if callback is not None:
            callback(drawn)

    for written in islice(model.write(codes, tokens, drawing, known, count), len(left)):
        last = written == left.stop
        if last or (longest is not None and (written - left.start) % longest == 0):
            yield h * w if last else written
            drawn = 0
