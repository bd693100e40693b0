"""Chooses what a run trains on: devices, and how several of them train together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

logger = logging.getLogger(__name__)


def choose_strategy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the devices, and how several processes train together.

    Frozen stages and a GAN's two optimizers leave parameters without gradient, which plain DDP
    does not survive, so DDP always looks for unused parameters. It talks through gloo on CPUs, and
    on GPUs where there is no NCCL, such as on Windows.

    Args:
        arguments: Trainer arguments.

    Returns:
        Trainer arguments to replace; empty if they are right as they are.

    Raises:
        ValueError: More GPUs are asked for than are visible.
    """
    accelerator = arguments.get("accelerator", "auto")
    devices = _parse_devices(arguments.get("devices", "auto"))
    if accelerator == "cpu" and isinstance(devices, list):
        # The run that is resumed, or another file, may have named GPUs.
        logger.info("accelerator cpu: devices %s are numbers of GPUs and play no part", devices)
        return {"devices": "auto"} | choose_strategy({**arguments, "devices": "auto"})
    strategy = arguments.get("strategy", "auto")
    several = _count_devices(accelerator, devices) * arguments.get("num_nodes", 1) > 1
    if strategy == "ddp" or (strategy == "auto" and several):
        logger.info("strategy %s: DDP that allows parameters without gradient", strategy)
        if torch.distributed.is_nccl_available():
            return {"strategy": "ddp_find_unused_parameters_true"}
        gloo = DDPStrategy(find_unused_parameters=True, process_group_backend="gloo")
        return {"strategy": gloo}
    return {}


def _parse_devices(devices: Any) -> Any:
    """Read what a string of devices means: ``"0,1"`` numbers them, ``"2"`` counts them."""
    if isinstance(devices, str) and "," in devices:
        return [int(number) for number in devices.split(",") if number.strip()]
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        return int(devices)
    return devices


def _count_devices(accelerator: str, devices: Any) -> int:
    visible = torch.cuda.device_count() or int(torch.backends.mps.is_available())
    wants_gpu = accelerator in ("gpu", "cuda") or (
        accelerator == "auto" and isinstance(devices, list)
    )
    if wants_gpu:
        highest = max(devices) + 1 if isinstance(devices, list) else devices
        if visible == 0 or (isinstance(highest, int) and highest > visible):
            instead = f"--gpus with numbers below {visible}, or " if visible else ""
            raise ValueError(
                f"GPU devices {devices} are asked for, here or by the run that is resumed, but "
                f"{visible} GPUs are visible here; pass {instead}--accelerator cpu (or --gpus 0) "
                "to train on the CPU"
            )
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    return visible if wants_gpu or (accelerator == "auto" and visible) else 1
