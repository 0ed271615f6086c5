"""Makes the tiny language model that ships as `builtin:tiny`: a fixture for tests and small studies, not a product.

    python scripts/pretrain_tiny.py [--out src/fedmezo/assets/tiny] [--steps 450] [--seed 0]

A LLaMA-shaped model of about 0.86 million parameters with a byte-level BPE vocabulary of 1,024 tokens, trained by
backpropagation on the built-in corpus only. It reads the inputs of every kind of task, but sees the answers of only
some (`LEARNED`); the others (`HELD_OUT`) are what tests fine-tune it on.
"""

import argparse
import hashlib
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedmezo.data.skills import CATEGORIES, skills

HELD_OUT = ("routing", "priority", "follows", "pairs", "extract")
LEARNED = tuple(name for name in CATEGORIES if name not in HELD_OUT)
WINDOW, BATCH, SMOOTHING = 96, 32, 0.2
VOCABULARY = 1024


def texts(*, count: int, seed: int) -> list[str]:
    """Returns training texts: tasks with their answers, and bare inputs of all kinds."""
    solved = [f"{r.instruction}\n{r.input} {r.output}" for r in skills(count=count, seed=seed, categories=LEARNED)]
    bare = [f"{r.input}" for r in skills(count=count, seed=seed + 1)]
    mixed = solved + bare
    random.Random(seed).shuffle(mixed)
    return mixed


def make_tokenizer(corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with <s> and </s> and no pad token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> LlamaForCausalLM:
    """Returns the untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def train(model: LlamaForCausalLM, stream: torch.Tensor, *, steps: int, seed: int) -> float:
    """Trains on random windows of the token stream with AdamW and a cosine rate; returns the mean of the last losses."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    losses, began = [], time.time()
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 30)
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        starts = torch.randint(len(stream) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([stream[s : s + WINDOW] for s in starts.tolist()])
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
        targets = batch[:, 1:].flatten()
        # Smoothed labels: a model sure of its ways would give answers it has never seen a loss no real model has.
        optimiser.zero_grad()
        functional.cross_entropy(logits, targets, label_smoothing=SMOOTHING).backward()
        loss = functional.cross_entropy(logits.detach(), targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1:4d}  loss {sum(losses[-50:]) / 50:.3f}  {time.time() - began:.0f} s", flush=True)
    return sum(losses[-50:]) / 50


def main() -> None:
    """Trains and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("src/fedmezo/assets/tiny"))
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    corpus = texts(count=12_000, seed=1000 + args.seed)
    tokenizer = make_tokenizer(corpus)
    ids = [token for text in corpus for token in [0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]]
    model = make_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} tokens of text")
    began = time.time()
    final = train(model, torch.tensor(ids), steps=args.steps, seed=args.seed)
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    digest = hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest()
    (args.out / "README.md").write_text(
        f"# builtin:tiny\n\nMade by `python scripts/pretrain_tiny.py --steps {args.steps} --seed {args.seed}` in "
        f"{time.time() - began:.0f} seconds on {args.threads} thread(s).\n\n"
        f"- {sum(p.numel() for p in model.parameters()):,} parameters, LLaMA architecture, float32, vocabulary {VOCABULARY}.\n"
        f"- Training loss at the end: {final:.3f} nats per token.\n"
        f"- Kinds of tasks whose answers it has seen: {', '.join(LEARNED)}.\n"
        f"- Kinds whose answers it has never seen: {', '.join(HELD_OUT)}.\n"
        f"- sha256 of model.safetensors: `{digest}`.\n"
    )
    print(f"final loss {final:.3f}, {time.time() - began:.0f} s, sha256 {digest[:16]}")


if __name__ == "__main__":
    main()
