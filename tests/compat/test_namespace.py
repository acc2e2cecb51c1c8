"""The trlx namespace: every module imports, and is a face on this project's own objects."""

import importlib
import pkgutil
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import solotune
import solotune.compat.trlx
from solotune.compat import shims
from solotune.compat.script import install
from solotune.errors import ConfigError, DataError, NotYetError
from tests.tiny import byte_tokenizer, save_tiny, tiny_lm
from tests.tiny_seq2seq import save_tiny_seq2seq

install()

NAMES = {  # what trlX's examples, its documentation and scripts of its users import
    "trlx": "train logging",
    "trlx.data.configs": "TRLConfig TrainConfig ModelConfig TokenizerConfig OptimizerConfig SchedulerConfig",
    "trlx.data.default_configs": "TRLConfig PPOConfig ILQLConfig SFTConfig default_ppo_config default_ilql_config "
    "default_sft_config default_nemo_20b_config default_nemo_2b_config default_nemo_1_3b_config",
    "trlx.data.method_configs": "MethodConfig register_method get_method",
    "trlx.models.modeling_ppo": "PPOConfig AdaptiveKLController FixedKLController AutoModelForCausalLMWithValueHead "
    "AutoModelForCausalLMWithHydraValueHead AutoModelForSeq2SeqLMWithValueHead ModelBranch hf_get_branch_class "
    "AutoModelForSeq2SeqLMWithHydraValueHead Seq2SeqLMOutputWithValue",
    "trlx.models.modeling_ilql": "ILQLConfig ILQLHeads AutoModelForCausalLMWithILQLHeads batched_index_select "
    "topk_mask",
    "trlx.trainer": "register_trainer BaseRLTrainer",
    "trlx.trainer.accelerate_base_trainer": "AccelerateRLTrainer",
    "trlx.trainer.accelerate_ppo_trainer": "AcceleratePPOTrainer",
    "trlx.trainer.accelerate_ilql_trainer": "AccelerateILQLTrainer",
    "trlx.trainer.accelerate_sft_trainer": "AccelerateSFTTrainer",
    "trlx.trainer.accelerate_rft_trainer": "AccelerateRFTTrainer RFTConfig",
    "trlx.trainer.nemo_ppo_trainer": "NeMoPPOTrainer",
    "trlx.pipeline": "MiniBatchIterator register_datapipeline BasePipeline",
    "trlx.pipeline.offline_pipeline": "PromptPipeline DialogStore DialogMessage tokenize_dialogue ILQLRolloutStorage",
    "trlx.pipeline.ppo_pipeline": "PPORolloutStorage",
    "trlx.utils": "set_seed get_optimizer_class get_scheduler_class Clock tree_map to_device significant "
    "infinite_dataloader",
    "trlx.utils.modeling": "make_head freeze_bottom_causal_layers hf_get_decoder_blocks hf_get_lm_head whiten "
    "RunningMoments logprobs_of_labels flatten_dict get_tensor_stats",
    "trlx.utils.loading": "get_trainer get_pipeline",
    "trlx.utils.logging": "get_logger set_verbosity INFO",
    "trlx.sweep": "main",
    "trlx.reference": "main",
}


@pytest.mark.parametrize("module", NAMES)
def test_what_scripts_import_is_there(module):
    imported = importlib.import_module(module)
    assert imported is importlib.import_module(f"solotune.compat.{module}")
    assert [name for name in NAMES[module].split() if not hasattr(imported, name)] == []


def test_every_module_imports_and_keeps_its_own_name():
    for found in pkgutil.walk_packages(solotune.compat.trlx.__path__, "trlx."):
        module = importlib.import_module(found.name)
        assert module.__name__ == f"solotune.compat.{found.name}"
        assert module.__spec__.name == module.__name__
    with pytest.raises(ModuleNotFoundError, match=r"trlx\.nothing"):
        importlib.import_module("trlx.nothing")


def test_what_is_not_there_says_so_when_it_is_used_and_not_before():
    from trlx.trainer.nemo_ppo_trainer import NeMoPPOTrainer as Absent

    class Mine(Absent):
        pass

    for used in (lambda: Absent(8, 9), lambda: Absent.from_pretrained("x"), lambda: Mine(config=None)):
        with pytest.raises(NotYetError, match="NeMo is not supported"):
            used()


def test_ilql_heads_and_the_model_with_them(tmp_path):
    from trlx.models.modeling_ilql import AutoModelForCausalLMWithILQLHeads, ILQLHeads, topk_mask

    heads, hidden = ILQLHeads(8, 11, two_qs=True, alpha=0.5), torch.randn(2, 5, 8)
    torch.nn.init.normal_(heads.q_heads[0].outer.weight)
    places = torch.tensor([[0, 2], [1, 4]])
    qs, targets, values = heads(hidden, states_ixs=places, actions_ixs=places)
    assert [q.shape for q in (*qs, *targets)] == [(2, 2, 11)] * 4
    assert values.shape == (2, 2, 1)
    torch.testing.assert_close(qs[0][1, 0], heads.q_heads[0](hidden[1, 1][None])[0])
    heads.sync_target_q_heads()
    torch.testing.assert_close(heads(hidden)[1][0], 0.5 * heads(hidden)[0][0])
    assert topk_mask(torch.tensor([[3.0, 1.0, 2.0]]), 2).isinf().tolist() == [[False, True, False]]

    model = AutoModelForCausalLMWithILQLHeads.from_pretrained(tiny_lm("gpt2"), two_qs=False)
    torch.nn.init.normal_(model.ilql_heads.q_heads[0].outer.weight)
    ids = torch.randint(0, 256, (2, 6))
    output = model(ids)
    torch.testing.assert_close(output.logits, model.base_model(input_ids=ids).logits)
    assert (len(output.qs), output.vs.shape) == (1, (2, 6, 1))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLMWithILQLHeads.from_pretrained(str(tmp_path / "saved"), two_qs=False)
    torch.testing.assert_close(again(ids).qs[0], output.qs[0])


def test_dialogues_as_trlx_tokenises_and_stores_them():
    from trlx.pipeline.offline_pipeline import DialogMessage, DialogStore, tokenize_dialogue

    tokenizer = byte_tokenizer()
    dialogues = [tokenize_dialogue(d, tokenizer, max_length=16) for d in (("ab", "c"), "d")]
    assert isinstance(dialogues[0][0], DialogMessage)
    assert [phrase.is_output for phrase in dialogues[0]] == [False, True]
    (batch,) = DialogStore(dialogues, tokenizer).create_loader(2)
    learned = batch["labels"] != -100
    assert (batch["labels"][learned] == batch["input_ids"][learned]).all()
    assert learned.sum(1).tolist() == [2, 2], "the outputs, each with its EOS"


def test_overriding_what_is_never_called_is_an_error():
    from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer

    with pytest.raises(NotYetError, match=r"Mine\.make_experience would never be called.*sample_rollouts"):
        type("Mine", (AcceleratePPOTrainer,), {"make_experience": lambda self: None})


# ---- configurations -----------------------------------------------------------------------------------------------


def test_defaults_are_trlxs():
    from trlx.data.default_configs import default_ilql_config, default_ppo_config, default_sft_config

    ppo, ilql, sft = default_ppo_config(), default_ilql_config(), default_sft_config()
    assert (ppo.train.tracker, ppo.train.checkpoint_dir, ppo.train.project_name) == ("wandb", "ckpts", "trlx")
    assert (ppo.train.seq_length, ppo.train.batch_size, ppo.optimizer.kwargs["lr"]) == (1024, 32, 3e-5)
    assert (ilql.train.seq_length, ilql.train.batch_size, ilql.optimizer.kwargs["lr"]) == (64, 128, 5e-5)
    assert (sft.train.seq_length, sft.train.batch_size, sft.optimizer.kwargs["lr"]) == (1024, 8, 1e-4)
    assert solotune.default_ppo_config().train.tracker is None, "this project's own defaults stay quiet"


def test_an_old_configuration_is_read_as_what_became_of_it(caplog):
    from trlx.data.configs import TRLConfig
    from trlx.data.default_configs import default_ppo_config

    old = default_ppo_config().to_dict()
    path = old.pop("tokenizer")["tokenizer_path"]
    old["model"] |= {"tokenizer_path": path, "model_type": "AcceleratePPOModel"}
    del old["train"]["tracker"]
    old["train"] |= {"orchestrator": "PPOOrchestrator", "trackers": ("tensorboard",), "learning_rate_init": 1e-6}
    before = repr(old)
    shims._told.clear()
    with caplog.at_level("INFO", logger="solotune"):
        config = TRLConfig.from_dict(old)
        TRLConfig.from_dict(old)
    assert repr(old) == before
    assert (config.tokenizer.tokenizer_path, config.train.tracker) == (path, "tensorboard")
    assert config.optimizer.kwargs["lr"] == 1e-6
    assert len([line for line in caplog.messages if line.startswith("trlX: ")]) == 5, "each shim is told once"


def test_batches_that_do_not_come_out_even_are_trlxs_to_allow():
    from trlx.data.default_configs import default_ppo_config

    randomwalks = {"train": {"batch_size": 100}}
    assert default_ppo_config().evolve(**randomwalks).train.batch_size == 100
    assert solotune.config.describe_steps(default_ppo_config().evolve(**randomwalks)).steps_per_round == 8
    with pytest.raises(ConfigError, match="must be a multiple"):
        solotune.default_ppo_config().evolve(**randomwalks)


# ---- pipelines and tools ------------------------------------------------------------------------------------------


def test_prompt_pipeline():
    from trlx.pipeline.offline_pipeline import PromptPipeline

    given = [{"prompt": "ab", "n": 1}, {"prompt": "cdef", "n": 2}]
    pipeline = PromptPipeline(given, 8, byte_tokenizer())
    assert "prompt" in given[0], "the caller's dicts are not changed"
    (batch,) = pipeline.create_loader(2)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch["n"] == [1, 2]
    with pytest.raises(DataError, match="prompt 1 has 4 tokens"):
        PromptPipeline(given, 3, byte_tokenizer())


def test_micro_batches():
    from trlx.pipeline import MiniBatchIterator

    @dataclass
    class Batch:
        x: torch.Tensor
        names: list

    rows = torch.arange(10)
    batches = [Batch(rows[:6], list("abcdef")), Batch(rows[6:], list("ghij"))]
    first, second = MiniBatchIterator(batches, 2, 3)
    assert [part.x.tolist() for part in first] == [[0, 1], [2, 3], [4, 5]]
    assert [part.names for part in second] == [["g", "h"], ["i", "j"]]
    ((only,),) = MiniBatchIterator([{"x": rows[:3]}], 4, 1)
    assert only["x"].tolist() == [0, 1, 2]
    assert list(MiniBatchIterator([{"x": []}], 4, 1)) == []


def test_tools():
    from trlx.utils import Clock, get_optimizer_class, get_scheduler_class, significant, tree_map
    from trlx.utils.modeling import flatten_dict, get_tensor_stats, logprobs_of_labels, whiten

    assert get_optimizer_class("adamw") is torch.optim.AdamW
    assert get_scheduler_class("linear") is torch.optim.lr_scheduler.LinearLR
    with pytest.raises(ConfigError, match="did you mean adamw"):
        get_optimizer_class("adamww")
    assert [significant(x) for x in (0.01234, 1234, "a", 0)] == [0.0123, 1230, "a", 0]
    assert tree_map(lambda x: x + 1, {"a": [1, 2], "b": (3,)}) == {"a": [2, 3], "b": (4,)}
    assert flatten_dict({"a": {"b": 1}, "c": 2}) == {"a/b": 1, "c": 2}
    clock = Clock()
    clock.tick(10)
    assert clock.get_stat(1000, reset=True) >= 0
    xs = torch.randn(4, 5)
    assert whiten(xs).mean().abs() < 1e-6
    assert (whiten(xs, shift_mean=False).mean() - xs.mean()).abs() < 1e-6
    mask = torch.tensor([[1, 1, 0]])
    stats = get_tensor_stats(torch.tensor([[1.0, 3.0, 99.0]]), mask, mask.sum())
    assert stats == {"mean": 2.0, "min": 1.0, "max": 3.0, "std": 1.0}
    logits, labels = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    expected = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(logprobs_of_labels(logits, labels).flatten(), expected)


# ---- value-head models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [None, {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}], ids=["k", "lora"])
def test_value_head_models(tmp_path, peft):
    from trlx.models.modeling_ppo import AutoModelForCausalLMWithHydraValueHead

    folder = save_tiny(tmp_path / "model", "llama")
    model = AutoModelForCausalLMWithHydraValueHead.from_pretrained(str(folder), num_layers_unfrozen=2, peft_config=peft)
    ids = torch.randint(0, 256, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    kept = mask.bool()
    out = model(ids, attention_mask=mask)
    assert out.value.shape == (2, 6)
    torch.testing.assert_close(out.logits[kept], expected[kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.forward_hydra(ids, attention_mask=mask), out.logits)
    (out.logits.sum() + out.value.sum()).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.base_model.parameters())
    with torch.no_grad():
        for parameter in model.policy.trainable_parameters():
            parameter.add_(0.1)
    tuned = model(ids, attention_mask=mask)
    assert (tuned.logits - out.logits)[kept].abs().max() > 0.01
    torch.testing.assert_close(
        model.forward_hydra(ids, attention_mask=mask)[kept], expected[kept], atol=1e-5, rtol=1e-5
    )
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLMWithHydraValueHead.from_pretrained(str(tmp_path / "saved"), num_layers_unfrozen=2)
    read = again(ids, attention_mask=mask)
    torch.testing.assert_close(read.logits[kept], tuned.logits[kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(read.value[kept], tuned.value[kept], atol=1e-5, rtol=1e-5)
    assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False).shape == (2, 8)


@pytest.mark.parametrize("peft", [None, {"peft_type": "LORA", "r": 2, "target_modules": ["q"]}], ids=["k", "lora"])
def test_value_head_models_of_an_encoder_decoder(tmp_path, peft):
    from trlx.models.modeling_ppo import AutoModelForSeq2SeqLMWithHydraValueHead

    folder = save_tiny_seq2seq(tmp_path / "model", "t5", num_layers=3)
    load = AutoModelForSeq2SeqLMWithHydraValueHead.from_pretrained
    model = load(str(folder), num_layers_unfrozen=2, peft_config=peft)
    ids, decoder_ids = torch.randint(0, 256, (2, 6)), torch.randint(0, 256, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    with torch.no_grad():
        expected = AutoModelForSeq2SeqLM.from_pretrained(folder)(**given).logits
    out = model(**given)
    assert out.value.shape == (2, 4)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.forward_hydra(**given), out.logits)
    (out.logits.sum() + out.value.sum()).backward()
    with torch.no_grad():
        for parameter in model.policy.trainable_parameters():
            parameter.add_(0.1)
    tuned = model(**given)
    assert (tuned.logits - out.logits).abs().max() > 0.01
    torch.testing.assert_close(model.forward_hydra(**given), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    read = load(str(tmp_path / "saved"), num_layers_unfrozen=2)(**given)
    torch.testing.assert_close(read.logits, tuned.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read.value, tuned.value, atol=1e-4, rtol=1e-4)
    assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False).shape == (2, 3)
    with pytest.raises(ConfigError, match="decoder_input_ids is missing"):
        model(ids)


def test_a_model_given_as_one(tmp_path):
    from trlx.models.modeling_ppo import AutoModelForCausalLMWithValueHead

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_lm("gpt2"), num_layers_unfrozen=1)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 259)


def test_an_encoder_decoder_with_ilql_heads(tmp_path):
    from trlx.models.modeling_ilql import AutoModelForSeq2SeqLMWithILQLHeads

    folder = save_tiny_seq2seq(tmp_path / "model", "t5")
    model = AutoModelForSeq2SeqLMWithILQLHeads.from_pretrained(str(folder))
    torch.nn.init.normal_(model.ilql_heads.q_heads[1].outer.weight)
    ids, outputs = torch.randint(0, 256, (2, 6)), torch.randint(0, 256, (2, 4))
    found = model(ids, torch.ones_like(ids), decoder_input_ids=outputs)
    plain = model.base_model(input_ids=ids, decoder_input_ids=outputs, output_hidden_states=True)
    torch.testing.assert_close(found.logits, plain.logits)
    assert (len(found.qs), found.vs.shape) == (2, (2, 4, 1))
    last = plain.decoder_hidden_states[-1][1, 3]
    torch.testing.assert_close(found.qs[1][1, 3], model.ilql_heads.q_heads[1](last[None])[0])
