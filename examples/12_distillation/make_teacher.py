"""What a teacher says of each label: its K most probable tokens, with log-probabilities.

    python examples/12_distillation/make_teacher.py models/moe

writes `output/teacher.jsonl`: conversations with `teacher_tokens` and `teacher_logps`, K numbers
for each label, in the order of the labels.  Teacher and student must share their tokenizer.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatrain import Template

TOP_K = 8
SOURCE = Path("examples/data/conversations.jsonl")
TARGET = Path("output/teacher.jsonl")


def main() -> None:
    """Write the file."""
    teacher = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    template = Template(sys.argv[1])
    TARGET.parent.mkdir(exist_ok=True)
    with TARGET.open("w") as file:
        for line in SOURCE.read_text().splitlines():
            row = json.loads(line)
            file.write(json.dumps(row | teach(teacher, template.encode(row))) + "\n")


@torch.no_grad()
def teach(teacher: torch.nn.Module, encoded: dict) -> dict[str, list]:
    """Return the teacher's tokens and log-probabilities for each label of an encoded row."""
    logits = teacher(input_ids=torch.tensor([encoded["input_ids"]])).logits[0, :-1]
    predicts_label = torch.tensor(encoded["labels"][1:]) != -100
    logps, tokens = logits[predicts_label].log_softmax(-1).topk(TOP_K)
    return {"teacher_tokens": tokens.tolist(), "teacher_logps": logps.tolist()}


if __name__ == "__main__":
    main()
