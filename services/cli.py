"""The command ``patchbay``: talk to the agent, serve it, measure it, train it, look after it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.chatter import hush
from services.bench import BENCHES, GPUS, run_bench, run_full_size, run_service, table, write_tables
from services.errors import PresetProblem, ServiceError, of_the_system, translate
from services.presets import load_preset, shipped_presets

if TYPE_CHECKING:
    from encoders.media import Modality
    from services.doctor import Survey

PARTS = ("image", "video", "audio", "encoder", "language_model")
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
OFFLINE = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
"""For all but the one command that downloads."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; an error of ours becomes one line on standard error and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    args = _parser().parse_args(argv)
    for name, value in (QUIET if args.run is fetch_command else QUIET | OFFLINE).items():
        os.environ.setdefault(name, value)
    hush()
    try:
        code: int = args.run(args)
    except (ServiceError, ValueError) as error:
        print(f"patchbay: {translate(error).message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("patchbay: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"patchbay: {of_the_system(error)}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="patchbay", description="An any-to-any agent: text, images, video and sound, in and out."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    chat = commands.add_parser(
        "chat", help=chat_command.__doc__, description=chat_command.__doc__, allow_abbrev=False
    )
    _preset_option(chat)
    for kind, formats in (
        ("image", "PNG, JPEG, WebP or GIF"),
        ("audio", "WAV, FLAC, OGG or MP3"),
        ("video", "MP4 or WebM"),
    ):
        chat.add_argument(
            f"--{kind}", metavar="F", action="append", default=[], help=f"{formats} file to send; repeatable"
        )
    chat.add_argument("--messages", metavar="F.json", help="earlier turns, in the form of chat completions")
    chat.add_argument(
        "--out", metavar="DIR", default="runs/chat", help="where media go (default %(default)s)"
    )
    chat.add_argument("--seed", type=_seed, help="the same seed makes the same reply")
    chat.add_argument(
        "--lora", metavar="NAME", action="append", default=[], help="adapter of the preset to use; repeatable"
    )
    chat.add_argument(
        "--strength",
        metavar="MEDIUM=S",
        type=_strength,
        action="append",
        default=[],
        help="make an image, video or audio from the newest one of the conversation, and go so far from it: "
        "above 0 up to 1; repeatable",
    )
    chat.add_argument(
        "--ask-below",
        metavar="P",
        type=float,
        help="ask about media of which the model is less sure than this instead of making them: from 0 "
        "(never) to below 1 (default: as the preset says)",
    )
    chat.add_argument("--json", action="store_true", help="print one JSON object instead of the reply")
    chat.add_argument("text", nargs="?", help="what the person says; without it, a conversation")
    chat.set_defaults(run=chat_command, refuse=chat.error)

    serve = commands.add_parser("serve", help=serve_command.__doc__, description=serve_command.__doc__)
    _preset_option(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=_port, default=8000, help="port to listen on (default %(default)s)")
    serve.set_defaults(run=serve_command)

    evaluate = commands.add_parser("eval", help=eval_command.__doc__, description=eval_command.__doc__)
    evaluate.add_argument(
        "what",
        choices=["toybox", "judge", "links", "phrasings", "ability"],
        help="every direction of the toy box, the judge itself, the links beside captions, how much the "
        "wording matters, or what is left of the base's ability in words",
    )
    _preset_option(evaluate)
    evaluate.add_argument(
        "--directions", default="all", help="all, or names with commas (default %(default)s)"
    )
    evaluate.add_argument(
        "--samples",
        type=_positive,
        help="per direction, medium or topic (default 200; judge 1000, phrasings 20)",
    )
    evaluate.add_argument("--seed", type=_seed, default=0, help="(default %(default)s)")
    evaluate.add_argument(
        "--seeds", type=_positive, default=1, help="toybox, links: so many seeds, their mean and spread"
    )
    evaluate.add_argument(
        "--wordings",
        choices=["reserved", "training"],
        default="reserved",
        help="toybox: ask in words that training never used, or in its own (default %(default)s)",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    evaluate.add_argument(
        "--link",
        choices=["signal", "caption"],
        help="send every decoder this instead of what the preset says",
    )
    evaluate.add_argument(
        "--jobs", type=_positive, default=1, help="processes that share the work (default %(default)s)"
    )
    evaluate.add_argument("--sheets", metavar="DIR", help="write contact sheets and a gallery there")
    evaluate.add_argument(
        "--keep", metavar="DIR", help="toybox: keep results there as they come, and go on from those"
    )
    evaluate.set_defaults(run=eval_command)

    report = commands.add_parser("report", help=report_command.__doc__, description=report_command.__doc__)
    report.add_argument("folder", metavar="DIR", help="holds evaluation.md, toybox.md and the JSON results")
    report.add_argument("--runs", metavar="RUN", help="draw the losses of this run, such as runs/toybox")
    report.set_defaults(run=report_command)

    train = commands.add_parser("train", help=train_command.__doc__, description=train_command.__doc__)
    train.add_argument(
        "stage", metavar="STAGE", help="a step, export, all, or bridge; a wrong one lists them"
    )
    _preset_option(train)
    train.add_argument("--part", choices=PARTS, help="with bridge: which part was exchanged")
    train.add_argument(
        "--captions", metavar="F.json", help="with bridge: captions to train on instead of the toy box's"
    )
    train.add_argument("--runs", default="runs", help="where checkpoints and logs go (default %(default)s)")
    train.add_argument("--steps", type=_positive, help="train so many steps instead of the recipe's")
    train.add_argument("--minutes", type=float, help="end a step after so long, its learning rate at zero")
    train.add_argument("--threads", type=_positive, default=1, help="CPU threads (default %(default)s)")
    train.add_argument(
        "--jobs", type=_positive, default=1, help="steps of all that run at once (default %(default)s)"
    )
    train.add_argument("--seed", type=int, default=0, help="of weights and data order (default %(default)s)")
    train.add_argument("--small", action="store_true", help="render small pools only, for a rehearsal")
    train.add_argument(
        "--dry-run", action="store_true", help="train nothing; time a few steps and say how long and how much"
    )
    train.set_defaults(run=train_command)

    bench = commands.add_parser("bench", help=bench_command.__doc__, description=bench_command.__doc__)
    bench.add_argument("name", nargs="?", choices=sorted(BENCHES), help="what to measure")
    _preset_option(bench)
    bench.add_argument("--quick", action="store_true", help="end within a minute; the figures vary more")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    bench.add_argument(
        "--url", help="with service: measure the one that runs there, such as http://127.0.0.1:8000"
    )
    bench.add_argument(
        "--full-size",
        action="store_true",
        help="models of the paper's sizes with random weights, all three benches; without a GPU only counted",
    )
    bench.add_argument("--dry", action="store_true", help="with --full-size: only count, even with a GPU")
    bench.add_argument(
        "--gpu",
        choices=GPUS,
        default="h100",
        help="with --full-size, where nothing can be measured: whose limits to tell (default %(default)s)",
    )
    bench.add_argument(
        "--weights",
        metavar="DIR",
        help="with --full-size on a GPU: write the random weights there, and time reading them too",
    )
    bench.add_argument(
        "--tables", metavar="DIR", help="write the tables of DIR's JSON files into its README.md"
    )
    bench.set_defaults(run=bench_command, refuse=bench.error)

    _convert_commands(commands)

    fetch = commands.add_parser("fetch", help=fetch_command.__doc__, description=fetch_command.__doc__)
    _preset_option(fetch)
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
    _preset_option(doctor)
    doctor.add_argument("--host", default="127.0.0.1", help="address to look at (default %(default)s)")
    doctor.add_argument("--port", type=_port, default=8000, help="port to look at (default %(default)s)")
    doctor.add_argument(
        "--memory",
        metavar="SIZE",
        type=_bytes,
        help="plan for a machine with so much, such as 24GB; load nothing",
    )
    doctor.add_argument(
        "--write", metavar="F.yaml", help="write the preset with the changes that make it fit"
    )
    doctor.add_argument(
        "--table", action="store_true", help="print what usual settings take, and nothing else"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    doctor.set_defaults(run=doctor_command)
    return parser


def _convert_commands(commands: Any) -> None:
    convert = commands.add_parser(
        "convert", help=convert_command.__doc__, description=convert_command.__doc__
    )
    kinds = convert.add_subparsers(title="what", metavar="WHAT", required=True)

    nextgpt = kinds.add_parser("nextgpt", help="pytorch_model.pt of NExT-GPT, into llm/ and projections/")
    nextgpt.add_argument("file", metavar="FILE", help="the released pytorch_model.pt")
    nextgpt.add_argument("--base", metavar="DIR_OR_HUB_ID", help="the base model, Vicuna-7B v0")
    nextgpt.add_argument(
        "--signal-rows-only",
        action="store_true",
        help="leave the trained rows of the base's own tokens out: 525 MB less, and a little less faithful",
    )

    imagebind = kinds.add_parser("imagebind", help="imagebind_huge.pth, into encoder/")
    imagebind.add_argument("file", metavar="FILE", help="the released imagebind_huge.pth")
    imagebind.add_argument(
        "--towers", default="vision,audio", help="what to keep, with commas (default %(default)s)"
    )
    imagebind.add_argument("--tokenizer", metavar="DIR", help="CLIP's vocabulary, for the text tower")
    imagebind.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="of the weights written (default: theirs)"
    )
    for parser in (nextgpt, imagebind):
        parser.add_argument("--out", metavar="DIR", required=True, help="the preset's folder of weights")

    delta = kinds.add_parser("delta", help="a published delta and its base, such as Vicuna v0's and LLaMA")
    delta.add_argument("folder", metavar="DIR", help="folder of the delta")
    delta.add_argument("--base", metavar="DIR", required=True, help="folder of the base, and its tokenizer")
    delta.add_argument("--out", metavar="DIR", required=True, help="folder for the sum, not there yet")

    pickles = kinds.add_parser("pickles", help="the .bin files of a saved model or pipeline, in place")
    pickles.add_argument("folder", metavar="DIR", help="safetensors are written beside the .bin files there")
    for name, parser in kinds.choices.items():
        parser.set_defaults(run=convert_command, kind=name)


def _preset_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", metavar="P", default="toybox", help="name or YAML file of a preset (default %(default)s)"
    )


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _port(text: str) -> int:
    port = _whole(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port; choose one from 1 to 65535")
    return port


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; at least 1")
    return number


def _bytes(text: str) -> int:
    """Read a size such as 24GB, 16GiB or 800MB."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG])(i?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write one like 24GB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMG".index(prefix.upper())))


def _strength(text: str) -> tuple[Modality, float | None]:
    from services.chat import read_strength

    try:
        return read_strength(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seed(text: str) -> int:
    from decoders.settings import MAX_SEED

    seed = _whole(text)
    if not 0 <= seed <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{seed} is not a seed; choose one from 0 to {MAX_SEED}")
    return seed


def chat_command(args: argparse.Namespace) -> int:
    """Say something, with media if you like, and get words and media back."""
    from services.chat import converse, say_once

    if args.text is None and args.json:
        args.refuse("--json prints one turn; give the text of that turn")
    return converse(args) if args.text is None else say_once(args)


def serve_command(args: argparse.Namespace) -> int:
    """Serve the agent: HTTP and a chat page."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "deploy.serve"]
    command += ["--preset", args.preset, "--host", args.host, "--port", str(args.port)]
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


def eval_command(args: argparse.Namespace) -> int:
    """Measure how often the outputs are right, and what that rests on."""
    from services.measuring import measure

    print(measure(args))
    return 0


def report_command(args: argparse.Namespace) -> int:
    """Write the figures of the documents from the results of eval."""
    from alignment.report import write_report

    for path in write_report(Path(args.folder), Path(args.runs) if args.runs else None):
        print(path)
    return 0


def train_command(args: argparse.Namespace) -> int:
    """Train a part of a preset, or all of it."""
    from alignment.training import TrainOptions, run
    from services.doctor import expect_trainable

    preset = load_preset(args.preset)
    if (args.part is not None) != (args.stage == "bridge"):
        raise ValueError("--part belongs to bridge: patchbay train bridge --part image --preset my.yaml")
    options = TrainOptions(
        runs=Path(args.runs),
        num_steps=args.steps,
        max_minutes=args.minutes,
        threads=args.threads,
        small=args.small,
        seed=args.seed,
        jobs=args.jobs,
    )
    if args.stage == "bridge":
        from services.bridging import train

        captions = Path(args.captions) if args.captions else None
        print(f"bridge to {args.part}: wrote {train(preset, args.part, options, captions)}")
        return 0
    expect_trainable(preset)
    if args.dry_run:
        from alignment.rehearsal import estimate, table

        print(table(estimate(args.stage, options), args.jobs))
        return 0
    run(args.stage, preset.weights_folder, options)
    return 0


def bench_command(args: argparse.Namespace) -> int:
    """Measure speed beside a peer's, in one run on this machine."""
    chosen = [wish for wish in (args.name, args.full_size, args.tables) if wish]
    if len(chosen) != 1:
        args.refuse(f"choose one: {', '.join(sorted(BENCHES))}, --full-size or --tables DIR")
    if args.url and args.name != "service":
        args.refuse("--url belongs to service: patchbay bench service --url http://127.0.0.1:8000")
    if args.weights and not args.full_size:
        args.refuse("--weights belongs to --full-size: patchbay bench --full-size --weights DIR")
    if args.tables:
        print("\n".join(write_tables(Path(args.tables))))
        return 0
    if args.full_size:
        folder = Path(args.weights) if args.weights else None
        result = run_full_size(args.quick, args.dry, args.gpu, folder)
    elif args.url:
        result = run_service(args.url, args.quick)
    else:
        result = run_bench(args.name, load_preset(args.preset), args.quick)
    print(json.dumps(result) if args.json else table(result))
    return 0


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
        record = convert_imagebind(Path(args.file), out, args.towers.split(","), tokenizer, dtype)
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


def fetch_command(args: argparse.Namespace) -> int:
    """Download what a preset's weights lack from where it is published, and convert it."""
    from services.doctor import steps_after_fetching
    from services.fetch import expect_disk, fetch, fetchable, plan

    preset = load_preset(args.preset)
    for origin in fetchable(preset):
        print(origin.terms, flush=True)
    found = plan(preset, args.keep_downloads)
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


if __name__ == "__main__":
    sys.exit(main())
