"""A later release of the tuner, for tests of two releases that share one database: this one with another schema and its migration."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import adasplash_tuner

ROOT = Path(__file__).parents[2]

MIGRATION = """
from alembic import op
import sqlalchemy as sa

revision = "0002"
down_revision = "0001"


def upgrade():
    # As most changes are made in SQLite: the table is copied, and the old one dropped, though other tables refer to it.
    recreate = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("adasplash_keys", recreate=recreate) as table:
        table.add_column(sa.Column("host", sa.Text(), nullable=False, server_default=""))
    op.create_index("adasplash_measurements_status", "adasplash_measurements", ["status"])
"""

IMPORT = """
import importlib.util, sys
place = sys.argv[1]
spec = importlib.util.spec_from_file_location("adasplash_tuner", place + "/__init__.py", submodule_search_locations=[place])
module = sys.modules["adasplash_tuner"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import adasplash_tuner.storage.schema
assert adasplash_tuner.storage.schema.SCHEMA_VERSION == 2
"""


def later_release(folder: Path, *, readable_from: int = 1) -> Path:
    """The package's folder. ``readable_from`` 2 makes its databases unreadable for the present release."""
    package = folder / "adasplash_tuner"
    shutil.copytree(Path(adasplash_tuner.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    schema = package / "storage/schema.py"
    text = schema.read_text().replace("SCHEMA_VERSION = 1", "SCHEMA_VERSION = 2")
    schema.write_text(text.replace("READABLE_FROM = 1", f"READABLE_FROM = {readable_from}"))
    models = package / "storage/models.py"
    column = 'Column("readable", Text, nullable=False),'
    models.write_text(models.read_text().replace(column, f'{column} Column("host", Text, nullable=False, server_default=""),'))
    (package / "storage/migrations/versions/schema_0002.py").write_text(MIGRATION)
    return package


def start(package: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    """Run code in a process whose ``adasplash_tuner`` is the later release."""
    command = [sys.executable, "-W", "always", "-c", IMPORT + code, str(package), *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(package: Path, code: str, *arguments: str) -> str:
    """What the code printed. The process must succeed."""
    process = start(package, code, *arguments)
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 0, complained
    return said
