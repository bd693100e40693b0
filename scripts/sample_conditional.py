"""Sample in a page of the browser from a prior, given an image's condition.

python scripts/sample_conditional.py -r logs/<run>
python scripts/sample_conditional.py -r logs/<run> --ignore_base_data \\
    data='{target: main.DataModuleFromConfig, params: {batch_size: 1, validation: {target: \\
    taming.data.ade20k.Examples}}}'

It samples given a class, segmentation, depth map or place, completes images from above and where
they are painted over, and slides a window over large images. Without a condition, or with classes,
--ignore_base_data alone will do. The page is that of `taming demo`, with the data of the run.
"""

from __future__ import annotations

from pathlib import Path

from taming.demo.__main__ import add_page_arguments
from taming.run import cli


def main() -> None:
    """Serve the page until interrupted."""
    parser = cli.run_parser(__doc__)
    add_page_arguments(parser)
    options, saved = cli.parse_run(parser)
    from taming.demo.exhibit import Exhibit
    from taming.demo.serve import serve
    from taming.models.cond_transformer import Net2NetTransformer

    device = cli.choose_device(options.device)
    datasets = saved.data().datasets if "data" in saved.config.values else {}
    model = cli.check_kind(saved.model(), Net2NetTransformer, options.resume, "a transformer prior")
    model.to(device).eval().requires_grad_(False)
    name = f"{Path(options.resume).name}, step {saved.step()}"
    exhibit = Exhibit.of_prior(name, model, datasets)
    serve([exhibit], options.host, options.port, not options.no_browser)


if __name__ == "__main__":
    cli.run(main)
