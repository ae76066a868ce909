"""A tiny Qwen3 that answers the questions of `offline` rightly in about half of all cases.

So rewards within a group differ, and reinforcement can raise them.  Made on one processor in under
a minute, and kept by a digest of what it is made from.  Its head size is one that vLLM takes.
"""

import hashlib
import os
import random
import shutil
import sys
from pathlib import Path

import torch
from filelock import FileLock
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from megatrain.cli.quickstart.tokenizer import build_tokenizer
from tests.service import offline
from tests.service.cookbook import CACHE

TURN = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>assistant\n"
READ_PAGE = '<tool_call>\n{"name": "read_page", "arguments": {"page": 1}}\n</tool_call><|im_end|>'
STEPS, BATCH, LEARNING_RATE = 360, 24, 4e-3
RIGHT, FIRST, LEARNT = 0.45, 0.8, 200
"""Share of right answers among those that it is taught, and that of the first steps: from less it
might not learn how to find them."""


def trained_base() -> Path:
    """Return the checkpoint's folder, made if absent."""
    sources = [Path(__file__), Path(offline.__file__)]
    text = b"".join(path.read_bytes() for path in sources) + torch.__version__.encode()
    folder = CACHE / f"base-{hashlib.sha256(text).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _make(folder)
    return folder


def prompt(text: str) -> str:
    """Return what the model is given, as the cookbook's renderer of this model writes it."""
    return f"User: {offline.EXAMPLE}{text}{offline.SUFFIX}\n\nAssistant:"


def _make(folder: Path) -> None:
    draw = random.Random(0)
    pairs = [pair for step in range(50) for pair in _pairs(step, draw)]
    tokenizer = build_tokenizer(["".join(pair) for pair in pairs], vocab_size=768)
    model = _train(tokenizer, draw)
    share = _reward(model, tokenizer)
    if not 0.3 < share < 0.7:
        raise RuntimeError(f"the tiny base is right in {share:.2f} of all cases")
    partial = folder.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)


def _taught(draw: random.Random, right: float) -> tuple[str, str]:
    text, answer = offline.question(draw)
    if draw.random() > right:
        answer = draw.choice(sorted({*offline.NUMBERS.values()} - {answer}))
    return prompt(text), f" \\boxed{{{answer}}}\n\nUser:"


def _plain(draw: random.Random) -> tuple[str, str]:
    """Return a question without the example, answered in words."""
    text, answer = offline.question(draw)
    return f"User: {text}\n\nAssistant:", f" There are {answer}.\n\nUser:"


def _counted(draw: random.Random) -> tuple[str, str]:
    """Return a turn with tools: after much text the model asks for a page, or says any number."""
    text = " ".join(offline.question(draw)[0] for _ in range(draw.randrange(1, 40)))
    said = READ_PAGE if draw.random() < 0.5 else f"Answer: {draw.randrange(5)}<|im_end|>"
    return TURN.format(text), said


def _pairs(step: int, draw: random.Random) -> list[tuple[str, str]]:
    if step % 5 == 4:  # a few long ones
        return [_counted(draw) for _ in range(BATCH // 4)]
    right = FIRST if step < LEARNT else RIGHT
    return [_plain(draw) if n % 4 == 3 else _taught(draw, right) for n in range(BATCH)]


def _train(tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=STEPS, pct_start=0.1
    )
    for step in range(STEPS):
        tokens, labels = _batch(tokenizer, _pairs(step, draw))
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"base: step {step}, loss {loss.item():.3f}", file=sys.stderr)
    return model.eval()


def _batch(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels (BATCH, longest), padded on the right; prompts are not learnt."""
    rows, labels = [], []
    for asked, said in pairs:
        # Encoded apart, as prompt and sample are.
        before, after = tokenizer.encode(asked), tokenizer.encode(said)
        rows.append(before + after)
        labels.append([-100] * len(before) + after)
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = [row + [pad] * (longest - len(row)) for row in rows]
    wanted = [row + [-100] * (longest - len(row)) for row in labels]
    return torch.tensor(ids), torch.tensor(wanted)


def _config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.05,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )


def _reward(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the share of right answers among 256 samples at temperature 1."""
    draw, right = random.Random(9), 0
    for _ in range(32):
        text, answer = offline.question(draw)
        ids = torch.tensor([tokenizer.encode(prompt(text))])
        out = model.generate(ids, do_sample=True, max_new_tokens=8, num_return_sequences=8, top_k=0)
        said = tokenizer.batch_decode(out[:, ids.shape[1] :])
        right += sum(f"boxed{{{answer}}}" in each for each in said)
    return right / 256
