"""Portable provenance: what Snakemake knows about a run, kept with the results that DVC keeps.

Snakemake decides what is stale from its own records, one per output, below
``.snakemake/metadata``. They do not travel with the results. :func:`save_state` stores the records
of each milestone as ``results/<milestone>/provenance.jsonl`` and :func:`restore_state` puts them
back, so that an old state is complete again, here or in a clone elsewhere, and real changes are
still seen. The record format is internal to Snakemake; :data:`RECORD_FORMAT` guards it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from terraloom.errors import StateError
from terraloom.io import digest_json, sha256, write_text
from terraloom.operate.stored import (
    CAMPAIGN,
    MILESTONES,
    PROVENANCE,
    call_dvc,
    check_objects,
    locked_outs,
)

__all__ = [
    "MILESTONES", "PROVENANCE", "RECORD_FORMAT", "check_format", "restore_state", "save_state",
]  # fmt: skip

#: Snakemake's record format that this module reads and writes.
RECORD_FORMAT = 6

_SNAKEMAKE = Path(".snakemake")
#: What rules make here stays on a restore if it fits; what people put here always stays.
_MADE = "resources/"
#: Facts about one execution, not about what was executed.
_OCCASION = ("starttime", "endtime", "job_hash", "incomplete", "external_jobid")
_ABSOLUTE = re.compile(r"""(?:^|["'\s=])(/[^"'\s,\]}]+)""")

Record = dict[str, Any]
Records = dict[str, Record]


def save_state(run_dir: Path = Path(), milestones: Sequence[str] | None = None) -> str:
    """Store Snakemake's records of each milestone with the milestone.

    Records of intermediates (``work/``, ``resources/``) go with the earliest milestone that needs
    them. A record that says the same as the one stored before is left as it was, times included,
    so that a rerun without a change leaves the file byte for byte. Frozen milestones keep what
    they came with.

    Args:
        run_dir: Folder of the run, with ``results/`` and ``.snakemake/``.
        milestones: Milestones to save; all that exist if not given.

    Returns:
        What was saved, as lines of text.

    Raises:
        StateError: Nothing to save, an unfinished run, results that do not fit together, or
            another record format.
    """
    check_format()
    frozen = _frozen(run_dir)
    names = _to_save(run_dir, milestones, frozen)
    records = _merged(run_dir, frozen)
    owner = _owners(records, [m for m in MILESTONES if m not in frozen])
    chosen = {m: {o: records[o] for o in sorted(records) if owner.get(o) == m} for m in names}
    _check_whole(run_dir, chosen)
    _check_inputs(run_dir, chosen)
    lines = []
    for name, part in chosen.items():
        path = run_dir / "results" / name / PROVENANCE
        text = "".join(_line(output, record) for output, record in part.items())
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        lines.append(f"results/{name}/{PROVENANCE}: {len(part)} records")
    _keep_campaign(run_dir, names)
    lines += [f"results/{m}: frozen, left as it is" for m in MILESTONES if m in frozen]
    outside = sorted({p for part in chosen.values() for r in part.values() for p in _absolute(r)})
    if outside:
        lines.append(
            f"note: the campaign names absolute paths ({', '.join(outside[:3])}); "
            "a restored state is complete only where these paths exist"
        )
    return "\n".join(lines)


def restore_state(run_dir: Path = Path()) -> str:
    """Bring the results of the commit that is checked out back, complete for Snakemake.

    Runs ``dvc checkout``, clears ``work/``, removes files below ``resources/`` that a rule made in
    another way, and rebuilds ``.snakemake/metadata``. Where two milestones store a record of one
    output, the one with the newest end time counts.

    Args:
        run_dir: Folder with ``dvc.lock`` and ``results/``.

    Returns:
        What was restored, as lines of text.

    Raises:
        StateError: A run is under way, results were changed and not committed, objects are
            missing from the DVC cache, or the records are missing or of another format. Nothing
            is overwritten by force.
    """
    check_format()
    _check_idle(run_dir)
    outs = locked_outs(run_dir)
    names = [m for m in MILESTONES if f"results/{m}" in outs]
    if not names:
        raise StateError(
            "dvc.lock has no milestone", where=str(run_dir / "dvc.lock"),
            allowed=", ".join(f"results/{m}" for m in MILESTONES),
            fix="check out a commit or tag with results: git tag -l",
        )  # fmt: skip
    check_objects(run_dir, outs)
    call_dvc(run_dir, "checkout")
    records = _newest(_stored(run_dir, m) for m in names)
    if not records:
        raise StateError(
            "the results are back, but no milestone holds Snakemake's records",
            where=f"results/*/{PROVENANCE}",
            fix="snakemake would redo them; before a commit run `terraloom state save`",
        )  # fmt: skip
    removed = _clear(run_dir, _recorded(run_dir), records)
    _rebuild(run_dir, records)
    lines = [f"restored {', '.join(names)}"]
    lines += [
        f"note: results/{m} has no {PROVENANCE}; snakemake may redo it"
        for m in names
        if not (run_dir / "results" / m / PROVENANCE).exists()
    ]
    lines.append("cleared work/" + (f" and {', '.join(removed)}" if removed else ""))
    lines.append(f"rebuilt {len(records)} records; to check: snakemake -n")
    return "\n".join(lines)


def check_format() -> None:
    """Refuse a Snakemake whose records this module does not know.

    Raises:
        StateError: Names both formats.
    """
    found = importlib.import_module("snakemake.persistence").RECORD_FORMAT_VERSION
    if found != RECORD_FORMAT:
        raise StateError(
            f"this Snakemake writes records of format {found}", where="snakemake.persistence",
            allowed=str(RECORD_FORMAT), fix="install the versions of envs/requirements.lock",
        )  # fmt: skip


def _check_record(record: Mapping[str, Any], where: str) -> None:
    found = record.get("record_format_version")
    if found != RECORD_FORMAT:
        raise StateError(
            f"a record of format {found}", where=where, allowed=str(RECORD_FORMAT),
            fix="it was made with another Snakemake; use that one, or run the campaign again",
        )  # fmt: skip


def _check_idle(run_dir: Path) -> None:
    if any((run_dir / _SNAKEMAKE / "locks").glob("*.lock")):
        raise StateError(
            "a run is under way here, or was killed", where=str(run_dir / _SNAKEMAKE / "locks"),
            fix="wait for it; if none is running: terraloom resume --only-clear",
        )  # fmt: skip


def _check_whole(run_dir: Path, chosen: Mapping[str, Records]) -> None:
    broken = sorted(
        o
        for o in _decoded(run_dir / _SNAKEMAKE / "incomplete")
        if any(o in part for part in chosen.values()) and (run_dir / o).exists()
    )
    if broken:
        raise StateError(
            f"unfinished outputs: {', '.join(broken[:5])}", where=str(run_dir),
            fix="run snakemake again to the end, then save",
        )  # fmt: skip
    for name, part in chosen.items():
        if not part:
            raise StateError(
                "Snakemake has no records of this milestone", where=f"results/{name}",
                fix="run snakemake here with `persistence-backend: file`, then save",
            )  # fmt: skip


def _check_inputs(run_dir: Path, chosen: Mapping[str, Records]) -> None:
    """Refuse a mixture: what a record says was read must be what lies here, where it lies here."""
    readers: dict[tuple[str, str], str] = {}
    for part in chosen.values():
        for output, record in part.items():
            for path, digest in (record.get("input_checksums") or {}).items():
                readers.setdefault((path, str(digest).removeprefix("sha256:")), output)
    now: dict[str, str] = {}
    wrong = []
    for (path, digest), output in sorted(readers.items()):
        if (run_dir / path).is_file():
            if path not in now:
                now[path] = sha256(run_dir / path)
            if now[path] != digest:
                wrong.append(f"{output} was made from another {path}")
    if wrong:
        raise StateError(
            f"the results do not fit together: {'; '.join(wrong[:5])}", where=str(run_dir),
            fix="run snakemake to the end, delete outputs that the campaign no longer has, "
            "or name the milestones that are done: terraloom state save scenes",
        )  # fmt: skip


def _to_save(run_dir: Path, wanted: Sequence[str] | None, frozen: set[str]) -> list[str]:
    unknown = sorted(set(wanted or ()) - set(MILESTONES))
    if unknown:
        raise StateError(
            f"no such milestone: {', '.join(unknown)}", allowed=", ".join(MILESTONES)
        )  # fmt: skip
    here = [m for m in MILESTONES if (run_dir / "results" / m).is_dir()]
    absent = sorted(set(wanted or ()) - set(here))
    if absent or not here:
        raise StateError(
            f"nothing to save: no folder {', '.join(f'results/{m}' for m in absent or MILESTONES)}",
            where=str(run_dir), fix="run snakemake first",
        )  # fmt: skip
    return [m for m in here if m not in frozen and (wanted is None or m in wanted)]


def _keep_campaign(run_dir: Path, milestones: Sequence[str]) -> None:
    """The campaign as it ran goes with the map, so that two maps can be compared key by key."""
    path = run_dir / "work" / "campaign.yaml"
    if "map" not in milestones or not path.is_file():
        return
    kept, text = run_dir / "results" / "map" / CAMPAIGN, path.read_text(encoding="utf-8")
    if not kept.is_file() or kept.read_text(encoding="utf-8") != text:
        write_text(kept, text)


def _frozen(run_dir: Path) -> set[str]:
    """Frozen milestones of the last run; its rules did not make them."""
    path = run_dir / "work" / "campaign.yaml"
    if not path.exists():
        return set()
    data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return {m for m, how in (data.get("milestones") or {}).items() if how != "build"}


def _merged(run_dir: Path, frozen: set[str]) -> Records:
    """Records of this folder, portable; stored ones fill gaps and stand where nothing changed."""
    stored = _newest(_stored(run_dir, m) for m in MILESTONES)
    records = dict(stored)
    for output, record in _recorded(run_dir).items():
        where = f"{_SNAKEMAKE}/metadata: {output}"
        if not _portable(output) or (_milestone(output) or "") in frozen:
            continue
        if _below_results(output) and not os.path.lexists(run_dir / output):
            continue  # of another run, such as a fold that the campaign no longer has
        _check_record(record, where)
        old = stored.get(output)
        new = _tidy(record, run_dir)
        records[output] = old if old and _essence(old) == _essence(new) else new
    return {
        o: r for o, r in records.items()
        if not _below_results(o) or os.path.lexists(run_dir / o)
    }  # fmt: skip


def _owners(records: Records, milestones: Iterable[str]) -> dict[str, str]:
    """Milestone of each output: its folder, or the first milestone whose jobs lead to it.

    All outputs of a job matter: Snakemake trusts an input only if every output of the job has a
    record of it.
    """
    siblings: dict[str, list[str]] = defaultdict(list)
    for output, record in records.items():
        siblings[_job(record)].append(output)
    owner = {o: m for o in records if (m := _milestone(o))}
    for milestone in milestones:
        todo = [o for o, m in owner.items() if m == milestone]
        while todo:
            record = records[todo.pop()]
            for path in {*(record.get("input") or ()), *siblings[_job(record)]}:
                if path in records and path not in owner:
                    owner[path] = milestone
                    todo.append(path)
    return owner


def _milestone(output: str) -> str | None:
    parts = output.split("/")
    known = len(parts) > 2 and parts[0] == "results" and parts[1] in MILESTONES
    return parts[1] if known else None


def _below_results(output: str) -> bool:
    return output.startswith("results/")


def _portable(output: str) -> bool:
    return not output.startswith(("/", "../")) and "://" not in output


def _tidy(record: Record, run_dir: Path) -> Record:
    """Without what belongs to one machine; paths below the run's own folder become relative."""
    here = f"{run_dir.resolve().as_posix()}/"
    out = {k: v for k, v in record.items() if v is not None and k != "external_jobid"}
    if "shellcmd" in out:
        out["shellcmd"] = out["shellcmd"].replace(here, "")
    if "log" in out:
        out["log"] = [p.removeprefix(here) for p in out["log"]]
    # Snakemake's own is an address in memory; its report only needs one number per job.
    out["job_hash"] = int(_job(out)[:12], 16)
    return out


def _essence(record: Record) -> Record:
    return {k: v for k, v in record.items() if k not in _OCCASION}


def _job(record: Record) -> str:
    """Digest that the outputs of one job share, and no other output."""
    return digest_json([record.get(k) for k in ("rule", "shellcmd", "log", "params", "input")])


def _absolute(record: Record) -> set[str]:
    texts = [*(record.get("input") or ()), *map(str, record.get("params") or ())]
    return {p for text in texts for p in _ABSOLUTE.findall(text) if not p.startswith("//")}


def _line(output: str, record: Record) -> str:
    return json.dumps({**record, "output": output}, sort_keys=True, ensure_ascii=False) + "\n"


def _newest(parts: Iterable[Records]) -> Records:
    out: Records = {}
    for part in parts:
        for output, record in part.items():
            old = out.get(output)
            if old is None or (record.get("endtime") or 0) > (old.get("endtime") or 0):
                out[output] = record
    return out


def _stored(run_dir: Path, milestone: str) -> Records:
    path = run_dir / "results" / milestone / PROVENANCE
    out: Records = {}
    if not path.exists():
        return out
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"results/{milestone}/{PROVENANCE}:{number}"
        try:
            record = json.loads(line)
            output = str(record.pop("output"))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as err:
            raise StateError(
                "not a record", where=where, fix="terraloom state verify; then restore again"
            ) from err
        if not _portable(output) or ".." in output.split("/"):
            raise StateError(f"a record of a file outside the run: {output}", where=where)
        _check_record(record, where)
        out[output] = record
    return out


def _recorded(run_dir: Path) -> Records:
    """Snakemake's records of this folder."""
    out: Records = {}
    for output, path in _decoded(run_dir / _SNAKEMAKE / "metadata").items():
        try:
            out[output] = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            continue  # half written by a killed run; Snakemake ignores it too
    return out


def _decoded(folder: Path) -> dict[str, Path]:
    """Output name of each record file; long names are split into ``@`` folders by Snakemake."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = "".join(part.removeprefix("@") for part in path.relative_to(folder).parts)
        try:
            out[urlsafe_b64decode(name.encode()).decode()] = path
        except ValueError:
            continue  # not a record
    return out


def _record_path(folder: Path, output: str) -> Path:
    size = (os.pathconf(folder, "PC_NAME_MAX") or 255) - 1
    name = urlsafe_b64encode(output.encode()).decode()
    parts = [name[i : i + size] for i in range(0, len(name), size)]
    return folder.joinpath(*(f"@{p}" for p in parts[:-1]), parts[-1])


def _clear(run_dir: Path, before: Records, after: Records) -> list[str]:
    """Empty ``work/``; below ``resources/`` remove what was not made as the records say."""
    work = run_dir / "work"
    for path in work.iterdir() if work.is_dir() else ():  # the folder may be a link to scratch
        _remove(path)
    removed = []
    for output, record in after.items():
        path = run_dir / output
        if not output.startswith(_MADE) or not os.path.lexists(path):
            continue
        if output not in before or _essence(_tidy(before[output], run_dir)) != _essence(record):
            _remove(path)
            removed.append(output)
    return sorted(removed)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _rebuild(run_dir: Path, records: Records) -> None:
    """Replace the records in one step, and drop what else is about the run before."""
    base = run_dir / _SNAKEMAKE
    new = base / "metadata.restored"
    for leftover in (new, base / "incomplete", base / "iocache"):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    (base / "incomplete").mkdir()
    for output, record in records.items():
        path = _record_path(new, output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**record, "incomplete": False}), encoding="utf-8")
    shutil.rmtree(base / "metadata", ignore_errors=True)
    new.rename(base / "metadata")
