"""Everything in a PostgreSQL server that a restore must bring back, read by plain queries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

Row = tuple[Any, ...]

# An ACL as sorted text with names instead of numbers; what was never granted reads as the default it stands for.
_ACL = """(SELECT coalesce(string_agg(t, ' ' ORDER BY t), '') FROM (SELECT format('%s:%s%s<%s',
    CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(a.grantee) END, a.privilege_type,
    CASE WHEN a.is_grantable THEN '*' ELSE '' END, pg_get_userbyid(a.grantor)) AS t
    FROM aclexplode(coalesce({acl}, acldefault('{kind}', {owner}))) a) s)"""
_USER_SCHEMA = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"


def _acl(column: str, kind: str, owner: str) -> str:
    return _ACL.format(acl=column, kind=kind, owner=owner)


_ROLES = """
    SELECT r.rolname, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb, r.rolcanlogin, r.rolreplication,
        r.rolbypassrls, r.rolconnlimit, r.rolvaliduntil, r.rolpassword,
        (SELECT coalesce(string_agg(g.rolname || CASE WHEN m.admin_option THEN '*' ELSE '' END, ' ' ORDER BY g.rolname), '')
         FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid)
    FROM pg_authid r WHERE r.rolname !~ '^pg_' ORDER BY 1"""
_DATABASES = f"""
    SELECT d.datname, pg_get_userbyid(d.datdba), pg_encoding_to_char(d.encoding), d.datcollate, d.datctype, d.datconnlimit,
        d.datallowconn, shobj_description(d.oid, 'pg_database'), {_acl("d.datacl", "d", "d.datdba")}
    FROM pg_database d WHERE NOT d.datistemplate ORDER BY 1"""
_SETTINGS = """
    SELECT coalesce(r.rolname, '*') || ' in ' || coalesce(d.datname, '*'), array_to_string(ARRAY(SELECT unnest(setconfig) ORDER BY 1), ' ')
    FROM pg_db_role_setting s LEFT JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase
    ORDER BY 1"""

#: What is defined in a database: each query gives names and definitions, and neither holds a number of this server's own.
_DEFINITIONS = {
    "schema": f"SELECT n.nspname, pg_get_userbyid(n.nspowner) || ' ' || {_acl('n.nspacl', 'n', 'n.nspowner')}"
    f" FROM pg_namespace n WHERE {_USER_SCHEMA}",
    "relation": f"""SELECT format('%I.%I', n.nspname, c.relname), concat_ws(' ', c.relkind, c.relpersistence,
        pg_get_userbyid(c.relowner), array_to_string(c.reloptions, ','), obj_description(c.oid, 'pg_class'),
        {_acl("c.relacl", "r", "c.relowner")})
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'v', 'm') AND {_USER_SCHEMA}""",
    "column": f"""SELECT format('%I.%I.%I', n.nspname, c.relname, a.attname), concat_ws(' ',
        (SELECT count(*) FROM pg_attribute b WHERE b.attrelid = c.oid AND b.attnum > 0 AND NOT b.attisdropped AND b.attnum <= a.attnum),
        format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated, pg_get_expr(e.adbin, e.adrelid),
        (SELECT string_agg(pg_get_userbyid(x.grantee) || ':' || x.privilege_type, ' ' ORDER BY x.grantee::regrole::text, x.privilege_type)
         FROM aclexplode(a.attacl) x))
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        LEFT JOIN pg_attrdef e ON e.adrelid = a.attrelid AND e.adnum = a.attnum
        WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm') AND {_USER_SCHEMA}""",
    "index": f"SELECT format('%I.%I', n.nspname, c.relname), pg_get_indexdef(c.oid) FROM pg_class c"
    f" JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'i' AND {_USER_SCHEMA}",
    "constraint": f"SELECT format('%s %I', k.conrelid::regclass, k.conname), pg_get_constraintdef(k.oid)"
    f" FROM pg_constraint k JOIN pg_namespace n ON n.oid = k.connamespace WHERE k.contype <> 'n' AND {_USER_SCHEMA}",
    "view": f"SELECT format('%I.%I', n.nspname, c.relname), pg_get_viewdef(c.oid) FROM pg_class c"
    f" JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('v', 'm') AND {_USER_SCHEMA}",
    "function": f"SELECT p.oid::regprocedure::text, pg_get_userbyid(p.proowner) || ' ' || pg_get_functiondef(p.oid)"
    f" || {_acl('p.proacl', 'f', 'p.proowner')} FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace"
    f" WHERE p.prokind IN ('f', 'p') AND {_USER_SCHEMA}",
    "trigger": "SELECT format('%s %I', tgrelid::regclass, tgname), pg_get_triggerdef(oid) || tgenabled::text"
    " FROM pg_trigger WHERE NOT tgisinternal",
    "enum": f"SELECT format('%I.%I', n.nspname, t.typname), string_agg(e.enumlabel, ' ' ORDER BY e.enumsortorder)"
    f" FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid JOIN pg_namespace n ON n.oid = t.typnamespace"
    f" WHERE {_USER_SCHEMA} GROUP BY 1",
    "extension": "SELECT extname, '' FROM pg_extension",
    "default grants": """SELECT concat_ws(' ', pg_get_userbyid(d.defaclrole), n.nspname, d.defaclobjtype), string_agg(format('%s:%s',
        CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(x.grantee) END, x.privilege_type), ' '
        ORDER BY x.grantee::regrole::text, x.privilege_type)
        FROM pg_default_acl d LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace, aclexplode(d.defaclacl) x GROUP BY 1""",
}
_TABLES = f"""SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'm') AND {_USER_SCHEMA} ORDER BY 1, 2"""
_SEQUENCES = f"""SELECT n.nspname, c.relname, concat_ws(' ', pg_get_userbyid(c.relowner), format_type(s.seqtypid, NULL), s.seqstart,
    s.seqincrement, s.seqmin, s.seqmax, s.seqcache, s.seqcycle, {_acl("c.relacl", "s", "c.relowner")})
    FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE {_USER_SCHEMA}"""


def fingerprint_postgres(admin_dsn: str) -> dict[str, str]:
    """Give every role, database, definition, table and sequence by its name; equal texts mean equal things.

    A table is its number of rows and the sums of two halves of each row's MD5, so neither order nor place matters, but a row
    that is there twice counts twice. `admin_dsn` is a superuser's. Raise psycopg.Error when the server does not answer.
    """
    found: dict[str, str] = {}
    with _connect(admin_dsn) as connection:
        for name, *attributes, password, memberships in _rows(connection, _ROLES):
            verifier = hashlib.sha256(str(password).encode()).hexdigest()[:16]
            found[f"role {name}"] = f"{_join(attributes)} password {verifier} member of [{memberships}]"
        databases = list(_rows(connection, _DATABASES))
        found |= {f"settings of {name}": str(value) for name, value in _rows(connection, _SETTINGS)}
    for name, *attributes in databases:
        found[f"database {name}"] = _join(attributes)
        with _connect(admin_dsn, dbname=str(name)) as connection:
            found |= {f"{name}: {key}": value for key, value in _contents(connection).items()}
    return found


def _contents(connection: psycopg.Connection[Row]) -> dict[str, str]:
    found = {
        f"{kind} {name}": str(text)
        for kind, query in _DEFINITIONS.items()
        for name, text in _rows(connection, query)
    }
    for schema, name in _rows(connection, _TABLES):
        hashed = sql.SQL(
            "SELECT count(*), sum(('x' || left(h, 16))::bit(64)::bigint::numeric), sum(('x' || right(h, 16))::bit(64)::bigint::numeric)"
            " FROM (SELECT md5(t::text) AS h FROM ONLY {} t) s"
        ).format(sql.Identifier(schema, name))
        count, left, right = next(iter(connection.execute(hashed)))
        found[f"rows of {schema}.{name}"] = _sums(count, left, right)
    for schema, name, definition in _rows(connection, _SEQUENCES):
        state = connection.execute(
            sql.SQL("SELECT last_value, is_called FROM {}").format(sql.Identifier(schema, name))
        )
        found[f"sequence {schema}.{name}"] = f"{_join(next(iter(state)))} {definition}"
    large = "SELECT count(*), md5(string_agg(md5(loid || ':' || pageno || ':' || encode(data, 'hex')), '' ORDER BY loid, pageno)) FROM pg_largeobject"
    found["large objects"] = _join(next(iter(connection.execute(large))))
    return found


def _sums(count: object, left: object, right: object) -> str:
    return f"{count} rows, hash {hashlib.sha256(f'{left} {right}'.encode()).hexdigest()[:16]}"


def _rows(connection: psycopg.Connection[Row], query: str) -> list[Row]:
    return connection.execute(query.encode()).fetchall()


def _connect(dsn: str, *, dbname: str | None = None) -> psycopg.Connection[Row]:
    connection = psycopg.connect(make_conninfo(dsn, dbname=dbname), connect_timeout=10, autocommit=True)
    # Whatever the database or role sets, values are written one way.
    for setting in (
        "timezone = 'UTC'",
        "datestyle = 'ISO'",
        "extra_float_digits = 3",
        "bytea_output = 'hex'",
        "search_path = ''",
    ):
        connection.execute(f"SET {setting}".encode())
    return connection


def _join(values: Iterable[object]) -> str:
    return " ".join("-" if value is None else str(value) for value in values)
