"""Sizes of the tokenizer that several benchmarks build."""

from __future__ import annotations

from typing import Any

SETTING: dict[str, Any] = {
    "ddconfig": {
        "double_z": False,
        "z_channels": 64,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 64,
        "ch_mult": [1, 1, 2, 2],
        "num_res_blocks": 2,
        "attn_resolutions": [8],
        "dropout": 0.0,
    },
    "n_embed": 1024,
    "embed_dim": 64,
    "batch_size": 4,
    "learning_rate": 1e-5,
    "loss": {"disc_start": 0, "perceptual_weight": 0.0},
}
ON_GPU: dict[str, Any] = {
    "ddconfig": SETTING["ddconfig"]
    | {"z_channels": 256, "resolution": 256, "ch": 128, "ch_mult": [1, 1, 2, 2, 4]}
    | {"attn_resolutions": [16]},
    "n_embed": 16384,
    "embed_dim": 256,
    "batch_size": 8,
}
