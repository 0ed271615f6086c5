"""Tiny random language models of five architectures, and rows and examples for them."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from fedmezo.models.load import Loaded

VOCABULARY = 97
WINDOW = 64


@dataclass(frozen=True, slots=True)
class Row:
    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Example:
    rows: tuple[Row, ...]
    answer: int = 0
    options: tuple[int, ...] = ()
    record: int = 0
    category: str = ""


def _config(name):
    import transformers as hf

    ends = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": WINDOW,
    } | ends
    grouped = common | {"intermediate_size": 48, "num_key_value_heads": 2}
    return {
        "llama": lambda: hf.LlamaConfig(**grouped),
        "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=WINDOW, **ends),
        "opt": lambda: hf.OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **common),
        "qwen2": lambda: hf.Qwen2Config(tie_word_embeddings=True, **grouped),
        "neox": lambda: hf.GPTNeoXConfig(intermediate_size=48, **common),
        "mistral": lambda: hf.MistralConfig(sliding_window=8, **grouped),
        "gemma2": lambda: hf.Gemma2Config(head_dim=8, sliding_window=8, query_pre_attn_scalar=8, **grouped),
        "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **ends),
        "granite": lambda: hf.GraniteConfig(logits_scaling=4.0, **grouped),
        "mamba": lambda: hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **ends),
        "mixtral": lambda: hf.MixtralConfig(num_local_experts=2, **grouped),
        "qwen3": lambda: hf.Qwen3Config(head_dim=8, **grouped),
    }[name]()


def tiny(name, *, dtype=torch.float32):
    """A frozen random model; weights larger than usual, so that every term matters."""
    import transformers as hf

    torch.manual_seed(5)
    model = hf.AutoModelForCausalLM.from_config(_config(name)).to(dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape).to(dtype))
    return Loaded(model, SimpleNamespace(eos_token_id=2), "fingerprint", name, WINDOW)


def row(draw, *, size, labels):
    return Row(tuple(draw.randrange(3, VOCABULARY) for _ in range(size)), size - labels)


def answers(count, *, seed=0, sizes=(7, 12, 12, 19)):
    draw = random.Random(seed)
    return tuple(
        Example((row(draw, size=sizes[i % len(sizes)], labels=1 + i % 4),), record=i, category="ab"[i % 2])
        for i in range(count)
    )


def candidates(count, *, seed=0):
    draw = random.Random(seed)
    made = []
    for i in range(count):
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(6 + i))
        tails = [tuple(draw.randrange(3, VOCABULARY) for _ in range(1 + n)) for n in range(3)]
        made.append(Example(tuple(Row(prompt + tail, len(prompt)) for tail in tails), answer=i % 3, category="c"))
    return tuple(made)


def multiple_choice(count, *, seed=0):
    draw = random.Random(seed)
    return tuple(
        Example((row(draw, size=9 + i, labels=1),), answer=i % 4, options=(5, 9, 30, 60), category="o")
        for i in range(count)
    )
