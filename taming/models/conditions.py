"""Condition stages: what encodes a prior's condition as tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from taming.checkpoint import freeze
from taming.modules.util import SOSProvider
from taming.util import instantiate_from_config

UNCONDITIONAL = "__is_unconditional__"


def build_cond_stage(config: Mapping[str, Any] | str, first_stage: Any, sos_token: int) -> Any:
    """Build a condition stage, frozen.

    Args:
        config: ``{target, params}``, ``"__is_first_stage__"`` or ``"__is_unconditional__"``.
        first_stage: The tokenizer of the images.
        sos_token: Token that stands for no condition.

    Raises:
        ValueError: The configuration is wrong, or the stage lacks an attribute of `ConditionStage`.
    """
    if config == UNCONDITIONAL:
        return SOSProvider(sos_token)
    if config == "__is_first_stage__":
        return first_stage
    if isinstance(config, str):
        raise ValueError(
            f"cond_stage_config {config!r}: expected a block with a 'target', "
            f"'__is_first_stage__' or {UNCONDITIONAL!r}"
        )
    stage = instantiate_from_config(config)
    needed = ("condition_vocab_size", "condition_length", "condition_pictures")
    if lacking := [name for name in needed if not hasattr(stage, name)]:
        raise ValueError(
            f"the condition stage {type(stage).__name__} lacks {', '.join(lacking)}: derive it "
            "from taming.modules.util.ConditionStage and set these"
        )
    return freeze(stage) if isinstance(stage, nn.Module) else stage
