"""The prior: a transformer over the token sequences of a tokenizer.

Axis letters: B images, C channels, H W image, D latent channels, h w grid, S = h w sites, T turns,
L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.checkpoint import freeze, load_weights
from taming.models.vqgan import VQModel
from taming.modules.transformer.mingpt import GPT
from taming.modules.transformer.permuter import Identity
from taming.modules.transformer.sampling import filter_logits, sample_tokens
from taming.modules.util import SOSProvider
from taming.modules.vqvae.sequence import PAD, TokenSequence
from taming.util import instantiate_from_config

Grid = tuple[int, int]


class Net2NetTransformer(pl.LightningModule):
    """Autoregressive prior over the tokens of a frozen tokenizer (arXiv:2012.09841, section 3.2).

    Each image is one sequence after its condition's tokens. Sequences may differ in length; the
    tokenizer's grammar says where each token belongs and which tokens cannot come next.

    Args:
        transformer_config: ``{target, params}`` of a `GPT`.
        first_stage_config: Of the tokenizer, a `VQModel`.
        cond_stage_config: Of what turns the condition into tokens; or ``"__is_first_stage__"``, or
            ``"__is_unconditional__"``.
        permuter_config: Order of the sites; None for raster order.
        ckpt_path: Checkpoint whose weights to start from.
        ignore_keys: Prefixes of keys to leave out of it.
        first_stage_key: Key of the image in a batch.
        cond_stage_key: Key of the condition.
        downsample_cond_size: Side to which conditions are scaled before encoding; -1 for none.
        pkeep: Probability that an input token is kept in training; others become random.
        sos_token: Token that stands for no condition.
        unconditional: Ignore any condition.
        sequence_config: ``{target, params}`` of the `TokenSequence`; None for the tokenizer's own.
        scheduler_config: ``{target, params}`` of a factor of the learning rate by step.

    Attributes:
        learning_rate: Set by the caller before training.

    Raises:
        ValueError: The parts do not fit each other.
    """

    def __init__(
        self,
        transformer_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        permuter_config: Mapping[str, Any] | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        first_stage_key: str = "image",
        cond_stage_key: str = "depth",
        downsample_cond_size: int = -1,
        pkeep: float = 1.0,
        sos_token: int = 0,
        unconditional: bool = False,
        sequence_config: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.learning_rate = 4.5e-6
        self.be_unconditional = unconditional or cond_stage_config == "__is_unconditional__"
        self.sos_token = sos_token
        self.first_stage_key = first_stage_key
        self.cond_stage_key = first_stage_key if self.be_unconditional else cond_stage_key
        self.downsample_cond_size = downsample_cond_size
        self.pkeep = pkeep

        self.first_stage_model: VQModel = freeze(instantiate_from_config(first_stage_config))
        self.cond_stage_model = self._build_cond_stage(cond_stage_config)
        self.permuter: nn.Module = (
            Identity() if permuter_config is None else instantiate_from_config(permuter_config)
        )
        self.sequence: TokenSequence = (
            self.first_stage_model.quantize.sequence
            if sequence_config is None
            else instantiate_from_config(sequence_config)
        )
        self.transformer: GPT = instantiate_from_config(transformer_config)
        self._check_fit()
        self.schedule = (
            None if scheduler_config is None else instantiate_from_config(scheduler_config)
        )
        if ckpt_path is not None:
            load_weights(self, ckpt_path, ignore_keys)

    def _build_cond_stage(self, config: Mapping[str, Any] | str) -> Any:
        """What encodes conditions; frozen, and possibly the tokenizer itself."""
        if self.be_unconditional:
            return SOSProvider(self.sos_token)
        if config == "__is_first_stage__":
            return self.first_stage_model
        if isinstance(config, str):
            raise ValueError(
                f"cond_stage_config {config!r}: expected a block with a 'target', "
                "'__is_first_stage__' or '__is_unconditional__'"
            )
        stage = instantiate_from_config(config)
        return freeze(stage) if isinstance(stage, nn.Module) else stage

    def _check_fit(self) -> None:
        """Refuse a sequence or a transformer that the tokenizer's codes do not fit."""
        own, used = self.first_stage_model.quantize.sequence, self.sequence
        if (used.n_e, used.max_loops) != (own.n_e, own.max_loops):
            raise ValueError(
                f"the sequence is for n_e={used.n_e}, max_loops={used.max_loops}, but the "
                f"tokenizer has n_e={own.n_e}, max_loops={own.max_loops}"
            )
        vocab_size = self.transformer.config.vocab_size
        if vocab_size < used.vocab_size:
            raise ValueError(
                f"transformer vocab_size {vocab_size} is too small: {type(used).__name__} with "
                f"n_e={used.n_e}, max_loops={used.max_loops} writes {used.vocab_size} tokens"
            )
        shape = self.transformer.config.site_shape
        if shape is not None and shape[2] < used.site_tokens:
            raise ValueError(
                f"transformer site_shape {tuple(shape)} has {shape[2]} depths, but a site takes up "
                f"to {used.site_tokens} tokens"
            )

    # --- images <-> tokens -----------------------------------------------------------------------

    @torch.no_grad()
    def encode_to_z(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Turn images into token sequences.

        Args:
            x: (B, C, H, W) in [-1, 1].

        Returns:
            z_q (B, D, h, w) and tokens (B, L) int64, -1 after each sequence's end.
        """
        quant_z, _, info = self.first_stage_model.encode(x)
        batch, _, h, w = quant_z.shape
        codes = self.permuter(info.indices.reshape(batch, h * w, -1))
        tokens, _ = self.sequence.encode(codes.reshape(batch, h, w, -1))
        return quant_z, tokens

    @torch.no_grad()
    def encode_to_c(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Turn conditions into tokens.

        Args:
            c: A batch of conditions, as the condition stage takes them.

        Returns:
            What the stage made of them, and tokens (B, Lc) int64, all of one length.
        """
        if self.downsample_cond_size > -1:
            c = F.interpolate(c, size=(self.downsample_cond_size, self.downsample_cond_size))
        quant_c, _, (_, _, indices) = self.cond_stage_model.encode(c)
        tokens = indices.reshape(len(c), -1)
        if (tokens < 0).any():
            raise ValueError(
                "the condition's quantizer writes sequences of different lengths; a condition "
                "needs one of fixed length, such as VectorQuantizer2"
            )
        return quant_c, tokens

    @torch.no_grad()
    def decode_to_img(self, index: Tensor, zshape: Sequence[int]) -> Tensor:
        """Turn token sequences back into images.

        Args:
            index: (B, L) int64.
            zshape: (B, D, h, w).

        Returns:
            (B, C, H, W), about in [-1, 1].

        Raises:
            ValueError: A sequence breaks the grammar.
        """
        _, channels, h, w = zshape
        codes = self.sequence.decode(index, (h, w))
        codes = self.permuter(codes.flatten(1, 2), reverse=True).reshape(codes.shape)
        return self.first_stage_model.decode_code(codes, (len(index), h, w, channels))

    def first_sites(self, tokens: Tensor, sites: int) -> Tensor:
        """Keep what (B, L) sequences write for their first sites; -1 and cut off after that."""
        kept = tokens.masked_fill(self.sequence.states(tokens).site >= sites, PAD)
        return kept[:, : int((kept >= 0).sum(dim=1).max())]

    # --- training --------------------------------------------------------------------------------

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each token of the images from those before it.

        Args:
            x: (B, C, H, W) images in [-1, 1].
            c: Their conditions.

        Returns:
            logits (B, L, V), -inf where the grammar forbids a token; targets (B, L) int64, -1 after
            each sequence's end.
        """
        quant_z, tokens = self.encode_to_z(x)
        _, condition = self.encode_to_c(c)
        inputs = torch.cat([condition, self._corrupt(tokens.clamp(min=0))], dim=1)
        sites = self.sequence.sites(tokens, self._grid(quant_z.shape))
        logits, _ = self.transformer(inputs[:, :-1], sites=sites)
        logits = logits[:, condition.shape[1] - 1 :]
        if self.sequence.restricted:
            allowed = self.sequence.allowed(self.sequence.states(tokens))
            allowed = F.pad(allowed, (0, logits.shape[-1] - allowed.shape[-1]), value=False)
            logits = logits.masked_fill(~allowed, -torch.inf)
        return logits, tokens

    def _corrupt(self, tokens: Tensor) -> Tensor:
        """Replace tokens by random ones, each with probability 1 - pkeep, while training."""
        if not self.training or self.pkeep >= 1:
            return tokens
        keep = torch.rand(tokens.shape, device=tokens.device) < self.pkeep
        return torch.where(keep, tokens, torch.randint_like(tokens, self.sequence.vocab_size))

    def _grid(self, zshape: Sequence[int]) -> Grid:
        """The grid (h, w) of latents, checked against the transformer's tables."""
        h, w = zshape[2:]
        shape = self.transformer.config.site_shape
        if shape is not None and (h > shape[0] or w > shape[1]):
            raise ValueError(
                f"a grid of {h}x{w} sites does not fit the transformer's site_shape {tuple(shape)}"
            )
        return h, w

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Train on one batch."""
        return self._shared_step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Measure one batch."""
        return self._shared_step(batch, "val")

    def _shared_step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """Mean cross-entropy per token (nats); bits are logged per token and per image."""
        logits, target = self(*self.get_xc(batch))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=PAD)
        tokens, images, bits = int((target >= 0).sum()), len(target), loss.detach() / math.log(2)
        for name, value, weight in (
            ("loss", loss, images),
            ("bits_per_token", bits, tokens),
            ("bits_per_image", bits * tokens / images, images),
            ("tokens_per_image", tokens / images, images),
        ):
            self.log(
                f"{split}/{name}",
                value,
                prog_bar=name == "loss",
                batch_size=weight,
                on_epoch=True,
                sync_dist=split == "val",
            )
        return loss

    def get_input(self, key: str, batch: Mapping[str, Any]) -> Tensor:
        """Take a value out of a batch; images (B, H, W, C) and (B, H, W) become (B, C, H, W)."""
        x = batch[key]
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2).contiguous()
        return x.float() if x.dtype == torch.float64 else x

    def get_xc(self, batch: Mapping[str, Any], N: int | None = None) -> tuple[Tensor, Tensor]:
        """Take the first N (all, if None) images and conditions out of a batch."""
        x = self.get_input(self.first_stage_key, batch)
        c = self.get_input(self.cond_stage_key, batch)
        return x[:N], c[:N]

    def configure_optimizers(self) -> Any:
        """AdamW with weight decay on the matrices of linear layers only."""
        linear = {
            f"{name}.weight"
            for name, module in self.transformer.named_modules()
            if isinstance(module, nn.Linear)
        }
        parameters = dict(sorted(self.transformer.named_parameters()))
        groups = [
            {"params": [p for n, p in parameters.items() if n in linear], "weight_decay": 0.01},
            {"params": [p for n, p in parameters.items() if n not in linear], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    # --- sampling --------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        c: Tensor,
        steps: int | None = None,
        temperature: float = 1.0,
        sample: bool = False,
        top_k: int | None = None,
        callback: Callable[[int], None] | None = None,
        top_p: float | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """Continue token sequences.

        Args:
            x: (B, L0) int64 beginnings, -1 after the end of shorter ones; L0 may be 0.
            c: (B, Lc) int64 tokens of the conditions.
            steps: Most tokens to add; None until every site is written.
            temperature: See `filter_logits`, as ``top_k`` and ``top_p``.
            sample: Draw from the distribution; False takes the likeliest token.
            top_k: Draw among the likeliest k.
            callback: Called with the number of tokens drawn after each one.
            top_p: Draw among the likeliest that together have this probability.
            grid: (h, w) of the image; may be left out where ``steps`` says how many codes to add.

        Returns:
            (B, L) int64, beginnings included.

        Raises:
            ValueError: Nothing says where to stop, or a value is out of range.
        """
        if grid is None:
            if steps is None or self.sequence.restricted or self.transformer.site_emb is not None:
                raise ValueError("sample needs the grid (h, w) of the image to be written")
            grid = (1, x.shape[1] + steps)
        return sample_tokens(
            self.transformer,
            c,
            self.sequence,
            grid,
            prefix=x,
            steps=steps,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            greedy=not sample,
            callback=callback,
        )

    def top_k_logits(self, logits: Tensor, k: int) -> Tensor:
        """Keep the k largest logits (..., V), -inf elsewhere."""
        return filter_logits(logits, top_k=k)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], temperature: float = 1.0, top_k: int = 100, **unused: Any
    ) -> dict[str, Tensor]:
        """Pictures of a batch: what is known, half of it completed, and new images.

        Returns:
            Name -> (B, 3, H, W) in [-1, 1], for at most 4 images.
        """
        x, c = (part.to(self.device) for part in self.get_xc(batch, N=4))
        quant_z, tokens = self.encode_to_z(x)
        _, condition = self.encode_to_c(c)
        grid = self._grid(quant_z.shape)
        half = self.first_sites(tokens, grid[0] * grid[1] // 2)
        nothing = tokens[:, :0]

        def draw(known: Tensor, sample: bool = True) -> Tensor:
            return self.sample(known, condition, None, temperature, sample, top_k, grid=grid)

        sequences = {
            "reconstructions": tokens,
            "samples_half": draw(half),
            "samples_nopix": draw(nothing),
            "samples_det": draw(nothing, sample=False),
        }
        pictures = {k: self.decode_to_img(v, quant_z.shape) for k, v in sequences.items()}
        pictures = {"inputs": x} | pictures
        if c.ndim == 4 and not self.be_unconditional:
            pictures["conditioning"] = c
        return {k: v if v.shape[1] == 3 else self._to_rgb(v) for k, v in pictures.items()}

    def _to_rgb(self, picture: Tensor) -> Tensor:
        """Colour a picture of other than 3 channels as the model it belongs to does."""
        stage = self.cond_stage_model if isinstance(self.cond_stage_model, VQModel) else None
        return (stage or self.first_stage_model).to_rgb(picture)
