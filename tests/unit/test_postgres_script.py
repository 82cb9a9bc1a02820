"""Scripts of pg_dump and pg_dumpall read as a stream: nothing inside of quotes, comments or rows is taken for a command."""

from collections.abc import Iterable

import pytest

from tasks.components.postgres_script import Connect, Item, MadeBy, Rows, Sql, read_script
from workers.errors import IntegrityError

SCRIPT = rb"""--
-- PostgreSQL database cluster dump
--

\restrict abc
SET standard_conforming_strings = on;
CREATE ROLE "a;\connect b";
\unrestrict abc
\connect template1
-- Dumped from database version 15.18 (Debian)
--
-- PostgreSQL database dump complete
--
CREATE DATABASE "a b" WITH TEMPLATE = template0;
COMMENT ON DATABASE "a b" IS 'it''s
\connect nowhere';
\connect -reuse-previous=on "dbname='a\'b'"
CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $_$ BEGIN /* ; */ 'x
\connect inside
$_$;
SELECT E'\';\\', 'a\', "q""
\connect z";
/* c /* ; */
\! rm
*/ COPY public."T ""1""; --" ("a b", t) FROM stdin;
1	x
2	\\.
\.
COPY public.e  FROM stdin;
\.
COPY s.z () FROM stdin;


\.
\connect "postgres"
--
-- PostgreSQL database cluster dump complete
--

"""


def read(chunks: Iterable[bytes]) -> list[Item]:
    """Return the items, with the pieces of the rows of a table as one."""
    found: list[Item] = []
    for item in read_script(chunks):
        last = found[-1] if found else None
        if isinstance(item, Rows) and isinstance(last, Rows) and last.table == item.table:
            found[-1] = Rows(item.table, last.text + item.text, last.count + item.count)
        else:
            found.append(item)
    return found


def test_a_script_is_read_the_same_however_it_is_cut() -> None:
    items = read([SCRIPT])
    assert [item.database for item in items if isinstance(item, Connect)] == ["template1", "a'b", "postgres"]
    rows = [(item.table, item.count) for item in items if isinstance(item, Rows)]
    assert rows == [('public."T ""1""; --"', 2), ("public.e", 0), ("s.z", 2)]
    statements = [item.text for item in items if isinstance(item, Sql)]
    assert len(statements) == 9
    assert statements[3].endswith(b"IS 'it''s\n\\connect nowhere';\n")
    assert MadeBy(15) in items
    for size in range(1, 30):
        assert read(SCRIPT[at : at + size] for at in range(0, len(SCRIPT), size)) == items


def test_a_script_that_is_cut_anywhere_is_refused() -> None:
    end = SCRIPT.index(b"-- PostgreSQL database cluster dump complete")
    for cut in range(end + 44):
        with pytest.raises(IntegrityError, match=r"cut short|within a statement|no dump"):
            read([SCRIPT[:cut]])
    read([SCRIPT[: end + 44]])


@pytest.mark.parametrize(
    "command", [b"\\! touch /tmp/x\n", b"\\i /etc/passwd\n", b"SELECT 1 \\gexec\n", b"\\copy t from x\n"]
)
def test_other_commands_of_psql_are_refused(command: bytes) -> None:
    with pytest.raises(IntegrityError, match="no dump"):
        read([command, SCRIPT])


def test_the_script_of_one_database_ends_in_its_own_words() -> None:
    script = b"--\n-- PostgreSQL database dump\n--\nCREATE TABLE t ();\n--\n-- PostgreSQL database dump complete\n--\n"
    assert len(read([script])) == 1
    with pytest.raises(IntegrityError, match="cut short"):
        read([b"--\n-- PostgreSQL database cluster dump\n--\n" + script])
