"""The benchmark of context models counts what it says, and runs."""

import logging
import sys

import pytest
import torch
from support.context import codes_of
from support.runs import TinyRuns

from benchmarks import context, timing


def test_tables_cost_the_entropy_of_the_codes_that_they_were_counted_in() -> None:
    codes = torch.stack([codes_of((40, 50), 3, 4, seed) for seed in range(2)])
    bits = context.static_bits(codes, codes, 4) * len(codes)
    counts = [(codes[..., turn] >= 0).sum() for turn in range(3)]
    expected = 0.0
    for turn in range(3):
        present = codes[..., turn][codes[..., turn] >= 0]
        share = torch.bincount(present, minlength=4) / len(present)
        expected += float((present.numel() * share * -share.log2()).sum())
        if turn:
            on = counts[turn] / counts[turn - 1]
            expected -= float(counts[turn - 1] * (on * on.log2() + (1 - on) * (1 - on).log2()))
    assert bits == pytest.approx(expected, rel=1e-4)


def test_all_contenders_are_trained_once_and_measured(
    tiny_runs: TinyRuns, tmp_path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    folder = str(tiny_runs.data / "images")
    argv = ["context", "-r", tiny_runs.of("photos.yaml"), "--train", folder, "--val", folder]
    argv += ["--size", "32", "--images", "4", "--steps", "2", "-o", tmp_path / "kept"]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    tables = []
    for _ in range(2):  # from the files the second time
        with caplog.at_level(logging.INFO, "taming.benchmark"):
            caplog.clear()
            context.main()
            tables.append(
                [line.split("|")[1:4] for line in caplog.text.splitlines() if "|" in line]
            )
    assert tables[0] == tables[1]
    names = [line[0].strip() for line in tables[0][2:]]
    assert names == ["static", "integer", "float", "transformer", "segments"]
    assert (tmp_path / "context.json").is_file()
