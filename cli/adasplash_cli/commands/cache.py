"""``adasplash cache``: look at the database of tuned configs, carry it elsewhere, and mend it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adasplash_cli.commands.cache_report import report_command
from adasplash_cli.output import json_option, milliseconds, note, print_json, print_table

if TYPE_CHECKING:
    from adasplash_tuner.measure.drift import Drift
    from adasplash_tuner.storage.records import BestConfig, Row
    from adasplash_tuner.storage.snapshot import Snapshot
    from adasplash_tuner.storage.store import TuningStore
    from adasplash_tuner.storage.upkeep import Finding


@click.group("cache")
def command() -> None:
    """List, show, export, import and prune tuned configs.

    They are in one database, which `adasplash cache path` names. ADASPLASH_DB, a file path or a SQLAlchemy URL of SQLite or PostgreSQL,
    names another, or a snapshot (*.json) that `adasplash cache export` wrote. ADASPLASH_CACHE_MODE says what may be done with it.
    """


command.add_command(report_command)


@command.command("path")
@json_option
def path_command(as_json: bool) -> None:
    """Print where the database is, and what state it is in."""
    from adasplash_core.errors import StoreError
    from adasplash_tuner.storage.location import cache_mode, locate

    location, mode = locate(), cache_mode()
    exists = location.exists()
    facts: dict[str, Any] = {"location": str(location), "exists": exists, "mode": mode.value, "bytes": None, "problem": None}
    if exists and location.path is not None:
        facts["bytes"] = location.path.stat().st_size
    try:
        if exists:
            source = _source()
            facts |= source.counts()
            facts["sha256"] = getattr(source, "digest", None)
    except StoreError as error:
        facts["problem"] = str(error)
    if as_json:
        print_json(facts)
        return
    click.echo(facts["location"])
    if facts["problem"]:
        note(facts["problem"])
    elif not exists:
        note("It does not exist yet: `adasplash tune` makes it.")
    else:
        note(f"{facts['best']} tuned configs ({facts['quarantined']} in quarantine), {facts['measurements']} measurements")
        if facts["sha256"]:
            note(f"A snapshot, sha256 {facts['sha256']}: processes with the same one agree.")
    if not mode.writes:
        note(f"ADASPLASH_CACHE_MODE is {mode.value!r}: nothing is written.")


@command.command("list")
@click.option("--backend", help="Only this backend's.")
@click.option("--device", help="Only devices whose name contains this text.")
@json_option
def list_command(backend: str | None, device: str | None, as_json: bool) -> None:
    """List the tuned configs, one a line."""
    store = _source()
    rows = [row for row in store.rows() if _matches(row, backend, device)]
    if as_json:
        print_json({"location": str(store.location), "rows": [_row_json(row) for row in rows]})
        return
    if not rows:
        click.echo(f"No tuned config {'matches' if backend or device else 'is'} in {store.location}.")
        return
    columns = ["id", "problem", "device", "ms", "gain", "error", "measured", "config"]
    print_table("", columns, [_cells(row) for row in rows], right=["id", "ms", "gain", "error"])
    if bad := [row for row in rows if row.usable is None]:
        click.echo(f"{len(bad)} in quarantine or not readable: `adasplash cache verify` says why.")


@command.command("show")
@click.argument("id_", metavar="ID", type=int)
@json_option
def show_command(id_: int, as_json: bool) -> None:
    """Show one tuned config, its whole key, and everything that was measured under it. ID is from `adasplash cache list`."""
    store = _source()
    row = store.row(id_)
    if row is None:
        raise click.BadParameter(f"there is no row {id_} in {store.location}", param_hint="ID")
    measured = store.measurements(row.record.key) if row.record is not None else []
    if as_json:
        from dataclasses import asdict

        print_json({**_row_json(row), "measurements": [asdict(m) for m in measured]})
        return
    if row.record is None:
        click.echo(f"{row.readable}\nnot readable: {row.problem}")
        return
    best = row.record
    for name, value in best.key.as_dict().items():
        click.echo(f"{name:20} {value}")
    click.echo()
    for name, value in best.as_dict().items():
        if name != "key" and value != "":
            click.echo(f"{name:20} {_config_words(value) if name == 'config' else value}")
    columns = ["config", "stage", "ms", "spread", "samples", "error", "status"]
    rows = [
        [
            _config_words(m.config),
            m.stage,
            milliseconds(m.median_ms),
            milliseconds(m.spread_ms),
            m.samples,
            None if m.error is None else f"{m.error:.0e}",
            f"{m.status}: {m.note}" if m.note else m.status,
        ]
        for m in measured
    ]
    print_table("\nmeasurements", columns, rows, right=columns[2:6])


@command.command("export")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True), default="-")
@click.option("--backend", help="Only this backend's.")
@click.option("--device", help="Only devices whose name contains this text.")
@click.option(
    "--pretuned",
    is_flag=True,
    help="One card's configs of the installed code, and where they are from, to ship. FILE may be a folder.",
)
@json_option
def export_command(file: Path, backend: str | None, device: str | None, pretuned: bool, as_json: bool) -> None:
    """Write the tuned configs to FILE, or to standard output, as JSON that `adasplash cache import` reads.

    The file is also a snapshot: with ADASPLASH_DB=FILE and ADASPLASH_CACHE_MODE=frozen every process of a job uses the same configs,
    on any file system. Configs in quarantine are left out. With --json and a FILE, what was written is reported as JSON.
    """
    from adasplash_tuner.storage.exchange import export_document

    rows = [row for row in _source().rows() if _matches(row, backend, device)]
    if pretuned:
        from adasplash_core.device import visible_devices
        from adasplash_core.plugins import registry
        from adasplash_tuner.storage.pretuning import file_name, one_card, pretuned_document, shippable

        records = one_card(shippable(rows, registry()), visible_devices())
        text = pretuned_document(records)
        if file.is_dir():
            file /= file_name(records[0].key)
    else:
        records = [record for row in rows if (record := row.usable) is not None]
        text = export_document(records)
    if str(file) == "-":
        click.echo(text, nl=False)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}") from error
    if as_json:
        print_json({"file": str(file), "configs": len(records)})
    else:
        click.echo(f"{len(records)} tuned configs written to {file}")


@command.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def import_command(file: Path, as_json: bool) -> None:
    """Merge the tuned configs of FILE, all or none: each replaces a stored one only if it is faster.

    The file's content is checked strictly and nothing in it is executed, so it may come from anyone.
    """
    from adasplash_tuner.storage.exchange import read_document

    records = read_document(file)
    store = _store()
    taken = store.merge(records)
    if as_json:
        print_json({"file": str(file), "read": len(records), "taken": taken, "location": str(store.location)})
    else:
        click.echo(f"{taken} of {len(records)} configs taken into {store.location}; the others were not faster.")


@command.command("prune")
@click.option("--older-than", metavar="DAYS", type=click.FloatRange(0), help="Those measured more than this many days ago.")
@click.option("--missing-gpu", is_flag=True, help="Those of GPUs that are not in this machine.")
@click.option(
    "--stale", is_flag=True, help="Those measured with other code than what is installed. They are still used until then."
)
@click.option("--quarantined", is_flag=True, help="Those in quarantine, and those that cannot be read.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@json_option
def prune_command(
    older_than: float | None, missing_gpu: bool, stale: bool, quarantined: bool, dry_run: bool, as_json: bool
) -> None:
    """Delete tuned configs, and the measurements under them, to which any of the given options applies."""
    if older_than is None and not (missing_gpu or stale or quarantined):
        raise click.UsageError("Say what to delete: --older-than DAYS, --missing-gpu, --stale, --quarantined.")
    from adasplash_core.device import visible_devices
    from adasplash_core.plugins import registry
    from adasplash_tuner.storage.upkeep import DAY_S, prunable

    store = _source()
    chosen = prunable(
        store.rows(),
        registry(),
        older_than_s=None if older_than is None else older_than * DAY_S,
        devices=visible_devices() if missing_gpu else None,
        stale=stale,
        quarantined=quarantined,
    )
    deleted = 0 if dry_run or not chosen else _store().delete(list(chosen))
    if as_json:
        print_json({"location": str(store.location), "dry_run": dry_run, "chosen": chosen, "deleted": deleted})
        return
    for id_, reasons in chosen.items():
        click.echo(f"{id_}: {'; '.join(reasons)}")
    click.echo(
        f"{len(chosen)} would be deleted from {store.location}" if dry_run else f"{deleted} deleted from {store.location}"
    )


@command.command("verify")
@click.option("--sample", type=click.IntRange(0), default=8, show_default=True, help="Measure so many again; 0 for none.")
@click.option("--all", "all_rows", is_flag=True, help="Measure all of this machine again, however long it takes.")
@click.option(
    "--seconds", type=click.FloatRange(0), default=60, show_default=True, help="Begin no further one after this time."
)
@click.option(
    "--tolerance", type=click.FloatRange(0), default=10, show_default=True, help="Per cent by which times may differ."
)
@click.option("--workload", type=click.Path(dir_okay=False), help="File that configs were tuned on, to measure those again.")
@json_option
def verify_command(sample: int, all_rows: bool, seconds: float, tolerance: float, workload: str | None, as_json: bool) -> None:
    """Check the file and every row, measure some configs again on this machine, and say how to mend what is wrong.

    Rows that do not parse are put in quarantine, and so are configs that no longer run or are less accurate than their dtype's bound.
    Times that differ from the stored ones by more than --tolerance are reported as drift, which is no fault; nor are stale rows. Exits
    with 1 if the database or a row is broken.
    """
    from adasplash_core.plugins import registry
    from adasplash_tuner.storage.upkeep import verify

    store = _source()
    damage = store.integrity_problems()
    findings = verify(store, registry())
    fine = [finding.row for finding in findings if finding.state == "ok"]
    drifts = _measure_again(fine, None if all_rows else sample, float("inf") if all_rows else seconds, workload)
    for drift in drifts:
        if drift.is_fault:
            _set_apart(store, drift)
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.state] = counts.get(finding.state, 0) + 1
    if as_json:
        listed = [{"id": f.row.id, "key": f.row.readable, "state": f.state, "why": f.why or None} for f in findings]
        measured = [
            {
                "id": d.row.id,
                "then_ms": d.row.record.median_ms if d.row.record else None,
                "now_ms": d.now_ms,
                "drift_percent": d.percent,
                "default_ms": d.default_ms,
                "error": d.error,
                "problem": d.problem or None,
            }
            for d in drifts
        ]
        print_json({"location": str(store.location), "damage": damage, "counts": counts, "rows": listed, "measured": measured})
    else:
        _print_findings(str(store.location), findings, counts)
        _print_drifts(drifts, tolerance)
        for line in damage[:10]:
            note(f"The file is damaged: {line}")
        if damage:
            note("Run `adasplash cache mend`: it sets the file aside and keeps every config that can still be read.")
        elif counts.get("broken") or counts.get("quarantined"):
            note("`adasplash tune` measures them anew; `adasplash cache prune --quarantined` deletes them.")
    if damage or counts.get("broken") or any(drift.is_fault for drift in drifts):
        raise click.exceptions.Exit(1)


def _measure_again(rows: list[Row], sample: int | None, seconds: float, workload: str | None) -> list[Drift]:
    if not rows or sample == 0:
        return []
    from adasplash_core.device import device_info, visible_devices
    from adasplash_core.plugins import registry
    from adasplash_tuner.measure.drift import measure_again

    drifts: list[Drift] = []
    devices = {(d.type, d.name, d.capability, d.multiprocessors): d for d in (*reversed(visible_devices()), device_info("cpu"))}
    for device in devices.values():  # of identical GPUs the first
        left = None if sample is None else sample - len(drifts)
        drifts += measure_again(rows, registry(), device, sample=left, workload=workload, budget_s=seconds)
    return drifts


def _set_apart(store: TuningStore | Snapshot, drift: Drift) -> None:
    from adasplash_core.errors import StoreError
    from adasplash_tuner.storage.snapshot import Snapshot

    if isinstance(store, Snapshot):
        return
    try:
        store.quarantine(drift.row.id, drift.problem)
    except StoreError as error:  # the finding is still worth printing
        note(str(error))


def _print_findings(location: str, findings: list[Finding], counts: dict[str, int]) -> None:
    click.echo(f"{location}: {', '.join(f'{n} {state}' for state, n in sorted(counts.items())) or 'empty'}")
    for finding in findings:
        if finding.state != "ok":
            click.echo(f"{finding.row.id} {finding.state}: {finding.why}\n   {finding.row.readable}")


def _print_drifts(drifts: list[Drift], tolerance: float) -> None:
    columns = ["id", "problem", "then ms", "now ms", "drift", "gain", "error", ""]
    rows = []
    for d in drifts:
        if d.row.record is None:
            continue
        percent, gain = d.percent, None if d.now_ms is None or d.default_ms is None else d.default_ms / d.now_ms
        verdict = d.problem or ("drifted" if percent is not None and abs(percent) > tolerance else "as before")
        rows.append(
            [
                d.row.id,
                d.row.record.key.problem(),
                milliseconds(d.row.record.median_ms),
                milliseconds(d.now_ms),
                None if percent is None else f"{percent:+.1f} %",
                None if gain is None else f"{gain:.2f}x",
                None if d.error is None else f"{d.error:.0e}",
                verdict,
            ]
        )
    if rows:
        print_table("\nmeasured again", columns, rows, right=columns[2:7])


@command.command("mend")
@json_option
def mend_command(as_json: bool) -> None:
    """Set a broken SQLite file aside (renamed, never deleted) and start a new one with the configs that can still be read."""
    from adasplash_tuner.storage.upkeep import mend

    store = _store()
    mended = mend(store)
    if as_json:
        print_json({"location": str(store.location), "set_aside": str(mended.set_aside), "saved": mended.saved})
    else:
        click.echo(f"The old file is now {mended.set_aside}.\n{mended.saved} tuned configs were saved into {store.location}.")


def _store() -> TuningStore:
    """The database, to write to it."""
    from adasplash_tuner.storage.store import TuningStore

    return TuningStore()


def _source() -> TuningStore | Snapshot:
    """The database or the snapshot, to read it."""
    from adasplash_tuner.storage.snapshot import open_source

    return open_source()


def _matches(row: Row, backend: str | None, device: str | None) -> bool:
    if row.record is None:
        return backend is None and device is None
    key = row.record.key
    return (backend is None or key.backend == backend) and (device is None or device.lower() in key.device_name.lower())


def _row_json(row: Row) -> dict[str, Any]:
    record = row.record.as_dict() if row.record is not None else None
    return {"id": row.id, "readable": row.readable, "record": record, "problem": row.problem or None}


def _cells(row: Row) -> list[object]:
    if row.record is None:
        return [row.id, row.readable, None, None, None, None, None, f"not readable: {row.problem}"]
    best = row.record
    config = f"in quarantine: {best.quarantined}" if best.quarantined else _config_words(best.config)
    return [
        row.id,
        best.key.problem(),
        best.key.machine(),
        milliseconds(best.median_ms),
        f"{best.gain:.2f}x",
        f"{best.error:.0e}",
        _when(best),
        config,
    ]


def _when(best: BestConfig) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(best.measured_at, UTC).strftime("%Y-%m-%d")


def _config_words(config: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in config.items()) or "nothing to tune"
