"""The template: a standard row to tokens and labels, by the tokenizer's own chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from megatrain.data.template.marking import Marked, render_marked
from megatrain.data.template.messages import Conversation, Message, read_conversation
from megatrain.data.template.tokenizer import (
    check_fast,
    end_tokens,
    load_tokenizer,
    special_tokens,
)
from megatrain.data.template.tokens import Span, labels_of, num_labels
from megatrain.data.template.turns import Stops, spans_by_message, underivable
from megatrain.errors import ConfigError, DataError
from megatrain.types import IGNORED_LABEL

Truncation = Literal["raise", "left", "right", "delete"]
LossOn = Literal["assistant", "all", "last"]
Row = Mapping[str, Any]


class Template:
    """Encodes chats, preference pairs and plain text; decodes tokens.

    model_id: where the tokenizer is, as `MegatronModel` takes it; or give `tokenizer`.
    max_length: tokens that a row may have at most (each side of a pair); None: any number.
    truncation_strategy: what happens to a longer row.  "raise": DataError.  "left": the first
        tokens are cut off, a system message too.  "right": the last ones are.  "delete": encode()
        returns None.  After a cut, a row without a label left gives None as well.
    loss_on: "assistant": all that the assistant says, its end of turn included (see turns.py).
        "last": its last message alone.  "all": every token.  A message's own "loss", true or
        false, wins over this.
    chat_template: a Jinja file, or its text, instead of the tokenizer's.
    chat_template_kwargs: variables for the chat template, such as {"enable_thinking": False}.

    A subclass may override `render`, then also `message_spans`, or `encode` as a whole.
    """

    def __init__(
        self,
        model_id: str | None = None,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        truncation_strategy: Truncation = "raise",
        loss_on: LossOn = "assistant",
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        _check_choice("truncation_strategy", truncation_strategy, get_args(Truncation))
        _check_choice("loss_on", loss_on, get_args(LossOn))
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length {max_length}: a row needs 2 tokens to predict one")
        if (model_id is None) == (tokenizer is None):
            raise ConfigError("a template needs either model_id or tokenizer")
        self.tokenizer = load_tokenizer(model_id) if model_id is not None else tokenizer
        check_fast(self.tokenizer)
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        self.loss_on = loss_on
        self.chat_template = None if chat_template is None else _read_template(chat_template)
        self.variables = dict(chat_template_kwargs or {})
        self.stops = Stops(special_tokens(self.tokenizer), end_tokens(self.tokenizer))

    def encode(self, row: Row, add_generation_prompt: bool = False) -> dict[str, Any] | None:
        """Return `row` with its tokens, or None where truncation leaves nothing of it.

        {"messages", "tools"?}: adds input_ids, labels (-100: no loss; not shifted), length and
        num_labels.  With "label" (true or false, 1 or 0, KTO) the loss is on the last turn alone.
        {"chosen", "rejected"}: adds chosen_input_ids, chosen_labels and the same for rejected;
        the messages that both begin with are the prompt and have no labels.
        {"text"}: the tokenizer's special tokens around the text, and the end-of-sequence token;
        every token is a label.
        With `add_generation_prompt`, a chat is a prompt, without labels.
        DataError says what is wrong with a row.
        """
        if "chosen" in row and "rejected" in row:
            _refuse_prompt(add_generation_prompt, "a preference pair")
            encoded = self._encode_pair(row)
        elif "messages" in row:
            encoded = self._encode_chat(row, add_generation_prompt)
        elif "text" in row:
            _refuse_prompt(add_generation_prompt, "plain text")
            encoded = self._finish(*self._encode_text(row["text"]))
        else:
            raise DataError(
                "a row needs messages, or chosen and rejected, or text; it has "
                f"{', '.join(sorted(row)) or 'no columns'}",
                hint='map a preprocessor first, for example dataset.map("MessagesProcessor")',
            )
        return None if encoded is None else {**row, **encoded}

    def batch_encode(
        self, rows: Sequence[Row], add_generation_prompt: bool = False
    ) -> list[dict[str, Any] | None]:
        """Return encode() of each row."""
        return [self.encode(row, add_generation_prompt) for row in rows]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text that is tokenized, special tokens included."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **self.variables,
        )
        return text

    def message_spans(self, conversation: Conversation, text: str) -> list[list[Span]]:
        """Return for each message its spans of characters in `text`, its rendering.

        An assistant's are what it says, end of turn included; another's are all that is rendered
        for it.  ConfigError if the chat template does not let this be derived.
        """
        source = self.tokenizer.get_chat_template(self.chat_template, tools=conversation.tools)
        variables = {**self.tokenizer.special_tokens_map, **self.variables, "documents": None}

        def render(
            messages: Sequence[Message], add_generation_prompt: bool = False, **more: Any
        ) -> Marked:
            fixed = {"tools": conversation.tools, "add_generation_prompt": add_generation_prompt}
            return render_marked(source, messages, {**variables, **fixed, **more})

        marked = render(conversation.messages)
        if marked.text != text:
            raise underivable("render() does not write what the chat template writes")
        return spans_by_message(render, conversation.messages, marked, self.stops)

    def _encode_chat(self, row: Row, add_generation_prompt: bool) -> dict[str, Any] | None:
        conversation = read_conversation(row["messages"], row.get("tools"))
        if add_generation_prompt:
            return self._encode_prompt(conversation)
        turns = conversation.turns()
        if _has_label(row):
            return self._finish(*self._encode_messages(conversation, turns[-1:]))
        if self.loss_on == "all":
            return self._finish(*self._encode_everything(conversation))
        wanted = turns[-1:] if self.loss_on == "last" else turns
        return self._finish(*self._encode_messages(conversation, wanted))

    def _encode_prompt(self, conversation: Conversation) -> dict[str, Any] | None:
        if conversation.messages[-1]["role"] == "assistant":
            raise DataError(
                "a prompt ends with the assistant's message, which leaves nothing to generate",
                hint="map a function that leaves it out, or encode without add_generation_prompt",
            )
        text = self._render(conversation, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        too_long = self.max_length is not None and len(ids) > self.max_length
        if too_long and self.truncation_strategy == "right":
            raise DataError(
                f"a prompt has {len(ids)} tokens, more than max_length {self.max_length}; "
                'truncation_strategy "right" would cut off the generation prompt',
                hint='"left" or "delete" can be used for prompts',
            )
        cut = self._truncate(list(ids))
        return None if cut is None else _sizes(cut, [IGNORED_LABEL] * len(cut))

    def _encode_pair(self, row: Row) -> dict[str, Any] | None:
        sides = {
            side: read_conversation(row[side], row.get("tools")) for side in ("chosen", "rejected")
        }
        chosen, rejected = (side.messages for side in sides.values())
        same = [ours == theirs for ours, theirs in zip(chosen, rejected, strict=False)]
        num_prompt = (*same, False).index(False)
        encoded: dict[str, Any] = {"length": 0, "num_labels": 0}
        for side, conversation in sides.items():
            wanted = [turn for turn in conversation.turns() if turn >= num_prompt]
            if not wanted:
                raise DataError(
                    f"{side} has no assistant message of its own; {num_prompt} messages are shared"
                )
            wanted = wanted[-1:] if self.loss_on == "last" else wanted
            finished = self._finish(*self._encode_messages(conversation, wanted))
            if finished is None:
                return None
            encoded[f"{side}_input_ids"] = finished["input_ids"]
            encoded[f"{side}_labels"] = finished["labels"]
            encoded["length"] += finished["length"]
            encoded["num_labels"] += finished["num_labels"]
        return encoded

    def _encode_text(self, text: Any) -> tuple[list[int], list[int]]:
        if not isinstance(text, str) or not text:
            raise DataError(f"text must be a text that is not empty, not {text!r}")
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError("the tokenizer has no end-of-sequence token to end a text with")
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if ids[-1] != end:
            ids.append(end)
        return ids, ids

    def _encode_messages(
        self, conversation: Conversation, wanted: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Return tokens and labels; `wanted` are the messages with a loss unless they say else."""
        text, ids, offsets = self._tokenize(conversation)
        spans = self.message_spans(conversation, text)
        chosen = [
            span
            for index, loss in enumerate(conversation.loss)
            if (index in wanted if loss is None else loss)
            for span in spans[index]
        ]
        return ids, labels_of(ids, offsets, chosen)

    def _encode_everything(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Return tokens and labels: all tokens but those of messages that refuse a loss."""
        text, ids, offsets = self._tokenize(conversation)
        refused = [index for index, loss in enumerate(conversation.loss) if loss is False]
        if not refused:
            return ids, list(ids)
        spans = self.message_spans(conversation, text)
        off = labels_of(ids, offsets, [span for index in refused for span in spans[index]])
        pairs = zip(ids, off, strict=True)
        return ids, [t if label == IGNORED_LABEL else IGNORED_LABEL for t, label in pairs]

    def _tokenize(self, conversation: Conversation) -> tuple[str, list[int], Sequence[Span]]:
        text = self._render(conversation)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return text, list(encoded["input_ids"]), encoded["offset_mapping"]

    def _render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        try:
            return self.render(conversation.messages, conversation.tools, add_generation_prompt)
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"the chat template refuses these messages: {error}",
                hint="see which roles, in which order, it takes, and whether arguments of tool "
                "calls are text or mappings",
            ) from error

    def _truncate(self, tokens: list[int]) -> list[int] | None:
        if self.max_length is None or len(tokens) <= self.max_length:
            return tokens
        match self.truncation_strategy:
            case "left":
                return tokens[-self.max_length :]
            case "right":
                return tokens[: self.max_length]
            case "delete":
                return None
        raise DataError(
            f"a row has {len(tokens)} tokens, more than max_length {self.max_length}",
            hint='a larger max_length, or truncation_strategy "left", "right" or "delete"',
        )

    def _finish(self, ids: list[int], labels: list[int]) -> dict[str, Any] | None:
        if not num_labels(labels):
            raise DataError("a row has no token with a loss: no assistant message asks for one")
        cut_ids, cut_labels = self._truncate(ids), self._truncate(labels)
        if cut_ids is None or cut_labels is None or not num_labels(cut_labels):
            return None
        return _sizes(cut_ids, cut_labels)


def _has_label(row: Row) -> bool:
    """Tell whether the row is KTO's: an answer that is wanted, or not."""
    label = row.get("label")
    if label is not None and not (isinstance(label, int) and label in (0, 1)):
        raise DataError(
            f"label must be true or false (1 or 0), not {label!r}",
            hint="rename the column if it says something else",
        )
    return label is not None


def _sizes(ids: list[int], labels: list[int]) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "labels": labels,
        "length": len(ids),
        "num_labels": num_labels(labels),
    }


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{option} {value!r} is not one of {', '.join(known)}")


def _refuse_prompt(add_generation_prompt: bool, what: str) -> None:
    if add_generation_prompt:
        raise DataError(f"{what} is no prompt: add_generation_prompt needs messages")


def _read_template(chat_template: str | Path) -> str:
    """Return the text of a Jinja file, or `chat_template` itself where it is such a text."""
    if isinstance(chat_template, str) and "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat_template: no such file: {path}")
    return path.read_text(encoding="utf-8")
