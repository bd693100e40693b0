"""The quantizers of vector-quantize-pytorch with this project's contract, by name.

The library (https://github.com/lucidrains/vector-quantize-pytorch) comes with
``pip install 'loopy-taming[zoo]'``.

Axis letters: B images, D channels, h w grid, N latents, K codes, T codes of a site, G groups.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from taming.modules.distributed import is_distributed
from taming.modules.sequence.notations import RasterSequence
from taming.modules.vqvae.base import (
    GridShape,
    Quantizer,
    QuantizerInfo,
    QuantizerOutput,
    as_rows,
    channels_second,
    code_perplexity,
    straight_through,
)
from taming.modules.vqvae.checks import mark_outside, rows_of_codes
from taming.modules.vqvae.codebook import check_precision
from taming.util import nearest, parameters_of

# Name -> the quantizer to which it passes further arguments on. The library's others have no codes
# that can be decoded, or none for each site.
PARTS = {
    "VectorQuantize": "",
    "SimVQ": "",
    "FSQ": "",
    "LFQ": "",
    "ResidualVQ": "VectorQuantize",
    "ResidualSimVQ": "SimVQ",
    "ResidualFSQ": "FSQ",
    "ResidualLFQ": "LFQ",
    "GroupedResidualVQ": "ResidualVQ",
    "GroupedResidualFSQ": "ResidualFSQ",
    "GroupedResidualLFQ": "ResidualLFQ",
}
SIZES = {"dim": "embed_dim", "codebook_size": "n_embed"}  # where the model states them
# Arguments about the layout of latents, and one with which the library cannot decode its codes.
REFUSED = (
    *("channel_first", "is_channel_first", "channel_last", "accept_image_fmap", "accept_3d_fmap"),
    *("keep_num_codebooks_dim", "return_indices", "affine_param"),
)


def _library() -> Any:
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise ValueError(
            "LibraryQuantizer needs the package vector-quantize-pytorch: "
            "pip install 'loopy-taming[zoo]'"
        ) from error
    return vector_quantize_pytorch


def arguments_of(name: str) -> list[str]:
    """Return the arguments that the library's quantizer of a name takes.

    Raises:
        ValueError: The library has no such quantizer, or it is not installed.
    """
    if name not in PARTS:
        end = nearest(name, PARTS).partition("; valid")[0]
        raise ValueError(
            f"vector-quantize-pytorch has no quantizer {name!r} with codes of each site{end}; "
            f"the names are {', '.join(PARTS)}"
        )
    own = [*parameters_of(getattr(_library(), name))[0]]
    passed_on = arguments_of(PARTS[name]) if PARTS[name] else []
    return [argument for argument in dict.fromkeys(own + passed_on) if argument not in REFUSED]


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    taken = [argument for argument in arguments_of(name) if argument not in SIZES]
    for option in options:
        if option in SIZES:
            raise ValueError(f"{name}: {option} is the model's {SIZES[option]}; leave it out")
        if option not in taken:
            end = nearest(option, taken).partition("; valid")[0]
            raise ValueError(f"{name} takes no {option!r}{end}; it takes {', '.join(taken)}")


def _build(name: str, n_e: int, e_dim: int, options: Mapping[str, Any]) -> nn.Module:
    """Build the library's quantizer of K codes and D channels, or refuse its arguments."""
    _check_options(name, options)
    sizes = {"dim": e_dim}
    if "codebook_size" in arguments_of(name):
        sizes["codebook_size"] = n_e
    elif isinstance(levels := options.get("levels"), list | tuple) and math.prod(levels) != n_e:
        raise ValueError(
            f"{name}: levels {[*levels]} make {math.prod(levels)} codes, but n_embed is {n_e}"
        )
    try:
        return getattr(_library(), name)(**sizes, **copy.deepcopy(dict(options)))
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        message = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ValueError(f"{name} with {dict(sizes, **options)}: {message}") from error


class LibraryQuantizer(Quantizer):
    """A quantizer of vector-quantize-pytorch, with T codes for every site.

    A site's codes are those of a residual quantizer's turns, group by group, of heads or of several
    codebooks. ``LFQ`` with ``spherical: true`` is binary spherical quantization, BSQ.

    Searches and codebooks are float32 whatever autocast does. In training, z_q and its gradient are
    the library's, but for residual quantizers, whose gradient to z is too large by the number of
    turns; the loss is averaged over turns likewise. In evaluation z_q is that of
    `get_codebook_entry`, with a gradient straight to z, and the state does not change.

    Args:
        name: A key of ``PARTS``.
        n_e: K, number of codes of a codebook; for FSQ the product of its ``levels``.
        e_dim: D, channels of a latent.
        **options: Further arguments of the library's class.

    Attributes:
        inner: The library's quantizer.

    Raises:
        ValueError: Name or options are not the library's, or contradict K and D.

    Example:
        >>> quantizer = LibraryQuantizer("ResidualVQ", n_e=16, e_dim=8, num_quantizers=4).eval()
        >>> z_q, loss, (_, _, codes) = quantizer(torch.randn(2, 8, 5, 5))
        >>> codes.shape
        torch.Size([2, 5, 5, 4])
        >>> torch.equal(quantizer.get_codebook_entry(codes), z_q)
        True
    """

    def __init__(self, name: str, n_e: int, e_dim: int, **options: Any) -> None:
        super().__init__(n_e, e_dim)
        self.name, self.options = name, options
        self.inner = _build(name, n_e, e_dim, options)
        self.groups = options.get("groups", 1)
        self.eval()
        with torch.no_grad(), self._unchanged():
            turns = self._as_rows(self.inner(torch.zeros(1, 1, e_dim))[1]).shape[1]
        self.train()
        self.sequence = RasterSequence(n_e, turns)
        shared = options.get("heads", 1) > 1 and not options.get("separate_codebook_per_head")
        per_group = 1 if shared or options.get("shared_codebook") else turns // self.groups
        self.codebooks = self.groups * per_group
        learned = (parameter for parameter, _ in self.inner.named_parameters())
        self.trains_without_decoder = not any("project" in parameter for parameter in learned)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize latents.

        Args:
            z: (B, D, h, w) or (N, D); not changed.

        Returns:
            z_q like z; the library's loss, 0 where it has none; info with the perplexity averaged
            over codebooks and indices (B, h, w, T) or (N, T), -1 for turns that a
            ``quantize_dropout`` leaves out in training.
        """
        self._check(z)
        rows = as_rows(z)  # (N, D)
        inner, d = self._in_float32(), self.e_dim
        if self.training:
            check_precision(next(self._floats(), rows), rows)
            self._join_ranks()
        with torch.autocast(z.device.type, enabled=False), self._unchanged():
            # The library takes at least one latent.
            z_q, indices, *losses = inner(rows[None] if len(rows) else rows.new_zeros(1, 1, d))
            codes = self._as_rows(indices)[: len(rows)]  # (N, T)
            z_q = z_q[0] if self.training else straight_through(rows, self._look_up(codes))
        used = (codes >= 0).any(dim=0).sum()
        if "Residual" in self.name and self.training:
            z_q = z_q.detach() + (z_q - z_q.detach()) * (self.groups / used)
        loss = losses[0].float() if losses else rows.new_zeros(1)
        loss = loss.sum() / (used if loss.numel() > 1 else 1)
        axes = (len(z), *z.shape[2:])
        books = [code_perplexity(book, self.n_e) for book in codes.chunk(self.codebooks, dim=1)]
        info = QuantizerInfo(
            torch.stack(books).nanmean(), None, codes.reshape(*axes, codes.shape[1])
        )
        return QuantizerOutput(self._grid(z_q, axes), loss, info)

    def get_codebook_entry(self, indices: Tensor, shape: GridShape | None = None) -> Tensor:
        """Turn codes back into latents: exactly the z_q of `forward` in eval mode.

        Args:
            indices: (B, h, w, T) or (N, T) integers in 0..K-1.
            shape: (B, h, w, D) if the indices are flat, or (B, h, w) where T is 1.

        Returns:
            z_q (B, D, h, w), or (N, D) for codes (N, T) without a shape.

        Raises:
            ValueError: They are no such integers, or do not fill the shape. On an accelerator and
                in a graph, a site with an index that is out of range becomes NaN instead.
        """
        codes, grid = rows_of_codes(indices, self.sequence.max_loops, shape, self.e_dim)  # (N, T)
        wrong = mark_outside(codes, self.n_e)
        with torch.autocast(codes.device.type, enabled=False):
            z_q = self._look_up(codes.masked_fill(wrong, 0))
        return self._grid(z_q.masked_fill(wrong.any(dim=1, keepdim=True), math.nan), grid)

    def identity(self) -> dict[str, object]:
        """Add the options, of which some decide the codes."""
        return {**super().identity(), "options": self.options}

    def _look_up(self, codes: Tensor) -> Tensor:
        """Turn codes (N, T) in 0..K-1 into z_q (N, D) float32."""
        if len(codes) == 0:
            return torch.zeros(0, self.e_dim, device=codes.device)
        inner, indices = self._in_float32(), self._of_rows(codes)
        if self.name == "VectorQuantize":  # its own method leaves heads with one codebook apart
            return inner.project_out(inner.get_codes_from_indices(indices).flatten(2))[0]
        is_residual = "Residual" in self.name
        look_up = inner.get_output_from_indices if is_residual else inner.indices_to_codes
        return look_up(indices)[0]

    def _as_rows(self, indices: Tensor) -> Tensor:
        """Lay the library's indices (G, 1, N, T / G), (1, N, T) or (1, N) out as (N, T) int64."""
        if indices.ndim == 4:
            return rearrange(indices, "g 1 n t -> n (g t)").long()
        return indices[0].reshape(indices.shape[1], -1).long()

    def _of_rows(self, codes: Tensor) -> Tensor:
        """Lay codes (N, T) out as the library's indices; the inverse of `_as_rows`."""
        if self.name.startswith("Grouped"):
            return rearrange(codes, "n (g t) -> g 1 n t", g=self.groups)
        takes_one = "Residual" not in self.name and codes.shape[1] == 1
        return codes.T if takes_one else codes[None]

    def _grid(self, rows: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Give z_q (N, D) the codebook's dtype and the grid (B, h, w), if there is one."""
        rows = rows.to(next(self._floats(), rows).dtype)
        return rows if len(axes) == 1 else channels_second(rows.reshape(*axes, self.e_dim))

    def _floats(self) -> Iterator[Tensor]:
        """Yield parameters and buffers of a floating dtype."""
        tensors = chain(self.inner.parameters(), self.inner.buffers())
        return (tensor for tensor in tensors if tensor.is_floating_point())

    def _in_float32(self) -> Any:
        """Return the library's quantizer; in a half model, a copy in float32."""
        half = any(tensor.dtype != torch.float32 for tensor in self._floats())
        return copy.deepcopy(self.inner).float() if half else self.inner

    def _apply(self, *args: Any) -> LibraryQuantizer:
        """Convert as `nn.Module` does; the library's buffers with gradient stay leaves."""
        with torch.no_grad():
            return super()._apply(*args)

    def _codebooks(self) -> list[Any]:
        """Return the library's codebooks that learn by moving averages."""
        kind = _library().vector_quantize_pytorch.Codebook
        return [module for module in self.inner.modules() if isinstance(module, kind)]

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """In evaluation, keep the library from starting a codebook by k-means."""
        flags = [] if self.training else [codebook.initted for codebook in self._codebooks()]
        before = [flag.clone() for flag in flags]
        try:
            for flag in flags:
                flag.fill_(True)
            yield
        finally:
            for flag, value in zip(flags, before, strict=True):
                flag.copy_(value)

    def _join_ranks(self) -> None:
        """Let codebooks learn from all ranks, which the library decides before there are any."""
        if not is_distributed() or self.options.get("sync_codebook") is False:
            return
        from torch.distributed import all_reduce

        library = _library().vector_quantize_pytorch
        for codebook in self._codebooks():
            codebook.use_ddp = True
            codebook.all_reduce_fn = codebook.kmeans_all_reduce_fn = all_reduce
            codebook.sample_fn = library.sample_vectors_distributed
            codebook.replace_sample_fn = library.sample_vectors_distributed
