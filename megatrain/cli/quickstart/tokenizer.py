"""The small checkpoint's tokenizer: byte-level BPE with a ChatML template, and labels from it."""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatrain.cli.quickstart.task import Question
from megatrain.types import IGNORED_LABEL, InputFeature

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML.  `generation` marks what the assistant says, its end of turn included."""


def build_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = (END_OF_TEXT, TURN_START, TURN_END)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True) for token in specials],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> InputFeature:
    """Return the conversation's tokens; labels outside the assistant's words are IGNORED_LABEL."""
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
    labels = [token if said else IGNORED_LABEL for token, said in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}


def encode_task(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> list[InputFeature]:
    """Return the conversations that the adapter learns from, as tokens and labels."""
    return [encode_conversation(tokenizer, question.task_messages()) for question in questions]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Return the tokens up to where the assistant starts to answer `question`."""
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
    )
    return list(encoded["input_ids"])
