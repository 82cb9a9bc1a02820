"""What a service of the demo system answers over HTTP, configured by the environment (see `service`)."""

from __future__ import annotations

import hashlib
import hmac
import html
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import jwt
import psycopg
import redis

from compose.demo import health

T = TypeVar("T")

SESSION_SECONDS = 7 * 24 * 3600
LARGEST_REQUEST = 32 * 1024 * 1024


class _Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _login(settings: health.Settings, body: dict[str, Any]) -> dict[str, Any]:
    """Give a signed token for a right name and password, and keep the session in Redis."""
    name, password = str(body.get("username", "")), str(body.get("password", ""))
    with health.connect(settings) as connection:
        row = connection.execute(
            "SELECT id, password_hash FROM users WHERE username = %s AND active", [name]
        ).fetchone()
        if row is None or not verify_password(password, str(row[1])):
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "unknown user or wrong password")
        claims = {"sub": name, "iat": int(time.time()), "jti": secrets.token_hex(16)}
        key = (Path(settings["KEYS_DIR"]) / "private.pem").read_bytes()
        token = jwt.encode(claims, key, algorithm=health.ALGORITHM)
        connection.execute("INSERT INTO issued_tokens (user_id, token) VALUES (%s, %s)", [row[0], token])
    with health.sessions(settings) as client:
        session = f"session:{claims['jti']}"
        client.hset(session, mapping={"user": name, "since": str(claims["iat"])})
        client.expire(session, SESSION_SECONDS)
    return {"token": token}


def _profile(settings: health.Settings, name: str) -> dict[str, Any]:
    with health.connect(settings) as connection:
        query = "SELECT username, name, biography, preferences FROM profiles WHERE username = %s"
        row = connection.execute(query, [name]).fetchone()
    if row is None:
        raise _Refusal(HTTPStatus.NOT_FOUND, "no such profile")
    return dict(zip(("username", "name", "biography", "preferences"), row, strict=True))


def _documents(settings: health.Settings, _: str) -> dict[str, Any]:
    with health.connect(settings) as connection:
        rows = connection.execute(
            "SELECT id, title, path, size FROM documents ORDER BY id DESC LIMIT 50"
        ).fetchall()
    return {"documents": [dict(zip(("id", "title", "path", "size"), row, strict=True)) for row in rows]}


def _upload(settings: health.Settings, body: dict[str, Any]) -> dict[str, Any]:
    """Keep a document: the file first, then the row that names it."""
    title, text = str(body.get("title", "")), str(body.get("text", ""))
    data = text.encode()
    digest = hashlib.sha256(data).hexdigest()
    path = f"api/{secrets.token_hex(8)}.txt"
    file = Path(settings["UPLOADS_DIR"]) / path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    with health.connect(settings) as connection:
        row = connection.execute(
            "WITH d AS (INSERT INTO documents (title, path, size, sha256) VALUES (%s, %s, %s, %s) RETURNING id)"
            " INSERT INTO ocr_pages (document_id, page, body, confidence) SELECT id, 1, %s, 1 FROM d RETURNING document_id",
            [title, path, len(data), digest, text],
        ).fetchone()
    return {"id": row[0] if row else None, "path": path, "sha256": digest}


_GET: dict[tuple[str, str], Callable[[health.Settings, str], dict[str, Any]]] = {
    ("user", "profiles"): _profile,
    ("admin", "documents"): _documents,
}
_POST: dict[tuple[str, str], Callable[[health.Settings, dict[str, Any]], dict[str, Any]]] = {
    ("auth", "token"): _login,
    ("admin", "documents"): _upload,
}


def hash_password(password: str, salt: bytes) -> str:
    """Give the form in which a password is stored: salt and digest, both in hexadecimal."""
    return f"{salt.hex()}${hashlib.pbkdf2_hmac('sha256', password.encode(), salt, 1000).hex()}"


def verify_password(password: str, stored: str) -> bool:
    """Say whether `stored` is the hash of `password`."""
    salt = stored.partition("$")[0]
    return hmac.compare_digest(hash_password(password, bytes.fromhex(salt)), stored)


class _Handler(BaseHTTPRequestHandler):
    settings: health.Settings = os.environ
    timeout = 30

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self) -> dict[str, Any] | str:
        name, _, rest = unquote(self.path.partition("?")[0]).strip("/").partition("/")
        role = self.settings["ROLE"]
        if name == "health":
            return {"status": "ok", "role": role, **health.check(self.settings)}
        if not name and role.startswith("front"):
            return f"<!doctype html><title>{html.escape(self.settings.get('TITLE', role))}</title>"
        return self._find(_GET, role, name)(self.settings, rest)

    def _post(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LARGEST_REQUEST:
            raise _Refusal(HTTPStatus.BAD_REQUEST, f"a body of 1 to {LARGEST_REQUEST} bytes is needed")
        body = json.loads(self.rfile.read(length))
        if not isinstance(body, dict):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
        return self._find(_POST, self.settings["ROLE"], self.path.strip("/"))(self.settings, body)

    @staticmethod
    def _find(table: dict[tuple[str, str], T], role: str, name: str) -> T:
        try:
            return table[role, name]
        except KeyError:
            raise _Refusal(HTTPStatus.NOT_FOUND, "not here") from None

    def _answer(self, work: Callable[[], dict[str, Any] | str]) -> None:
        status, content = HTTPStatus.OK, None
        try:
            content = work()
        except _Refusal as refusal:
            status, content = refusal.status, {"error": str(refusal)}
        except health.UnhealthyError as error:
            status, content = HTTPStatus.SERVICE_UNAVAILABLE, {"status": "unhealthy", "error": str(error)}
        except (psycopg.Error, redis.RedisError, OSError, ValueError) as error:
            status, content = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": type(error).__name__}
        page = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        kind = "text/html" if isinstance(content, str) else "application/json"
        data = page.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve() -> None:
    """Serve until SIGTERM or SIGINT."""
    address = (os.environ.get("HOST", "127.0.0.1"), int(os.environ["PORT"]))
    with ThreadingHTTPServer(address, _Handler) as server:
        server.daemon_threads = True
        for number in (signal.SIGTERM, signal.SIGINT):
            # shutdown() waits for serve_forever(), so it cannot be called from this thread.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        server.serve_forever(poll_interval=0.1)
