"""Teach a model its name and its author: the format of swift/self-cognition."""

from collections.abc import Sequence
from typing import Any

from megatrain.data.preprocessors.base import Preprocessor, Row, assistant, need, user
from megatrain.errors import ConfigError, DataError

LANGUAGES = ("zh", "en")

Names = str | Sequence[str]


class SelfCognitionProcessor(Preprocessor):
    """{"query", "response", "tag"?} -> {"messages"}; {{NAME}} and {{AUTHOR}} are filled in.

    model_name, model_author: one name, or a pair: for rows tagged zh, and for those tagged en.
    A row without a tag takes the Chinese name if its response has Chinese characters.
    """

    def __init__(self, model_name: Names, model_author: Names) -> None:
        self.names = _pair("model_name", model_name)
        self.authors = _pair("model_author", model_author)

    def __call__(self, row: Row) -> dict[str, Any]:
        query, response = need(row, "query", "response", who=self)
        tag = row.get("tag") or ("zh" if _is_chinese(response) else "en")
        if tag not in LANGUAGES:
            raise DataError(f"tag must be one of {', '.join(LANGUAGES)}, not {tag!r}")
        return {"messages": [user(self.fill(query, tag)), assistant(self.fill(response, tag))]}

    def fill(self, text: str, language: str) -> str:
        """Return `text` with the names of this language."""
        return text.replace("{{NAME}}", self.names[language]).replace(
            "{{AUTHOR}}", self.authors[language]
        )


def _pair(option: str, names: Names) -> dict[str, str]:
    both = (names, names) if isinstance(names, str) else tuple(names)
    if len(both) != len(LANGUAGES) or not all(isinstance(name, str) and name for name in both):
        raise ConfigError(f"{option} must be one name, or a pair for zh and en, not {names!r}")
    return dict(zip(LANGUAGES, both, strict=True))


def _is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)
