"""Training steps of the original's modules in a plain loop: a worker of benchmarks/training.py.

python benchmarks/original_step.py FOLDER, with the folder of the package
taming-transformers-rom1504 first in PYTHONPATH. Nothing of this project is imported.
"""

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from workers import Server

folder = Path(sys.argv[1])  # of the setting and the weights
setting = json.loads((folder / "setting.json").read_text())
networks = importlib.import_module("taming.modules.diffusionmodules.model")
quantizers = importlib.import_module("taming.modules.vqvae.quantize")
losses: Any = importlib.import_module("taming.modules.losses.vqperceptual")
losses.LPIPS = nn.Identity  # its weights would be downloaded, and its factor is 0

torch.set_num_threads(1)
channels, width = setting["ddconfig"]["z_channels"], setting["embed_dim"]
model = nn.ModuleDict(
    {
        "encoder": networks.Encoder(**setting["ddconfig"]),
        "decoder": networks.Decoder(**setting["ddconfig"]),
        "quantize": quantizers.VectorQuantizer2(setting["n_embed"], width, beta=0.25),
        "quant_conv": nn.Conv2d(channels, width, 1),
        "post_quant_conv": nn.Conv2d(width, channels, 1),
        "loss": losses.VQLPIPSWithDiscriminator(**setting["loss"]),
    }
)
model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
model.to(setting["device"])
loss: Any = model["loss"]
generator = [p for name, p in model.named_parameters() if not name.startswith("loss.")]
rate, betas = setting["learning_rate"], (0.5, 0.9)
optimizers = [
    torch.optim.Adam(generator, rate, betas=betas),
    torch.optim.Adam(loss.discriminator.parameters(), rate, betas=betas),
]
torch.manual_seed(0)
images = torch.rand(setting["batch_size"], 3, *[setting["ddconfig"]["resolution"]] * 2) * 2 - 1
images = images.to(setting["device"])
last_layer = model.get_parameter("decoder.conv_out.weight")


def step(steps: int) -> float:
    """Step both optimizers, each with a forward pass of its own as in the original.

    Returns:
        The generator's loss.
    """
    values = []
    for number, optimizer in enumerate(optimizers):
        z = model["quant_conv"](model["encoder"](images))
        z_q, quant_loss, _ = model["quantize"](z)
        rebuilt = model["decoder"](model["post_quant_conv"](z_q))
        value, _ = loss(quant_loss, images, rebuilt, number, steps, last_layer=last_layer)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    return values[0]


server, report = Server(), {}
for number in itertools.count():
    server.turn(**report)
    report = {"loss": step(number)}
