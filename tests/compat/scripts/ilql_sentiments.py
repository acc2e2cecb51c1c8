# ILQL on labelled film reviews, at several betas of decoding, as people wrote it for trlX.
import json
import sys

import trlx
from datasets import load_dataset
from transformers import pipeline
from trlx.data.default_configs import TRLConfig, default_ilql_config

default_config = default_ilql_config()


def main(hparams={}):
    config = TRLConfig.update(default_config, hparams)
    sentiment = pipeline("sentiment-analysis", "lvwerra/distilbert-imdb", top_k=2, truncation=True, device=-1)

    def metric_fn(samples, **kwargs):
        scores = [{s["label"]: s["score"] for s in scores}["POSITIVE"] for scores in sentiment(samples)]
        return {"sentiments": scores}

    imdb = load_dataset("imdb", split="train+test")
    trainer = trlx.train(
        samples=imdb["text"],
        rewards=imdb["label"],
        eval_prompts=["the film", "the plot", "a story"] * 4,
        metric_fn=metric_fn,
        config=config,
    )
    print("sentiments:", trainer.evaluate().metrics["sentiments"])


if __name__ == "__main__":
    main({} if len(sys.argv) == 1 else json.loads(sys.argv[1]))
