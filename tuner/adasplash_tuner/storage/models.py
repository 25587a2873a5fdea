"""The database's tables, as SQLAlchemy Core knows them.

A change here needs a migration in ``migrations/versions``, and the next ``SCHEMA_VERSION`` in ``schema.py``; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Integer, MetaData, String, Table, Text
from sqlalchemy import PrimaryKeyConstraint as PrimaryKey
from sqlalchemy import UniqueConstraint as Unique

from adasplash_tuner.key import KEY_FIELDS
from adasplash_tuner.storage.schema import META_TABLE, REVISION_TABLE

_BIG = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts ids only in INTEGER columns

metadata = MetaData()

META = Table(  # facts about the database itself: ``schema_version`` and ``readable_from``
    META_TABLE,
    metadata,
    Column("name", String(100), primary_key=True),
    Column("value", Text, nullable=False),
)

REVISION = Table(  # Alembic's, which is not asked for it: importing Alembic takes longer than a look-up
    REVISION_TABLE,
    metadata,
    Column("version_num", String(32), nullable=False),
    PrimaryKey("version_num", name="adasplash_revision_pkc"),
)

KEYS = Table(  # one TuningKey a row, field by field: its docstring says what they are
    "adasplash_keys",
    metadata,
    Column("id", _BIG, primary_key=True),
    Column("backend", String, nullable=False),
    Column("pass_", String, nullable=False),
    Column("dtype", String, nullable=False),
    Column("head_dim", Integer, nullable=False),
    Column("head_dim_v", Integer, nullable=False),
    Column("q_bucket", BigInteger, nullable=False),
    Column("kv_bucket", BigInteger, nullable=False),
    Column("batch_heads_bucket", Integer, nullable=False),
    Column("gqa_bucket", Integer, nullable=False),
    Column("causal", Boolean, nullable=False),
    Column("mask_class", String, nullable=False),
    Column("alpha_class", String, nullable=False),
    Column("deterministic", Boolean, nullable=False),
    Column("device_type", String, nullable=False),
    Column("device_name", String, nullable=False),
    Column("capability", String, nullable=False),
    Column("multiprocessors", Integer, nullable=False),
    Column("code_hash", String, nullable=False),
    Column("space_version", String, nullable=False),
    Column("toolchain", String, nullable=False),
    Column("readable", Text, nullable=False),
    Unique(*KEY_FIELDS, name="adasplash_keys_unique"),
)

BEST = Table(  # the winner of a key, at most one; its config is canonical JSON, parsed by ``records``
    "adasplash_best",
    metadata,
    Column("key_id", _BIG, ForeignKey(KEYS.c.id, ondelete="CASCADE"), primary_key=True),
    Column("config", Text, nullable=False),
    Column("median_ms", Float(53), nullable=False),
    Column("spread_ms", Float(53), nullable=False),
    Column("default_ms", Float(53), nullable=False),
    Column("error", Float(53), nullable=False),
    Column("shape", Text, nullable=False),
    Column("inputs", Text, nullable=False),
    Column("samples", Integer, nullable=False),
    Column("measured_at", BigInteger, nullable=False),  # Unix seconds: no dialect's time zones to disagree about
    Column("version", String, nullable=False),
    Column("quarantined", Text, nullable=False),
)

MEASUREMENTS = Table(  # all that was ever measured, failures too: a changed list of candidates throws nothing away
    "adasplash_measurements",
    metadata,
    Column("id", _BIG, primary_key=True),
    Column("key_id", _BIG, ForeignKey(KEYS.c.id, ondelete="CASCADE"), index=True, nullable=False),
    Column("config", Text, nullable=False),
    Column("shape", Text, nullable=False),
    Column("inputs", Text, nullable=False),
    Column("stage", String, nullable=False),
    Column("status", String, nullable=False),
    Column("measured_at", BigInteger, nullable=False),
    Column("version", String, nullable=False),
    Column("median_ms", Float(53)),
    Column("spread_ms", Float(53)),
    Column("samples", Integer, nullable=False),
    Column("error", Float(53)),
    Column("note", Text, nullable=False),
)
