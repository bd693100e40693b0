"""Record of the settings of a folder of results."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def claim(file: Path, settings: Mapping[str, Any], free: Collection[str] = ()) -> None:
    """Save the settings of a folder of results; refuse to mix results of different settings.

    Args:
        file: JSON file in the folder.
        settings: Settings that determine the results.
        free: Names of settings that may differ from the saved ones.

    Raises:
        ValueError: The saved settings differ.
    """
    now = json.loads(json.dumps(settings))
    before = json.loads(file.read_text()) if file.exists() else now
    changed = [key for key in now if now[key] != before.get(key) and key not in free]
    if changed:
        raise ValueError(
            f"{file.parent} holds results of different settings: {', '.join(changed)}; "
            "name another folder with --outdir"
        )
    file.write_text(json.dumps(now, indent=2))
