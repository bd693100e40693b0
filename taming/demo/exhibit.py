"""A run on the demo's page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from taming.demo.studio import Studio
from taming.generator import Generator
from taming.loading import load
from taming.models.prior import Prior
from taming.tokenizer import Tokenizer

MAX_PIXELS = 2**26  # of a picture


@dataclass(frozen=True)
class Exhibit:
    """A run on the page.

    Attributes:
        name: Its name, as it was given.
        tokenizer: Its tokenizer, or that of its prior.
        studio: Its prior, if it has one.
    """

    name: str
    tokenizer: Tokenizer
    studio: Studio | None = None

    def __post_init__(self) -> None:
        self.tokenizer.max_pixels = MAX_PIXELS

    @classmethod
    def load(cls, run: str, device: torch.device, **options: Any) -> Exhibit:
        """Load a run: a tokenizer, or a prior without a condition or given a class.

        Args:
            run: As for `taming.load`, like the options.
            device: Device of the model.
            **options: Of `taming.load`.

        Raises:
            FileNotFoundError: There is no such run.
            ValueError: Its model is neither, or priors of several levels.
        """
        loaded = load(run, device, **options)
        if isinstance(loaded, Generator):
            if len(loaded.priors) > 1:
                raise ValueError(
                    f"{run} holds the priors of all levels of a VQ-VAE-2, but the page shows one "
                    "prior: sample them by taming sample"
                )
            return cls.of_prior(run, loaded.model)
        return cls(run, loaded)

    @classmethod
    def of_prior(
        cls, name: str, prior: Prior, datasets: Mapping[str, Any] | None = None
    ) -> Exhibit:
        """Show a prior, in eval mode, with its data sets by name and its tokenizer."""
        return cls(name, Tokenizer(prior.first_stage_model.whole), Studio(prior, datasets or {}))
