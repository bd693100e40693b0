"""The devices of a run: parsed and counted, and the strategy by which they train together."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

logger = logging.getLogger(__name__)

PROCESSES_PER_CORE = 4  # most training processes that a core of a CPU can serve


def choose_strategy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Trainer arguments to replace so that several processes train together.

    Frozen stages and the two optimizers of a GAN leave parameters without gradients, on which plain
    DDP fails, so DDP always looks for unused parameters. It communicates through gloo on CPUs, and
    on GPUs where NCCL is not available, such as on Windows.

    Raises:
        ValueError: More GPUs are asked for than are visible, or more processes than the CPU can
            serve; or the strategy does not start processes as a program.
    """
    accelerator = arguments.get("accelerator", "auto")
    devices = _parse_devices(arguments.get("devices", "auto"))
    if accelerator == "cpu" and isinstance(devices, list):
        # The run that is resumed, or another file, may have named GPUs.
        logger.info("accelerator cpu: devices %s are indices of GPUs and are ignored", devices)
        return {"devices": "auto"} | choose_strategy({**arguments, "devices": "auto"})
    strategy, nodes = arguments.get("strategy", "auto"), arguments.get("num_nodes", 1)
    if str(strategy).startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
        raise ValueError(f"strategy {strategy} is for notebooks; with main.py, use ddp")
    several = _count_devices(accelerator, devices) * nodes > 1
    if strategy != "ddp" and not (strategy == "auto" and several):
        return {}
    logger.info("strategy %s: DDP that allows parameters without gradients", strategy)
    if torch.distributed.is_nccl_available():
        return {"strategy": "ddp_find_unused_parameters_true"}
    return {"strategy": DDPStrategy(find_unused_parameters=True, process_group_backend="gloo")}


def _parse_devices(devices: Any) -> Any:
    """Parse a string of devices: ``"0,1"`` holds indices, ``"2"`` is a number of devices."""
    if isinstance(devices, str) and "," in devices:
        return [int(number) for number in devices.split(",") if number.strip()]
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        return int(devices)
    return devices


def _count_devices(accelerator: str, devices: Any) -> int:
    visible = torch.cuda.device_count() or int(torch.backends.mps.is_available())
    is_list = isinstance(devices, list)
    wants_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and is_list)
    needed = max(devices) + 1 if is_list else devices
    if wants_gpu and (visible == 0 or (isinstance(needed, int) and needed > visible)):
        instead = f"--gpus with indices below {visible}, or " if visible else ""
        raise ValueError(
            f"GPU devices {devices} are asked for, here or by the run that is resumed, but "
            f"{visible} GPUs are visible here; pass {instead}--accelerator cpu (or --gpus 0) to "
            "train on the CPU"
        )
    if is_list:
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        cores, on_cpu = os.cpu_count() or 1, accelerator == "cpu" or not visible
        if on_cpu and devices > PROCESSES_PER_CORE * cores:
            raise ValueError(
                f"{devices} devices are asked for, here or by the run that is resumed, each a "
                f"process on this machine's {cores} CPU cores; pass --devices {cores} or fewer"
            )
        return devices
    return visible if wants_gpu or (accelerator == "auto" and visible) else 1
