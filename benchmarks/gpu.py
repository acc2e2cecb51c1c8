"""What one GPU does with the classic experiment, and with a 7B model.

    python benchmarks/gpu.py --out benchmarks/results/gpu-h100.json
    python benchmarks/gpu.py --device cpu --shape tiny --out tiny.json     # the same code, in the tests

Random weights of the real shapes, no network; needs torch, transformers, peft, accelerate, safetensors and numpy only.
Its parts, each a process of its own, each left out by `--skip`, and each of which that fails says so in the JSON:

    round     a PPO round of OPT-1.3B (LoRA r=8 on the attention of 2 of 24 blocks, 128 rollouts of 40 tokens, 16
              updates) by phase, median after warm-up, extrapolated to the classic run's 625 rounds; peak memory
    decode    tokens a second at batch 1, 32, 128, against transformers.generate, and against the memory bandwidth
              that a copy reaches on this card
    parity    greedy output of tiny models in fp32 equals transformers.generate token for token, with captured steps
    7b        LLaMA-7B in bf16: a batch of 32 x (64 + 64) tokens, LoRA r=16 on all linear layers
    7b-nf4    the same with the frozen weights in 4 bits, where bitsandbytes is installed
    learn     (with --model FOLDER) thirty rounds of PPO on a real model, for a reward that counts a letter
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, OPTConfig

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from shapes import KL_COEF, LEARNING_RATE, LORA_ALPHA, LORA_R, LORA_TARGETS, PPO_EPOCHS, SHAPES, Shape  # noqa: E402

from solotune.algorithms import gae, k1, ppo_loss, token_rewards, whiten  # noqa: E402
from solotune.models.adapters import linear_names  # noqa: E402
from solotune.models.policy import Measured, PolicyModel  # noqa: E402
from solotune.models.products import allow_tf32_beside, use_fastest_products  # noqa: E402
from solotune.models.split import Decoder, Head  # noqa: E402
from solotune.rollout.draw import row_uniforms  # noqa: E402
from solotune.rollout.masks import PARITY_TESTED  # noqa: E402
from solotune.rollout.records import Rollouts  # noqa: E402
from solotune.rollout.settings import SamplingSettings  # noqa: E402
from solotune.rollout.static import StaticSampler  # noqa: E402

CLASSIC_ROUNDS = 625
PAD = 1


class Phases:
    """Seconds by phase; queued work is waited for at the end of each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        synchronize(self._device)
        start = time.perf_counter()
        result = work()
        synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(device: torch.device) -> dict[str, int]:
    """Most memory held so far: allocated tensors, and these with what torch keeps for later (among it the temporaries
    of captured steps); on a CPU the process's."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_memory_bytes": int(allocated), "reserved_memory_bytes": int(reserved)}
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()  # a policy and its hooks refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class Round:
    """One round of PPO, the project's passes and formulas in the trainer's order."""

    def __init__(self, policy: PolicyModel, shape: Shape, micro_batch: int | None = None, seed: int = 0) -> None:
        self.policy, self.shape, self.seed = policy, shape, seed
        self.micro_batch = micro_batch or shape.batch_size
        self.device = next(policy.value_head.parameters()).device
        self.parameters = policy.trainable_parameters()
        fused = {"fused": True} if self.device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), **fused)
        self.settings = SamplingSettings(shape.new_tokens)
        self.played = 0
        self.largest_gap = 0.0
        allow_tf32_beside(p for p in policy.parameters() if not p.requires_grad)

    def seen(self) -> dict[str, Any]:
        """Whether the steps were replayed, and how far the log-prob of a token when it was drawn was from the measured
        one, at most: with a stale weight, mask or position it would be nats."""
        return {"is_captured": is_captured(self.policy), "largest_logprob_gap": self.largest_gap}

    def prompts(self) -> tuple[Tensor, Tensor]:
        size = (self.shape.rollouts, self.shape.prompt_tokens)
        ids = torch.randint(3, self.shape.vocabulary, size, device=self.device)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def play(self, score: Callable[[Rollouts], Tensor] | None = None) -> tuple[dict[str, float], float]:
        """Seconds by phase, and the mean score."""
        phases, n = Phases(self.device), self.shape.rollouts
        ids, mask = self.prompts()
        uniforms = row_uniforms(self.seed, 0, range(self.played * n, (self.played + 1) * n), self.shape.new_tokens)
        index = torch.arange(n, device=self.device)
        rollouts: Rollouts = phases.run(
            "sample", lambda: self.policy("sample", ids, mask, index, uniforms, self.settings, PAD)
        )
        scores = phases.run("score", lambda: (score or lengths)(rollouts))
        measured = phases.run("measure", lambda: self._measure(rollouts))
        gap_NT = (measured.logprobs_bT - rollouts.sample_logprobs_NT).abs()  # both zero on padding
        self.largest_gap = max(self.largest_gap, float(gap_NT.max()))
        credit = phases.run("credit", lambda: self._credit(rollouts, scores, measured))
        phases.run("update", lambda: self._update(rollouts, measured, *credit))
        self.played += 1
        return phases.seconds, float(scores.mean())

    @torch.no_grad()
    def _measure(self, rollouts: Rollouts) -> Measured:
        rows = torch.arange(rollouts.n_rollouts, device=self.device).split(self.micro_batch)
        parts = [self.policy("measure", rollouts.select(part), 1.0) for part in rows]
        return Measured._make(torch.cat(column) for column in zip(*parts, strict=True))

    def _credit(self, rollouts: Rollouts, scores: Tensor, measured: Measured) -> tuple[Tensor, Tensor]:
        mask = rollouts.response_mask_NT
        assert measured.ref_logprobs_bT is not None
        kl = k1(measured.logprobs_bT, measured.ref_logprobs_bT, mask)
        advantages, returns = gae(token_rewards(scores, kl, KL_COEF, mask), measured.values_bT, mask, 1.0, 0.95)
        return whiten(advantages, mask), returns

    def _update(self, rollouts: Rollouts, measured: Measured, advantages: Tensor, returns: Tensor) -> None:
        for _ in range(PPO_EPOCHS):
            order = torch.randperm(rollouts.n_rollouts, device=self.device)
            for rows in order.split(self.shape.batch_size):
                self.step(rollouts, measured, advantages, returns, rows)

    def step(self, rollouts: Rollouts, measured: Measured, advantages: Tensor, returns: Tensor, rows: Tensor) -> None:
        tokens = rollouts.response_mask_NT[rows].sum()
        for part in rows.split(self.micro_batch):
            now = self.policy("update", rollouts.select(part), 1.0)
            ppo_loss(
                now.logprobs_bT, now.values_bT, measured.logprobs_bT[part], measured.values_bT[part], advantages[part],
                returns[part], rollouts.response_mask_NT[part], cliprange=0.2, cliprange_value=0.2, vf_coef=1.0,
                denominator=tokens,
            ).loss.backward()  # fmt: skip
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def lengths(rollouts: Rollouts) -> Tensor:
    return rollouts.response_mask_NT.float().mean(-1)


def lora(lm: Any, r: int, alpha: int, targets: Any, blocks: list[int] | None) -> Any:
    """LoRA in fp32 on a frozen model, with its B random: a fresh one would change nothing."""
    lm.requires_grad_(False)
    pattern = Decoder(lm).list_name if blocks is not None else None
    config = LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=targets, layers_to_transform=blocks,
        layers_pattern=pattern,
    )  # fmt: skip
    tuned = get_peft_model(lm, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in tuned.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return tuned


def classic_policy(shape: Shape, device: torch.device, dtype: torch.dtype) -> PolicyModel:
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(OPTConfig(**shape.opt_config()), dtype=dtype)
    return PolicyModel(lora(lm, LORA_R, LORA_ALPHA, list(LORA_TARGETS), shape.lora_blocks))


def part_round(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    forget_peak(device)
    game = Round(classic_policy(shape, device, dtype), shape)
    for _ in range(3):
        game.play()
    played = [game.play()[0] for _ in range(rounds)]
    by_phase = {name: statistics.median(seconds[name] for seconds in played) for name in played[0]}
    seconds = statistics.median(sum(each.values()) for each in played)
    return {
        "rounds": rounds,
        "seconds_per_round": seconds,
        "seconds_by_phase": by_phase,
        "seconds_per_update": by_phase["update"] / shape.updates_per_round,
        "tokens_per_second": shape.rollouts * shape.new_tokens / seconds,
        "seconds_of_625_rounds": CLASSIC_ROUNDS * seconds,
        **game.seen(),
        **peaks(device),
    }


def part_decode(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    policy = classic_policy(shape, device, dtype)
    result: dict[str, Any] = {"copy_bytes_per_second": copy_speed(device)}
    weights = sum(p.numel() * p.element_size() for p in policy.lm.parameters())
    for batch in (1, 32, 128) if shape.name != "tiny" else (1, 4):
        ids = torch.randint(3, shape.vocabulary, (batch, shape.prompt_tokens), device=device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        uniforms = row_uniforms(0, 0, range(batch), shape.new_tokens)
        given = (ids, mask, torch.arange(batch, device=device), uniforms, SamplingSettings(shape.new_tokens), PAD)
        ours = best_of(device, lambda given=given: policy("sample", *given))
        theirs = best_of(
            device,
            lambda ids=ids, mask=mask: policy.generate(
                input_ids=ids, attention_mask=mask.long(), max_new_tokens=shape.new_tokens, do_sample=True, top_k=0,
                min_new_tokens=shape.new_tokens, pad_token_id=PAD,
            ),
        )  # fmt: skip
        tokens = batch * shape.new_tokens
        limit = weights / result["copy_bytes_per_second"] * shape.new_tokens
        result[str(batch)] = {
            "tokens_per_second": tokens / ours,
            "generate_tokens_per_second": tokens / theirs,
            "ratio": theirs / ours,
            "share_of_bandwidth_limit": limit / ours,  # the weights alone, read once a token
        }
    return {**result, "is_captured": is_captured(policy)}


def is_captured(policy: PolicyModel) -> bool:
    """Whether its steps were replayed as CUDA graphs."""
    sampler = policy._static_sampler
    return sampler is not None and sampler.captures


def best_of(device: torch.device, work: Callable[[], Any], times: int = 3) -> float:
    work()
    seconds = []
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def copy_speed(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_of(device, lambda: target.copy_(source))


def part_parity(device: torch.device) -> dict[str, Any]:
    """Architecture -> whether greedy steps (captured, on a GPU) give transformers.generate's tokens, while the batch
    shrinks."""
    from solotune.models.split import Decoder
    from tests.tiny import PAD as TINY_PAD
    from tests.tiny import tiny_lm

    torch.backends.cuda.matmul.allow_tf32 = False

    def agrees(architecture: str) -> bool:
        lm: Any = tiny_lm(architecture).to(device)
        decoder = Decoder(lm)
        sampler = StaticSampler(decoder.module, Head(lm, decoder.name), None)
        torch.manual_seed(0)
        mask = torch.arange(10) >= 10 - torch.tensor([10, 7, 5, 10, 3, 8, 9, 2] * 4)[:, None]
        ids = torch.randint(0, 256, mask.shape).masked_fill(~mask, TINY_PAD).to(device)
        mask = mask.to(device)
        expected = lm.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=16, do_sample=False, eos_token_id=None,
            pad_token_id=TINY_PAD,
        )[:, 10:]  # fmt: skip
        eos = tuple({int(token) for token in expected[:, 5]})
        equal = True
        for ends in ((), eos):
            settings = SamplingSettings(16, do_sample=False, eos_token_ids=ends)
            uniforms = row_uniforms(0, 0, range(len(ids)), 16)
            found = sampler.sample(ids, mask, torch.arange(len(ids), device=device), uniforms, settings, TINY_PAD)
            kept, width = found.response_mask_NT, found.response_ids_NT.shape[1]
            equal &= bool((found.response_ids_NT == expected[:, :width])[kept].all())
        return equal and sampler.captures == (device.type == "cuda")

    def outcome(architecture: str) -> bool | str:
        try:
            return agrees(architecture)
        except Exception as error:  # one architecture that fails must not hide the others
            return f"{type(error).__name__}: {error}"

    result = {architecture: outcome(architecture) for architecture in PARITY_TESTED}
    return {"agrees": result, "all": all(found is True for found in result.values())}


def part_7b(shape: Shape, device: torch.device, dtype: torch.dtype, nf4: bool = False) -> dict[str, Any]:
    """Peak memory and seconds of sampling, measuring and one update of LLaMA-7B, gradient checkpointing on."""
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**(tiny | {"vocab_size": 256} if shape.name == "tiny" else {"vocab_size": 32000}))
    torch.manual_seed(0)
    with torch.device(device):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if nf4:
        in_four_bits(Decoder(lm).blocks, dtype, device)
    forget_peak(device)  # in use, 16-bit weights never were there
    policy = PolicyModel(lora(lm, 16, 32, "all-linear", None), gradient_checkpointing=True)
    sizes = {"rollouts": 32, "batch_size": 32, "prompt_tokens": 64, "new_tokens": 64}
    if shape.name == "tiny":
        sizes = {"rollouts": 4, "batch_size": 4, "prompt_tokens": 8, "new_tokens": 4}
    game = Round(policy, Shape(**{**vars(shape), **sizes, "vocabulary": config.vocab_size}), micro_batch=4)
    game.play()
    seconds, _ = game.play()
    kind = "nf4" if nf4 else str(dtype)
    return {"seconds_by_phase": seconds, "dtype": kind, **game.seen(), **peaks(device)}


def in_four_bits(blocks: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the linear layers of the blocks by bitsandbytes' nf4 ones, as from_pretrained does."""
    import bitsandbytes as bnb  # type: ignore[import-not-found]

    for name, linear in [(n, m) for n, m in blocks.named_modules() if isinstance(m, torch.nn.Linear)]:
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        packed.weight = bnb.nn.Params4bit(
            linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=packed
        )
        packed.support_avx512bf16_for_cpu = False  # as solotune.models.loading: that kernel has no gradient
        blocks.set_submodule(name, packed.to(device))


def part_learn(folder: str, given: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Mean reward (share of 'e' among the letters) by round, of a real model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    blocks = list(range(lm.config.num_hidden_layers))[-4:]
    policy = PolicyModel(lora(lm, 16, 32, linear_names(Decoder(lm).blocks[-1]), blocks))
    shape = Shape(**{**vars(given), "vocabulary": len(tokenizer), "new_tokens": min(given.new_tokens, 24)})
    game = Round(policy, shape)
    for group in game.optimizer.param_groups:
        group["lr"] = 1e-3
    start = tokenizer("The film was", return_tensors="pt").input_ids.to(device)
    game.prompts = lambda: (  # type: ignore[method-assign]
        start.expand(shape.rollouts, -1), torch.ones_like(start, dtype=torch.bool).expand(shape.rollouts, -1)
    )  # fmt: skip

    def letter_e(rollouts: Rollouts) -> Tensor:
        texts = tokenizer.batch_decode(rollouts.response_ids_NT, skip_special_tokens=True)
        return torch.tensor([text.count("e") / max(len(text), 1) for text in texts], device=device)

    rewards = [game.play(letter_e)[1] for _ in range(30)]
    return {"reward_by_round": rewards, "gain": statistics.mean(rewards[-3:]) - statistics.mean(rewards[:3])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=["full", "tiny"], default="full")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", help="folder of a real model, for the part `learn`")
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {"shape": options.shape}
    names = ["round", "decode", "7b", "7b-nf4", "parity", "learn"]
    if importlib.util.find_spec("bitsandbytes") is None:
        names.remove("7b-nf4")
    if not options.model:
        names.remove("learn")
    for name in names:
        if name in options.skip:
            continue
        found = in_a_process(play, name, options)
        result |= found.pop("machine", {})
        result[name] = found
        print(name, json.dumps(found), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def play(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One part, and on what machine."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return {"failed": "no CUDA device: --device cpu --shape tiny runs the same code"}
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = SHAPES["opt-1.3b" if options.shape == "full" else "tiny"]
    use_fastest_products(device)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "round": lambda: part_round(shape, device, dtype, options.rounds if options.shape == "full" else 2),
        "decode": lambda: part_decode(shape, device, dtype),
        "7b": lambda: part_7b(shape, device, dtype),
        "7b-nf4": lambda: part_7b(shape, device, dtype, nf4=True),
        "parity": lambda: part_parity(device),
        "learn": lambda: part_learn(options.model, shape, device, dtype),
    }
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, accelerate)},
    }
    return {**parts[name](), "machine": machine}


def in_a_process(work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """A part that fails must not take the others along, on a machine that is lent for minutes: a capture that fails can
    leave a process's GPU unusable."""
    context = multiprocessing.get_context("spawn")  # libraries look at the GPU when they are imported
    here, there = context.Pipe(duplex=False)
    process, start = context.Process(target=_answer, args=(there, work, given)), time.perf_counter()
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv()
    except EOFError:
        found = {"failed": "the process died"}
    process.join()
    if "failed" in found and process.exitcode:
        found["failed"] += f" (exit status {process.exitcode})"
    return {**found, "part_seconds": time.perf_counter() - start}


def _answer(there: Connection, work: Callable[..., dict[str, Any]], given: tuple[Any, ...]) -> None:
    try:
        there.send(work(*given))
    except Exception:
        there.send({"failed": traceback.format_exc()})


if __name__ == "__main__":
    main()
