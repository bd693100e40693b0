"""Loading: a trained model as the `Tokenizer` or `Generator` that it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from taming.generator import Generator
from taming.signatures import naming_nearest
from taming.tokenizer import Tokenizer
from taming.util import usable_device


@naming_nearest()
def load(
    run: str | Path | Sequence[str | Path],
    device: torch.device | str = "cpu",
    *,
    tokenizer: str | Path | None = None,
    trust_config: bool = False,
) -> Tokenizer | Generator:
    """Load a trained model.

    Args:
        run: Folder of a run, ``logs/<run>``, one of its checkpoints, a folder of
            `Shared.save_pretrained`, or the name of a model that ships; a path that exists wins.
            For a VQ-VAE-2, the runs of the priors of all levels, the top's first.
        device: Device for the model.
        tokenizer: Run of a prior's tokenizer, or a checkpoint, if it is not where it was when the
            prior was trained, nor beside the prior's run as it was then.
        trust_config: Build whatever the run's configuration names, which may run any code; by
            default, only what ``docs/security.md`` lists.

    Returns:
        A `Generator` for the run of a prior, a `Tokenizer` for that of a tokenizer, with a
        `ContextNetwork` for that of a context model.

    Raises:
        FileNotFoundError: There is no such run or checkpoint.
        ValueError: It is not a run, its model is neither, there is no such device, or its
            configuration asks for what it may not.
    """
    device = usable_device(device)  # before the run is loaded
    loaded = _load(run, tokenizer, trust_config)
    loaded.name = str(run)
    return loaded.frozen().to(device)


def _load(
    run: str | Path | Sequence[str | Path], tokenizer: str | Path | None, trust_config: bool
) -> Tokenizer | Generator:
    from taming.run.folder import model_from_run
    from taming.run.parts import is_shared, place_of
    from taming.run.pretrained import load_modules

    several = not isinstance(run, (str, os.PathLike))
    names: Sequence[str | Path] = run if several else [run]  # type: ignore[assignment]
    if not several and is_shared(place := place_of(names[0])):
        if tokenizer is not None:
            raise ValueError(f"{run} has its tokenizer with it and takes no other")
        modules = load_modules(place, trust_config=trust_config)
        kind = Tokenizer if hasattr(modules.get("model"), "quantize") else Generator
        return kind.of_modules(modules)
    options = {"tokenizer": tokenizer, "trust_config": trust_config}
    models = [model_from_run(name, **options) for name in names]
    for name, model in zip(names, models, strict=True):
        if several and not hasattr(model, "sample_codes"):
            raise ValueError(f"{name} holds a {type(model).__name__}, not a prior of one level")
    if several:
        return Generator(models)
    if hasattr(models[0], "context"):
        return Tokenizer(models[0].first_stage_model, context=models[0].context)
    return (Generator if hasattr(models[0], "sample_codes") else Tokenizer)(models[0])
