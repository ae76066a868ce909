"""Exact arithmetic in a text that nobody can trust: + - * / and brackets, nothing else."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARACTERS = 300
"""Longer texts are no arithmetic problem's answer; a bound on time and on recursion."""

_ALLOWED = re.compile(r"[0-9+\-*/()\s]+", re.ASCII)

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the exact value and the whole numbers in it, in order; None if it is no arithmetic.

    Python's parser reads the text, nothing is executed.  Powers, `//`, names and division by zero
    are none.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS or not _ALLOWED.fullmatch(text):
        return None
    numbers: list[int] = []
    try:
        value = _value(ast.parse(" ".join(text.split()), mode="eval").body, numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, numbers


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int() as number):
            numbers.append(number)
            return Fraction(number)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            first = _value(left, numbers)
            return _OPERATORS[type(op)](first, _value(right, numbers))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, numbers)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, numbers)
        case _:
            raise ValueError(f"no arithmetic: {type(node).__name__}")
