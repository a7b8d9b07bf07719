"""The manifest: what it holds, that it is the same for the same files, and what `freeze --check` says of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.project import History, ProjectOptions
from migrator.project.freeze import freeze
from migrator.project.history_manifest import NoManifest, dump, file_sums, load, parse, problems, syntax_of
from tests.support.projects import Revision, linear_history
from tests.support.runner import ROOT, Runner

SOURCE = b'''"""Add a table.

Create Date: 2024-05-01 10:00:00
"""
from alembic import op

revision = "a1"
down_revision = None


def upgrade():
    """Add it."""
    op.execute("CREATE TABLE t (id int)")  # a comment
    pass
'''


def manifest_of(folder: Path) -> Path:
    return folder / "migrations" / "manifest.json"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"10:00:00", b"11:30:00"),
        (b"  # a comment", b""),
        (b'"a1"', b"'a1'"),
        (b'op.execute("CREATE', b'op.execute(\n        "CREATE'),
        (b'"CREATE TABLE t (id int)"', b'"CREATE TABLE " "t (id int)"'),
        (b"    pass\n", b""),
        (b'    """Add it."""\n', b""),
        (b"\n\n\ndef", b"\n\ndef"),
    ],
)
def test_a_cosmetic_edit_leaves_what_the_file_says(old: bytes, new: bytes, tmp_path: Path) -> None:
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_bytes(SOURCE)
    after.write_bytes(SOURCE.replace(old, new))
    assert SOURCE.replace(old, new) != SOURCE
    assert file_sums(after).edited_from(file_sums(before)) == "cosmetic"
    assert file_sums(before).edited_from(file_sums(before)) == ""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"t (id int)", b"t (id bigint)"),
        (b"down_revision = None", b"down_revision = 'a0'"),
        (b"op.execute(", b"op.run("),
        (b"def upgrade():", b"def upgrade(x=None):"),
        (b"    pass\n", b"    op.execute('')\n"),
        (b"from alembic import op", b"from alembic import op as op2"),
        (b"from alembic import op", b"import op.alembic"),
        (b"def upgrade():", b"def downgrade():"),
        (b"def upgrade():", b"async def upgrade():"),
        (b'"a1"', b'b"a1"'),
        (b'"a1"', b"('a1',)"),
        (b'"a1"', b"('a', '1')"),
    ],
)
def test_a_real_edit_is_seen(old: bytes, new: bytes) -> None:
    assert SOURCE.replace(old, new) != SOURCE
    assert syntax_of(SOURCE.replace(old, new)) not in (syntax_of(SOURCE), "")


def test_texts_are_not_taken_for_structure() -> None:
    """No text that stands in a file can make two different trees look the same."""
    sources = [
        b"f('a', 'b')",
        b"f('as1:b', '')",
        b'f("a\'s1:b")',
        b"f('a' 'b')",
        b"f(a, b)",
        b"f(a)(b)",
        b"f('1')",
        b"f(1)",
        b"f(1.0)",
        b"f(True)",
        b"f(None)",
        b"f(...)",
        b"f(1j)",
        b"f(b'1')",
        b"f(f'{a}b')",
        b"f(f'{a!r}b')",
        b"f(f'{a:>3}b')",
        b"f(*a)",
        b"f(**a)",
        b"f({**a})",
        b"f({a: b})",
        b"global a, b",
        b"global ab",
        b"a[b:c]",
        b"a[b::c]",
        b"a[:b:c]",
    ]
    assert len({syntax_of(source) for source in sources}) == len(sources)


def test_the_digest_of_a_tree_is_the_same_under_every_version_of_python() -> None:
    """A ledger is read by images with other versions: what is pinned here must come out everywhere."""
    pinned = "9d6e42ec8cfa0fa854d7c88c5e39c3ae05670df2ba0b97af01c2ee9a845d83d7"
    source = SOURCE + (
        b"x: int = 0x1f + -1\ny = f'{x}a' 'b' u'\\u00e9' f'{x!r:>{x}}'\nz = {**{}, 'a': [1.5, None, ...]}\n"
        b"class C(object, metaclass=type):\n    '''Doc.'''\n\n\n@op\ndef f(a, /, b=1, *c, d=2, **e) -> None:\n"
        b"    match a:\n        case {'k': [1, *_]} if b:\n            return (lambda q: q)(a)\n    try:\n"
        b"        pass\n    except* ValueError as error:\n        raise\n"
    )
    assert syntax_of(source) == pinned


def test_what_is_no_python_has_no_syntax(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_bytes(b"def (:\n")
    assert file_sums(broken).syntax == ""
    assert syntax_of(b"x = '\0'") == ""
    also = tmp_path / "also.py"
    also.write_bytes(b"def (:\n# x\n")
    assert file_sums(also).edited_from(file_sums(broken)) == "real"


def test_freeze_writes_what_the_history_is(project: Callable[..., Path], run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(3), env="own_variable")
    result = run_migrator("freeze", cwd=folder)
    assert result.code == 0, result
    text = manifest_of(folder).read_text()
    document = json.loads(text)
    assert [line["revision"] for line in document["revisions"]] == ["r001", "r002", "r003"]
    assert document["revisions"][1]["parents"] == ["r001"]
    assert document["revisions"][1]["file"] == "versions/r002.py"
    assert document["heads"] == document["rows_at_head"] == ["r003"]
    assert str(folder) not in text
    assert sum('"revision": ' in line for line in text.splitlines()) == 3, "one line for each revision"


def test_freezing_again_or_elsewhere_changes_nothing(
    project: Callable[..., Path], run_migrator: Runner
) -> None:
    here = project(revisions=linear_history(3))
    there = project(revisions=linear_history(3), name="elsewhere")
    assert run_migrator("freeze", cwd=here).code == 0
    first = manifest_of(here).read_bytes()
    again = run_migrator("freeze", cwd=here)
    assert "is current" in again.stdout, again
    result = run_migrator("freeze", cwd=there, env={"PYTHONHASHSEED": "7", "SOME": "thing"})
    assert result.code == 0, result
    assert manifest_of(there).read_bytes() == manifest_of(here).read_bytes() == first


def test_a_new_revision_is_a_new_line(project: Callable[..., Path], run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(3))
    run_migrator("freeze", cwd=folder)
    before = manifest_of(folder).read_text().splitlines()
    project(revisions=linear_history(4))
    run_migrator("freeze", cwd=folder)
    after = manifest_of(folder).read_text().splitlines()
    changed = [line for line in after if line not in before and line.removesuffix(",") not in before]
    assert [line.split(":")[0] for line in changed[:-1]] == ['"digest"', '"heads"', '"rows_at_head"']
    assert '"r004"' in changed[-1]
    assert len(after) == len(before) + 1


def test_check_says_what_differs(project: Callable[..., Path], run_migrator: Runner) -> None:
    folder = project(revisions=linear_history(3))
    none = run_migrator("freeze", "--check", cwd=folder)
    assert none.code == 31, none
    assert "there was no manifest" in none.stderr
    assert not manifest_of(folder).exists()
    run_migrator("freeze", cwd=folder)
    assert run_migrator("freeze", "--check", cwd=folder).code == 0
    versions = folder / "migrations" / "versions"
    (versions / "r001.py").write_text((versions / "r001.py").read_text() + "# a comment\n")
    (versions / "r002.py").write_text((versions / "r002.py").read_text().replace("t2", "u2"))
    project(revisions=linear_history(4)[3:])
    before = manifest_of(folder).read_bytes()
    result = run_migrator("freeze", "--check", cwd=folder)
    assert result.code == 31, result
    for text in (
        "r004 (versions/r004.py) is new",
        "r001 (versions/r001.py) has a cosmetic change",
        "r002 (versions/r002.py) has a change",
        "run `migrator freeze` and commit it",
    ):
        assert text in result.stderr, result
    assert manifest_of(folder).read_bytes() == before


def test_a_manifest_that_was_merged_by_hand_is_none(
    project: Callable[..., Path], run_migrator: Runner
) -> None:
    folder = project(revisions=linear_history(2))
    run_migrator("freeze", cwd=folder)
    text = manifest_of(folder).read_text()
    parse(text)
    for spoilt in (
        text.replace("r002.py", "r003.py", 1).replace('"sha256": "', '"sha256": "0', 1),
        text.replace('"format": 1', '"format": 2'),
        text.replace('"heads": ["r002"],\n', ""),
        "<<<<<<< HEAD\n" + text,
        "[]",
        "",
    ):
        with pytest.raises(NoManifest):
            parse(spoilt)
    with pytest.raises(NoManifest):
        load(folder / "nowhere.json")


def test_the_example_is_frozen(run_migrator: Runner) -> None:
    result = run_migrator("freeze", "--check", cwd=ROOT)
    assert result.code == 0, result


def test_labels_dependencies_and_floors_are_frozen(project: Callable[..., Path]) -> None:
    folder = project(
        revisions=[Revision("a1", None), Revision("a2", "a1"), Revision("b1", None)],
        files={
            "migrations/versions/c1.py": "revision = 'c1'\ndown_revision = None\nbranch_labels = ('other',)\n"
            "depends_on = 'a1'\nmigrator_min_compatible = 'a1'\ndef upgrade(): pass\n",
            "migrations/versions/c2.py": "revision = 'c2'\ndown_revision = 'c1'\ndef upgrade(): pass\n",
            "migrations/versions/__init__.py": "",
        },
    )
    options = ProjectOptions(config=(str(folder / "alembic.ini"),))
    found = freeze(History(options, None, folder), options, folder)
    by_id = {item.revision: item for item in found.revisions}
    assert [item.revision for item in found.revisions] == ["a1", "a2", "b1", "c1", "c2"]
    assert (by_id["c1"].labels, by_id["c1"].depends_on, by_id["c1"].min_compatible) == (
        ("other",),
        ("a1",),
        "a1",
    )
    assert by_id["c2"].labels == ()
    assert found.heads == ("a2", "b1", "c2")
    assert parse(dump(found)) == found
    assert problems(found, folder / "migrations") == ()


def test_rows_at_head_are_fewer_where_a_head_is_depended_on(project: Callable[..., Path]) -> None:
    folder = project(
        revisions=[Revision("a1", None)],
        files={
            "migrations/versions/b1.py": "revision = 'b1'\ndown_revision = None\ndepends_on = 'a1'\n"
            "def upgrade(): pass\n"
        },
    )
    options = ProjectOptions(config=(str(folder / "alembic.ini"),))
    found = freeze(History(options, None, folder), options, folder)
    assert found.heads == ("a1", "b1")
    assert found.rows_at_head == ("b1",)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("context.configure(connection=connection)", ["alembic_version", ""]),
        ("context.configure(connection=connection, version_table='v', version_table_schema='s')", ["v", "s"]),
        ("context.configure(connection=connection, **OPTIONS)", ["v", "public"]),
        ("context.configure(connection=connection, **OTHERS)", None),
        ("OPTIONS['version_table'] = name\ncontext.configure(connection=connection, **OPTIONS)", None),
        ("import os\ncontext.configure(connection=connection, version_table=os.environ['NAME'])", None),
        ("import os\ncontext.configure(connection=connection, version_table=os.getenv('NAME', 'v'))", None),
    ],
)
def test_the_version_table_is_frozen_where_only_the_file_decides(
    env: str, expected: list[str] | None, project: Callable[..., Path], run_migrator: Runner
) -> None:
    options = "OPTIONS = {'version_table': 'v', 'version_table_schema': 'public'}\n"
    folder = project(revisions=linear_history(1), files={"migrations/env.py": options + env + "\n"})
    result = run_migrator("freeze", cwd=folder, env={"NAME": "of_the_environment"})
    assert result.code == 0, result
    assert json.loads(manifest_of(folder).read_text())["version_table"] == expected
