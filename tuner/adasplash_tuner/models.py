"""The database's tables. Every column of the key is NOT NULL; configs are canonical JSON text, parsed by ``records``."""

from __future__ import annotations

from sqlalchemy import BigInteger, Float, ForeignKey, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from adasplash_tuner.key import KEY_FIELDS

SCHEMA_VERSION = 1

_BIG = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts ids only in INTEGER columns


class Base(DeclarativeBase):
    pass


class Meta(Base):
    """Facts about the database itself, such as ``schema_version``."""

    __tablename__ = "adasplash_meta"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class KeyRow(Base):
    """One :class:`~adasplash_tuner.key.TuningKey`, field by field."""

    __tablename__ = "adasplash_keys"
    __table_args__ = (UniqueConstraint(*KEY_FIELDS, name="adasplash_keys_unique"),)

    id: Mapped[int] = mapped_column(_BIG, primary_key=True)
    backend: Mapped[str]
    pass_: Mapped[str]
    dtype: Mapped[str]
    head_dim: Mapped[int]
    head_dim_v: Mapped[int]
    q_bucket: Mapped[int] = mapped_column(BigInteger)
    kv_bucket: Mapped[int] = mapped_column(BigInteger)
    batch_heads_bucket: Mapped[int]
    gqa_bucket: Mapped[int]
    causal: Mapped[bool]
    mask_class: Mapped[str]
    alpha_class: Mapped[str]
    deterministic: Mapped[bool]
    device_type: Mapped[str]
    device_name: Mapped[str]
    capability: Mapped[str]
    multiprocessors: Mapped[int]
    code_hash: Mapped[str]
    space_version: Mapped[str]
    toolchain: Mapped[str]
    readable: Mapped[str] = mapped_column(Text)

    best: Mapped[BestRow | None] = relationship(back_populates="key", passive_deletes=True)


class BestRow(Base):
    """The winner of a key, at most one."""

    __tablename__ = "adasplash_best"

    key_id: Mapped[int] = mapped_column(_BIG, ForeignKey(KeyRow.id, ondelete="CASCADE"), primary_key=True)
    config: Mapped[str] = mapped_column(Text)
    median_ms: Mapped[float] = mapped_column(Float(53))
    spread_ms: Mapped[float] = mapped_column(Float(53))
    default_ms: Mapped[float] = mapped_column(Float(53))
    error: Mapped[float] = mapped_column(Float(53))
    shape: Mapped[str] = mapped_column(Text)
    inputs: Mapped[str] = mapped_column(Text)
    samples: Mapped[int]
    measured_at: Mapped[int] = mapped_column(BigInteger)  # Unix seconds: no dialect's time zones to disagree about
    version: Mapped[str]
    quarantined: Mapped[str] = mapped_column(Text)

    key: Mapped[KeyRow] = relationship(back_populates="best")


class MeasurementRow(Base):
    """Every measurement ever made, also of configs that failed: a changed list of candidates throws nothing away."""

    __tablename__ = "adasplash_measurements"

    id: Mapped[int] = mapped_column(_BIG, primary_key=True)
    key_id: Mapped[int] = mapped_column(_BIG, ForeignKey(KeyRow.id, ondelete="CASCADE"), index=True)
    config: Mapped[str] = mapped_column(Text)
    shape: Mapped[str] = mapped_column(Text)
    inputs: Mapped[str] = mapped_column(Text)
    stage: Mapped[str]
    status: Mapped[str]
    measured_at: Mapped[int] = mapped_column(BigInteger)
    version: Mapped[str]
    median_ms: Mapped[float | None] = mapped_column(Float(53))
    spread_ms: Mapped[float | None] = mapped_column(Float(53))
    samples: Mapped[int]
    error: Mapped[float | None] = mapped_column(Float(53))
    note: Mapped[str] = mapped_column(Text)
