# SFT on the positive film reviews, as people wrote it for trlX.
import json
import sys
from typing import Dict, List

import trlx
from datasets import load_dataset
from transformers import pipeline
from trlx.data.default_configs import TRLConfig, default_sft_config


def main(hparams={}):
    config = TRLConfig.update(default_sft_config().to_dict(), hparams)
    imdb = load_dataset("imdb", split="train")
    imdb = imdb.filter(lambda sample: sample["label"] == 1)
    sentiment = pipeline("sentiment-analysis", "lvwerra/distilbert-imdb", top_k=2, truncation=True, device=-1)

    def metric_fn(samples: List[str], **kwargs) -> Dict[str, List[float]]:
        return {"sentiments": [max(s["score"] for s in scores) for scores in sentiment(samples)]}

    trainer = trlx.train(
        samples=imdb["text"],
        eval_prompts=["the film was"] * 8,
        metric_fn=metric_fn,
        config=config,
    )
    trainer.save_pretrained("reviews-sft")


if __name__ == "__main__":
    main({} if len(sys.argv) == 1 else json.loads(sys.argv[1]))
