"""The commands that look after weights: ``convert``, ``fetch``, ``presets`` and ``doctor``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.arguments import memory_size, place, port, preset_option
from services.errors import PresetProblem
from services.presets import load_preset, shipped_presets

if TYPE_CHECKING:
    from services.doctor import Survey


def add_weight_commands(commands: Any) -> None:
    """Add them to the commands of the program."""
    _convert_commands(commands)

    fetch = commands.add_parser("fetch", help=fetch_command.__doc__, description=fetch_command.__doc__)
    preset_option(fetch)
    fetch.add_argument(
        "--dry-run", action="store_true", help="say what would be downloaded and how much disk it takes"
    )
    fetch.add_argument(
        "--keep-downloads",
        action="store_true",
        help="keep what was only downloaded to be converted; else it goes once it is converted",
    )
    fetch.set_defaults(run=fetch_command)

    presets = commands.add_parser(
        "presets", help=presets_command.__doc__, description=presets_command.__doc__
    )
    presets.set_defaults(run=presets_command)

    doctor = commands.add_parser("doctor", help=doctor_command.__doc__, description=doctor_command.__doc__)
    preset_option(doctor)
    doctor.add_argument("--host", default="127.0.0.1", help="address to look at (default %(default)s)")
    doctor.add_argument("--port", type=port, default=8000, help="port to look at (default %(default)s)")
    doctor.add_argument(
        "--memory",
        metavar="SIZE",
        type=memory_size,
        help="plan for a machine with so much, such as 24GB; load nothing",
    )
    doctor.add_argument(
        "--write", metavar="F.yaml", type=place, help="write the preset with the changes that make it fit"
    )
    doctor.add_argument(
        "--table", action="store_true", help="print what usual settings take, and nothing else"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    doctor.set_defaults(run=doctor_command)


def _convert_commands(commands: Any) -> None:
    convert = commands.add_parser(
        "convert", help=convert_command.__doc__, description=convert_command.__doc__
    )
    kinds = convert.add_subparsers(title="what", metavar="WHAT", required=True)

    nextgpt = kinds.add_parser("nextgpt", help="pytorch_model.pt of NExT-GPT, into llm/ and projections/")
    nextgpt.add_argument("file", metavar="FILE", type=place, help="the released pytorch_model.pt")
    nextgpt.add_argument("--base", metavar="DIR_OR_HUB_ID", type=place, help="the base model, Vicuna-7B v0")
    nextgpt.add_argument(
        "--signal-rows-only",
        action="store_true",
        help="leave the trained rows of the base's own tokens out: 525 MB less, and a little less faithful",
    )

    imagebind = kinds.add_parser("imagebind", help="imagebind_huge.pth, into encoder/")
    imagebind.add_argument("file", metavar="FILE", type=place, help="the released imagebind_huge.pth")
    imagebind.add_argument(
        "--towers", default="vision,audio", help="what to keep, with commas (default %(default)s)"
    )
    imagebind.add_argument(
        "--tokenizer", metavar="DIR", type=place, help="CLIP's vocabulary, for the text tower"
    )
    imagebind.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights written (default: theirs)"
    )
    for parser in (nextgpt, imagebind):
        parser.add_argument(
            "--out", metavar="DIR", type=place, required=True, help="the preset's folder of weights"
        )

    delta = kinds.add_parser("delta", help="a published delta and its base, such as Vicuna v0's and LLaMA")
    delta.add_argument("folder", metavar="DIR", type=place, help="folder of the delta")
    delta.add_argument(
        "--base", metavar="DIR", type=place, required=True, help="folder of the base, and its tokenizer"
    )
    delta.add_argument(
        "--out", metavar="DIR", type=place, required=True, help="folder for the sum, not there yet"
    )

    pickles = kinds.add_parser("pickles", help="the .bin files of a saved model or pipeline, in place")
    pickles.add_argument(
        "folder", metavar="DIR", type=place, help="safetensors are written beside the .bin files there"
    )
    for name, parser in kinds.choices.items():
        parser.set_defaults(run=convert_command, kind=name)


def convert_command(args: argparse.Namespace) -> int:
    """Turn released weights of others into this program's own layout."""
    from services.convert import convert_imagebind, convert_nextgpt
    from services.pickles import convert_pickles
    from services.weight_files import CONVERTED

    if args.kind == "pickles":
        for path in convert_pickles(Path(args.folder)):
            print(path)
        return 0
    out = Path(args.out)
    if args.kind == "delta":
        from services.weight_delta import convert_delta

        record = convert_delta(Path(args.folder), Path(args.base), out)
    elif args.kind == "nextgpt":
        whole = not args.signal_rows_only
        record = convert_nextgpt(Path(args.file), out, args.base, whole_tables=whole)
    else:
        import torch

        tokenizer = Path(args.tokenizer) if args.tokenizer else None
        dtype = getattr(torch, args.dtype) if args.dtype else None
        record = convert_imagebind(Path(args.file), out, _names(args.towers), tokenizer, dtype)
    for part, count in record["tensors"].items():
        print(f"{part:28} {count:5} tensors")
    for part in record.get("absent", ()):
        print(f"{part:28} not in the file")
    if "left_out" in record:
        print(f"left out: {', '.join(record['left_out']['names']) or 'nothing'}")
    print(f"licence: {record['licence']}")
    print(f"{len(record['files'])} files in {out}; {CONVERTED} there has their digests")
    if "base" in record and not args.base:
        print(
            f"The base model is not there yet. Remove {out}/llm, {out}/projections and {out}/{CONVERTED}, "
            f"then run this again with --base DIR."
        )
    return 0


def _names(text: str) -> list[str]:
    """Return names with commas between them, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def fetch_command(args: argparse.Namespace) -> int:
    """Download what a preset's weights lack from where it is published, and convert it."""
    from services.doctor import steps_after_fetching
    from services.fetch import expect_disk, fetch, fetchable, plan

    preset = load_preset(args.preset)
    for origin in fetchable(preset):
        print(origin.terms, flush=True)
    found = plan(preset, args.keep_downloads)
    if found.steps:
        for line in found.in_words():
            print(line, flush=True)
        expect_disk(found)
        if args.dry_run:
            return 0
        fetch(found, lambda line: print(line, flush=True), args.keep_downloads)
    for step in steps_after_fetching(preset):
        print(f"next: {step}")
    return 0


def presets_command(args: argparse.Namespace) -> int:
    """List the presets that come with the program."""
    from services.footprint import missing_files

    for name in shipped_presets():
        preset = load_preset(name)
        state = "weights are not complete" if missing_files(preset) else "ready"
        print(f"{name:16} {state:26} {preset.description}")
    return 0


def doctor_command(args: argparse.Namespace) -> int:
    """Look whether this machine can run a preset, and say what is missing."""
    from services.doctor import examine, survey

    preset, bad, checks = load_preset(args.preset), 0, []
    if args.table:
        from services.memory_plan import rows, table

        found_rows = rows(preset)
        print(json.dumps([asdict(row) for row in found_rows]) if args.json else table(found_rows))
        return 0
    found = survey(preset, args.memory)
    if args.write:
        return _write_plan(found, Path(args.write))
    if not args.json:
        print(found.table(), flush=True)
    for check in examine(preset, args.host, args.port, args.memory, found.boxes):
        bad += not check.ok
        checks.append({"name": check.name, "ok": check.ok, "detail": check.detail})
        if not args.json:
            print(f"{'ok ' if check.ok else 'BAD'} {check.name:16} {check.detail}", flush=True)
    if args.json:
        print(json.dumps({**found.to_json(), "checks": checks}, indent=2))
    elif bad and found.next_steps[0].startswith("patchbay serve"):
        print(f"next: mend what is marked BAD, then {found.next_steps[0]}")
    else:
        print("\n".join(f"next: {step}" for step in found.next_steps))
    if bad:
        print(f"patchbay: {bad} of the checks failed; the lines marked BAD say why.", file=sys.stderr)
    return 1 if bad else 0


def _write_plan(found: Survey, path: Path) -> int:
    from services.memory_plan import write_preset

    if found.plan is None:
        print(f"{found.fits.name}: {found.fits.detail}. Nothing was written.")
        return 0 if found.fits.ok else 1
    if not found.plan.fits:
        raise PresetProblem(
            f"Nothing makes {found.preset.name!r} fit: {found.plan.needed / 1e9:.2f} GB are needed "
            f"at the least, and there are {found.plan.room / 1e9:.2f} GB. See `patchbay doctor --preset "
            f"{found.preset.as_argument} --table`.",
            code="too_large",
        )
    write_preset(found.plan, path)
    print(f"{path}: {'; '.join(found.plan.words)}. Next: patchbay serve --preset {path}")
    return 0
