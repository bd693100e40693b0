"""The original as its users have it: configurations, targets, recorded outputs, checkpoints."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor

from taming.util import instantiate_from_config

CONFIGS = [
    "coco_cond_stage.yaml",
    "coco_scene_images_transformer.yaml",
    "custom_vqgan.yaml",
    "drin_transformer.yaml",
    "faceshq_transformer.yaml",
    "faceshq_vqgan.yaml",
    "imagenet_vqgan.yaml",
    "imagenetdepth_vqgan.yaml",
    "open_images_scene_images_transformer.yaml",
    "sflckr_cond_stage.yaml",
]

SCRIPTS = [
    "extract_depth",
    "extract_segmentation",
    "extract_submodel",
    "make_samples",
    "make_scene_samples",
    "sample_conditional",
    "sample_fast",
]

# Configurations of two published checkpoints, which no file of the original holds.
_SIZES = {
    "double_z": False,
    "z_channels": 256,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "num_res_blocks": 2,
    "dropout": 0.0,
}
_F8 = {**_SIZES, "ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}
_F16 = {**_SIZES, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}
_NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}
PUBLISHED = {
    "gumbel_f8 (published checkpoint)": {
        "target": "taming.models.vqgan.GumbelVQ",
        "params": {
            "ddconfig": _F8,
            "lossconfig": _NO_LOSS,
            "n_embed": 8192,
            "embed_dim": 256,
            "kl_weight": 1e-8,
            "temperature_scheduler_config": {
                "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
                "params": {
                    "warm_up_steps": 0,
                    "max_decay_steps": 1000001,
                    "lr_start": 0.9,
                    "lr_max": 0.9,
                    "lr_min": 1e-6,
                },
            },
        },
    },
    "cin_transformer (published checkpoint)": {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "cond_stage_key": "class_label",
            "first_stage_config": {
                "target": "taming.models.vqgan.VQModel",
                "params": {
                    "ddconfig": _F16,
                    "lossconfig": _NO_LOSS,
                    "n_embed": 16384,
                    "embed_dim": 256,
                },
            },
            "cond_stage_config": {
                "target": "taming.modules.util.Labelator",
                "params": {"n_classes": 1000},
            },
            "transformer_config": {
                "target": "taming.modules.transformer.mingpt.GPT",
                "params": {
                    "vocab_size": 16384,
                    "block_size": 256,
                    "n_layer": 48,
                    "n_head": 16,
                    "n_embd": 1536,
                },
            },
        },
    },
}

_VQMODEL = (
    "ddconfig lossconfig n_embed embed_dim ckpt_path ignore_keys image_key colorize_nlabels "
    "monitor remap sane_index_shape"
)
_NO_DISC = "ddconfig lossconfig n_embed embed_dim ckpt_path ignore_keys image_key colorize_nlabels"
_DDCONFIG = (
    "ch out_ch ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv in_channels "
    "resolution"
)
_GPT = "vocab_size block_size n_layer n_head n_embd embd_pdrop resid_pdrop attn_pdrop n_unmasked"
_OBJECTS = (
    "data_path split keys target_image_size min_object_area min_objects_per_image "
    "max_objects_per_image crop_method random_flip no_tokens use_group_parameter encode_crop "
    "category_allow_list_target category_mapping_target no_object_classes"
)
_BUILDER = (
    "no_object_classes no_max_objects no_tokens encode_crop use_group_parameter "
    "use_additional_parameters"
)
_COCO = "size onehot_segmentation use_stuffthing crop_size force_no_crop given_files"
_FACES = "size keys crop_size coord"
_EXAMPLES = "size random_crop interpolation"
_ADE20K = "config size random_crop interpolation crop_size"
_DEPTH = "random_crop sub_indices size crop_size root"
_SCALE = "size crop_size random_crop up_factor hr_factor keep_mode"

_MODELS = {
    "models.vqgan.VQModel": _VQMODEL,
    "models.vqgan.VQSegmentationModel": (
        "n_labels ddconfig lossconfig n_embed embed_dim ckpt_path ignore_keys image_key monitor "
        "remap sane_index_shape"
    ),
    "models.vqgan.VQNoDiscModel": _NO_DISC,
    "models.vqgan.GumbelVQ": f"{_NO_DISC} temperature_scheduler_config monitor kl_weight remap",
    "models.vqgan.EMAVQ": _VQMODEL,
    "models.cond_transformer.Net2NetTransformer": (
        "transformer_config first_stage_config cond_stage_config permuter_config ckpt_path "
        "ignore_keys first_stage_key cond_stage_key downsample_cond_size pkeep sos_token "
        "unconditional"
    ),
    "models.dummy_cond_stage.DummyCondStage": "conditional_key",
}

_MODULES = {
    "modules.vqvae.quantize.VectorQuantizer": "n_e e_dim beta",
    "modules.vqvae.quantize.VectorQuantizer2": (
        "n_e e_dim beta remap unknown_index sane_index_shape legacy"
    ),
    "modules.vqvae.quantize.GumbelQuantize": (
        "num_hiddens embedding_dim n_embed straight_through kl_weight temp_init use_vqinterface "
        "remap unknown_index"
    ),
    "modules.vqvae.quantize.EmbeddingEMA": "num_tokens codebook_dim decay eps",
    "modules.vqvae.quantize.EMAVectorQuantizer": (
        "n_embed embedding_dim beta decay eps remap unknown_index"
    ),
    "modules.losses.DummyLoss": "",
    "modules.losses.vqperceptual.DummyLoss": "",
    "modules.losses.vqperceptual.VQLPIPSWithDiscriminator": (
        "disc_start codebook_weight pixelloss_weight disc_num_layers disc_in_channels disc_factor "
        "disc_weight perceptual_weight use_actnorm disc_conditional disc_ndf disc_loss"
    ),
    "modules.losses.vqperceptual.adopt_weight": "weight global_step threshold value",
    "modules.losses.vqperceptual.hinge_d_loss": "logits_real logits_fake",
    "modules.losses.vqperceptual.vanilla_d_loss": "logits_real logits_fake",
    "modules.losses.segmentation.BCELoss": "",
    "modules.losses.segmentation.BCELossWithQuant": "codebook_weight",
    "modules.losses.lpips.LPIPS": "use_dropout",
    "modules.discriminator.model.NLayerDiscriminator": "input_nc ndf n_layers use_actnorm",
    "modules.discriminator.model.weights_init": "",
    "modules.diffusionmodules.model.Encoder": f"{_DDCONFIG} z_channels double_z",
    "modules.diffusionmodules.model.Decoder": f"{_DDCONFIG} z_channels give_pre_end",
    "modules.diffusionmodules.model.Model": f"{_DDCONFIG} use_timestep",
    "modules.diffusionmodules.model.VUNet": f"{_DDCONFIG} c_channels z_channels use_timestep",
    "modules.diffusionmodules.model.SimpleDecoder": "in_channels out_channels",
    "modules.diffusionmodules.model.UpsampleDecoder": (
        "in_channels out_channels ch num_res_blocks resolution ch_mult dropout"
    ),
    "modules.util.ActNorm": "num_features",
    "modules.util.Labelator": "n_classes quantize_interface",
    "modules.util.SOSProvider": "sos_token quantize_interface",
    "modules.util.AbstractEncoder": "",
    "modules.util.count_params": "",
    "modules.misc.coord.CoordStage": "n_embed down_factor",
    "modules.transformer.mingpt.GPT": _GPT,
    "modules.transformer.mingpt.CodeGPT": f"{_GPT} in_channels",
    "modules.transformer.mingpt.DummyGPT": "add_value",
    "modules.transformer.mingpt.GPTConfig": _GPT,
    "modules.transformer.mingpt.GPT1Config": _GPT,
    "modules.transformer.mingpt.KMeans": "ncluster nc niter",
    "modules.transformer.mingpt.sample": "x model steps temperature sample top_k",
    "modules.transformer.mingpt.sample_with_past": (
        "x model steps temperature sample_logits top_k top_p callback"
    ),
    "modules.transformer.permuter.Identity": "",
    "modules.transformer.permuter.Subsample": "H W",
    "modules.transformer.permuter.ZCurve": "H W",
    "modules.transformer.permuter.SpiralOut": "H W",
    "modules.transformer.permuter.SpiralIn": "H W",
    "modules.transformer.permuter.Random": "H W",
    "modules.transformer.permuter.AlternateParsing": "H W",
}

_DATA = {
    "data.base.ImagePaths": "paths size random_crop labels",
    "data.base.NumpyPaths": "paths size random_crop labels",
    "data.base.ConcatDatasetWithIndex": "",
    "data.custom.CustomTrain": "size training_images_list_file",
    "data.custom.CustomTest": "size test_images_list_file",
    "data.faceshq.CelebAHQTrain": "size keys",
    "data.faceshq.CelebAHQValidation": "size keys",
    "data.faceshq.FFHQTrain": "size keys",
    "data.faceshq.FFHQValidation": "size keys",
    "data.faceshq.FacesHQTrain": _FACES,
    "data.faceshq.FacesHQValidation": _FACES,
    "data.imagenet.ImageNetTrain": "config",
    "data.imagenet.ImageNetValidation": "config",
    "data.imagenet.ImageNetTrainWithDepth": _DEPTH,
    "data.imagenet.ImageNetValidationWithDepth": _DEPTH,
    "data.imagenet.RINTrainWithDepth": "size random_crop crop_size root config",
    "data.imagenet.RINValidationWithDepth": "size random_crop crop_size root config",
    "data.imagenet.DRINExamples": "",
    "data.imagenet.ImageNetScaleTrain": _SCALE,
    "data.imagenet.ImageNetScaleValidation": _SCALE,
    "data.imagenet.ImageNetEdgesTrain": "size crop_size random_crop",
    "data.imagenet.ImageNetEdgesValidation": "size crop_size random_crop",
    "data.imagenet.str_to_indices": "string",
    "data.imagenet.give_synsets_from_indices": "indices path_to_yaml",
    "data.coco.Examples": _EXAMPLES,
    "data.coco.CocoImagesAndCaptionsTrain": _COCO,
    "data.coco.CocoImagesAndCaptionsValidation": _COCO,
    "data.ade20k.Examples": _EXAMPLES,
    "data.ade20k.ADE20kTrain": _ADE20K,
    "data.ade20k.ADE20kValidation": _ADE20K,
    "data.sflckr.Examples": _EXAMPLES,
    "data.sflckr.SegmentationBase": (
        "data_csv data_root segmentation_root size random_crop interpolation n_labels "
        "shift_segmentation"
    ),
    "data.annotated_objects_coco.AnnotatedObjectsCoco": f"use_things use_stuff {_OBJECTS}",
    "data.annotated_objects_open_images.AnnotatedObjectsOpenImages": (
        f"use_additional_parameters {_OBJECTS}"
    ),
    "data.open_images_helper.open_images_unify_categories_for_coco": "",
    "data.open_images_helper.top_300_classes_plus_coco_compatibility": "",
    "data.conditional_builder.objects_bbox.ObjectsBoundingBoxConditionalBuilder": _BUILDER,
    "data.conditional_builder.objects_center_points.ObjectsCenterPointsConditionalBuilder": (
        _BUILDER
    ),
    "data.helper_types.Annotation": "area image_id bbox category_no category_id",
    "data.helper_types.Category": "id super_category name",
    "data.helper_types.ImageDescription": "id file_name original_size",
    "data.image_transforms.CenterCropReturnCoordinates": "size",
    "data.image_transforms.RandomCrop1dReturnCoordinates": "size",
    "data.image_transforms.Random2dCropReturnCoordinates": "min_size",
    "data.image_transforms.RandomHorizontalFlipReturn": "p",
    "data.image_transforms.convert_pil_to_tensor": "image",
    "data.utils.custom_collate": "batch",
}

_OTHERS = {
    "lr_scheduler.LambdaWarmUpCosineScheduler": (
        "warm_up_steps lr_min lr_max lr_start max_decay_steps verbosity_interval"
    ),
    "util.download": "url local_path chunk_size",
    "util.md5_hash": "path",
    "util.get_ckpt_path": "name root check",
    "util.retrieve": "key splitval default",
    "util.KeyNotFoundError": "",
    "util.instantiate_from_config": "",
    "util.get_obj_from_str": "string reload",
}

_MAIN = {
    "main.instantiate_from_config": "",
    "main.get_obj_from_str": "string reload",
    "main.DataModuleFromConfig": "batch_size train validation test wrap num_workers",
    "main.WrappedDataset": "dataset",
    "main.SetupCallback": "now logdir ckptdir cfgdir config lightning_config",
    "main.ImageLogger": "batch_frequency max_images clamp increase_log_steps",
    "main.LearningRateMonitor": "logging_interval",
}

# Target -> parameters that configurations and code may name.
TARGETS = {f"taming.{k}": v for k, v in (_MODELS | _MODULES | _DATA | _OTHERS).items()} | _MAIN


class Golden(NamedTuple):
    """A recorded model: its config, its parameters, its inputs and outputs by name."""

    config: dict[str, Any]
    parameters: dict[str, Tensor]
    io: dict[str, Tensor]

    def build(self) -> Any:
        """Build our model from the config and load the recorded parameters, strictly."""
        model = instantiate_from_config(self.config)
        model.load_state_dict(self.parameters, strict=True)
        return model.eval()


def load_golden(shared: Path, name: str) -> Golden:
    """Read ``upstream/golden/<name>.safetensors`` of the reference data."""
    with safe_open(shared / f"upstream/golden/{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return Golden(
        config,
        {key[6:]: value for key, value in tensors.items() if key.startswith("param/")},
        {key[3:]: value for key, value in tensors.items() if key.startswith("io/")},
    )


_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"


def save_as_lightning_1(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint as Lightning 1.0 did: a callback's class is the key of its state."""
    callback = type("ModelCheckpoint", (), {"__module__": _CALLBACK})
    module = types.ModuleType(_CALLBACK)
    vars(module)["ModelCheckpoint"] = callback
    state = {"monitor": "val/rec_loss", "best_model_score": torch.tensor(0.3)}
    state |= {"best_model_path": "a", "current_score": torch.tensor(0.4), "dirpath": "b"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:  # pickling looks the class up by its name
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, _CALLBACK, module)
        torch.save({"callbacks": {callback: state}, **content}, path)


def save_checkpoint(path: Path, weights: Mapping[str, Tensor], step: int) -> None:
    """Write weights, and what else Lightning 1.0 saved with them."""
    content = {
        "epoch": 4,
        "global_step": step,
        "pytorch-lightning_version": "1.0.8",
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 4.5e-6, "params": [0]}]}],
        "lr_schedulers": [],
        "state_dict": dict(weights),
    }
    save_as_lightning_1(path, content)


def save_run(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """Write ``configs/*-project.yaml`` and ``checkpoints/last.ckpt``, trained for 1234 steps."""
    save_checkpoint(folder / "checkpoints/last.ckpt", weights, step=1234)
    (folder / "configs").mkdir()
    OmegaConf.save(OmegaConf.create(dict(config)), folder / "configs/2021-01-01-project.yaml")
    return folder


def with_masks(weights: Mapping[str, Tensor], block_size: int) -> dict[str, Tensor]:
    """Add the causal masks that the original stored in every attention layer."""
    mask = torch.ones(1, 1, block_size, block_size).tril()
    layers = {k.removesuffix("key.weight") for k in weights if k.endswith("attn.key.weight")}
    return {**weights, **{f"{layer}mask": mask for layer in sorted(layers)}}
