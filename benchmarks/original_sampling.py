"""Sampling with the original's transformer: a worker of benchmarks/sampling.py.

python benchmarks/original_sampling.py FOLDER, with the folder of the package
taming-transformers-rom1504 first in PYTHONPATH. Nothing of this project is imported.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from workers import Server

folder = Path(sys.argv[1])  # of the setting and the weights
setting = json.loads((folder / "setting.json").read_text())
# It imports a filter that newer versions of transformers lack, and only needs it for top_k.
filters: Any = ModuleType("transformers")
filters.top_k_top_p_filtering = None
sys.modules["transformers"] = filters
mingpt = importlib.import_module("taming.modules.transformer.mingpt")

torch.set_num_threads(1)
model = mingpt.GPT(**setting["sizes"]).eval()
found = model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True), strict=False)
assert not found.unexpected_keys and all(key.endswith("attn.mask") for key in found.missing_keys)

server, report, greedy = Server(), {}, True
start = torch.zeros(setting["images"], 1, dtype=torch.int64)
while True:
    server.turn(**report)
    tokens = mingpt.sample_with_past(start, model, setting["steps"], sample_logits=not greedy)
    report, greedy = {"tokens": tokens.tolist()} if greedy else {}, False
