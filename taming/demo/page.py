"""The page of the demo, on Gradio: what is shown where, and what calls what.

All that is computed is in `taming.demo.study` and `taming.demo.studio`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from taming.demo.exhibit import Exhibit
from taming.demo.sampling import sample_tab
from taming.demo.study import OWN, RATES, Study, View, kinds_of

EXAMPLE = Path(__file__).with_name("example.jpg")  # by Stefan van der Walt, CC0
SIDES = (128, 256, 384, 512, 768, 1024, 2048)
# Kind of rate -> its name, the slider's label and step.
NAMES = {
    OWN: ("the tokenizer's own", "", 1.0),
    "codes": ("codes", "Mean codes of a site", 0.05),
    "bits": ("bits", "Bits of a pixel", 0.001),
    "lambda": ("lambda", "log2 of lambda: the larger, the fewer bits", 0.25),
}
CSS = """
.gradio-container { max-width: 1500px !important; }
.shown img { cursor: crosshair; }
.numbers { font-variant-numeric: tabular-nums; }
.pixels img { width: 100%; object-fit: contain; image-rendering: pixelated; }
"""
# One event uses the models at a time.
EVENT: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
EVENT |= {"api_visibility": "private"}
DRAG: dict[str, Any] = EVENT | {"trigger_mode": "always_last", "show_progress": "hidden"}


class Panel(NamedTuple):
    """What the page shows of a picture for one run."""

    picture: gr.Image
    lengths: gr.Image
    numbers: gr.Markdown
    path: gr.Dataframe


def build(exhibits: Sequence[Exhibit]) -> gr.Blocks:
    """Build the page of one run, or of several side by side."""
    with gr.Blocks(title="Loopy tokenizer", analytics_enabled=False) as page:
        gr.Markdown("# Loopy tokenizer")
        with gr.Tab("Compress", elem_id="compress"):
            compress_tab(page, exhibits)
        studios = [(e.name, e.studio) for e in exhibits if e.studio is not None]
        if studios:
            with gr.Tab("Sample", elem_id="sample"):
                sample_tab(studios, EVENT)
    return page


def compress_tab(page: gr.Blocks, exhibits: Sequence[Exhibit]) -> None:
    """Lay out the reconstruction of a picture at any rate, and the path of a site."""
    known = {kind for exhibit in exhibits for kind in kinds_of(exhibit.tokenizer)}
    kinds = [(NAMES[kind][0], kind) for kind in RATES if kind in known]
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            photo = lay_photo()
            side = gr.Dropdown(SIDES, value=512, label="Longest side in pixels", elem_id="side")
            kind = gr.Radio(kinds, value=OWN, label="Rate by", elem_id="kind")
            value = gr.Slider(0, 1, visible=False, elem_id="rate")
            with gr.Row():
                x = gr.Number(0, precision=0, minimum=0, min_width=80, label="x", elem_id="x")
                y = gr.Number(0, precision=0, minimum=0, min_width=80, label="y", elem_id="y")
            gr.Markdown("Click a picture, or type x and y of a pixel, to see the loop of a site.")
        panels = [lay_panel(exhibit) for exhibit in exhibits]
    studies, wrong = gr.State([], time_to_live=3600), gr.State("")
    shown = [component for panel in panels for component in panel]

    def see(studies: list[Study], wrong: str, *wanted: Any) -> list[Any]:
        return show(studies, *wanted) or [None, None, wrong, None] * len(panels)

    def load(path: str | None, side: int, kind: str) -> tuple[list[Study], str, Any]:
        found, wrong = study_all(exhibits, path, side)
        return found, wrong, slider_of(found, kind)

    seen = [studies, wrong, kind, value, x, y]
    sees: dict[str, Any] = {"fn": see, "inputs": seen, "outputs": shown}
    for event in (page.load, photo.change, side.input):
        loaded = event(load, [photo, side, kind], [studies, wrong, value], **EVENT)
        loaded.success(**sees, **EVENT)
    kind.input(slider_of, [studies, kind], value, **EVENT).success(**sees, **EVENT)
    gr.on([value.input, x.input, y.input], **sees, **DRAG)
    for image in [image for panel in panels for image in (panel.picture, panel.lengths)]:
        clicked = image.select(place_of, None, [x, y], api_visibility="private", queue=False)
        clicked.success(**sees, **DRAG)


def lay_photo() -> gr.Image:
    """Lay out the picture to drop, which reaches the studies as the path it was uploaded to."""
    photo = gr.Image(
        str(EXAMPLE),
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label="Picture",
        elem_id="photo",
        height=240,
    )
    # Gradio's own opens the file as well, and fails where it is no picture before `study_all` can.
    photo.preprocess = lambda payload: payload and payload.path
    return photo


def lay_panel(exhibit: Exhibit) -> Panel:
    """Lay out what is shown for one run."""
    with gr.Column(scale=2, min_width=300):
        gr.Markdown(f"### {exhibit.name}")
        numbers = gr.Markdown(elem_classes="numbers")
        with gr.Row():
            picture = lay_picture("Reconstruction")
            lengths = lay_picture("Lengths: from dark for one turn to bright for all")
        path = gr.Dataframe(
            headers=["turn", "code", "distance"],
            interactive=False,
            label="Loop of the site",
            elem_classes="path",
        )
    return Panel(picture, lengths, numbers, path)


def lay_picture(caption: str) -> gr.Image:
    """Lay out a picture that can be clicked, under its caption."""
    with gr.Column(min_width=280):
        gr.Markdown(caption)
        return gr.Image(
            show_label=False,
            alt_text=caption,
            interactive=False,
            format="png",
            buttons=["download"],
            elem_classes="shown",
        )


def study_all(exhibits: Sequence[Exhibit], path: str | None, side: int) -> tuple[list[Study], str]:
    """Study a picture with the tokenizer of each run.

    Returns:
        The studies, none without a picture or of what is none; and what is wrong with it, or "".
    """
    if path is None:
        return [], ""
    try:
        return [Study(exhibit.tokenizer, path, side) for exhibit in exhibits], ""
    except ValueError as error:  # the page does not show where files lie
        return [], str(error).replace(path, Path(path).name)


def slider_of(studies: list[Study], kind: str) -> Any:
    """Return the slider for a kind of rate, over all studies' ranges, at the first's start."""
    having = [study for study in studies if kind in study.ranges]
    if kind == OWN or not having:
        return gr.Slider(visible=False)
    ranges = [study.ranges[kind] for study in having]
    _, label, step = NAMES[kind]
    # In whole steps, which a study moves into its own range.
    least = math.floor(min(low for low, _ in ranges) / step)
    most = math.ceil(max(high for _, high in ranges) / step)
    start = round(having[0].start_of(kind) / step)
    low, value, high = (round(steps * step, 6) for steps in (least, start, most))
    return gr.Slider(low, high, value, step=step, label=label, visible=True)


def place_of(event: gr.SelectData) -> tuple[int, int]:
    """Return x and y of the pixel that was clicked."""
    return int(event.index[0]), int(event.index[1])


def show(
    studies: list[Study], kind: str, value: float, x: float | None, y: float | None
) -> list[Any]:
    """Return what the panels show, one after the other, at a rate and a pixel."""
    return [part for study in studies for part in _shown(study, kind, value, (x or 0, y or 0))]


def _shown(study: Study, kind: str, value: float, pixel: tuple[float, float]) -> tuple[Any, ...]:
    """Return what one panel shows; a rate that it does not have is named there."""
    try:
        view = study.at(study.rate_of(kind, value))
    except ValueError as error:
        return None, None, str(error), None
    site = study.site_at(*pixel)
    turns = study.path(view, site)
    rows = [
        [t.turn, t.code or "(ended)", "" if t.distance is None else f"{t.distance:.4f}"]
        for t in turns
    ]
    lengths = None if view.lengths is None else study.marked(view.lengths, site)
    label = f"Loop of the site in row {site[0]}, column {site[1]}"
    return view.picture, lengths, text_of(study, view), gr.Dataframe(rows, label=label)


def plural(number: float, noun: str) -> str:
    """Return a noun for a number of things."""
    return noun if number == 1 else f"{noun}s"


def text_of(study: Study, view: View) -> str:
    """Return the numbers of a view in two lines."""
    (height, width), numbers = study.size, view.numbers
    first = f"**{numbers['psnr']:.2f} dB** PSNR · file of **{numbers['bytes']:,.0f} bytes**"
    rows, columns = study.grid
    pixels, sites = plural(width * height, "pixel"), plural(rows * columns, "site")
    second = f"{width} × {height} {pixels} · {columns} × {rows} {sites}"
    codes = plural(numbers["codes"], "code")
    second += f" · {numbers['codes']:,.0f} {codes}, {numbers['mean']:.2f} of a site"
    return f"{first}, {numbers['bpp']:.3f} bits of a pixel<br>{second}"
