"""A model that cannot fit into memory is refused before it is allocated."""

import pytest
from support.models import tokenizer_config

from taming.run.memory import build_model


def test_a_model_is_built():
    assert build_model(tokenizer_config("plain")).quantize.n_e == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_embed": 10**12}, "model.params.n_embed=1000000000000: .* GB"),
        ({"embed_dim": 10**12}, "model.params.embed_dim=1"),
    ],
)
def test_sizes_beyond_memory_are_named(change, words):
    block = tokenizer_config("plain")
    with pytest.raises(ValueError, match=words):
        build_model({**block, "params": {**block["params"], **change}})


def test_a_bug_of_a_model_is_raised():
    with pytest.raises(TypeError):
        build_model({"target": "builtins.int", "params": {"nonsense": 1}})
