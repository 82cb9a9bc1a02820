"""The difference of configuration files: what changed is named, and no value is ever shown."""

import io
import json
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.components.config_diff import Version, diff, read_versions, recorded_versions

KEYS = st.text("abcdefgh_", min_size=1, max_size=6)
SECRETS = st.text("QXZ0123456789=+/ $#'\n", min_size=6, max_size=30)
TREES = st.dictionaries(
    KEYS, SECRETS | st.dictionaries(KEYS, SECRETS, max_size=3) | st.lists(SECRETS, max_size=3)
)


def tar(files: dict[str, str], *, mode: int = 0o600) -> dict[str, Version]:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text.encode()), mode
            archive.addfile(info, io.BytesIO(text.encode()))
    whole = made.getvalue()
    return read_versions(whole[start : start + 700] for start in range(0, len(whole), 700))


def env(values: dict[str, str]) -> str:
    return "".join(
        "{}='{}'\n".format(key, value.replace("\\", "\\\\").replace("'", "\\'"))
        for key, value in values.items()
    )


@settings(deadline=None)
@given(st.dictionaries(KEYS, SECRETS), st.dictionaries(KEYS, SECRETS))
def test_keys_of_env_files_are_named_and_values_never(old: dict[str, str], new: dict[str, str]) -> None:
    lines = diff(tar({"a/.env": env(old)}), tar({"a/.env": env(new)}))
    for key in {*old, *new}:
        assert (f"  value changed: {key}" in lines) == (key in old and key in new and old[key] != new[key])
        assert (f"  added: {key}" in lines) == (key not in old)
        assert (f"  removed: {key}" in lines) == (key not in new)
    for value in [*old.values(), *new.values()]:
        assert value not in "\n".join(lines)


@settings(deadline=None)
@given(TREES, TREES, st.sampled_from(["x.json", "x.yml", "x.yaml", "x.ini", "key.pem", ".env"]))
def test_no_value_appears_whatever_the_file_is_called(old: object, new: object, name: str) -> None:
    shown = "\n".join(diff(tar({name: json.dumps(old)}), tar({name: json.dumps(new)})))
    assert bool(shown) == (json.dumps(old) != json.dumps(new))
    assert not set("QXZ0123456789+") & set(shown.replace("[0]", "").replace("[1]", "").replace("[2]", ""))


@settings(deadline=None)
@given(st.text(max_size=200), st.text("QXZ0123456789=", min_size=8, max_size=70))
def test_the_rest_of_a_broken_value_is_not_taken_for_a_key(before: str, rest: str) -> None:
    broken = f"GOOD=1\nBEGIN PRIVATE\n{rest}\n"
    assert rest.strip("=") not in "\n".join(diff(tar({".env": "GOOD=1\n"}), tar({".env": broken})))
    for ini in (f"[a]\ngood = 1\nprivate =\n{rest}\n", f"[a]\ngood = 1\nBEGIN PRIVATE\n{rest}\n"):
        shown = "\n".join(diff(tar({"x.ini": "[a]\ngood = 1\n"}), tar({"x.ini": ini})))
        assert rest.strip("=").lower() not in shown.lower()
    for yml in (
        f"good: 1\npassword: {{{rest}}}\n",
        f"good: 1\n{rest}:\n",
        f"good: 1\n- {rest}\n",
        f"? {rest}\n",
    ):
        assert rest.strip("=") not in "\n".join(diff(tar({"x.yml": "good: 1\n"}), tar({"x.yml": yml})))
    names = (".env", "x.json", "x.toml", "x.yml", "x.ini")
    assert diff(tar(dict.fromkeys(names, before)), tar({})) == [f"removed: {name}" for name in sorted(names)]
    diff(tar(dict.fromkeys(names, before)), tar(dict.fromkeys(names, rest)))


def test_files_modes_keys_and_mere_comments() -> None:
    old = tar(
        {
            "gone": "",
            "same": "x",
            ".env": "# old\nA=1\n",
            "t.toml": "[db]\nport = 1\nuser = 'u'\n",
            "k.pem": "1",
        }
    )
    new = tar(
        {
            "came": "",
            "same": "x",
            ".env": "# new\nA=1\n",
            "t.toml": "[db]\nport = 2\nuser = 'u'\n",
            "k.pem": "2",
        }
    )
    assert diff(old, new) == [
        "changed: .env", "  no value: comments, order or spaces", "added: came", "removed: gone",
        "changed: k.pem", "  its content, which is not looked into", "changed: t.toml", "  value changed: db.port",
    ]  # fmt: skip
    assert diff(tar({"f": "x"}), tar({"f": "x"}, mode=0o644)) == ["mode: f: 0600 → 0644"]


COMPOSE = """
x-common: &common {restart: always}
services:
  auth-service:
    <<: *common
    image: auth:1
    environment: {LEVEL: info, TOKEN: QXZ-1}
    ports: ["8001:8001"]
"""


def test_keys_of_yaml_json_and_ini_files_are_named_by_their_paths() -> None:
    changed = COMPOSE.replace("QXZ-1", "QXZ-2").replace("always", "no").replace("LEVEL: info, ", "")
    assert diff(tar({"c.yml": COMPOSE}), tar({"c.yml": changed})) == [
        "changed: c.yml",
        "  removed: services.auth-service.environment.LEVEL",
        "  value changed: services.auth-service.environment.TOKEN",
        "  value changed: services.auth-service.restart",
        "  value changed: x-common.restart",
    ]
    old, new = "[server]\nport = 1\n[log]\nlevel = x\n", "; a comment\n[server]\nport = 2\nbind = QXZ\n"
    assert diff(tar({"a.ini": old}), tar({"a.ini": new})) == [
        "changed: a.ini", "  removed: log.level", "  added: server.bind", "  value changed: server.port",
    ]  # fmt: skip
    assert diff(tar({"a.json": '{"a": {"b": [1, 2]}}'}), tar({"a.json": '{"a": {"b": [1, 3], "c": 1}}'})) == [
        "changed: a.json", "  value changed: a.b[1]", "  added: a.c",
    ]  # fmt: skip


def test_a_file_of_references_without_end_is_compared_as_a_whole() -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]
    for text in ("\n".join(lines), "a: &a [*a]"):
        assert diff(tar({"a.yml": text}), tar({"a.yml": f"{text}\nb: 1"})) == [
            "changed: a.yml", "  its content, which is not looked into",
        ]  # fmt: skip


def test_records_alone_tell_which_files_changed() -> None:
    old = {"contents": {"a": "1", "b": "1", "c": "1"}, "modes": {"a": "0600", "b": "0600", "c": "0600"}}
    new = {"contents": {"a": "2", "b": "1", "d": "1"}, "modes": {"a": "0600", "b": "0644", "d": "0600"}}
    assert diff(recorded_versions(old), recorded_versions(new)) == [
        "changed: a", "  its content, which is not looked into", "mode: b: 0600 → 0644", "removed: c", "added: d",
    ]  # fmt: skip
