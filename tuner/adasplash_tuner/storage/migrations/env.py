"""What Alembic runs: the migrations, on the connection that :mod:`adasplash_tuner.storage.upgrade` hands over, in its transaction."""

from __future__ import annotations

from alembic import context

from adasplash_tuner.storage.models import REVISION, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=REVISION.name,
    render_as_batch=True,  # SQLite changes a column by copying its table
)
with context.begin_transaction():
    context.run_migrations()
