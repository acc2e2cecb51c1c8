"""The parameter tree counts what PyTorch and PEFT count, folds only what is alike, and draws it readably."""

import io
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, OPTConfig

from solotune.models.ilql import Heads
from solotune.models.tree import format_bytes, parameter_tree

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


def tiny_opt(layers: int = 6, **kwargs):
    return AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=layers,
            ffn_dim=32,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            **kwargs,
        )
    )


def with_lora(model, last_blocks: list[int], targets: list[str] | None = None):
    config = LoraConfig(r=2, target_modules=targets or ATTENTION, layers_to_transform=last_blocks)
    return get_peft_model(model, config)


@pytest.fixture(scope="module")
def opt_1_3b():
    config = OPTConfig(
        vocab_size=50272,
        hidden_size=2048,
        num_hidden_layers=24,
        ffn_dim=8192,
        num_attention_heads=32,
        max_position_embeddings=2048,
        word_embed_proj_dim=2048,
    )
    lora = LoraConfig(r=8, target_modules=ATTENTION, layers_to_transform=[22, 23])
    with torch.device("meta"):
        return get_peft_model(AutoModelForCausalLM.from_config(config), lora)


def test_opt_1_3b_ends_with_the_two_promised_lines(opt_1_3b):
    head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    lines = parameter_tree(opt_1_3b, nn.ModuleDict({"value_head": head})).text().splitlines()
    assert lines[-2] == "Trainable 262,144 of 1,316,020,224 parameters (0.0199 %)"
    assert lines[-1] == "Value head: 49 trainable"


def test_opt_1_3b_is_folded_by_trainability_and_compact(opt_1_3b):
    text = parameter_tree(opt_1_3b).text()
    assert "0-21 (OPTDecoderLayer) x22" in text
    assert "22-23 (OPTDecoderLayer) x2" in text
    assert len(text.splitlines()) < 40
    assert max(map(len, text.splitlines())) <= 110


def test_peft_wrapper_levels_are_hidden_and_adapter_tensors_shown(opt_1_3b):
    text = parameter_tree(opt_1_3b).text()
    assert text.startswith("OPTForCausalLM ")
    for hidden in ("base_model", "base_layer", "PeftModel", "LoraModel", "ModuleDict", "default"):
        assert hidden not in text
    assert re.search(r"lora_A \(Linear\)  weight \[8, 2048\]\*", text)
    assert re.search(r"lora_B \(Linear\)  weight \[2048, 8\]\*", text)
    assert "(Linear + LoRA)  weight [2048, 2048], bias [2048]\n" in text  # frozen: no mark


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_opt(),
        lambda: tiny_opt(tie_word_embeddings=False),
        lambda: with_lora(tiny_opt(), [4, 5]),
        lambda: with_lora(
            AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=64)),
            [2],
            ["c_attn", "c_proj"],
        ),
        lambda: with_lora(
            AutoModelForCausalLM.from_config(
                LlamaConfig(
                    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=64
                )
            ),
            [1, 2],
            ["q_proj", "down_proj"],
        ),
        lambda: get_peft_model(
            AutoModelForCausalLM.from_config(
                GemmaConfig(
                    hidden_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                    intermediate_size=24,
                    vocab_size=64,
                )
            ),
            LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], use_dora=False),
        ),
    ],
)
def test_sums_are_pytorchs_own(build):
    model = build()
    tree = parameter_tree(model)
    parameters = list(model.parameters())  # PyTorch lists a tied tensor once
    assert tree.total == sum(p.numel() for p in parameters)
    assert tree.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert tree.root.nbytes == sum(p.numel() * p.element_size() for p in parameters)


def test_folded_lines_add_up_to_their_parent():
    tree = parameter_tree(with_lora(tiny_opt(), [4, 5]))

    def check(node):
        own = sum(torch.Size(t.shape).numel() for t in node.tensors if not t.tied_to) * len(node.names)
        if len(node.names) == 1:
            assert node.total == own + sum(child.total for child in node.children)
        else:
            assert node.total == own + len(node.names) * sum(child.total for child in node.children)
        for child in node.children:
            check(child)

    check(tree.root)


def test_one_trainable_bias_keeps_a_block_apart():
    model = tiny_opt(layers=5).requires_grad_(False)
    model.model.decoder.layers[2].fc1.bias.requires_grad_(True)
    text = parameter_tree(model).text()
    for line in ("0-1 (OPTDecoderLayer) x2", "2 (OPTDecoderLayer)  ", "3-4 (OPTDecoderLayer) x2", "bias [32]*"):
        assert line in text
    assert text.count("*") == 2  # the tensor and the legend


def test_other_shapes_and_other_dtypes_are_not_folded():
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(4, 5).to(torch.bfloat16)])
    names = [child.names for child in parameter_tree(blocks).root.children]
    assert names == [("0", "1"), ("2",), ("3",)]


def test_a_gap_in_the_numbers_is_not_folded_over():
    children = parameter_tree(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))).root.children
    assert [child.names for child in children] == [("0",), ("2",)]


def test_tied_tensor_is_counted_once_and_says_where():
    tied, untied = parameter_tree(tiny_opt()), parameter_tree(tiny_opt(tie_word_embeddings=False))
    assert untied.total - tied.total == 64 * 16
    assert "lm_head (Linear)  weight [64, 16]* tied to model.decoder.embed_tokens.weight" in tied.text()
    assert "tied to" not in untied.text()


def test_blocks_that_share_one_module_are_counted_once():
    block = nn.Linear(3, 3)
    tree = parameter_tree(nn.ModuleList([block, block, block]))
    assert tree.total == 12
    assert [child.names for child in tree.root.children] == [("0",), ("1", "2")]


def test_buffers_are_not_counted():
    assert parameter_tree(nn.BatchNorm1d(7)).total == 14


def test_second_adapter_is_shown_by_its_name():
    model = with_lora(tiny_opt(layers=2), [1])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1]))
    text = parameter_tree(model).text()
    assert "lora_A.other (Linear)  weight [3, 16]" in text
    assert "lora_A (Linear)  weight [2, 16]*" in text


def test_4_bit_weight_counts_elements_and_weighs_its_bytes():
    layer = nn.Linear(8, 8, bias=False)
    packed = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = nn.Module()
    packed.quant_state.shape = torch.Size([8, 8])
    layer.weight = packed
    tree = parameter_tree(layer)
    assert (tree.total, tree.root.nbytes) == (64, 32)


def test_no_value_head_and_no_parameters():
    lines = parameter_tree(nn.ReLU()).text().splitlines()
    assert lines[-1] == "Trainable 0 of 0 parameters (0.0000 %)"


def test_each_head_that_is_trained_has_a_sum_of_its_own():
    heads = Heads(hidden_size=4, vocabulary=6)
    tree = parameter_tree(nn.Linear(2, 2), nn.ModuleDict(dict(heads.named_children())))
    lines = tree.text().splitlines()
    assert any(line.startswith("target_q_heads (ModuleList)  188, 752 B") for line in lines)
    assert lines[-3:] == [
        "Trainable 6 of 6 parameters (100.0000 %)",
        "Value head: 49 trainable",  # 4 x 8 + 8, 8 + 1
        "Q heads: 188 trainable",  # twice 4 x 8 + 8, 8 x 6 + 6
    ]


def printed(tree, **kwargs) -> str:
    out = io.StringIO()
    tree.print(Console(file=out, **kwargs))
    return out.getvalue()


def test_print_is_the_text_unbroken_at_any_width(opt_1_3b):
    tree = parameter_tree(opt_1_3b)
    assert printed(tree, width=30) == tree.text() + "\n"


def test_print_colours_what_is_trained(opt_1_3b):
    out = printed(parameter_tree(opt_1_3b), force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;32mweight [8, 2048]" in out
    assert "\x1b[1;32mweight [50272, 2048]" not in out


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (16_384, "16.38 kB"), (5_264_080_896, "5.26 GB")])
def test_bytes_in_decimal_units(count, text):
    assert format_bytes(count) == text
