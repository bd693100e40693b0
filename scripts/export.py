"""Export a tokenizer for other programs: graphs of its networks, and its loop in NumPy.

python scripts/export.py -r logs/<run> -o folder

encoder.pt2, encoder.onnx   images (B, C, H, W) float32 in [-1, 1] -> latents (B, D, h, w)
loop.npz, loop.py           latents -> codes (B, h, w, T) int64, at a rate, by NumPy alone
decoder.pt2, decoder.onnx   codes -> images

Pictures have any size from 2 x 2 sites up, in whole sites. A run, a folder of save_pretrained and
the name of a model that ships will do. See docs/sharing.md.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import taming
from taming.run import cli
from taming.util import replacing

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from taming.models.vqgan import VQModel

logger = logging.getLogger("taming.export")

FORMATS = ("pt2", "onnx")
_SIDE = 4096  # most sites in a row: all that a decoder takes at once


def trace(model: VQModel) -> dict[str, ExportedProgram]:
    """Trace the networks of a tokenizer with batch and grid as symbols.

    Args:
        model: The tokenizer, in eval mode; its tiles are switched off.

    Returns:
        ``encoder`` and ``decoder``, with an input ``images`` or ``codes``.
    """
    import torch
    from torch.export import Dim, export

    from taming.modules.util import Method

    encoder, decoder = Method(model, "encode_to_prequant"), Method(model, "decode_code")
    b, h, w = Dim("b", min=1, max=1 << 16), *(Dim(side, min=2, max=_SIDE) for side in "hw")
    factor = model.factor
    images = torch.zeros(2, model.channels, 3 * factor, 2 * factor)
    codes = torch.zeros(2, 3, 2, model.quantize.sequence.max_loops, dtype=torch.int64)
    codes[..., 1:] = -1
    sizes = {0: b, 2: factor * h, 3: factor * w}
    with torch.no_grad(), _quiet():
        return {
            "encoder": export(encoder, (images,), dynamic_shapes=(sizes,), strict=False),
            "decoder": export(
                decoder, (codes,), dynamic_shapes=({0: b, 1: h, 2: w},), strict=False
            ),
        }


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of torch about its own functions, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save(programs: dict[str, Any], folder: Path, formats: tuple[str, ...]) -> None:
    """Save programs as ``<name>.pt2``, ``<name>.onnx`` or both."""
    import torch

    names = {"encoder": ("images", "latents"), "decoder": ("codes", "images")}
    for name, program in programs.items():
        if "pt2" in formats:
            with replacing(folder / f"{name}.pt2") as part, part.open("wb") as file:
                torch.export.save(program, file)
        if "onnx" in formats:
            given, made = names[name]
            with _quiet():
                graph = torch.onnx.export(
                    program, input_names=[given], output_names=[made], dynamo=True, verbose=False
                )
            assert graph is not None
            with replacing(folder / f"{name}.onnx") as part:
                graph.save(part)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = cli.script_parser(__doc__, device=False)
    add = parser.add_argument
    run_help = "run of the tokenizer, a folder or a shipped name"
    add("-r", "--resume", required=True, type=cli.existing_run, help=run_help)
    add("--trust_config", action="store_true", help=cli.TRUST_HELP)
    add("-o", "--outdir", type=Path, required=True)
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="default: both")
    options = parser.parse_args()
    cli.check_folder(options.outdir)
    return options


def refuse_missing(formats: tuple[str, ...]) -> None:
    """Refuse ONNX where a package for it is missing, before anything is done."""
    if "onnx" in formats:
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "ONNX needs onnx and onnxscript: pip install 'loopy-taming[export]', or give "
                "--formats pt2"
            ) from error


def main() -> None:
    """Export the networks and the tables of the loop."""
    options = parse_options()
    refuse_missing(options.formats)
    import numpy as np

    from taming.modules.vqvae import numpy_loop
    from taming.tokenizer import Tokenizer

    loaded = taming.load(options.resume, trust_config=options.trust_config)
    tokenizer = cli.check_kind(loaded, Tokenizer, options.resume, "a tokenizer")
    found = tokenizer.model.quantize.loop_tables()
    tables: dict[str, Any] = {key: value.numpy() for key, value in found.items()}
    tokenizer.tile = None  # tiles depend on the size of a picture, and a graph must not
    save(trace(tokenizer.model), options.outdir, options.formats)
    with replacing(options.outdir / "loop.npz") as part, part.open("wb") as file:
        np.savez(file, **tables)
    shutil.copyfile(numpy_loop.__file__, options.outdir / "loop.py")
    logger.info("exported %s to %s", options.resume, options.outdir)


if __name__ == "__main__":
    cli.run(main)
