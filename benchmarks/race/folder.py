"""A folder of results knows what they are results of."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def claim(file: Path, settings: Mapping[str, Any], free: Collection[str] = ()) -> None:
    """Write into a folder of results what they are results of, where they are reused.

    Args:
        file: JSON file in the folder.
        settings: What the results depend on.
        free: Names of settings that may differ from those of before.

    Raises:
        ValueError: The folder holds results of other settings.
    """
    now = json.loads(json.dumps(settings))
    before = json.loads(file.read_text()) if file.exists() else now
    changed = [key for key in now if now[key] != before.get(key) and key not in free]
    if changed:
        raise ValueError(
            f"{file.parent} holds results with another {', '.join(changed)} than asked for now; "
            "give another folder with --outdir"
        )
    file.write_text(json.dumps(now, indent=2))
