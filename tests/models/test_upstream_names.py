"""Every model and module that configurations of the original name is here, with its arguments."""

import pytest

from taming.signature import signature_of
from taming.util import get_obj_from_str

BASE = "ddconfig lossconfig n_embed embed_dim ckpt_path ignore_keys image_key"
VQ = f"{BASE} colorize_nlabels"
DD = (
    "ch out_ch ch_mult num_res_blocks attn_resolutions dropout resamp_with_conv in_channels "
    "resolution"
)
GPT = "vocab_size block_size n_layer n_head n_embd embd_pdrop resid_pdrop attn_pdrop n_unmasked"
REMAP = "remap unknown_index"
CLASSES = {
    "models.vqgan.VQModel": f"{VQ} monitor remap sane_index_shape",
    "models.vqgan.VQSegmentationModel": f"n_labels {BASE} monitor remap sane_index_shape",
    "models.vqgan.VQNoDiscModel": VQ,
    "models.vqgan.GumbelVQ": f"{VQ} temperature_scheduler_config kl_weight monitor remap",
    "models.vqgan.EMAVQ": f"{VQ} monitor remap sane_index_shape",
    "models.cond_transformer.Net2NetTransformer": (
        "transformer_config first_stage_config cond_stage_config permuter_config ckpt_path "
        "ignore_keys first_stage_key cond_stage_key downsample_cond_size pkeep sos_token "
        "unconditional"
    ),
    "models.dummy_cond_stage.DummyCondStage": "conditional_key",
    "modules.vqvae.quantize.VectorQuantizer": "n_e e_dim beta",
    "modules.vqvae.quantize.VectorQuantizer2": f"n_e e_dim beta {REMAP} sane_index_shape legacy",
    "modules.vqvae.quantize.GumbelQuantize": (
        "num_hiddens embedding_dim n_embed straight_through kl_weight temp_init use_vqinterface "
        + REMAP
    ),
    "modules.vqvae.quantize.EmbeddingEMA": "num_tokens codebook_dim decay eps",
    "modules.vqvae.quantize.EMAVectorQuantizer": f"n_embed embedding_dim beta decay eps {REMAP}",
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
    "modules.diffusionmodules.model.Encoder": f"{DD} z_channels double_z",
    "modules.diffusionmodules.model.Decoder": f"{DD} z_channels give_pre_end",
    "modules.diffusionmodules.model.Model": f"{DD} use_timestep",
    "modules.diffusionmodules.model.VUNet": f"{DD} c_channels z_channels use_timestep",
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
    "modules.transformer.mingpt.GPT": GPT,
    "modules.transformer.mingpt.CodeGPT": f"{GPT} in_channels",
    "modules.transformer.mingpt.DummyGPT": "add_value",
    "modules.transformer.mingpt.GPTConfig": GPT,
    "modules.transformer.mingpt.GPT1Config": GPT,
    "modules.transformer.mingpt.KMeans": "ncluster nc niter",
    "modules.transformer.mingpt.sample": "model x steps temperature sample top_k",
    "modules.transformer.mingpt.sample_with_past": (
        "x model steps temperature sample_logits top_k top_p callback"
    ),
    "modules.transformer.permuter.Identity": "",
    **{
        f"modules.transformer.permuter.{name}": "H W"
        for name in ("Subsample", "ZCurve", "SpiralOut", "SpiralIn", "Random", "AlternateParsing")
    },
}
METHODS = {
    "models.vqgan.VQModel": (
        "encode decode decode_code forward get_input get_last_layer to_rgb log_images"
    ),
    "models.vqgan.GumbelVQ": "encode_to_prequant",
    "models.cond_transformer.Net2NetTransformer": (
        "encode_to_z encode_to_c decode_to_img sample top_k_logits get_input get_xc log_images"
    ),
    "modules.transformer.mingpt.GPT": "forward forward_with_past get_block_size",
    "modules.vqvae.quantize.VectorQuantizer2": "get_codebook_entry remap_to_used unmap_to_all",
    "modules.vqvae.quantize.GumbelQuantize": "get_codebook_entry remap_to_used unmap_to_all",
    "modules.vqvae.quantize.EMAVectorQuantizer": "get_codebook_entry remap_to_used unmap_to_all",
    "modules.vqvae.quantize.VectorQuantizer": "get_codebook_entry",
}


@pytest.mark.parametrize("name", list(CLASSES))
def test_is_here_with_its_arguments(name: str) -> None:
    assert callable(get_obj_from_str(f"taming.{name}"))
    signature = signature_of(f"taming.{name}")
    assert not set(CLASSES[name].split()) - set(signature.names)
    # An open signature would let misspelt arguments pass until the model is built.
    assert not (signature.open and CLASSES[name])


@pytest.mark.parametrize("name", list(METHODS))
def test_has_its_methods(name: str) -> None:
    cls = get_obj_from_str(f"taming.{name}")
    assert not [method for method in METHODS[name].split() if not callable(getattr(cls, method))]
