"""The sampling loop: the model's own words, stopped at the right place, each row by itself."""

import pytest
import torch

from solotune.errors import ConfigError
from solotune.models.split import Decoder, Head
from solotune.rollout.draw import row_uniforms
from solotune.rollout.generate import generate
from solotune.rollout.records import FinishReason, concatenate
from solotune.rollout.sampler import sample
from solotune.rollout.settings import SamplingSettings
from tests.tiny import ARCHITECTURES, PAD, tiny_lm

STEPS = 16


def prompts(lengths=(10, 7, 5, 10)):
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return torch.randint(0, 256, (len(lengths), width)).masked_fill(~mask, PAD), mask


def run(lm, ids, mask, uniforms=None, pad=PAD, find_stop=None, by=sample, **settings):
    uniforms = row_uniforms(0, 0, range(len(ids)), STEPS) if uniforms is None else uniforms
    chosen = SamplingSettings(**{"max_new_tokens": STEPS, **settings})
    decoder = Decoder(lm)
    model = (decoder.module, Head(lm, decoder.name)) if by is sample else (lm,)
    return by(*model, ids, mask, torch.arange(len(ids)), uniforms, chosen, pad, find_stop=find_stop)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_output_is_transformers_own_token_for_token(architecture):
    lm = tiny_lm(architecture)
    ids, mask = prompts()
    expected = lm.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
    )[:, ids.shape[1] :]
    assert torch.equal(run(lm, ids, mask, do_sample=False).response_ids_NT, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_does_not_depend_on_the_rows_beside_it_while_the_batch_shrinks(architecture):
    lm = tiny_lm(architecture)
    ids, mask = prompts((10, 7, 5, 10, 9, 8, 7, 6) * 2)
    uniforms = row_uniforms(0, 0, range(16), STEPS)
    together = run(lm, ids, mask, uniforms, eos_token_ids=tuple(range(25)))
    assert together.response_mask_NT.sum(-1).min() < STEPS / 2 < together.response_mask_NT.sum(-1).max()
    for row in range(16):
        alone = run(
            lm, ids[row : row + 1], mask[row : row + 1], uniforms[row : row + 1], eos_token_ids=tuple(range(25))
        )
        width = alone.response_ids_NT.shape[1]
        assert torch.equal(alone.response_ids_NT[0], together.response_ids_NT[row, :width])
        assert not together.response_mask_NT[row, width:].any()
        torch.testing.assert_close(
            alone.sample_logprobs_NT[0], together.sample_logprobs_NT[row, :width], atol=1e-5, rtol=0
        )


def test_sampled_frequencies_are_the_models_softmax():
    lm = tiny_lm("gpt2")
    ids, mask = prompts((6,))
    n = 4000
    first = run(lm, ids.expand(n, -1), mask.expand(n, -1), row_uniforms(0, 0, range(n), STEPS)[:, :1], max_new_tokens=1)
    expected = lm(input_ids=ids).logits[0, -1].softmax(-1)
    observed = torch.bincount(first.response_ids_NT[:, 0], minlength=len(expected)) / n
    assert (observed - expected).abs().max() < 4 * (expected * (1 - expected) / n).sqrt().max()


def test_equal_prompts_get_independent_samples():
    lm = tiny_lm()
    ids, mask = prompts((6,))
    rollouts = run(lm, ids.expand(32, -1), mask.expand(32, -1), row_uniforms(0, 0, range(32), STEPS))
    assert len({tuple(row) for row in rollouts.response_ids_NT.tolist()}) == 32


@pytest.mark.parametrize("pad", [PAD, 5], ids=["own pad token", "pad is EOS"])
def test_the_first_eos_is_part_of_the_response_once_and_nothing_after_it(pad):
    lm = tiny_lm()
    ids, mask = prompts((10, 7, 5, 10, 9, 8, 7, 6) * 2)
    eos = {5, *range(40, 60)}
    rollouts = run(lm, ids, mask, eos_token_ids=tuple(eos), pad=pad)
    seen = set()
    for row, finish in enumerate(rollouts.finish_N.tolist()):
        tokens = rollouts.response_tokens(row)
        seen.add(finish)
        if finish == FinishReason.EOS:
            assert tokens[-1] in eos
            assert eos.isdisjoint(tokens[:-1])
            assert (rollouts.response_ids_NT[row, len(tokens) :] == pad).all()
        else:
            assert len(tokens) == STEPS, "a truncated response keeps its length and gets no EOS"
            assert eos.isdisjoint(tokens)
    assert seen == {FinishReason.EOS, FinishReason.LENGTH}


def test_no_eos_before_min_new_tokens():
    lm = tiny_lm()
    ids, mask = prompts((8,) * 16)
    rollouts = run(lm, ids, mask, eos_token_ids=tuple(range(200)), min_new_tokens=5)
    assert rollouts.response_mask_NT.sum(-1).min() >= 5
    free = run(lm, ids, mask, eos_token_ids=tuple(range(200)))
    assert free.response_mask_NT.sum(-1).min() < 5


def test_a_stop_string_ends_its_row_early():
    lm = tiny_lm()
    ids, mask = prompts((8,) * 16)
    stops = set(range(60))
    rollouts = run(lm, ids, mask, stop_strings=("x",), find_stop=lambda tokens: tokens[-1] in stops)
    for row, finish in enumerate(rollouts.finish_N.tolist()):
        tokens = rollouts.response_tokens(row)
        assert stops.isdisjoint(tokens[:-1])
        assert (finish == FinishReason.STOP_STRING) == (tokens[-1] in stops)
    assert (rollouts.finish_N == FinishReason.STOP_STRING).any()


def test_parts_join_at_a_common_padding():
    lm = tiny_lm()
    ids, mask = prompts((10, 4))
    uniforms = row_uniforms(0, 0, range(2), STEPS)
    parts = [
        run(lm, ids[:1], mask[:1], uniforms[:1]),
        run(lm, ids[1:, 6:], mask[1:, 6:], uniforms[1:], eos_token_ids=tuple(range(150))),
    ]
    joined = concatenate(parts, PAD)
    assert joined.prompt_ids_NP[1].tolist() == ids[1].tolist()
    assert [joined.response_tokens(row) for row in (0, 1)] == [part.response_tokens(0) for part in parts]


def test_arguments_the_sampler_does_not_know_go_to_transformers():
    lm = tiny_lm()
    ids, mask = prompts()
    rollouts = run(lm, ids, mask, by=generate, do_sample=False, other={"repetition_penalty": 5.0}, eos_token_ids=(3,))
    expected = lm.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=3,
        pad_token_id=PAD,
        repetition_penalty=5.0,
    )[:, ids.shape[1] :]
    for row in range(4):
        tokens = rollouts.response_tokens(row)
        assert tokens == expected[row, : len(tokens)].tolist()
    assert len(set(rollouts.response_tokens(0))) == len(rollouts.response_tokens(0)), "the penalty forbids repeating"
    with pytest.raises(ConfigError, match="refused"):
        run(lm, ids, mask, by=generate, other={"no_such_argument": 1})
    with pytest.raises(ConfigError, match="8 responses for 4 prompts"):
        run(lm, ids, mask, by=generate, other={"num_return_sequences": 2})


def test_gen_kwargs_are_read_as_trlx_wrote_them():
    settings = SamplingSettings.from_gen_kwargs(
        {"max_new_tokens": 7, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "eos_token_id": -1, "num_beams": 2}, 3
    )
    assert (settings.top_k, settings.eos_token_ids, settings.other) == (0, (), {"num_beams": 2})
    assert not settings.is_biased
    assert SamplingSettings.from_gen_kwargs({"top_k": 5}, [3, 4]).is_biased
    assert SamplingSettings.from_gen_kwargs({}, [3, 4]).eos_token_ids == (3, 4)
