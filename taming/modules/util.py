"""Small modules: data-initialized normalization, condition stages, and checks of a network.

Axis letters: B batch, C channels, H W feature map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.distributed import rows_of_all_ranks
from taming.util import DataError

# All that fit into int64: without uint64, whose largest value would turn into -1.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
INTEGERS += (torch.uint8, torch.uint16, torch.uint32)


def count_params(module: nn.Module) -> int:
    """Return the number of parameters, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())


def checks_values(tensor: Tensor) -> bool:
    """Return True if a check may look at the values of a tensor.

    It may not while torch.export, torch.compile or a trace turns code into a graph, which has no
    errors, nor on an accelerator, which each look would make the program wait for.
    """
    captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tensor.device.type == "cpu" and not captured


@torch.no_grad()
def start_orthogonal(*layers: nn.Conv2d) -> None:
    """Give layers orthogonal weights (Saxe et al. 2013, arXiv:1312.6120) and biases of zero.

    By default, consecutive linear layers start as random matrices, whose product passes some
    directions several times as faintly as others. How many directions a short training learns is
    then left to chance; between an encoder and a decoder, these are all that the codes convey.
    """
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
        if layer.bias is not None:
            layer.bias.zero_()


@torch.no_grad()
def start_at_zero(*layers: nn.Conv2d) -> None:
    """Give layers weights and biases of zero: what they add to begins unchanged."""
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()


class NonFiniteFoundError(Exception):
    """Ends a forward pass at the first non-finite output; its message is the module's name."""


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in an output of nested tuples, lists and mappings."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))


@torch.no_grad()
def first_non_finite(module: nn.Module, *inputs: Any) -> str | None:
    """Run a module again and name the first submodule that outputs a NaN or an infinity.

    Submodules are checked in the order in which they finish, so the innermost is named before those
    around it. The run ends at the first find.

    Args:
        module: The module, in its present training or evaluation mode.
        *inputs: Arguments of its ``forward``.

    Returns:
        Dotted name of the submodule, the class name if only ``module`` itself outputs such values,
        or None if every output is finite.
    """

    def check(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if not all(tensor.isfinite().all() for tensor in _tensors(output)):
            raise NonFiniteFoundError(name)

    hooks = [
        submodule.register_forward_hook(partial(check, name or type(module).__name__))
        for name, submodule in module.named_modules()
    ]
    try:
        module(*inputs)
    except NonFiniteFoundError as found:
        return str(found)
    finally:
        for handle in hooks:
            handle.remove()
    return None


class ActNorm(nn.Module):
    """Shift and scale per channel, initialized so that the first batch has mean 0 and std 1.

    From Glow (Kingma and Dhariwal 2018, arXiv:1807.03039, section 3.1). The first batch is that of
    all ranks, so that they start alike.

    Args:
        num_features: C.
    """

    initialized: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set shift and scale from a batch (B, C, H, W)."""
        x = rows_of_all_ranks(x.detach())
        self.loc.copy_(-x.mean(dim=(0, 2, 3), keepdim=True))
        self.scale.copy_(1 / (x.std(dim=(0, 2, 3), keepdim=True) + 1e-6))
        self.initialized.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if self.training and not self.initialized:
            self.initialize(x)
        return self.scale * (x + self.loc)


# What a quantizing first stage returns: (quantized, loss, (perplexity, encodings, indices)).
Quantized = tuple[Tensor, None, tuple[None, None, Tensor]]


class ConditionStage:
    """Base of what encodes a prior's condition as tokens; a tokenizer of images is one too.

    Attributes:
        condition_vocab_size: Number of different tokens; None if only the data determine it.
        condition_length: Tokens of a condition, of the images trained on; None if only the data
            determine it.
        n_classes: Number of classes; None for other conditions.
        channels: Channels of conditions that are images; None for others.
        value_range: Smallest and largest value of such an image.
    """

    condition_vocab_size: int | None
    condition_length: int | None
    n_classes: int | None = None
    channels: int | None = None
    value_range = (-1.0, 1.0)

    def check(self, c: Tensor) -> None:
        """Refuse conditions, as in a batch, that ``encode`` does not take; by default, none."""

    def condition_pictures(
        self, c: Tensor, quant_c: Tensor, size: tuple[int, int], datasets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return pictures of conditions by name; none by default.

        Args:
            c: Conditions, as in a batch.
            quant_c: The first output of ``encode`` for them.
            size: (H, W) of the images, in pixels.
            datasets: Data sets of the run by split, some of which can draw conditions.

        Returns:
            Name -> (B, 3, H, W) in [-1, 1].
        """
        return {}


class AbstractEncoder(ConditionStage, nn.Module, ABC):
    """A condition stage for conditions that are not images."""

    @abstractmethod
    def encode(self, c: Tensor) -> Tensor | Quantized:
        """Map a batch of conditions to tokens (B, L), in the form of a first stage's ``encode``."""


class Labelator(AbstractEncoder):
    """A class label as a sequence of one token.

    Args:
        n_classes: Number of classes.
        quantize_interface: Return what a quantizing first stage returns; else the tokens alone.

    Example:
        >>> _, _, (_, _, tokens) = Labelator(n_classes=10).encode(torch.tensor([3, 7]))
        >>> tokens
        tensor([[3],
                [7]])
    """

    n_classes: int
    condition_length = 1

    def __init__(self, n_classes: int, quantize_interface: bool = True) -> None:
        super().__init__()
        self.n_classes = self.condition_vocab_size = n_classes
        self.quantize_interface = quantize_interface

    def check(self, c: Tensor) -> None:
        """Refuse labels that are not one whole number (B,) in [0, n_classes) for each image."""
        if c.numel() != len(c) or c.is_floating_point() or c.is_complex():
            raise DataError(
                f"labels must be whole numbers (B,), one for each image, got {c.dtype} "
                f"{tuple(c.shape)}"
            )
        if checks_values(c) and ((c < 0) | (c >= self.n_classes)).any():
            raise DataError(
                f"labels from {int(c.min())} to {int(c.max())} are not all among the "
                f"n_classes {self.n_classes} of the Labelator, which begin at 0"
            )

    def encode(self, c: Tensor) -> Tensor | Quantized:
        """Map labels (B,) in [0, n_classes) to tokens (B, 1) int64.

        Raises:
            ValueError: A label is out of range.
        """
        self.check(c)
        tokens = c.reshape(-1, 1).long()
        return (tokens, None, (None, None, tokens)) if self.quantize_interface else tokens


class SOSProvider(AbstractEncoder):
    """A start token in place of a condition, for unconditional models.

    Args:
        sos_token: The token.
        quantize_interface: Return what a quantizing first stage returns; else the tokens alone.
    """

    condition_length = 1

    def __init__(self, sos_token: int, quantize_interface: bool = True) -> None:
        super().__init__()
        self.sos_token = sos_token
        self.condition_vocab_size = sos_token + 1
        self.quantize_interface = quantize_interface

    def encode(self, c: Tensor) -> Tensor | Quantized:
        """Map any batch (B, ...) to tokens (B, 1) int64, all the start token."""
        tokens = torch.full((c.shape[0], 1), self.sos_token, device=c.device)
        return (tokens, None, (None, None, tokens)) if self.quantize_interface else tokens


def count_codes(codes: Tensor, n_e: int) -> Tensor:
    """Count each of 0..K-1 among integers in -1..K of any shape: (K,) int64."""
    codes = codes.flatten() + 1
    # As bincount does, which waits for a GPU to learn the size of its output.
    return codes.new_zeros(n_e + 2).scatter_add_(0, codes, torch.ones_like(codes))[1:-1]


class Method(nn.Module):
    """A method of a module as a module of its own, for ``torch.export``.

    Args:
        module: The module.
        name: Name of a method with one argument.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x: Tensor) -> Any:
        """Return what the method returns."""
        return getattr(self.module, self.name)(x)
