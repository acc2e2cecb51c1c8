"""Sampling with fixed-shape steps says what sampling with growing ones says. On a CPU, uncaptured."""

import pytest
import torch

from solotune.models.split import Decoder, Head, InputRecorder
from solotune.rollout.draw import row_uniforms
from solotune.rollout.masks import PARITY_TESTED, sequence_masks, takes_masks
from solotune.rollout.records import FinishReason, positions_of
from solotune.rollout.sampler import LOOK_EVERY, sample
from solotune.rollout.settings import SamplingSettings
from solotune.rollout.static import StaticSampler
from tests.models.test_split import KINDS, policy_of
from tests.rollout.test_sampler import STEPS, prompts
from tests.tiny import ARCHITECTURES, PAD, tiny_lm
from tests.waiting import reads_of

EVERY = pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a in PARITY_TESTED])


class Both:
    """The two samplers on one model; what entered block 2 is recorded."""

    def __init__(self, architecture, **changes):
        self.lm = tiny_lm(architecture, **changes)
        decoder = Decoder(self.lm)
        recorder = InputRecorder(decoder.blocks[2])
        recorder.active = True
        self.module, self.head, self.take = decoder.module, Head(self.lm, decoder.name), recorder.take
        self.static = StaticSampler(self.module, self.head, self.take, captures=False)

    def rollouts(self, ids, mask, seed=0, find_stop=None, **settings):
        """(growing, fixed)."""
        chosen = SamplingSettings(**{"max_new_tokens": STEPS, **settings})
        uniforms = row_uniforms(seed, 0, range(len(ids)), chosen.max_new_tokens)
        given = (ids, mask, torch.arange(len(ids)), uniforms, chosen, PAD)
        growing = sample(self.module, self.head, *given, take_trunk=self.take, find_stop=find_stop)
        return growing, self.static.sample(*given, find_stop=find_stop)


def assert_equal(growing, fixed):
    for name in (
        "prompt_ids_NP",
        "prompt_mask_NP",
        "response_ids_NT",
        "response_mask_NT",
        "finish_N",
        "prompt_index_N",
    ):
        assert torch.equal(getattr(fixed, name), getattr(growing, name)), name
    torch.testing.assert_close(fixed.sample_logprobs_NT, growing.sample_logprobs_NT, atol=1e-5, rtol=0)
    kept = torch.cat([growing.prompt_mask_NP, growing.response_mask_NT[:, 1:]], dim=1)  # what a token is predicted from
    torch.testing.assert_close(fixed.trunk_NSH[kept], growing.trunk_NSH[kept], atol=1e-4, rtol=1e-4)


@EVERY
def test_greedy_output_is_transformers_own_token_for_token(architecture):
    both = Both(architecture)
    ids, mask = prompts()
    expected = both.lm.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
        pad_token_id=PAD,
    )[:, ids.shape[1] :]  # fmt: skip
    assert torch.equal(both.rollouts(ids, mask, do_sample=False)[1].response_ids_NT, expected)


@EVERY
def test_rows_finish_the_batch_shrinks_and_the_storage_is_used_again(architecture):
    """Three calls on one storage: a large one, a smaller one with shorter prompts, and one that it has to grow for."""
    both = Both(architecture)
    for lengths, seed in (((10, 7, 5, 10, 9, 8, 7, 6) * 4, 0), ((4, 3, 6), 1), ((17, 3) * 20, 2)):
        ids, mask = prompts(lengths)
        growing, fixed = both.rollouts(ids, mask, seed, eos_token_ids=tuple(range(40)))
        assert_equal(growing, fixed)
        assert {FinishReason.EOS} <= {FinishReason(i) for i in fixed.finish_N.tolist()}


@pytest.mark.parametrize("architecture", ["mistral", "opt"])
@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_ids": tuple(range(200)), "min_new_tokens": 5},
        {"top_k": 5, "temperature": 0.7},
        {"top_p": 0.8, "eos_token_ids": (3, 5)},
        {"max_new_tokens": 1},
        {"max_new_tokens": 3, "eos_token_ids": tuple(range(150))},
    ],
)
def test_every_way_to_draw(architecture, settings):
    both = Both(architecture)
    ids, mask = prompts((8, 3) * 10)
    assert_equal(*both.rollouts(ids, mask, **settings))


def test_the_storage_grows_and_the_cache_with_it():
    """Many rows, then fewer with wider prompts, then many again: the cache has room for the most of both."""
    both = Both("llama")
    for lengths in ((4,) * 20, (15, 9), (4,) * 20, (15,) * 20):
        assert_equal(*both.rollouts(*prompts(lengths)))


@EVERY
def test_ready_made_masks_are_the_models_own(architecture):
    """What the trainer hands over on a GPU, where a model would read the padding's mask on the host."""
    lm = tiny_lm(architecture)
    ids, mask = prompts((12, 9, 5, 12))
    decoder = Decoder(lm).module
    positions = positions_of(mask)
    with torch.no_grad():
        own = decoder(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        ready = sequence_masks(decoder.config, mask, torch.float32)
        given = decoder(input_ids=ids, attention_mask=ready, position_ids=positions, use_cache=False)
    torch.testing.assert_close(given.last_hidden_state[mask], own.last_hidden_state[mask], atol=1e-5, rtol=1e-5)


def test_a_window_that_is_off():
    both = Both("mistral", sliding_window=None)
    assert_equal(*both.rollouts(*prompts((9, 4, 7))))


def test_stop_strings_end_rows_where_they_stand():
    both = Both("opt")
    stops = set(range(60))
    ids, mask = prompts((8,) * 16)
    growing, fixed = both.rollouts(ids, mask, stop_strings=("x",), find_stop=lambda tokens: tokens[-1] in stops)
    assert_equal(growing, fixed)
    assert (fixed.finish_N == FinishReason.STOP_STRING).any()


def test_nothing_of_an_earlier_call_is_left():
    both = Both("llama")
    ids, mask = prompts((8, 5) * 8)
    first = both.rollouts(ids, mask, seed=3)[1]
    both.rollouts(ids.flip(0), mask.flip(0), seed=4, eos_token_ids=tuple(range(150)))
    again = both.rollouts(ids, mask, seed=3)[1]
    assert torch.equal(first.response_ids_NT, again.response_ids_NT)
    assert torch.equal(first.sample_logprobs_NT, again.sample_logprobs_NT)
    assert torch.equal(first.trunk_NSH, again.trunk_NSH)


def test_what_is_not_parity_tested_is_not_let_in():
    left_out = {a for a in ARCHITECTURES if not StaticSampler.admits(tiny_lm(a).config)}
    assert left_out == {"gpt_neo", "bloom"}


@EVERY
def test_a_step_reads_no_number(architecture):
    """The host would wait for the device in every step, and a capture would fail."""
    both = Both(architecture)
    found, step = [], both.static._run_step

    def watched(*args):
        found.append(reads_of(lambda: step(*args)))

    both.static._run_step = watched
    ids, mask = prompts()
    both.rollouts(ids, mask, eos_token_ids=(3, 5), min_new_tokens=2, top_k=5, top_p=0.9)
    assert len(found) > LOOK_EVERY
    assert not any(found)


def test_where_a_step_cannot_be_captured_it_runs_as_it_is(monkeypatch, caplog):
    both, tries = Both("opt"), []

    def fails(*args):
        tries.append(args)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(both.static, "captures", True)
    monkeypatch.setattr(both.static, "_captured", fails)
    ids, mask = prompts()
    with caplog.at_level("WARNING"):
        for seed in range(2):
            assert_equal(*both.rollouts(ids, mask, seed))
    assert len(tries) == 1
    assert [record.message for record in caplog.records] == [
        "steps are not replayed as CUDA graphs, which is slower: capturing one failed (operation not permitted when "
        "stream is capturing)"
    ]


def test_attention_that_reads_padding_gets_no_ready_masks():
    config = tiny_lm("llama").config
    assert takes_masks(config)
    config._attn_implementation = "flash_attention_2"
    assert not takes_masks(config)
    assert not StaticSampler.admits(config)


def test_a_reading_is_seen():
    x = torch.ones(2)
    works = (x.tolist, x.sum().item, lambda: bool(x.any()), x.cpu, x.numpy, x.nonzero, x.unique, lambda: x[x > 0])
    for work in works:
        assert reads_of(work), work
    assert not reads_of(lambda: x.sum() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_of_two_precisions_are_sampled_in_steps_under_autocast_alone(tiny_folder, dtype):
    """A step has masks of one precision. In fp16 blocks that are trained in place compute in fp32."""
    policy, is_stepwise = policy_of(tiny_folder, dtype=dtype, **KINDS["last 2 blocks"]), dtype != torch.float16
    assert policy._samples_in_steps == is_stepwise
    assert policy_of(tiny_folder, dtype=dtype, **KINDS["lora on the last 2"])._samples_in_steps
    if not is_stepwise:
        return
    ids, mask = prompts()
    uniforms = row_uniforms(0, 0, range(len(ids)), STEPS)
    with policy._recording() as take, policy._autocast():
        given = (ids, mask, torch.arange(len(ids)), uniforms, SamplingSettings(STEPS), PAD)
        fixed = StaticSampler(policy.decoder.module, policy.head, take, captures=False).sample(*given)
    measured = policy("measure", fixed, 1.0)
    assert (measured.logprobs_bT - fixed.sample_logprobs_NT).abs().max() < (1e-4 if dtype == torch.float32 else 0.2)
