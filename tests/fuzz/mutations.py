"""Ways to spoil bytes, texts and nested values."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

NASTY_NUMBERS = (-1, 0, 1, 2, 255, 256, 10**6, 2**31, 2**63, 10**40, -0.5, 1e308, float("inf"), float("nan"))
NASTY_TEXTS = (
    "", " ", "\x00", "\x1b[2J\x1b]0;title\x07", "\u202egnp.exe", "a" * 5000, "../../../etc/passwd", "~nobody",
    "nan", "1e999",
    "null", "{}", "{0.__class__}", "%s%n", "\udce9", "e\u0301", "\ufeff", "cat; cat", "a,b,,c", "id: name", "@", "@x",
    "x" * 300,
    "!!python/object/apply:os.system ['touch canary']", "&a [*a]", "🦒" * 50,
)  # fmt: skip


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to a few changes: bits, cut and doubled parts, foreign numbers, an early end."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not spoilt:
            break
        place, length = rng.randrange(len(spoilt)), rng.choice((1, 2, 4, 8, 64, len(spoilt) // 3 + 1))
        # Headers lie in front and are small; half the changes go there.
        place = min(place, rng.choice((16, 64, 256, len(spoilt) - 1)))
        kind = rng.randrange(6)
        if kind == 0:
            spoilt[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del spoilt[place : place + length]
        elif kind == 2:
            spoilt[place:place] = spoilt[place : place + length]
        elif kind == 3:
            spoilt[place : place + length] = rng.choice((b"\xff", b"\x00", b"\x7f")) * length
        elif kind == 4:
            spoilt[place : place + 1] = rng.randbytes(length)
        else:
            del spoilt[place:]
    return bytes(spoilt)


def nasty(rng: random.Random, depth: int = 2) -> Any:
    """A value that nobody expects."""
    kind = rng.randrange(9 if depth else 4)
    if kind < 2:
        return rng.choice(NASTY_NUMBERS)
    if kind == 2:
        return rng.choice(NASTY_TEXTS)
    if kind == 3:
        return rng.choice((None, True, False))
    if kind == 4:
        return {rng.choice(NASTY_TEXTS): nasty(rng, depth - 1) for _ in range(rng.randrange(3))}
    if kind == 5:
        value: Any = []
        for _ in range(rng.choice((3, 200))):
            value = [value]
        return value
    return [nasty(rng, depth - 1) for _ in range(rng.randrange(4))]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a nested value."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        inside = todo.pop()
        keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        found += [(inside, key) for key in keys]
        todo += [inside[key] for key in keys]
    return found


def spoil_value(value: Any, rng: random.Random) -> Any:
    """A copy of nested dicts and lists with a few values replaced, taken away, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            return nasty(rng)
        inside, key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[rng.choice(NASTY_TEXTS)] = inside.pop(key)
        elif kind == 2 and isinstance(inside, dict):
            inside[rng.choice(NASTY_TEXTS)] = nasty(rng)
        elif kind == 3:
            inside[key] = copy.deepcopy(rng.choice([parent[where] for parent, where in found]))
        else:
            inside[key] = nasty(rng)
    return value


def spoil_json(value: Any, rng: random.Random) -> bytes:
    """JSON of a spoilt value, or spoilt JSON."""
    if rng.random() < 0.75:
        return json.dumps(spoil_value(value, rng)).encode()
    if rng.random() < 0.1:
        return b"[" * 100_000
    return spoil_bytes(json.dumps(value).encode(), rng)
