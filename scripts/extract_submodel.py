"""Extract one part of a model, such as its tokenizer, from a checkpoint.

python scripts/extract_submodel.py logs/<run>/checkpoints/last.ckpt first.ckpt first_stage_model
"""

from __future__ import annotations

import logging

from taming.run import cli
from taming.util import replacing

logger = logging.getLogger("taming.extract_submodel")


def main() -> None:
    """Save a checkpoint that contains only the weights of the part."""
    parser = cli.script_parser(__doc__, device=False)
    parser.add_argument("inpath", type=cli.existing, help="checkpoint to load")
    parser.add_argument("outpath", help="checkpoint to save")
    parser.add_argument("submodel", nargs="?", default="cond_stage_model", help="name of the part")
    options = parser.parse_args()

    import torch

    from taming.checkpoint import load_checkpoint, weights_of

    checkpoint = load_checkpoint(options.inpath)
    weights = weights_of(checkpoint)
    prefix = f"{options.submodel}."
    part = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not part:
        names = ", ".join(sorted({key.partition(".")[0] for key in weights}))
        raise ValueError(f"{options.inpath} has no part {options.submodel!r}; its parts: {names}")
    with replacing(options.outpath) as file:
        torch.save({"state_dict": part}, file)
    logger.info("%d weights of %s in %s", len(part), options.submodel, options.outpath)


if __name__ == "__main__":
    cli.run(main)
