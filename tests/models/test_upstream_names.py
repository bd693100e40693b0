"""Every model and module of the original has its public methods."""

from pathlib import Path

import pytest
import torch
from support.models import DDCONFIG, PLAIN

from taming.models.vqgan import VQModel
from taming.modules.vqvae.quantize import GumbelQuantize
from taming.util import get_obj_from_str

METHODS = {
    "models.vqgan.VQModel": (
        "encode decode decode_code forward get_input get_last_layer to_rgb log_images "
        "init_from_ckpt"
    ),
    "models.vqgan.GumbelVQ": "encode_to_prequant",
    "models.cond_transformer.Net2NetTransformer": (
        "encode_to_z encode_to_c decode_to_img sample top_k_logits get_input get_xc log_images "
        "init_from_ckpt"
    ),
    "modules.transformer.mingpt.GPT": "forward forward_with_past get_block_size",
    "modules.vqvae.quantize.VectorQuantizer2": "get_codebook_entry remap_to_used unmap_to_all",
    "modules.vqvae.quantize.GumbelQuantize": "get_codebook_entry remap_to_used unmap_to_all",
    "modules.vqvae.quantize.EMAVectorQuantizer": "get_codebook_entry remap_to_used unmap_to_all",
    "modules.vqvae.quantize.VectorQuantizer": "get_codebook_entry",
}


@pytest.mark.parametrize("name", list(METHODS))
def test_has_its_methods(name: str) -> None:
    cls = get_obj_from_str(f"taming.{name}")
    assert not [method for method in METHODS[name].split() if not callable(getattr(cls, method))]


def test_programs_that_guide_a_tokenizer_find_its_sizes() -> None:
    """Programs outside of this repository, such as VQGAN-CLIP, read these from a model."""
    model = VQModel({**DDCONFIG, "ch_mult": [1, 1, 1]}, PLAIN, 16, 4)
    assert model.encoder.num_resolutions == model.decoder.num_resolutions == 3
    assert (model.quantize.n_e, model.quantize.e_dim) == (16, 4)
    assert model.quantize.embedding.weight.shape == (16, 4)
    gumbel = GumbelQuantize(8, 4, 16)
    assert (gumbel.n_embed, gumbel.embedding_dim) == (16, 4)
    assert gumbel.embed.weight.shape == (16, 4)


def test_weights_are_read_by_the_original_name(tmp_path: Path) -> None:
    one, other = (VQModel(DDCONFIG, PLAIN, 16, 4) for _ in range(2))
    torch.save({"state_dict": one.state_dict()}, tmp_path / "one.ckpt")
    other.init_from_ckpt(str(tmp_path / "one.ckpt"), ignore_keys=["quantize"])
    assert torch.equal(one.quant_conv.weight, other.quant_conv.weight)
    assert not torch.equal(one.quantize.embedding.weight, other.quantize.embedding.weight)
