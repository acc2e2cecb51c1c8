"""Learning from given samples: the trunk alone, packed rows, the cached trunk, and ILQL's heads."""

import pytest
import torch
from torch.nn import functional

from solotune.data.batches import collate
from solotune.data.dialogues import Samples
from solotune.models.adapters import select_trainable
from solotune.models.ilql import ILQLModel
from solotune.models.offline import OfflineModel
from solotune.models.split import Decoder
from solotune.rollout.draw import row_uniforms
from solotune.rollout.masks import PARITY_TESTED
from solotune.rollout.sampler import sample
from solotune.rollout.settings import SamplingSettings
from solotune.rollout.static import StaticSampler
from tests.rollout.test_sampler import prompts
from tests.tiny import ARCHITECTURES, EOS, PAD, tiny_lm

LENGTHS = (19, 5, 9, 2, 14, 4, 7)


def some_samples(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    return Samples(ids, [[(t > 0 and t % 4 != 1) or t == n - 1 for t in range(n)] for n in lengths], [*range(len(ids))])


def model_of(architecture, k=2, cls=OfflineModel, **options):
    lm = tiny_lm(architecture, **options)
    select_trainable(Decoder(lm), k)
    return cls(lm)


def plain_logprobs(lm, samples):
    """Row by row, without padding, by the whole language model."""
    found = []
    for ids, is_output in zip(samples.ids, samples.is_output, strict=True):
        logprobs = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found += [logprobs[t - 1, ids[t]] for t in range(1, len(ids)) if is_output[t]]
    return torch.stack(found)


def slopes(model, logprobs):
    weights = torch.linspace(-1, 1, len(logprobs))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad((weights * logprobs).sum(), parameters, allow_unused=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_and_gradients_are_the_whole_models_padded_packed_and_from_a_kept_trunk(architecture):
    model, samples = model_of(architecture), some_samples()
    assert model.start == 2
    expected = plain_logprobs(model.lm, samples)
    wanted = slopes(model, expected)
    assert model.can_pack == (architecture in PARITY_TESTED)
    for packs in (False, True) if model.can_pack else (False,):
        batch = collate(samples, range(len(samples)), packs=packs)
        assert batch.is_packed == packs
        trunk = model("trunk", batch)
        assert trunk.shape == (sum(LENGTHS) - len(LENGTHS), 32)
        for kept in (None, trunk):
            found = model("learn", batch, kept)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            for ours, theirs in zip(slopes(model, found), wanted, strict=True):
                if theirs is not None:
                    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_nothing_above_the_trunk_runs_for_it_and_nothing_below_the_top_for_an_update():
    model, batch = model_of("opt"), collate(some_samples(), [0, 1])
    ran = []
    for index, block in enumerate(model.decoder.blocks):
        block.fc1.register_forward_hook(lambda *_, index=index: ran.append(index))
    trunk = model("trunk", batch)
    assert ran == [0, 1]
    ran.clear()
    model("learn", batch, trunk)
    assert ran == [2, 3]


def test_a_model_without_reference_and_critic_has_no_copy_of_anything():
    model = model_of("gpt2", k=-1)
    own = sum(p.numel() for p in tiny_lm("gpt2").parameters())
    assert sum(p.numel() for p in model.parameters()) == own
    assert not list(model.critic.parameters())


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointed in (False, True):
        lm = tiny_lm("llama")
        select_trainable(Decoder(lm), 2)
        model, batch = OfflineModel(lm, checkpointed), collate(some_samples(), range(4), packs=True)
        found.append(slopes(model, model("learn", batch, model("trunk", batch))))
    for one, other in zip(*found, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other)


# ---- ILQL's heads -------------------------------------------------------------------------------------------------


def ilql_of(architecture="opt", seed=3):
    model = model_of(architecture, cls=ILQLModel)
    torch.manual_seed(seed)
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_the_heads_say_what_plain_heads_say_and_get_their_gradients():
    model, samples = ilql_of(), some_samples()
    batch = collate(samples, range(len(samples)), packs=True)
    weights = torch.rand(len(batch.targets_N))
    hidden = model._hidden(batch, None)
    rows = torch.arange(len(batch.targets_N))
    plain = [head.outer(head.inner(hidden).relu()) for head in [*model.heads.q_heads, *model.heads.target_q_heads]]
    chosen = torch.stack([q[rows, batch.targets_N] for q in plain])
    cql = sum((weights * functional.cross_entropy(q, batch.targets_N, reduction="none")).sum() for q in plain[:2])
    found = model("values", batch, None, weights)
    torch.testing.assert_close(found.logprobs_N, plain_logprobs(model.lm, samples), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.qs_KN, chosen[:2])
    torch.testing.assert_close(found.target_qs_KN, chosen[2:])
    torch.testing.assert_close(found.cql, cql)
    assert not found.target_qs_KN.requires_grad
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(chosen[:2].square().sum() + cql, parameters, allow_unused=True)
    slopes = torch.autograd.grad(found.qs_KN.square().sum() + found.cql, parameters, allow_unused=True)
    for ours, theirs in zip(slopes, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trains", [False, True])
def test_log_probs_are_left_out_where_nobody_asks_and_the_head_is_frozen(trains):
    """A trained head that is used in no pass would stop several processes from averaging its gradient."""
    model, batch = ilql_of(), collate(some_samples(), [0, 1])
    model.lm.get_output_embeddings().weight.requires_grad_(trains)
    found = model("values", batch, None, None, False)
    asked = model("values", batch, None, None)
    assert (asked.logprobs_N < 0).all()
    torch.testing.assert_close(found.logprobs_N, asked.logprobs_N if trains else torch.zeros_like(asked.logprobs_N))
    torch.testing.assert_close(found.qs_KN, asked.qs_KN)


def test_the_vocabularys_q_exists_for_the_chosen_tokens_alone():
    """Of 60 positions 3 are learned: no tensor of the pass has more rows of the vocabulary's width."""
    model = ilql_of()
    samples = Samples([list(range(61))], [[t > 57 for t in range(61)]], [0])
    batch, largest = collate(samples, [0]), [0]

    def look(tensor):
        if tensor.shape[-1:] == (259,):
            largest[0] = max(largest[0], tensor.numel() // 259)
        return tensor

    kept = [p for p in model.heads.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        model("values", batch, None, torch.ones(3))
    assert kept
    assert largest[0] <= 64, "rows of the last layer's weight, (259, 64), at most"


def test_targets_follow_and_are_not_trained():
    heads = ilql_of().heads
    before = [p.clone() for p in heads.target_q_heads.parameters()]
    heads.sync(0.25)
    for target, old, q in zip(heads.target_q_heads.parameters(), before, heads.q_heads.parameters(), strict=True):
        assert not target.requires_grad
        torch.testing.assert_close(target, 0.25 * q + 0.75 * old)


STEPS = 6


def drawn(model, ids, mask, static=False, **settings):
    chosen = SamplingSettings(max_new_tokens=STEPS, **settings)
    uniforms = row_uniforms(0, 0, range(len(ids)), STEPS)
    given = (ids, mask, torch.arange(len(ids)), uniforms, chosen, PAD)
    if static:
        model._weighed.beta = chosen.beta
        return StaticSampler(model.decoder.module, model._sampling_head, None, captures=False).sample(*given)
    return model("sample", *given)


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_decoding_at_beta_0_is_plain_sampling_token_for_token(architecture):
    model = ilql_of(architecture)
    ids, mask = prompts((7, 4, 6))
    settings = SamplingSettings(max_new_tokens=STEPS, top_k=9, temperature=0.8)
    plain = sample(
        model.decoder.module, model.head, ids, mask, torch.arange(3), row_uniforms(0, 0, range(3), STEPS), settings, PAD
    )
    found = drawn(model, ids, mask, beta=0.0, top_k=9, temperature=0.8)
    assert torch.equal(found.response_ids_NT, plain.response_ids_NT)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "fixed"])
def test_greedy_decoding_takes_the_token_with_the_largest_policy_and_advantage(static):
    """Against whole passes without a cache, by the formula."""
    model = ilql_of()
    ids, mask = prompts((6, 6))
    found = drawn(model, ids, mask, static, beta=2.0, do_sample=False).response_ids_NT
    heads, given = model.heads, ids
    for step in range(STEPS):
        hidden = model.decoder.module(input_ids=given).last_hidden_state[:, -1]
        q = torch.minimum(*(head(hidden) for head in heads.target_q_heads))
        scores = model.head(hidden).log_softmax(-1) + 2.0 * (q - heads.value_head(hidden)[:, None])
        assert torch.equal(scores.argmax(-1), found[:, step])
        given = torch.cat([given, found[:, step : step + 1]], dim=1)


def test_a_high_beta_changes_what_is_drawn_and_ends_where_eos_is_best():
    model = ilql_of()
    with torch.no_grad():
        for head in model.heads.target_q_heads:
            head.outer.bias[EOS] += 100.0
    ids, mask = prompts((6, 3, 5))
    settings = {"eos_token_ids": (EOS,)}
    assert drawn(model, ids, mask, beta=0.0, **settings).response_ids_NT.shape[1] > 1
    assert drawn(model, ids, mask, beta=10.0, **settings).response_ids_NT.tolist() == [[EOS]] * 3
