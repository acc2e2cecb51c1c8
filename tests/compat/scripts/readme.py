# The lines of trlX's README.
import trlx
from trlx.data.default_configs import default_ppo_config

trainer = trlx.train("gpt2", reward_fn=lambda samples, **kwargs: [sample.count("cats") for sample in samples])
inputs = trainer.tokenizer("Q: Who rules the world? A:", return_tensors="pt")
print("generated", trainer.generate(**inputs, do_sample=True).shape)
trainer.save_pretrained("output_model")

config = default_ppo_config()
config.train.total_steps = 4
config.method.gen_kwargs["max_new_tokens"] = 5
trlx.train(config=config, prompts=["I feel"] * 4, reward_fn=lambda outputs, **kwargs: list(map(len, outputs)))
