"""The small checkpoint that quickstart adapts, made with Transformers alone: no Megatron here.

Run as a process of its own: `python -m megatrain.cli.quickstart.base_model JOB.json`.
"""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatrain.cli.quickstart import task
from megatrain.cli.quickstart.child import report_failure
from megatrain.cli.quickstart.job import BASE_MARKER, Job, ModelShape
from megatrain.cli.quickstart.tokenizer import build_tokenizer, encode_conversation

ROW_TOKENS = 128
TEXT_ROWS, CHAT_ROWS = 2, 8
"""Rows of one batch."""
CONVERSATIONS = 3000
PEAK_LEARNING_RATE = 2e-3
INITIALIZER_RANGE = 0.05
"""Wider than 0.02, which is for larger hidden sizes: attention takes shape in half the steps."""

Row = tuple[list[int], list[int]]
"""Token ids and labels, ROW_TOKENS of each."""


def make_base(job: Job) -> None:
    """Make DIR/base; it appears whole or not at all."""
    tokenizer = build_tokenizer(corpus(job.seed), vocab_size=job.shape.vocab_size)
    model = train_base(job, tokenizer)
    partial = job.out / "base.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / BASE_MARKER).write_text(json.dumps(job.base_fingerprint(), indent=2) + "\n")
    shutil.rmtree(job.base, ignore_errors=True)
    partial.rename(job.base)


def corpus(seed: int) -> list[str]:
    """Return the text: Python's own documentation, questions in English, French word lists."""
    documentation = [topics[name] for name in sorted(topics)]
    order = random.Random(seed)
    questions = [task.draw_question(order) for _ in range(1000)]
    chat = [f"{question.text}\n{question.english}" for question in questions]
    return documentation + chat + task.word_lists(count=400, seed=seed)


def build_model(
    shape: ModelShape, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PreTrainedModel:
    """Return the model with random weights in float32."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "initializer_range": INITIALIZER_RANGE,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": torch.float32,
    }
    if not shape.num_experts:
        return Qwen3ForCausalLM(Qwen3Config(**common))
    experts = {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts))


def train_base(job: Job, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Train the base on the documentation and on questions answered in English."""
    model = build_model(job.shape, tokenizer, seed=job.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    schedule = OneCycleLR(
        optimizer, max_lr=PEAK_LEARNING_RATE, total_steps=job.base_steps, pct_start=0.1
    )
    text, chat = text_rows(tokenizer, seed=job.seed), chat_rows(tokenizer, seed=job.seed)
    model.train()
    for step in range(1, job.base_steps + 1):
        rows = [next(text) for _ in range(TEXT_ROWS)] + [next(chat) for _ in range(CHAT_ROWS)]
        tokens, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
        logits = model(input_ids=tokens).logits
        text_loss = _cross_entropy(logits[:TEXT_ROWS], labels[:TEXT_ROWS])
        chat_loss = _cross_entropy(logits[TEXT_ROWS:], labels[TEXT_ROWS:])
        (text_loss + chat_loss).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        _say(job, step, text_loss=text_loss.item(), loss=chat_loss.item())
    return model.eval()


def text_rows(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Iterator[Row]:
    """Yield pieces of the documentation and of the word lists without end."""
    texts = [topics[name] for name in sorted(topics)]
    texts += ["\n".join(task.word_lists(count=1200, seed=seed))]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokens = [token for ids in tokenizer(texts)["input_ids"] for token in (*ids, end)]
    order = random.Random(seed)
    while True:
        start = order.randrange(len(tokens) - ROW_TOKENS)
        row = tokens[start : start + ROW_TOKENS]
        yield row, row


def chat_rows(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Iterator[Row]:
    """Yield conversations in English, several to a row; the last one may be cut short."""
    order = random.Random(seed)
    pool = [
        encode_conversation(tokenizer, task.base_messages(task.draw_appointment(order)))
        for _ in range(CONVERSATIONS)
    ]
    while True:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < ROW_TOKENS:
            conversation = order.choice(pool)
            ids += conversation["input_ids"]
            labels += conversation["labels"]
        yield ids[:ROW_TOKENS], labels[:ROW_TOKENS]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over labels, each of which is predicted one position earlier."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _say(job: Job, step: int, **values: float) -> None:
    """Tell the command how far this is."""
    with job.base_metrics.open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


if __name__ == "__main__":
    _job = Job.read(sys.argv[1])
    with report_failure(_job.logs, name="base"):
        make_base(_job)
