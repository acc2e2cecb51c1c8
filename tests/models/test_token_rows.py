"""One row of Q for all tokens that the data never choose is what a row each would have become."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from solotune.algorithms.cross_entropy import linear_cross_entropy
from solotune.data.batches import collate
from solotune.data.dialogues import Samples
from solotune.errors import ModelError
from solotune.models.ilql import ILQLModel, TokenRows
from tests.tiny import tiny_lm

VOCABULARY = 259
SAMPLES = Samples([[5, 9, 200, 9, 7], [5, 40, 7]], [[False, False, True, True, True], [False, True, True]], [0, 1])
CHOSEN = [7, 9, 40, 200]


def model_of(tokens, source=None):
    """A model with heads for the given tokens; inner layers and V as `source` has them."""
    model = ILQLModel(tiny_lm("opt"), tokens_C=tokens)
    if source is not None:
        same = {name: p for name, p in source.state_dict().items() if ".outer." not in name and "rows." not in name}
        model.load_state_dict(same, strict=False)
    return model


def test_the_tokens_to_learn_are_those_that_are_chosen():
    assert SAMPLES.chosen_tokens == CHOSEN
    assert sorted(set(collate(SAMPLES, [0, 1]).targets_N.tolist())) == CHOSEN


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("tokens", [CHOSEN, [0, *CHOSEN], [*CHOSEN, VOCABULARY - 1]])
def test_a_shared_row_is_what_each_would_have_become(tokens, optimizer):
    """Trained side by side with a head that has a row for every token: Q, targets and losses stay the same."""
    full = model_of(None)
    shared = model_of(torch.tensor(tokens), full)
    batch, losses = collate(SAMPLES, [0, 1]), []
    weights = torch.full((len(batch.targets_N),), 0.7)
    for model in (full, shared):
        steps = getattr(torch.optim, optimizer)(model.heads.parameters(), lr=0.05, weight_decay=0.01)
        losses.append([])
        for step in range(12):
            now = model("values", batch, None, weights)
            loss = now.cql + (now.qs_KN - step).square().mean() + (now.values_N - now.target_qs_KN).square().mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
            model.sync(0.3)
            losses[-1].append(float(loss))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)
    assert losses[0][0] != losses[0][-1]
    hidden = torch.randn(6, full.hidden_size)
    for name in ("q_heads", "target_q_heads"):
        for one, whole in zip(getattr(shared.heads, name), getattr(full.heads, name), strict=True):
            assert len(one.outer.weight) == len(tokens) + 1
            rows = torch.arange(VOCABULARY)
            torch.testing.assert_close(
                one.outer.weight[shared.heads.rows.of(rows)], whole.outer.weight, atol=1e-4, rtol=1e-4
            )
            assert whole.outer.weight[100].abs().sum() > 0, "a token nobody chose has learned something"
            torch.testing.assert_close(shared.heads.rows.widened(one(hidden)), whole(hidden), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(shared.heads.advantages(hidden), full.heads.advantages(hidden), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk", [2, None])
def test_copies_of_the_last_row_count_as_if_they_were_there(chunk):
    torch.manual_seed(0)
    inputs, weight, bias = (torch.randn(*shape).double().requires_grad_() for shape in ((7, 5), (4, 5), (4,)))
    targets, weights = torch.randint(0, 3, (7,)), torch.rand(7).double()
    rows = torch.tensor([0, 1, 2, 3, 3, 3, 3, 3])
    each_weight, each_bias = (x.detach()[rows].requires_grad_() for x in (weight, bias))
    expected = (weights * functional.cross_entropy(inputs @ each_weight.T + each_bias, targets, reduction="none")).sum()
    found = linear_cross_entropy(inputs, weight, bias, targets, weights, chunk, copies_of_last=5)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, (inputs, each_weight, each_bias))
    slopes = torch.autograd.grad(found, (inputs, weight, bias))
    torch.testing.assert_close(slopes[0], wanted[0])
    for ours, theirs in zip(slopes[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ours[rows], theirs)


def test_heads_are_saved_with_the_tokens_they_were_learned_for(tmp_path):
    """In a model with a row for every token, each gets a copy of its own."""
    model = model_of(torch.tensor(CHOSEN))
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = model_of(None)
    again.load_critic(tmp_path)
    hidden = torch.randn(1, 3, model.hidden_size)
    torch.testing.assert_close(again.heads_at(hidden), model.heads_at(hidden))
    assert again.heads.q_heads[0](hidden[0]).shape == (3, VOCABULARY)
    file = tmp_path / model.CRITIC_FILE
    saved = load_file(file)
    for wrong in (saved["rows.rows_V"].float(), saved["rows.rows_V"][:-1], saved["rows.rows_V"] + 1, torch.tensor(3)):
        save_file({**saved, "rows.rows_V": wrong}, file)
        with pytest.raises(ModelError, match="which row is theirs"):
            again.load_critic(tmp_path)
    torch.testing.assert_close(again.heads_at(hidden), model.heads_at(hidden))


def test_tokens_beyond_the_models_are_refused():
    with pytest.raises(ModelError, match="the samples have token 300, but the model has 259"):
        model_of(torch.tensor([*CHOSEN, 300]))


def test_tokens_that_are_all_chosen_share_nothing():
    rows = TokenRows(6, torch.arange(6))
    assert (rows.n_rows, rows.n_sharing) == (6, 0)
    assert torch.equal(rows.of(torch.tensor([4, 0])), torch.tensor([4, 0]))


@pytest.mark.parametrize("tokens", [[3, 2], [2, 2], [-1, 4], [4, 6]])
def test_what_are_no_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match="ascending numbers below 6"):
        TokenRows(6, torch.tensor(tokens))
