"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

BIG = sa.BigInteger().with_variant(sa.Integer, "sqlite")

PROBLEM_AND_MACHINE = (
    ("backend", sa.String()),
    ("pass_", sa.String()),
    ("dtype", sa.String()),
    ("head_dim", sa.Integer()),
    ("head_dim_v", sa.Integer()),
    ("q_bucket", sa.BigInteger()),
    ("kv_bucket", sa.BigInteger()),
    ("batch_heads_bucket", sa.Integer()),
    ("gqa_bucket", sa.Integer()),
    ("causal", sa.Boolean()),
    ("mask_class", sa.String()),
    ("alpha_class", sa.String()),
    ("deterministic", sa.Boolean()),
    ("device_type", sa.String()),
    ("device_name", sa.String()),
    ("capability", sa.String()),
    ("multiprocessors", sa.Integer()),
    ("code_hash", sa.String()),
    ("space_version", sa.String()),
    ("toolchain", sa.String()),
)


def upgrade() -> None:
    op.create_table(
        "adasplash_meta",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("value", sa.Text(), nullable=False),
    )
    op.create_table(
        "adasplash_keys",
        sa.Column("id", BIG, primary_key=True),
        *(sa.Column(name, type_, nullable=False) for name, type_ in PROBLEM_AND_MACHINE),
        sa.Column("readable", sa.Text(), nullable=False),
        sa.UniqueConstraint(*(name for name, _ in PROBLEM_AND_MACHINE), name="adasplash_keys_unique"),
    )
    op.create_table(
        "adasplash_best",
        sa.Column("key_id", BIG, sa.ForeignKey("adasplash_keys.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("median_ms", sa.Float(53), nullable=False),
        sa.Column("spread_ms", sa.Float(53), nullable=False),
        sa.Column("default_ms", sa.Float(53), nullable=False),
        sa.Column("error", sa.Float(53), nullable=False),
        sa.Column("shape", sa.Text(), nullable=False),
        sa.Column("inputs", sa.Text(), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("measured_at", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("quarantined", sa.Text(), nullable=False),
    )
    op.create_table(
        "adasplash_measurements",
        sa.Column("id", BIG, primary_key=True),
        sa.Column("key_id", BIG, sa.ForeignKey("adasplash_keys.id", ondelete="CASCADE"), index=True, nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("shape", sa.Text(), nullable=False),
        sa.Column("inputs", sa.Text(), nullable=False),
        sa.Column("stage", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("measured_at", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("median_ms", sa.Float(53)),
        sa.Column("spread_ms", sa.Float(53)),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("error", sa.Float(53)),
        sa.Column("note", sa.Text(), nullable=False),
    )
