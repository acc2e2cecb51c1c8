"""Good, bad and plain words, a tokenizer for them, and the size of the models that read them."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

GOOD = ["good", "great", "fine", "superb", "lovely"]
BAD = ["bad", "awful", "poor", "dire", "dull"]
PLAIN = ["the", "film", "is", "and", "a", "story", "with", "actors", "that", "was", "it", "plot"]
SPECIAL = ["<pad>", "<unk>", "<cls>", "<sep>"]
VOCABULARY = SPECIAL + GOOD + BAD + PLAIN


def word_tokenizer(template: str, **named: str) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<cls>", vocab["<cls>"]), ("<sep>", vocab["<sep>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", model_max_length=32, **named)


def bert_config(**changes) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=32, pad_token_id=0, **sizes, **changes)


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
