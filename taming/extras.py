"""Extras: the packages that only one of them brings, named where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Packages that only an extra of this one brings, by the name of their module.
EXTRAS = {
    **dict.fromkeys(("lightning", "matplotlib", "pyarrow", "skimage"), "train"),
    **dict.fromkeys(("tensorboard", "torchmetrics", "torchvision"), "train"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "datasets": "data",
    **dict.fromkeys(("fastapi", "gradio", "uvicorn"), "demo"),
    "huggingface_hub": "hub",
    "ray": "ray",
    "torch_fidelity": "eval",
    "vector_quantize_pytorch": "zoo",
    "wandb": "wandb",
}


@contextmanager
def naming_extras() -> Iterator[None]:
    """Name the extra that brings a package which an import inside lacks.

    Raises:
        ValueError: The package is not installed; the message holds the pip command.

    Example:
        >>> with naming_extras():  # doctest: +SKIP
        ...     import gradio
        ValueError: gradio is not installed: pip install 'loopy-taming[demo]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        command = f"pip install 'loopy-taming[{EXTRAS[package]}]'"
        raise ValueError(f"{package} is not installed: {command}") from error
