"""What configurations of the original name is there, with the parameters that they may set."""

import ast
from pathlib import Path

import pytest

import taming.data
from taming.config import get_obj_from_str
from taming.signature import signature_of

WITH_DEPTH = ["size", "random_crop", "crop_size"]
SCALE = ["size", "crop_size", "random_crop", "up_factor", "hr_factor", "keep_mode"]
COCO = ["size", "onehot_segmentation", "use_stuffthing", "crop_size", "force_no_crop"]
ADE20K = ["config", "size", "random_crop", "interpolation", "crop_size"]
SEGMENTATION = ["data_csv", "data_root", "segmentation_root", "n_labels", "shift_segmentation"]
FACES = ["size", "keys", "crop_size", "coord"]
EXAMPLES = ["size", "random_crop", "interpolation"]
OBJECTS = [
    *["data_path", "split", "keys", "target_image_size", "min_object_area", "crop_method"],
    *["min_objects_per_image", "max_objects_per_image", "random_flip", "no_tokens"],
    *["use_group_parameter", "encode_crop", "category_allow_list_target"],
    *["category_mapping_target", "no_object_classes"],
]
BUILDER = [
    *["no_object_classes", "no_max_objects", "no_tokens", "encode_crop"],
    *["use_group_parameter", "use_additional_parameters"],
]
TARGETS = {
    "base.ImagePaths": ["paths", "size", "random_crop", "labels"],
    "base.NumpyPaths": ["paths", "size", "random_crop", "labels"],
    "base.ConcatDatasetWithIndex": [],
    "custom.CustomTrain": ["size", "training_images_list_file"],
    "custom.CustomTest": ["size", "test_images_list_file"],
    "faceshq.CelebAHQTrain": ["size", "keys"],
    "faceshq.CelebAHQValidation": ["size", "keys"],
    "faceshq.FFHQTrain": ["size", "keys"],
    "faceshq.FFHQValidation": ["size", "keys"],
    "faceshq.FacesHQTrain": FACES,
    "faceshq.FacesHQValidation": FACES,
    "imagenet.ImageNetTrain": ["config"],
    "imagenet.ImageNetValidation": ["config"],
    "imagenet.ImageNetTrainWithDepth": [*WITH_DEPTH, "root", "sub_indices"],
    "imagenet.ImageNetValidationWithDepth": [*WITH_DEPTH, "root", "sub_indices"],
    "imagenet.RINTrainWithDepth": ["config", *WITH_DEPTH],
    "imagenet.RINValidationWithDepth": ["config", *WITH_DEPTH],
    "imagenet.DRINExamples": [],
    "imagenet.ImageNetScaleTrain": SCALE,
    "imagenet.ImageNetScaleValidation": SCALE,
    "imagenet.ImageNetEdgesTrain": ["size", "crop_size", "random_crop"],
    "imagenet.ImageNetEdgesValidation": ["size", "crop_size", "random_crop"],
    "coco.Examples": EXAMPLES,
    "coco.CocoImagesAndCaptionsTrain": COCO,
    "coco.CocoImagesAndCaptionsValidation": [*COCO, "given_files"],
    "ade20k.Examples": EXAMPLES,
    "ade20k.ADE20kTrain": ADE20K,
    "ade20k.ADE20kValidation": ADE20K,
    "sflckr.Examples": EXAMPLES,
    "sflckr.SegmentationBase": [*SEGMENTATION, *EXAMPLES],
    "annotated_objects_coco.AnnotatedObjectsCoco": [*OBJECTS, "use_things", "use_stuff"],
    "annotated_objects_open_images.AnnotatedObjectsOpenImages": [
        *OBJECTS,
        "use_additional_parameters",
    ],
    "conditional_builder.objects_bbox.ObjectsBoundingBoxConditionalBuilder": BUILDER,
    "conditional_builder.objects_center_points.ObjectsCenterPointsConditionalBuilder": BUILDER,
    "image_transforms.CenterCropReturnCoordinates": ["size"],
    "image_transforms.RandomCrop1dReturnCoordinates": ["size"],
    "image_transforms.Random2dCropReturnCoordinates": ["min_size"],
    "image_transforms.RandomHorizontalFlipReturn": ["p"],
    "utils.custom_collate": ["batch"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_take_the_originals_parameters(name):
    target = f"taming.data.{name}"
    assert callable(get_obj_from_str(target))
    signature = signature_of(target)
    assert set(TARGETS[name]) <= set(signature.names)
    assert not signature.open or name == "base.ConcatDatasetWithIndex"  # torch's own


def test_scikit_image_is_imported_only_where_edges_are_found():
    for file in Path(taming.data.__path__[0]).rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "skimage" not in ast.unparse(node), file
