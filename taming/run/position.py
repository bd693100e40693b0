"""The position of a training in a checkpoint, from which a resumed run continues.

Lightning saves the counters of its loops as they are within the hook that saved the checkpoint, and
continues from some of them in the wrong place: it skips a validation, counts an epoch twice or
begins one anew.
"""

from __future__ import annotations

from typing import Any

_COUNTERS = ("ready", "started", "processed", "completed")


def settle(fit_loop: dict[str, Any]) -> None:
    """Set the counters of a saved ``fit_loop`` to a place from which Lightning continues rightly.

    Either a number of epochs is done, with their validations, or a number of batches of an epoch
    too. A validation after the last batch is done or begins anew. This may be applied again.

    Args:
        fit_loop: The loop's state in a checkpoint; it is changed.
    """
    names = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    if not fit_loop.keys() >= {*names}:  # of a very early Lightning 1
        return
    epochs, batches, validation = (fit_loop[name] for name in names)
    before = batches["current"]
    finished, done = epochs["current"]["processed"], before["processed"]
    within = finished < epochs["current"]["started"]
    if not within and done and not batches["is_last_batch"]:  # stopped within the epoch
        finished, within = finished - 1, True
    within = within and done > 0
    is_validated = (
        before["completed"] == done  # no longer in the hook after the batch, nor in the next batch
        and validation["is_last_batch"]
        and validation["current"]["completed"] == validation["current"]["ready"]
    )
    _set(batches, 0 if not within else done, batches["total"]["processed"])
    _set(epochs, finished, finished)
    _set(validation, 0, 0)
    if within:
        for counters in (epochs["total"], epochs["current"]):
            counters["ready"] = counters["started"] = finished + 1
    else:
        batches["is_last_batch"] = False
    validation["is_last_batch"] = within and is_validated
    if within and not is_validated:  # Lightning validates if it is due after this batch
        for counters in (validation["total"], validation["current"]):
            counters["ready"] = counters["started"] = 1


def _set(progress: dict[str, Any], current: int, total: int) -> None:
    progress["current"].update(dict.fromkeys(_COUNTERS, current))
    progress["total"].update(dict.fromkeys(_COUNTERS, total))
