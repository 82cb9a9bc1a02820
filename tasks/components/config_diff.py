"""What differs between two versions of configuration files, told without a single value of them.

Names of files and of keys are shown, values never: what is a secret cannot be told from what is none. No digest of a
single value is recorded anywhere, since one that is easily guessed would be given away by it; so the keys are compared
where both archives can be read, and the files alone, by what is recorded of them, where they cannot.
"""

from __future__ import annotations

import configparser
import hashlib
import io
import json
import re
import tarfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from dotenv.parser import parse_stream

LARGE = 1 << 20
"""Bytes of a file that are looked into; a larger one is compared as a whole."""
KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
VALUES = 50_000
"""How many values a file may have; YAML's references can make millions of a few lines."""
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


def recorded_versions(holds: Mapping[str, Any]) -> dict[str, Version]:
    """Return the files by what the record of a part says of them: enough to tell which ones changed, not how."""
    modes, contents = holds.get("modes", {}), holds.get("contents", {})
    return {name: Version(int(modes[name], 8), content) for name, content in contents.items()}


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
    read = next((read for pattern, read in READERS if pattern.search(name)), None)
    try:
        return read(text.decode()) if read else None
    except (ValueError, RecursionError, yaml.YAMLError, configparser.Error):
        return None  # not what its name says: compared as a whole


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


def _ini_keys(text: str) -> Keys:
    parser = configparser.RawConfigParser()
    parser.read_string(text)
    # The last line of a broken value in base64 would be a key with an empty value.
    return _paths({name: {key: it or None for key, it in keys.items()} for name, keys in parser.items()})


def _paths(value: Any) -> Keys:
    left, seen = [value], 0
    while left:
        here, seen = left.pop(), seen + 1
        if isinstance(here, (dict, list)):
            left += here.values() if isinstance(here, dict) else here
        if seen + len(left) > VALUES:
            raise ValueError(f"more than {VALUES} values")
    return dict(_walk(value))


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path of each value. A mapping counts as one value when it has keys that may be something else.

    That is what is no plain name, and a key without a value: ``{hunter2}`` is one in YAML.
    """
    if isinstance(value, dict) and value and all(map(_is_key, value, value.values())):
        for key, below in value.items():
            yield from _walk(below, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, below in enumerate(value):
            yield from _walk(below, f"{path}[{index}]")
    else:
        yield path or "(all of it)", _sha256(value)


def _is_key(key: object, value: object) -> bool:
    return isinstance(key, str) and value is not None and KEY.fullmatch(key) is not None


def _sha256(value: Any) -> str:
    return hashlib.sha256(repr(value).encode(errors="surrogatepass")).hexdigest()


READERS: tuple[tuple[re.Pattern[str], Callable[[str], Keys]], ...] = (
    (re.compile(r"(^|/)\.env[^/]*$|\.env$"), _env_keys),
    (re.compile(r"\.json$"), lambda text: _paths(json.loads(text))),
    (re.compile(r"\.toml$"), lambda text: _paths(tomllib.loads(text))),
    (re.compile(r"\.ya?ml$"), lambda text: _paths(yaml.safe_load(text))),
    (re.compile(r"\.(ini|cfg)$"), _ini_keys),
)
"""What finds the keys of a file, by its name."""


class _Joined(io.RawIOBase):
    """Chunks as the file that tarfile reads from."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._rest = iter(chunks), b""

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._chunks, b"")
        chunk, self._rest = self._rest[:size], self._rest[size:]
        return chunk
