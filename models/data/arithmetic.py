"""Sums and differences of numbers below a hundred, and the times table.

Worked out column by column: in the thought, or, where the model is not to think, in the answer.
Every column (8+7, 13-6) occurs in many sums, so a sum that is held out can be worked out.
"""

from __future__ import annotations

import random

from models.data.sample import Exchange, simple

LARGEST = 99

ADD = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "{a} + {b}",
    "{a}+{b}=?",
    "Calculate {a} + {b}.",
    "Add {a} and {b}.",
    "How much is {a} + {b}?",
    "What is the sum of {a} and {b}?",
)
SUBTRACT = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "{a} - {b}",
    "{a}-{b}=?",
    "Calculate {a} - {b}.",
    "Subtract {b} from {a}.",
    "How much is {a} - {b}?",
)
TIMES = (
    "What is {a} times {b}?",
    "What is {a} * {b}?",
    "{a} * {b}",
    "{a}*{b}=?",
    "Calculate {a} * {b}.",
    "Multiply {a} by {b}.",
    "How much is {a} times {b}?",
)


def add_thought(a: int, b: int) -> str:
    """Column addition: the ones, then the tens with the carry last."""
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + ones // 10
    return f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}+{ones // 10}={tens}"


def subtract_thought(a: int, b: int) -> str:
    """Column subtraction: ten is borrowed where the ones fall short, and taken off last."""
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow
    tens = a // 10 - b // 10 - borrow
    return f"{ones}-{b % 10}={ones - b % 10}, {a // 10}-{b // 10}-{borrow}={tens}"


def arithmetic(rng: random.Random) -> Exchange:
    """A sum, a difference that is not negative, or a product from the table."""
    kind = rng.random()
    if kind < 0.42:
        a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
        user = rng.choice(ADD).format(a=a, b=b)
        answer = f"{a} + {b} = {a + b}"
        return simple("arithmetic", f"{a}+{b}", user, answer, add_thought(a, b), is_work=True)
    if kind < 0.8:
        b, a = sorted((rng.randint(0, LARGEST), rng.randint(0, LARGEST)))
        user = rng.choice(SUBTRACT).format(a=a, b=b)
        answer = f"{a} - {b} = {a - b}"
        return simple("arithmetic", f"{a}-{b}", user, answer, subtract_thought(a, b), is_work=True)
    # A product cannot be worked out from other products, so the wording decides the split.
    a, b, wording = rng.randrange(1, 11), rng.randrange(1, 11), rng.randrange(len(TIMES))
    user = TIMES[wording].format(a=a, b=b)
    return simple("arithmetic", f"{a}*{b}|{wording}", user, f"{a} * {b} = {a * b}", f"{a}*{b}")
