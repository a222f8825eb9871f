"""The command ``patchbay``: talk to the agent, serve it, measure it, train it, look after it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from alignment.chatter import hush
from services.arguments import port, positive, preset_option, seed, strength
from services.bench import BENCHES, GPUS, run_bench, run_full_size, run_service, table, write_tables
from services.errors import ServiceError, of_the_system, translate
from services.presets import load_preset
from services.weight_commands import add_weight_commands, fetch_command

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
    preset_option(chat)
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
    chat.add_argument("--seed", type=seed, help="the same seed makes the same reply")
    chat.add_argument(
        "--lora", metavar="NAME", action="append", default=[], help="adapter of the preset to use; repeatable"
    )
    chat.add_argument(
        "--strength",
        metavar="MEDIUM=S",
        type=strength,
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
    chat.add_argument(
        "--no-verify",
        action="store_true",
        help="take media as they come, also where the preset lets the agent look at them again",
    )
    chat.add_argument("--json", action="store_true", help="print one JSON object instead of the reply")
    chat.add_argument("text", nargs="?", help="what the person says; without it, a conversation")
    chat.set_defaults(run=chat_command, refuse=chat.error)

    serve = commands.add_parser("serve", help=serve_command.__doc__, description=serve_command.__doc__)
    preset_option(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--port", type=port, default=8000, help="port to listen on (default %(default)s)")
    serve.set_defaults(run=serve_command)

    evaluate = commands.add_parser("eval", help=eval_command.__doc__, description=eval_command.__doc__)
    evaluate.add_argument(
        "what",
        choices=["toybox", "judge", "links", "phrasings", "ability", "ablations", "link-designs"],
        help="every direction of the toy box, the judge itself, the links beside captions, how much the "
        "wording matters, what is left of the base's ability in words, what each part of the method is "
        "worth, or ways to join a language model to media",
    )
    preset_option(evaluate)
    evaluate.add_argument(
        "--directions", default="all", help="all, or names with commas (default %(default)s)"
    )
    evaluate.add_argument(
        "--samples",
        type=positive,
        help="per direction, medium or topic (default 200; judge 1000, phrasings 20, ablations and "
        "link-designs 50)",
    )
    evaluate.add_argument("--seed", type=seed, default=0, help="(default %(default)s)")
    evaluate.add_argument(
        "--seeds", type=positive, default=1, help="toybox, links: so many seeds, their mean and spread"
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
        "--jobs", type=positive, default=1, help="processes that share the work (default %(default)s)"
    )
    evaluate.add_argument("--sheets", metavar="DIR", help="write contact sheets and a gallery there")
    evaluate.add_argument(
        "--keep",
        metavar="DIR",
        help="toybox, ablations, link-designs: keep results there as they come, and go on from those",
    )
    evaluate.add_argument(
        "--run", dest="trained", metavar="RUN", default="runs/toybox",
        help="ablations, link-designs: where the run lies whose parts `patchbay train` joined in other ways "
        "(default %(default)s)",
    )  # fmt: skip
    evaluate.set_defaults(run=eval_command)

    report = commands.add_parser("report", help=report_command.__doc__, description=report_command.__doc__)
    report.add_argument("folder", metavar="DIR", help="holds evaluation.md, toybox.md and the JSON results")
    report.add_argument("--runs", metavar="RUN", help="draw the losses of this run, such as runs/toybox")
    report.set_defaults(run=report_command)

    train = commands.add_parser("train", help=train_command.__doc__, description=train_command.__doc__)
    train.add_argument(
        "stage",
        metavar="STAGE",
        help="a step, export, all, ablations, link-designs or bridge; a wrong one lists them",
    )
    preset_option(train)
    train.add_argument("--part", choices=PARTS, help="with bridge: which part was exchanged")
    train.add_argument(
        "--captions", metavar="F.json", help="with bridge: captions to train on instead of the toy box's"
    )
    train.add_argument("--runs", default="runs", help="where checkpoints and logs go (default %(default)s)")
    train.add_argument("--steps", type=positive, help="train so many steps instead of the recipe's")
    train.add_argument("--minutes", type=float, help="end a step after so long, its learning rate at zero")
    train.add_argument("--threads", type=positive, default=1, help="CPU threads (default %(default)s)")
    train.add_argument(
        "--jobs",
        type=positive,
        default=1,
        help="steps of all, ablations or link designs that run at once (default %(default)s)",
    )
    train.add_argument("--seed", type=int, default=0, help="of weights and data order (default %(default)s)")
    train.add_argument("--small", action="store_true", help="render small pools only, for a rehearsal")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing; time a few steps and say how long and how much (not for bridge)",
    )
    train.set_defaults(run=train_command)

    bench = commands.add_parser("bench", help=bench_command.__doc__, description=bench_command.__doc__)
    bench.add_argument("name", nargs="?", choices=sorted(BENCHES), help="what to measure")
    preset_option(bench)
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

    add_weight_commands(commands)
    return parser


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
    if args.stage == "bridge" and args.dry_run:
        raise ValueError(
            "--dry-run times the steps of the embedded model, and no bridge. Leave it out: training a bridge "
            "tells after some steps how long is left, and can be broken off and gone on with."
        )
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
    if args.stage in ("ablations", "link-designs") and not args.dry_run:
        from alignment import ablations, link_designs

        others = ablations if args.stage == "ablations" else link_designs
        print("\n".join(map(str, others.train(preset.weights_folder, options))))
        return 0
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


if __name__ == "__main__":
    sys.exit(main())
