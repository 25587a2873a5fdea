"""Alembic's migrations of the database of tuned configs: :mod:`adasplash_tuner.storage.upgrade` runs them on one older than the code.

To change the schema: change ``models.py``, raise ``SCHEMA_VERSION``, and add ``versions/schema_NNNN.py`` whose ``revision`` is that
number in four digits and whose ``down_revision`` is the one before. Older versions of the package share these databases:
``READABLE_FROM`` stays as it is while they can read what the migration leaves.
"""
