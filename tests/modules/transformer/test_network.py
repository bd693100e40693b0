"""A network that has what `PriorNetwork` asks for, and no more, is a prior's network."""

import pytest
import torch
from support.models import TRANSFORMS, images, tokenizer_config, trainer
from torch import Tensor, nn

from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.sequence.grammar import GrammarState
from taming.modules.transformer.generate import SamplingParams
from taming.modules.transformer.logits import mask_logits
from taming.modules.transformer.network import IncrementalDecoder, PriorNetwork, Prompt


class Bigram(PriorNetwork):
    """Predicts a token from the one before it."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.table = nn.Embedding(vocab_size, vocab_size)

    def predict(
        self, condition: Tensor, tokens: Tensor, states: GrammarState, grid: tuple[int, int]
    ) -> Tensor:
        before = torch.cat([condition[:, -1:], tokens[:, :-1]], dim=1)
        return self.table(before[tokens >= 0])


class RememberingBigram(Bigram):
    """The same, with a decoder that only looks at the last token."""

    def decoder(self, grid: tuple[int, int]) -> IncrementalDecoder:
        return BigramDecoder(self)


class BigramDecoder(IncrementalDecoder):
    def __init__(self, network: Bigram) -> None:
        self.network = network

    def prefill(self, prompt: Prompt) -> Tensor:
        self.step(prompt.rows, prompt.condition[:, -1], prompt.states)
        return torch.zeros_like(prompt.rows)

    def step(self, rows: Tensor, tokens: Tensor, states: GrammarState) -> None:
        self.rows, self.logits = rows, self.network.table(tokens)


@pytest.mark.parametrize("name", ["Bigram", "RememberingBigram"])
@pytest.mark.parametrize("kind", list(TRANSFORMS))
def test_trains_measures_samples_and_completes(kind: str, name: str, tmp_path) -> None:
    target = {"target": f"modules.transformer.test_network.{name}"}
    model = Net2NetTransformer(target, tokenizer_config(kind), "__is_unconditional__")
    model.learning_rate = 1e-2
    trainer(tmp_path, max_steps=3).fit(model, images(6, 2), images(2, 2))
    model.eval()
    start = torch.zeros(3, 1, dtype=torch.int64)
    codes = model.sample_codes(start, SamplingParams(greedy=True))
    tokens, sequence = model.codes_to_tokens(codes), model.sequence
    states = sequence.states(tokens)
    logits = model.transformer.predict(start, tokens, states, model.grid)
    likeliest = mask_logits(logits, sequence.allowed(states)[tokens >= 0]).argmax(-1)
    assert torch.equal(likeliest, tokens[tokens >= 0])
    known = torch.rand(model.grid) < 0.5
    completed = model.sample_codes(start, codes=codes, known=known)
    assert torch.equal(completed[:, known], codes[:, known])
