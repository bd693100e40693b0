"""Condition stages: what encodes a prior's condition as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from taming.checkpoint import freeze
from taming.util import instantiate_from_config


def build_cond_stage(config: Mapping[str, Any] | str, first_stage: Any) -> Any:
    """Build a condition stage, frozen.

    Args:
        config: ``{target, params}``, ``"__is_first_stage__"`` or ``"__is_unconditional__"``.
        first_stage: The tokenizer of the images.

    Returns:
        The stage; None without a condition.
    """
    if config == "__is_unconditional__":
        return None
    if config == "__is_first_stage__":
        return first_stage
    if isinstance(config, str):
        raise ValueError(
            f"cond_stage_config {config!r}: expected a block with a 'target', "
            "'__is_first_stage__' or '__is_unconditional__'"
        )
    stage = instantiate_from_config(config)
    return freeze(stage) if isinstance(stage, nn.Module) else stage


def check_cond_stage(stage: Any) -> None:
    """Refuse a condition stage that does not answer what a prior asks.

    Raises:
        ValueError: It lacks an attribute of `ConditionStage`.
    """
    needed = ("condition_vocab_size", "condition_length", "condition_pictures")
    if lacking := [name for name in needed if not hasattr(stage, name)]:
        raise ValueError(
            f"the condition stage {type(stage).__name__} lacks {', '.join(lacking)}: derive it "
            "from taming.modules.util.ConditionStage and set these"
        )
