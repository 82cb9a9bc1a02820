"""What the demo's data is made of: text, bytes and times that follow from a seed, and the way into a table."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

Connection = psycopg.Connection[tuple[Any, ...]]

#: The day the demo's history begins. Fixed, so that the same seed gives the same rows.
BEGIN = datetime(2025, 1, 1, tzinfo=UTC)

_WORDS = (  # noqa: SIM905 - read more easily so
    "請求書 見積 契約 東京 大阪 確認 承認 金額 合計 消費税 住所 電話 担当 部署 日付 番号 備考 納品 注文 支払 "
    "invoice total amount customer address signed received paid contract order page scanned naïve Größe façade "
    "übermäßig señor 😀 № 100% 'quoted' \"double\" back\\slash"
).split()
_CHUNK = 256 * 1024


class Material:
    """A source of deterministic data: the same `seed` and the same calls give the same values."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)  # noqa: S311 - nothing secret comes from it
        self._pool = " ".join(self.random.choices(_WORDS, k=40_000))

    def text(self, length: int) -> str:
        """Give `length` characters of words."""
        start = self.random.randrange(len(self._pool) - length)
        return self._pool[start : start + length]

    def data(self, length: int) -> bytes:
        """Give `length` bytes that no compression makes smaller."""
        return self.random.randbytes(length)

    def moment(self) -> datetime:
        """Give a moment in the half year after `BEGIN`, to the microsecond."""
        return BEGIN + timedelta(microseconds=self.random.randrange(180 * 86_400 * 1_000_000))


def copy_rows(
    connection: Connection, table: str, columns: Iterable[str], rows: Iterable[Iterable[object]]
) -> int:
    """Load `rows` into `columns` of `table` and give their number. Lists and dicts become JSON."""
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(*table.split(".")), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    count, pending, size = 0, [], 0
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            line = "\t".join(map(_field, row)) + "\n"
            pending.append(line)
            count, size = count + 1, size + len(line)
            if size >= _CHUNK:
                copy.write("".join(pending))
                pending, size = [], 0
        copy.write("".join(pending))
    return count


def _field(value: object) -> str:
    """Give `value` as a field of COPY's text format."""
    if value is None:
        return r"\N"
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, bytes):
        return r"\\x" + value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    text = str(value)
    return text.replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n").replace("\r", r"\r")
