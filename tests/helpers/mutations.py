"""Files that are damaged or hostile, made from good ones: a byte, a piece or a value is another."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator

import yaml

VALUES = (
    *(None, True, False, 0, -1, 1, 2, 7, 1000000, 2**31, 2**63, -(2**63), 10**400, 0.0, 0.5, -0.0, 1e-320, 1e308),
    *(float("inf"), float("-inf"), float("nan"), "", "x", "auto", "12", "1e5", "a" * 10000, "\0", "\ud800", "é\u202e"),
    *("../../etc/passwd", "/etc/passwd", "/dev/zero", "~", "owner/name", "%s{x}", "__class__"),
    *([], {}, [[[]]], {"a": 1}, [1, "a", None], [1] * 1000),
)
WORDS = (
    b"",
    b"\0",
    b"\xff",
    b"\xe9",
    b"{",
    b"[",
    b'"',
    b",",
    b"\n",
    b": ",
    b"1e999",
    b"NaN",
    b"null",
    b"-",
    b"\\u0000",
)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to three changes: of values where the content is JSON or YAML, else of bytes."""
    text = None
    if rng.random() < 0.7:
        text = _structured(content, rng)
    return _bytes(content, rng) if text is None else text


def _structured(content: bytes, rng: random.Random) -> bytes | None:
    try:
        text = content.decode("utf-8")
        is_json = text.lstrip()[:1] in ("{", "[")
        value = json.loads(text) if is_json else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return None
    if not isinstance(value, dict | list):
        return None
    root = [value]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not (places := list(_places(root))):
            break
        parent, key = rng.choice(places)
        action = rng.random()
        if action < 0.75:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif action < 0.85 and parent is not root:
            del parent[key]
        elif isinstance(parent, dict):
            parent[rng.choice(("x", "", "constructor", "model_type", "-1"))] = copy.deepcopy(rng.choice(VALUES))
    if not is_json:
        try:
            return yaml.safe_dump(root[0], allow_unicode=False).encode("utf-8", "surrogatepass")
        except yaml.YAMLError:
            return None
    made = json.dumps(root[0])
    if rng.random() < 0.05 and made.startswith("{"):  # a key given twice
        made = "{" + made[1 : made.find(",") + 1] + made[1:] if "," in made else made
    return made.encode()


def _places(value: object) -> Iterator[tuple[dict | list, object]]:
    for key, inner in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _bytes(content: bytes, rng: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 20))):
        # The beginning is where the headers are.
        at = rng.randrange(min(len(made), rng.choice((16, 256, len(made) or 1))) or 1) if made else 0
        action = rng.randrange(6)
        if action == 0 and made:
            made[at] = rng.randrange(256)
        elif action == 1 and made:
            made[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            made[at:at] = rng.choice(WORDS)
        elif action == 3:
            del made[at : at + rng.choice((1, 4, 100))]
        elif action == 4:
            made[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
        elif rng.random() < 0.3:
            del made[at:]
    return bytes(made)
