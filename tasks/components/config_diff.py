"""What differs between two versions of configuration files, told without a single value of them.

Names of files and of keys are shown, values never: what is a secret cannot be told from what is none. Nothing is
recorded for it in `metadata.json`, since digests of single values that are easily guessed would give them away;
so a difference is made on demand, where the archives can be read.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dotenv.parser import parse_stream

LARGE = 1 << 20
"""Bytes of a file that are looked into; a larger one is compared as a whole."""
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
Keys = dict[str, str]
"""The digest of each value by the path of its key; they never leave this module."""


@dataclass(frozen=True)
class Version:
    """A file or link: its mode, the digest of its content or target, and the content where it is not large."""

    mode: int
    sha256: str
    text: bytes | None = None


def read_versions(chunks: Iterable[bytes]) -> dict[str, Version]:
    """Return the files of a plain tar stream by name."""
    found = {}
    with tarfile.open(fileobj=_Joined(chunks), mode="r|") as tar:
        for member in tar:
            if member.isdir():
                continue
            file = tar.extractfile(member) if member.isreg() else None
            digest, text = hashlib.sha256(member.linkname.encode(errors="surrogateescape")), b""
            while file is not None and (piece := file.read(LARGE)):
                digest.update(piece)
                text = text + piece if len(text) <= LARGE else text
            small = file is not None and len(text) <= LARGE
            found[member.name] = Version(member.mode & 0o7777, digest.hexdigest(), text if small else None)
    return found


def diff(old: Mapping[str, Version], new: Mapping[str, Version]) -> list[str]:
    """Return a line for each file that was added, removed or changed, followed by those of its keys that were."""
    lines = []
    for name in sorted({*old, *new}):
        shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        if name not in old or name not in new:
            lines.append(f"{'added' if name in new else 'removed'}: {shown}")
            continue
        before, after = old[name], new[name]
        if before.mode != after.mode:
            lines.append(f"mode: {shown}: {before.mode:04o} → {after.mode:04o}")
        if before.sha256 != after.sha256:
            lines.append(f"changed: {shown}")
            lines += [f"  {line}" for line in _changed(name, before, after)]
    return lines


def _changed(name: str, before: Version, after: Version) -> list[str]:
    old, new = _keys(name, before.text), _keys(name, after.text)
    if old is None or new is None:
        return ["its content, which is not looked into"]
    lines = []
    for key in sorted({*old, *new}):
        if key not in old or key not in new:
            lines.append(f"{'added' if key in new else 'removed'}: {key}")
        elif old[key] != new[key]:
            lines.append(f"value changed: {key}")
    return lines or ["no value: comments, order or spaces"]


def _keys(name: str, text: bytes | None) -> Keys | None:
    """Return the keys of a file, ``None`` where its format is not known or not kept."""
    if text is None:
        return None
    base = name.rpartition("/")[2]
    try:
        decoded = text.decode()
        if base.startswith(".env") or base.endswith(".env"):
            return _env_keys(decoded)
        if base.endswith(".json"):
            return dict(_paths(json.loads(decoded)))
        if base.endswith(".toml"):
            return dict(_paths(tomllib.loads(decoded)))
    except (ValueError, RecursionError):
        pass  # not what its name says: compared as a whole
    return None


def _env_keys(text: str) -> Keys:
    keys: Keys = {}
    unread: list[str] = []
    readable = True
    for binding in parse_stream(io.StringIO(text)):
        if binding.key is None and not binding.error:
            continue  # a comment or an empty line
        # What follows a line without a value may be more of it, a key in base64 for example, that looks like a name.
        readable = readable and not binding.error and binding.value is not None
        if readable and binding.key and KEY.fullmatch(binding.key):
            keys[binding.key] = _sha256(binding.value)
        else:
            unread.append(binding.original.string)
    if unread:
        keys["(lines that are no KEY=value, and what follows them)"] = _sha256(unread)
    return keys


def _paths(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path of each value; keys that are no plain names may hold anything, and count with their values."""
    if isinstance(value, dict) and value and all(KEY.fullmatch(key) for key in value):
        for key, below in value.items():
            yield from _paths(below, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, below in enumerate(value):
            yield from _paths(below, f"{path}[{index}]")
    else:
        yield path or "(all of it)", _sha256(value)


def _sha256(value: Any) -> str:
    return hashlib.sha256(repr(value).encode(errors="surrogatepass")).hexdigest()


class _Joined(io.RawIOBase):
    """Chunks as the file that tarfile reads from."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._rest = iter(chunks), b""

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._chunks, b"")
        chunk, self._rest = self._rest[:size], self._rest[size:]
        return chunk
