# SFT on dialogues of two sides, LoRA, stop sequences, as people wrote it for trlX.
import trlx
from peft import LoraConfig
from peft.utils.config import TaskType
from trlx.data.configs import ModelConfig, OptimizerConfig, SchedulerConfig, TokenizerConfig, TrainConfig, TRLConfig
from trlx.models.modeling_ppo import PPOConfig  # noqa
from trlx.trainer.accelerate_sft_trainer import AccelerateSFTTrainer
from trlx.data.default_configs import SFTConfig

config = TRLConfig(
    train=TrainConfig(
        seq_length=64, epochs=3, total_steps=6, batch_size=4, checkpoint_interval=1000, eval_interval=3,
        pipeline="PromptPipeline", trainer="AccelerateSFTTrainer", tracker=None, checkpoint_dir="ckpts/dialogue",
    ),
    model=ModelConfig(
        model_path="gpt2", num_layers_unfrozen=-1,
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type=TaskType.CAUSAL_LM, target_modules=["c_attn"]),
    ),
    tokenizer=TokenizerConfig(tokenizer_path="gpt2", truncation_side="left"),
    optimizer=OptimizerConfig(name="adamw", kwargs=dict(lr=1e-2, betas=(0.9, 0.95), eps=1.0e-8, weight_decay=1.0e-6)),
    scheduler=SchedulerConfig(name="cosine_annealing", kwargs=dict(T_max=1e4, eta_min=1e-2)),
    method=SFTConfig(name="sftconfig", gen_kwargs=dict(max_new_tokens=12, top_k=20, top_p=1.0, do_sample=True)),
)

if __name__ == "__main__":
    dialogues = [
        ["Human: hello\n", "Assistant: hello to you\n", "Human: how are you?\n", "Assistant: well\n"],
        ("Human: what is this?\n", "Assistant: a question\n"),
    ] * 8
    trainer = trlx.train(
        samples=dialogues,
        eval_prompts=[{"prompt": "Human: hello\n", "original_output": "hello to you"}] * 3,
        metric_fn=lambda **kwargs: {"length": [float(len(o)) for o in kwargs["outputs"]], "seen": float(len(kwargs["original_output"]))},
        stop_sequences=["Human:", "a"],
        config=config,
    )
    assert isinstance(trainer, AccelerateSFTTrainer) or trainer is not None
    print("loss fell:", trainer.steps_done)
