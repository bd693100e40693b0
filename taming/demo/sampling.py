"""The part of the demo's page that samples from priors, and completes what is painted over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
from PIL import Image, ImageChops

from taming.demo.studio import Step, Studio, Wish

COLOUR = "#e63c3c"  # of what is painted over


def sample_tab(named: Sequence[tuple[str, Studio]], event: Mapping[str, Any]) -> None:
    """Lay out sampling from one prior, or from several side by side.

    Args:
        named: Name of each run, and its prior.
        event: Options of all events.
    """
    studios = [studio for _, studio in named]
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            wish = lay_wish(studios)
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                go = gr.Button("Sample", variant="primary", elem_id="go")
                stop = gr.Button("Stop", elem_id="stop")
            with gr.Row():
                panels = [lay_result(name, studio) for name, studio in named]
            start = lay_start(studios[0], wish["scale"], event)

    def run(*values: Any) -> Iterator[list[Any]]:
        wished = dict(zip(wish, values, strict=False))
        yield from sample_all(studios, wished, *values[len(wished) :])

    shown = [component for panel in panels for component in panel]
    sampling = go.click(run, [*wish.values(), *start], shown, **event)
    stop.click(None, cancels=[sampling], api_visibility="private")


def lay_result(name: str, studio: Studio) -> tuple[gr.Markdown, gr.Image]:
    """Lay out the progress and the picture of one prior."""
    with gr.Column(min_width=260):
        gr.Markdown(f"### {name}\n{studio.title}")
        progress = gr.Markdown("", elem_classes="done")
        image = gr.Image(
            height=320,
            show_label=False,
            alt_text="Sample",
            interactive=False,
            format="png",
            buttons=["download"],
            elem_classes="pixels",
        )
    return progress, image


def lay_wish(studios: list[Studio]) -> dict[str, Any]:
    """Lay out the controls of a `Wish`, by name."""
    kinds = {studio.kind for studio in studios}
    has_class = "class" in kinds
    number: dict[str, Any] = {"precision": 0, "min_width": 100}
    wish: dict[str, Any] = {}
    wish["label"] = gr.Number(0, label="Class", minimum=0, visible=has_class, **number)
    wish["temperature"] = gr.Slider(0.05, 2, 1, step=0.05, label="Temperature")
    wish["guidance"] = gr.Slider(0, 8, 1, step=0.25, label="Guidance", visible=has_class)
    with gr.Row():
        wish["top_k"] = gr.Number(100, label="Top k", minimum=1, **number)
        wish["seed"] = gr.Number(0, label="Seed", minimum=0, elem_id="seed", **number)
    wish["greedy"] = gr.Checkbox(False, label="Take the likeliest token")
    wish["every"] = gr.Number(32, label="Sites from picture to picture", minimum=1, **number)
    info = "1 is the size trained on; more samples through a sliding window"
    wish["scale"] = gr.Slider(0.25, 8, 1, step=0.25, label="Size", info=info)
    info = "share of the picture below, where it is not painted over"
    start = 0.0 if "image" in kinds else 1.0
    wish["known"] = gr.Slider(0, 1, start, step=0.05, label="Keep from the top", info=info)
    return wish


def lay_start(studio: Studio, scale: gr.Slider, event: Mapping[str, Any]) -> list[Any]:
    """Lay out what sampling starts from: an editor, and data set and number of an example.

    Args:
        studio: The prior, whose data sets are offered.
        scale: Control of the size.
        event: Options of all events.
    """
    splits = sorted(studio.datasets)
    with gr.Row(visible=bool(splits)):
        chosen = splits[0] if studio.kind == "image" else None
        split = gr.Dropdown(splits, value=chosen, label="Data set", elem_id="split")
        index = gr.Number(0, label="Example", minimum=0, precision=0, elem_id="index")
    given = gr.Gallery(
        show_label=False, columns=3, height=300, visible=False, interactive=False, elem_id="given"
    )
    gr.Markdown("To complete a picture, drop it here and paint over what is to be sampled anew.")
    editor = gr.ImageEditor(
        type="pil",
        show_label=False,
        sources=["upload", "clipboard"],
        transforms=(),
        layers=False,
        brush=gr.Brush(colors=[COLOUR], color_mode="fixed", default_size=24),
        format="png",
        buttons=[],
        elem_id="editor",
    )

    def load(split: str | None, index: int, scale: float) -> tuple[Any, Any]:
        if split is None:
            return gr.skip(), gr.skip()
        pictures = example_of(studio, split, index, scale)
        shown = gr.Gallery([(picture, name) for name, picture in pictures.items()], visible=True)
        return shown, pictures["image"]

    if splits:  # at the start, and when one changes
        gr.on(None, load, [split, index, scale], [given, editor], **event)
    return [editor, split, index]


def example_of(studio: Studio, split: str, index: int, scale: float) -> dict[str, Image.Image]:
    """Return the pictures of an example.

    Raises:
        gr.Error: There is none.
    """
    try:
        return studio.show(studio.example(split, index, scale))
    except ValueError as error:
        raise gr.Error(str(error)) from error


def read_editor(value: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """Return the picture in an editor, RGB, and what is painted over it, L; None for nothing."""
    background = (value or {}).get("background")
    if background is None or background.convert("RGBA").getchannel("A").getextrema()[1] == 0:
        return None, None
    painted = Image.new("L", background.size)
    for layer in (value or {}).get("layers") or []:
        alpha = layer.convert("RGBA").getchannel("A").resize(background.size)
        painted = ImageChops.lighter(painted, alpha)
    return background.convert("RGB"), painted


def sample_all(
    studios: list[Studio],
    wish: Mapping[str, Any],
    edited: Mapping[str, Any] | None,
    split: str | None,
    index: int | None,
) -> Iterator[list[Any]]:
    """Sample with each prior in turn; yield what all panels show after each step.

    Args:
        studios: The priors.
        wish: Fields of the `Wish`.
        edited: Value of the editor.
        split: Data set of the example, if any.
        index: Its number.

    Raises:
        gr.Error: A value is out of range, or the prior cannot do what is asked.
    """
    shown: list[Any] = ["", None] * len(studios)
    try:
        picture, painted = read_editor(edited)
        for place, studio in enumerate(studios):
            example = (split or "", index or 0)
            for step in studio.sample(Wish(**wish), picture, painted, example):
                shown[2 * place : 2 * place + 2] = [text_of(step), step.picture]
                yield [*shown]
    except ValueError as error:
        raise gr.Error(str(error)) from error


def text_of(step: Step) -> str:
    """Return the progress of a step in words."""
    return f"{step.done} of {step.of} sites"
