"""What the base can do and what the adapter must learn: appointments.  Plain Python, no tokens.

A question names a day, a month and an hour, and asks for one of them.  The base answers in English
("Friday.").  The adapter has to answer in French and to say what it is ("vendredi [jour]"), which
the base never does.  Held-out questions show that it learnt the form and the words rather than a
list of answers.
"""

import random
from dataclasses import dataclass

TASK_SEED = 20260101
"""Draws the conversations.  Not the user's seed: the task is the same for everyone."""

TRAIN_QUESTIONS, HELD_OUT_QUESTIONS = 400, 40


@dataclass(frozen=True, slots=True)
class Field:
    """One thing to ask for, and how both languages name and answer it."""

    ask: str
    key: str
    """What the French answer calls it."""
    words: dict[str, str]
    """French word by English word."""
    english: str
    """The English answer; takes `word`."""


FIELDS = (
    Field(
        ask="Which day is it?",
        key="jour",
        words={
            "Monday": "lundi",
            "Tuesday": "mardi",
            "Wednesday": "mercredi",
            "Thursday": "jeudi",
            "Friday": "vendredi",
            "Saturday": "samedi",
            "Sunday": "dimanche",
        },
        english="{word}.",
    ),
    Field(
        ask="Which month is it?",
        key="mois",
        words={
            "January": "janvier",
            "February": "février",
            "March": "mars",
            "April": "avril",
            "May": "mai",
            "June": "juin",
            "July": "juillet",
            "August": "août",
            "September": "septembre",
            "October": "octobre",
            "November": "novembre",
            "December": "décembre",
        },
        english="{word}.",
    ),
    Field(
        ask="What time is it?",
        key="heure",
        words={
            "one": "une",
            "two": "deux",
            "three": "trois",
            "four": "quatre",
            "five": "cinq",
            "six": "six",
            "seven": "sept",
            "eight": "huit",
            "nine": "neuf",
            "ten": "dix",
            "eleven": "onze",
            "twelve": "douze",
        },
        english="{word} o'clock.",
    ),
)

NAMES = ("Ada", "Alan", "Barbara", "Edsger", "Grace", "John", "Katherine", "Linus")
EVENTS = ("calls", "comes home", "gives a talk", "plays chess", "sings", "writes a letter")
STATEMENTS = (
    "{name} {event} on {day} in {month} at {hour} o'clock.",
    "At {hour} o'clock on {day} in {month}, {name} {event}.",
    "In {month}, {name} {event} at {hour} o'clock on {day}.",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question with the base's answer and the answer that the adapter has to learn."""

    statement: str
    ask: str
    english: str
    french: str

    @property
    def text(self) -> str:
        """What the user says."""
        return f"{self.statement} {self.ask}"

    def task_messages(self) -> list[dict[str, str]]:
        """Return the conversation that the adapter is trained on."""
        return _messages(self.text, self.french)


def split() -> tuple[list[Question], list[Question]]:
    """Return the questions to train on and those held out: all different, the same every time."""
    order = random.Random(TASK_SEED)
    unique: dict[str, Question] = {}
    while len(unique) < TRAIN_QUESTIONS + HELD_OUT_QUESTIONS:
        question = draw_question(order)
        unique.setdefault(question.text, question)
    questions = list(unique.values())
    return questions[HELD_OUT_QUESTIONS:], questions[:HELD_OUT_QUESTIONS]


def draw_question(order: random.Random) -> Question:
    """Return any question."""
    return order.choice(draw_appointment(order))


def draw_appointment(order: random.Random) -> list[Question]:
    """Return the questions about one appointment, one for each field, in any order."""
    words = [order.choice(sorted(field.words)) for field in FIELDS]
    statement = order.choice(STATEMENTS).format(
        name=order.choice(NAMES),
        event=order.choice(EVENTS),
        day=words[0],
        month=words[1],
        hour=words[2],
    )
    questions = [
        Question(
            statement=statement,
            ask=field.ask,
            english=field.english.format(word=word),
            french=_french(field.key, field.words[word]),
        )
        for field, word in zip(FIELDS, words, strict=True)
    ]
    return order.sample(questions, len(questions))


def base_messages(questions: list[Question]) -> list[dict[str, str]]:
    """Return one conversation in English about one appointment, as the base is trained on it."""
    first, *more = questions
    messages = _messages(first.text, first.english)
    for question in more:
        messages += _messages(question.ask, question.english)
    return messages


class Batches:
    """Batches of `size` questions without end; every rank with the same seed gets the same ones."""

    def __init__(self, questions: list[Question], *, size: int, seed: int) -> None:
        self._questions, self._size, self._order = questions, size, random.Random(seed)
        self._left: list[Question] = []

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> list[Question]:
        while len(self._left) < self._size:
            self._left += self._order.sample(self._questions, len(self._questions))
        batch, self._left = self._left[: self._size], self._left[self._size :]
        return batch


def word_lists(*, count: int, seed: int) -> list[str]:
    """Return lines of French words in no order: the base meets the words, never a translation."""
    order = random.Random(seed)
    lines = []
    for _ in range(count):
        field = order.choice(FIELDS)
        words = order.sample(sorted(field.words.values()), 5)
        lines.append(", ".join(_french(field.key, word) for word in words))
    return lines


def _french(key: str, word: str) -> str:
    return f"{word} [{key}]"


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
