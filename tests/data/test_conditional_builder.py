"""Token sequences of objects: round trips up to the grid, flags, crops, pictures."""

import pytest
import torch

from taming.data.annotated_objects_dataset import BUILDERS
from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import (
    ObjectsCenterPointsConditionalBuilder,
)
from taming.data.conditional_builder.utils import (
    FULL_CROP,
    absolute_bbox,
    additional_parameters_string,
    filter_annotations,
    horizontally_flip_bbox,
    intersection_area,
    rescale_annotations,
)
from taming.data.helper_types import Annotation

HALF_STEP = 0.5 / 15  # of a grid of 16 x 16 points
CROP = (0.25, 0.125, 0.5, 0.75)


def build(name="objects_bbox", **options):
    defaults = {
        "no_object_classes": 10,
        "no_max_objects": 5,
        "no_tokens": 256,
        "encode_crop": False,
        "use_group_parameter": False,
        "use_additional_parameters": False,
    }
    return BUILDERS[name](**{**defaults, **options})


def thing(category, bbox, **flags):
    return Annotation(
        area=bbox[2] * bbox[3],
        image_id="1",
        bbox=bbox,
        category_no=category,
        category_id=str(category),
        **flags,
    )


def random_things(count, least=0.0):
    corners = torch.rand(count, 2, 2).sort(1).values
    return [
        thing(n, (a[0].item(), a[1].item(), *(b - a).clamp(min=least).tolist()))
        for n, (a, b) in enumerate(corners)
    ]


def close(box, other, tolerance=HALF_STEP + 1e-9):
    """Return True if the corners agree up to half a step of the grid."""
    corners = [(b[0], b[1], b[0] + b[2], b[1] + b[3]) for b in (box, other)]
    return all(abs(x - y) <= tolerance for x, y in zip(*corners, strict=True))


def test_lengths_of_sequences():
    scene = {"no_max_objects": 30, "no_tokens": 8192, "encode_crop": True}
    assert build(**scene).embedding_dim == 92
    assert build("objects_center_points", **scene).embedding_dim == 62
    assert build(**scene).no_sections == 90


@pytest.mark.parametrize("name", BUILDERS)
def test_points_of_the_grid_round_trip(name):
    builder = build(name)
    for token in range(256):
        assert builder.tokenize_coordinates(*builder.coordinates_from_token(token)) == token
    assert builder.tokenize_coordinates(1, 0) == 15


@pytest.mark.parametrize("encode_crop", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_boxes_round_trip_up_to_the_grid(encode_crop, flip):
    builder = build(encode_crop=encode_crop)
    for _ in range(20):
        things = random_things(4)
        tokens = builder.build(things, horizontal_flip=flip)
        assert (tokens.shape, tokens.dtype) == ((builder.embedding_dim,), torch.int64)
        objects, crop = builder.inverse_build(tokens)
        assert sorted(category for category, _ in objects) == [0, 1, 2, 3]
        for category, box in objects:
            expected = things[category].bbox
            assert close(box, horizontally_flip_bbox(expected) if flip else expected)
        assert crop == (FULL_CROP if encode_crop else None)


@pytest.mark.parametrize("flip", [False, True])
def test_centres_round_trip_up_to_the_grid(flip):
    builder = build("objects_center_points", encode_crop=True)
    things = random_things(5)
    objects, _ = builder.inverse_build(builder.build(things, horizontal_flip=flip))
    assert len(objects) == 5
    for category, (x, y) in objects:
        left, top, width, height = things[category].bbox
        centre = left + width / 2
        assert abs(x - (1 - centre if flip else centre)) <= HALF_STEP + 1e-9
        assert abs(y - (top + height / 2)) <= HALF_STEP + 1e-9


@pytest.mark.parametrize("flip", [False, True])
def test_without_the_crop_boxes_are_what_the_crop_shows_of_them(flip):
    builder = build()
    left, top, width, height = CROP
    for _ in range(20):
        things = random_things(5, least=0.01)
        objects, crop = builder.inverse_build(builder.build(things, CROP, flip))
        assert crop is None
        assert {n for n, _ in objects} == {
            n for n, a in enumerate(things) if intersection_area(a.bbox, CROP) > 0
        }
        for category, box in objects:
            x, y, w, h = things[category].bbox
            begin = max(x, left), max(y, top)
            end = min(x + w, left + width), min(y + h, top + height)
            shown = ((begin[0] - left) / width, (begin[1] - top) / height)
            shown += ((end[0] - begin[0]) / width, (end[1] - begin[1]) / height)
            assert close(box, horizontally_flip_bbox(shown) if flip else shown)


@pytest.mark.parametrize("flip", [False, True])
def test_the_crop_round_trips_and_leaves_boxes_in_the_image(flip):
    builder = build(encode_crop=True)
    inside = thing(3, (0.3, 0.3, 0.6, 0.6))
    outside = thing(4, (0.8, 0.0, 0.1, 0.1))
    ((category, box),), crop = builder.inverse_build(builder.build([inside, outside], CROP, flip))
    assert category == 3
    assert close(box, horizontally_flip_bbox(inside.bbox) if flip else inside.bbox)
    assert crop is not None and close(crop, horizontally_flip_bbox(CROP) if flip else CROP)


@pytest.mark.parametrize("name", BUILDERS)
def test_flags_round_trip_where_they_are_used(name):
    special = {"is_group_of": True, "is_occluded": False, "is_depiction": True, "is_inside": True}
    builder = build(name, use_group_parameter=True, use_additional_parameters=True)
    annotation = builder.representation_to_annotation(
        builder.object_representation(thing(7, FULL_CROP, **special))
    )
    assert annotation.category_no == 7
    assert {flag: getattr(annotation, flag) for flag in special} == special
    assert build(name).object_representation(thing(7, FULL_CROP, **special)) == 7
    group = build(name, use_group_parameter=True)
    assert group.object_representation(thing(7, FULL_CROP, **special)) == 17
    assert group.object_representation(thing(7, FULL_CROP)) == 7


def test_objects_come_in_random_order_and_the_annotations_stay_as_they_were():
    builder, things = build(), random_things(5)
    before = list(things)
    orders = {
        tuple(n for n, _ in builder.inverse_build(builder.build(things))[0]) for _ in range(20)
    }
    assert len(orders) > 5
    assert things == before
    torch.manual_seed(3)
    first = builder.build(things)
    torch.manual_seed(3)
    assert torch.equal(builder.build(things), first)


def test_unused_places_hold_the_last_token_and_too_many_objects_are_dropped(caplog):
    builder = build()
    assert builder.build([]).tolist() == [255] * 15
    tokens = builder.build(random_things(7))
    assert {n for n, _ in builder.inverse_build(tokens)[0]} == {0, 1, 2, 3, 4}
    assert "5 of 7 objects" in caplog.text


def test_invalid_vocabularies_and_lengths_are_refused():
    with pytest.raises(ValueError, match="no_tokens .*256, .*128 categories .*257"):
        build(no_object_classes=128, use_group_parameter=True)
    assert build(no_object_classes=127, use_group_parameter=True).none == 255
    with pytest.raises(ValueError, match=r"15 tokens, .*\(14,\)"):
        build().inverse_build(torch.zeros(14, dtype=torch.long))


@pytest.mark.parametrize("name", BUILDERS)
def test_plots_show_objects_labels_and_crop(name):
    builder = build(name, encode_crop=True)
    asked = []

    def label(number):
        asked.append(number)
        return f"thing {number}"

    tokens = builder.build([thing(3, (0.25, 0.25, 0.5, 0.5))], CROP)
    plot = builder.plot(tokens, label, (96, 64))
    assert (plot.shape, plot.dtype) == ((3, 64, 96), torch.float32)
    assert -1 <= plot.min() < -0.9 and plot.max() == 1
    assert asked == [3]
    colours = {tuple(c.tolist()) for c in ((plot + 1) * 127.5).round().long().flatten(1).T}
    assert {(31, 119, 180), (63, 63, 63), (255, 255, 255)} <= colours
    empty = builder.plot(builder.build([]), label, (96, 64), line_width=0)
    assert (empty == 1).float().mean() > 0.9


def test_geometry_of_boxes():
    assert intersection_area((0, 0, 0.5, 0.5), (0.25, 0.25, 1, 1)) == 0.0625
    assert intersection_area((0, 0, 0.5, 0.5), (0.5, 0, 0.5, 0.5)) == 0
    assert absolute_bbox((0.25, 0.5, 0.5, 0.5), 8, 10) == (2, 5, 6, 10)
    assert horizontally_flip_bbox((0.125, 0.5, 0.25, 0.5)) == (0.625, 0.5, 0.25, 0.5)
    touching = thing(0, (0.75, 0, 0.25, 1))
    assert filter_annotations([touching], CROP) == []
    (rescaled,) = rescale_annotations([thing(0, (0, 0, 1, 0.5))], CROP, flip=False)
    assert rescaled.bbox == (0, 0, 1, 0.5)


def test_flags_are_named():
    special = thing(0, FULL_CROP, is_group_of=True, is_depiction=True)
    assert additional_parameters_string(special) == "(g,d)"
    assert additional_parameters_string(special, short=False) == "(group,depiction)"
    assert additional_parameters_string(thing(0, FULL_CROP)) == ""


def test_both_builders_have_their_own_names():
    assert set(BUILDERS.values()) == {
        ObjectsBoundingBoxConditionalBuilder,
        ObjectsCenterPointsConditionalBuilder,
    }
