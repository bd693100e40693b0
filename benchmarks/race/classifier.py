"""Small image classifier that judges samples by accuracy and by a distance of features.

Axis letters: B images, H W image, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from race.training import loader

logger = logging.getLogger("taming.benchmark")


class Classifier(nn.Module):
    """Three levels of convolutions, then a linear layer on their spatial mean.

    Args:
        classes: Number of classes.
        features: F, channels of the last level.
    """

    def __init__(self, classes: int = 10, features: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = [3, features // 4, features // 2, features]
        for before, after in zip(sizes, sizes[1:], strict=False):
            for channels in (before, after):
                layers += [
                    nn.Conv2d(channels, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                ]
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features (B, F) of images (B, 3, H, W) in [-1, 1]."""
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (B, classes) of images (B, 3, H, W) in [-1, 1]."""
        return self.head(self.features(x))


def trained_classifier(data: Any, steps: int, file: Path, device: torch.device) -> Classifier:
    """Train a classifier on labelled images, or load an earlier result."""
    torch.manual_seed(0)
    model = Classifier().to(device)
    if file.exists():
        model.load_state_dict(torch.load(file, map_location=device))
        return model.eval()
    logger.info("training the classifier")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    batches = loader(data, min(64, len(data)), shuffle=True)
    for _, (x, labels) in zip(range(steps), labelled(endless(batches), device), strict=False):
        loss = F.cross_entropy(model(x), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    torch.save(model.state_dict(), file)
    return model.eval()


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches epoch after epoch."""
    while True:
        yield from batches


def labelled(batches: Iterable[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Convert a data set's batches to images (B, 3, H, W) and classes (B,)."""
    for batch in batches:
        yield batch["image"].permute(0, 3, 1, 2).to(device), batch["class_label"].to(device)


class Judgement(NamedTuple):
    """A classifier's statistics of a set of images.

    Attributes:
        accuracy: Fraction of images assigned to their intended class.
        mean: (F,) float64, mean of the features.
        covariance: (F, F) float64, covariance of the features.
    """

    accuracy: float
    mean: Tensor
    covariance: Tensor

    def distance(self, other: Judgement) -> float:
        """Compute the Frechet distance of normal distributions (Dowson and Landau 1982).

        It is the FID (arXiv:1706.08500, equation 6) in this classifier's features: only distances
        from the same classifier are comparable.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
        spread = self.covariance.trace() + other.covariance.trace() - 2 * cross
        return float((self.mean - other.mean).square().sum() + spread)


@torch.no_grad()
def judge(model: Classifier, images: Iterable[tuple[Tensor, Tensor]]) -> Judgement:
    """Judge batches of images (B, 3, H, W) with intended classes (B,)."""
    features, right = [], []
    for x, labels in images:
        features.append(model.features(x.clamp(-1, 1)))
        right.append(model.head(features[-1]).argmax(dim=1) == labels)
    rows = torch.cat(features).double().cpu()
    accuracy = float(torch.cat(right).float().mean())
    return Judgement(accuracy, rows.mean(dim=0), torch.cov(rows.T))
