"""Answers to the held-out questions before and after, from Transformers and PEFT alone."""

import json

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from megatrain.cli.quickstart import task
from megatrain.cli.quickstart.job import Job
from megatrain.cli.quickstart.tokenizer import encode_prompt

MAX_NEW_TOKENS = 24


def write_samples(job: Job) -> None:
    """Answer every held-out question with the base and with the adapter on it."""
    _, questions = task.split()
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32).eval()
    before = answers(model, tokenizer, questions)
    adapted = PeftModel.from_pretrained(model, str(job.adapter)).eval()
    after = answers(adapted, tokenizer, questions)
    rows = [
        {"question": question.text, "wanted": question.french, "before": old, "after": new}
        for question, old, new in zip(questions, before, after, strict=True)
    ]
    job.samples.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


@torch.inference_mode()
def answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[task.Question],
) -> list[str]:
    """Return the model's most likely answers, each up to its end of turn."""
    prompts = [encode_prompt(tokenizer, question.text) for question in questions]
    batch = tokenizer.pad(
        {"input_ids": prompts}, padding=True, padding_side="left", return_tensors="pt"
    )
    out = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new_tokens = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
