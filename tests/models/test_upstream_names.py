"""Every model and module of the original has its public methods."""

import pytest

from taming.util import get_obj_from_str

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


@pytest.mark.parametrize("name", list(METHODS))
def test_has_its_methods(name: str) -> None:
    cls = get_obj_from_str(f"taming.{name}")
    assert not [method for method in METHODS[name].split() if not callable(getattr(cls, method))]
