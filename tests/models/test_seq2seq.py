"""Encoder-decoders: the rules of the split, and of sampling, for every kind that is supported."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSeq2SeqLM

from solotune.errors import ConfigError, ModelError
from solotune.models.fit import fit
from solotune.models.loading import build_policy
from solotune.models.seq2seq import Seq2SeqPolicy
from solotune.models.split import Decoder, Encoded, Head, InputRecorder, Top
from solotune.rollout.draw import row_uniforms
from solotune.rollout.records import FinishReason, concatenate
from solotune.rollout.settings import SamplingSettings
from tests.tiny import EOS, PAD, VOCABULARY, tiny_lm
from tests.tiny_seq2seq import KINDS, save_tiny_seq2seq, tiny_seq2seq, tiny_seq2seq_config

EVERY = pytest.mark.parametrize("kind", KINDS)
LORA = {"delta_kwargs": {"delta_type": "lora", "modified_modules": "all", "lora_r": 4}}
IN_ENCODER_TOO = r".*\.(q|v|q_proj|v_proj)"
TRAINED = {
    "lora on the last 2": {"num_layers_unfrozen": 2, **LORA},
    "lora on the last": {"num_layers_unfrozen": 1, **LORA},
    "lora in the decoder": {"num_layers_unfrozen": -1, **LORA},
    "lora everywhere": {"delta_kwargs": None, "peft_config": LoraConfig(r=4, target_modules=IN_ENCODER_TOO)},
    "last 2 blocks": {"num_layers_unfrozen": 2, "delta_kwargs": None},
    "the decoder": {"num_layers_unfrozen": 3, "delta_kwargs": None},
    "everything": {"num_layers_unfrozen": -1, "delta_kwargs": None},
}
CASES = [("t5", trained) for trained in TRAINED]
CASES += [(kind, trained) for kind in KINDS if kind != "t5" for trained in ("lora on the last 2", "everything")]
CASES += [("umt5", "last 2 blocks")]  # whose trained blocks own their position biases
WAYS = pytest.mark.parametrize(("kind", "trained"), CASES)
LENGTHS = (10, 7, 3, 10)


def policy_of(
    kind="t5", trained="lora on the last 2", lora_noise=0.0, dtype=torch.float32, changes=None, **train
) -> Seq2SeqPolicy:
    config = tiny_seq2seq_config(Path("unused/model"), model=TRAINED[trained], train=train)
    config.model.model_path = tiny_seq2seq(kind, **(changes or {})).to(dtype)
    policy = build_policy(config)
    assert isinstance(policy, Seq2SeqPolicy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, lora_noise)
    return policy


def prompts(lengths=LENGTHS, left=True):
    """Padded random prompts; the same ones for either side."""
    torch.manual_seed(1)
    width = max(lengths)
    rows = [torch.randint(0, 256, (length,)) for length in lengths]
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), None) if left else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, True
    return ids, mask


def rollouts_of(policy, steps=8, eos=(), find_stop=None, rows=None, **settings):
    ids, mask = prompts()
    chosen = list(range(len(ids))) if rows is None else rows
    settings = SamplingSettings(steps, eos_token_ids=eos, **settings)
    uniforms = row_uniforms(0, 0, chosen, steps)
    task = "generate" if settings.other else "sample"
    return policy(task, ids[chosen], mask[chosen], torch.tensor(chosen), uniforms, settings, PAD, find_stop=find_stop)


def full_logprobs(lm, rollouts, temperature=1.0):
    """The textbook way: encoder and decoder anew, a softmax over everything."""
    start = torch.full_like(rollouts.response_ids_NT[:, :1], lm.config.decoder_start_token_id)
    logits = lm(
        input_ids=rollouts.encoder_ids_NE,
        attention_mask=rollouts.encoder_mask_NE.long(),
        decoder_input_ids=torch.cat([start, rollouts.response_ids_NT[:, :-1]], dim=1),
        use_cache=False,
    ).logits
    chosen = (logits / temperature).log_softmax(-1).gather(-1, rollouts.response_ids_NT[..., None]).squeeze(-1)
    return chosen.masked_fill(~rollouts.response_mask_NT, 0.0)


@EVERY
@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_resumed_decoder_gives_the_full_models_logits_to_the_last_bit(kind, start):
    lm = tiny_seq2seq(kind)
    decoder = Decoder(lm)
    recorder = InputRecorder(decoder.blocks[start])
    ids, mask = prompts(left=False)
    decoder_ids = torch.randint(0, 256, (len(ids), 9))
    given = {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder_ids, "use_cache": False}
    with torch.no_grad():
        recorder.active = True
        full = lm(**given).logits
        recorder.active = False
        encoded = Encoded(lm.get_encoder()(input_ids=ids, attention_mask=mask.long()).last_hidden_state, mask)
        ones = torch.ones_like(decoder_ids)
        hidden = Top(decoder, start)(recorder.take(), decoder_ids, ones, ones, encoded)
        resumed = Head(lm, decoder.name)(hidden.flatten(0, 1)).view(*decoder_ids.shape, VOCABULARY)
        again = lm(**given).logits
    assert torch.equal(resumed, full)
    assert torch.equal(again, full), "the full model has to be left as it was"


@WAYS
def test_before_training_policy_and_reference_agree_exactly(kind, trained):
    policy = policy_of(kind, trained)
    measured = policy("measure", rollouts_of(policy), 1.0)
    assert torch.equal(measured.logprobs_bT, measured.ref_logprobs_bT)


@WAYS
def test_the_first_ratio_is_exactly_one(kind, trained):
    policy = policy_of(kind, trained, lora_noise=0.1)
    rollouts = rollouts_of(policy, eos=(3, 4, 5))
    measured, updated = policy("measure", rollouts, 0.7), policy("update", rollouts, 0.7)
    assert torch.equal(updated.logprobs_bT, measured.logprobs_bT)
    assert torch.equal(updated.values_bT, measured.values_bT)


@WAYS
def test_cached_trunk_recomputed_trunk_and_full_model_agree_in_values_and_gradients(kind, trained):
    policy = policy_of(kind, trained, lora_noise=0.1)
    rollouts = rollouts_of(policy, eos=(3, 4, 5))
    weights = torch.randn(rollouts.response_mask_NT.shape)
    expected = full_logprobs(policy.lm, rollouts)
    (expected * weights).sum().backward()
    wanted = {name: p.grad.clone() for name, p in policy.backbone.named_parameters() if p.grad is not None}
    policy.zero_grad()
    got = policy("update", rollouts, 1.0).logprobs_bT
    (got * weights).sum().backward()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollouts.sample_logprobs_NT, expected.detach(), atol=1e-5, rtol=0)
    assert wanted.keys() == {name for name, p in policy.backbone.named_parameters() if p.requires_grad}
    for name, parameter in policy.backbone.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)
    given = policy("given", *prompts(), rollouts.response_ids_NT, rollouts.response_mask_NT)
    assert (rollouts.encoder_hidden_NEH is None) == (trained in ("everything", "lora everywhere"))
    if rollouts.encoder_hidden_NEH is not None:
        torch.testing.assert_close(given.encoder_hidden_NEH, rollouts.encoder_hidden_NEH, atol=1e-5, rtol=1e-5)
    assert (given.trunk_NSH is None) == (rollouts.trunk_NSH is None) == (policy.start == 0)
    if policy.start > 0:
        fed = rollouts.inputs[1].bool()
        torch.testing.assert_close(given.trunk_NSH[fed], rollouts.trunk_NSH[fed], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(policy("update", given, 1.0).logprobs_bT, got, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", TRAINED)
def test_gradient_checkpointing_changes_memory_and_not_the_gradient(trained):
    gradients = []
    for checkpointing in (False, True):
        policy = policy_of("t5", trained, gradient_checkpointing=checkpointing)
        measured = policy("update", rollouts_of(policy), 1.0)
        (measured.logprobs_bT.sum() + measured.values_bT.sum()).backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


@EVERY
@pytest.mark.parametrize("trained", ["lora on the last 2", "everything"])
def test_padding_changes_nothing(kind, trained):
    """Neither on the left or the right of the prompt, nor behind the response, nor because of the rows beside."""
    policy = policy_of(kind, trained, lora_noise=0.1)
    rollouts = rollouts_of(policy, eos=tuple(range(40)))
    whole = policy("measure", rollouts, 1.0)
    assert len(set(rollouts.response_mask_NT.sum(-1).tolist())) > 1
    for left in (True, False):
        given = policy("given", *prompts(left=left), rollouts.response_ids_NT, rollouts.response_mask_NT)
        measured = policy("measure", given, 1.0)
        torch.testing.assert_close(measured.logprobs_bT, whole.logprobs_bT, atol=1e-5, rtol=0)
    ids, mask = prompts()
    for row in range(4):
        length = int(rollouts.response_mask_NT[row].sum())
        response = rollouts.response_ids_NT[row : row + 1, :length]
        alone = policy("given", ids[row][mask[row]][None], torch.ones(1, LENGTHS[row]), response, response >= 0)
        single = policy("measure", alone, 1.0)
        torch.testing.assert_close(single.logprobs_bT[0], whole.logprobs_bT[row, :length], atol=1e-5, rtol=0)
        torch.testing.assert_close(single.values_bT[0], whole.values_bT[row, :length], atol=1e-5, rtol=0)


@WAYS
def test_the_reference_never_moves_and_the_frozen_part_neither(kind, trained):
    policy = policy_of(kind, trained)
    rollouts = rollouts_of(policy)
    before = policy("measure", rollouts, 1.0)
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2)
    for _ in range(3):
        (-policy("update", rollouts, 1.0).logprobs_bT.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = policy("measure", rollouts, 1.0)
    assert torch.equal(after.ref_logprobs_bT, before.ref_logprobs_bT)
    assert after.logprobs_bT.sum() > before.logprobs_bT.sum() + 0.1, "the policy has to learn"
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)


@EVERY
def test_what_is_trained_is_the_decoders_last_blocks_and_its_norm(kind):
    policy = policy_of(kind, "last 2 blocks")
    assert (policy.start, policy.encoder_trains) == (1, False)
    trained = {name for name, p in policy.backbone.named_parameters() if p.requires_grad}
    blocks = policy.decoder.blocks_name
    assert all(name.startswith((f"{blocks}.1.", f"{blocks}.2.", f"{policy.decoder.name}.final_")) for name in trained)
    assert not any(p.requires_grad for p in policy.lm.get_input_embeddings().parameters())
    assert not any(p.requires_grad for p in policy.lm.get_output_embeddings().parameters())
    policy = policy_of(kind, "lora on the last 2")
    adapted = {name for name, p in policy.lm.named_parameters() if p.requires_grad}
    assert {name.removeprefix(f"{blocks}.")[0] for name in adapted if name.startswith(blocks)} == {"1", "2"}
    assert all(name.startswith(blocks) for name in adapted)
    layers = {name.split(".lora_")[0].partition(f"{blocks}.2.")[2] for name in adapted} - {""}
    assert len(layers) == {"bart": 10, "t5": 10}.get(kind, 11), layers


@EVERY
def test_greedy_responses_are_those_of_transformers_token_for_token(kind):
    """Rows end at different steps, so that the batch shrinks while it is sampled."""
    # transformers counts the encoder's blocks for the decoder's cache: T5's have to be as many
    policy = policy_of(kind, lora_noise=0.2, changes={} if kind == "bart" else {"num_layers": 3})
    free = rollouts_of(policy, steps=20, do_sample=False).response_ids_NT
    eos = sorted({int(free[0, 2]), int(free[1, 9])})
    got = rollouts_of(policy, steps=20, eos=tuple(eos), do_sample=False)
    ids, mask = prompts(left=False)
    expected = policy.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=PAD,
    )[:, 1:]
    assert torch.equal(got.response_ids_NT, expected[:, : got.response_ids_NT.shape[1]])
    assert got.response_mask_NT.sum(-1).tolist()[0] <= 3
    handed_on = rollouts_of(policy, steps=20, eos=tuple(eos), do_sample=False, other={"num_beams": 1})
    assert torch.equal(handed_on.response_ids_NT, got.response_ids_NT)
    assert torch.equal(handed_on.finish_N, got.finish_N)
    one, other = (policy("measure", rollouts, 1.0).logprobs_bT for rollouts in (got, handed_on))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_row_is_sampled_alone_as_in_a_batch_and_ends_where_it_should():
    policy = policy_of()
    eos = tuple(range(60))
    whole = rollouts_of(policy, steps=12, eos=eos)
    for row in range(4):
        alone = rollouts_of(policy, steps=12, eos=eos, rows=[row])
        assert alone.response_tokens(0) == whole.response_tokens(row)
        tokens = whole.response_tokens(row)
        assert not set(tokens[:-1]) & set(eos)
        ended = tokens[-1] in eos
        assert int(whole.finish_N[row]) == (FinishReason.EOS if ended else FinishReason.LENGTH)
    assert FinishReason.EOS in whole.finish_N.tolist()
    stopped = rollouts_of(policy, steps=12, find_stop=lambda ids: len(ids) == 3, stop_strings=("x",))
    assert stopped.response_mask_NT.sum(-1).tolist() == [3] * 4
    assert set(stopped.finish_N.tolist()) == {FinishReason.STOP_STRING}


def test_rollouts_that_were_sampled_in_parts_are_joined_at_the_widest_prompt():
    policy = policy_of()
    whole = rollouts_of(policy)
    ids, mask = prompts()
    uniforms, settings = row_uniforms(0, 0, range(4), 8), SamplingSettings(8)
    short = policy("sample", ids[2:3, -3:], mask[2:3, -3:], torch.tensor([2]), uniforms[2:3], settings, PAD)
    joined = concatenate([whole.select(torch.tensor([0, 1])), short, whole.select(torch.tensor([3]))], PAD)
    assert torch.equal(joined.encoder_ids_NE, whole.encoder_ids_NE)
    assert torch.equal(joined.encoder_mask_NE, whole.encoder_mask_NE)
    assert joined.prompt_tokens(2) == ids[2][mask[2]].tolist()
    one, other = (policy("measure", rollouts, 1.0).logprobs_bT for rollouts in (joined, whole))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", ["lora on the last 2", "last 2 blocks"])
def test_bf16_trunk_and_the_first_ratio_is_exactly_one_there_too(trained):
    policy = policy_of("t5 1.1", trained, dtype=torch.bfloat16)
    rollouts = rollouts_of(policy)
    measured, updated = policy("measure", rollouts, 1.0), policy("update", rollouts, 1.0)
    assert torch.equal(updated.logprobs_bT, measured.logprobs_bT)
    assert torch.equal(measured.logprobs_bT, measured.ref_logprobs_bT)
    assert (measured.logprobs_bT - rollouts.sample_logprobs_NT).abs().mean() < 0.1


@pytest.mark.parametrize("trained", ["lora on the last 2", "everything"])
@pytest.mark.parametrize("kind", ["t5", "t5 1.1"])
def test_what_is_saved_loads_without_solotune(tmp_path, kind, trained):
    folder = save_tiny_seq2seq(tmp_path / "base", kind)
    config = tiny_seq2seq_config(folder, model={"model_path": str(folder), **TRAINED[trained]})
    policy = build_policy(config)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    policy.save_pretrained(tmp_path / "saved")
    if trained == "everything":
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    else:
        loaded = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(folder), str(tmp_path / "saved"))
        assert loaded.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    rollouts = rollouts_of(policy)
    expected = policy("measure", rollouts, 1.0).logprobs_bT
    torch.testing.assert_close(full_logprobs(loaded, rollouts), expected, atol=1e-5, rtol=0)


def test_a_tied_head_stays_tied_and_frozen_or_trained_with_the_embeddings():
    policy = policy_of("t5", "everything")
    lm = policy.lm
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight is lm.get_encoder().embed_tokens.weight
    reference = policy.reference["lm"]
    assert reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    assert sum(p is lm.get_input_embeddings().weight for p in policy.trainable_parameters()) == 1


MISTAKES = [
    ({"model_arch_type": "seq2seq"}, {}, tiny_lm, "model_arch_type is 'seq2seq'.*causal language model.*to 'causal'"),
    ({"model_arch_type": "causal"}, {}, tiny_seq2seq, "model_arch_type is 'causal'.*an encoder-decoder.*'seq2seq'"),
    ({"num_layers_unfrozen": 4}, {}, tiny_seq2seq, "has 3 blocks"),
    ({}, {"num_value_layers_unfrozen": 1}, tiny_seq2seq, "num_value_layers_unfrozen = 1.*allowed is 0"),
    ({"delta_kwargs": None, "peft_config": {"peft_type": "LORA", "task_type": "CAUSAL_LM"}}, {}, tiny_seq2seq,
     "task_type is .*'SEQ_2_SEQ_LM'"),
    ({"delta_kwargs": {"delta_type": "lora", "modified_modules": ["k_proj"]}}, {}, tiny_seq2seq,
     r"'k_proj' is no linear layer of a T5Block.*layer\.1\.EncDecAttention\.q"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "method", "make", "said"), MISTAKES)
def test_mistakes_are_said(tmp_path, model, method, make, said):
    config = tiny_seq2seq_config(tmp_path, model=model, method=method)
    config.model.model_path = make()
    with pytest.raises(ModelError, match=said):
        build_policy(config)


def test_what_fit_does_not_count_is_said(tmp_path):
    config = tiny_seq2seq_config(tmp_path)
    config.model.model_path = tiny_seq2seq()
    with pytest.raises(ConfigError, match="decoders alone"):
        fit(config)


def test_the_meta_model_has_the_same_tensors():
    config = tiny_seq2seq_config(Path("unused/model"))
    config.model.model_path = tiny_seq2seq()
    real, empty = build_policy(config), build_policy(config, meta=True)
    described = [{n: (p.shape, p.requires_grad) for n, p in policy.named_parameters()} for policy in (real, empty)]
    assert described[0] == described[1]
    assert {p.device.type for p in empty.parameters()} == {"meta"}


def test_a_folder_of_the_other_kind_and_an_unsupported_architecture(tmp_path, tiny_folder):
    folder = save_tiny_seq2seq(tmp_path / "t5")
    for path, kind in ((folder, "causal"), (tiny_folder, "seq2seq")):
        for meta in (False, True):
            config = tiny_seq2seq_config(path, model={"model_path": str(path), "model_arch_type": kind})
            with pytest.raises(ModelError, match=f"model_arch_type is '{kind}'"):
                build_policy(config, meta=meta)
    config = tiny_seq2seq_config(folder)
    config.model.model_path = transformers.PegasusConfig(
        vocab_size=VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    with pytest.raises(ModelError, match="'pegasus' are not supported; allowed are bart, mt5, t5, umt5"):
        build_policy(config)
