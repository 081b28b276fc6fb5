"""The command line `pocketune-edge`: personalize, sample, inspect."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pocketune.errors import Interrupted, PocketuneError
from pocketune_edge.display import printable, say
from pocketune_edge.versions import installed_version

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script; the exit code."""
    given = _parser().parse_args(arguments)
    try:
        _run(given)
    except Interrupted as error:
        say(f"interrupted: {printable(str(error))}", sys.stderr)
        return EXIT_INTERRUPTED
    except PocketuneError as error:
        say(f"error: {printable(str(error))}", sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        resumable = hasattr(given, "resume") and given.out.exists()
        say(f"interrupted: give the same command {'with --resume to go on' if resumable else 'to start again'}.", sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _run(given: argparse.Namespace) -> None:
    """Run a command, whose libraries are imported here."""
    try:
        from pocketune_edge.commands import COMMANDS
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pocketune"):
            raise
        msg = f"this command needs {error.name}, which is not installed. Run: pip install 'pocketune[edge]'"
        raise PocketuneError(msg) from error
    COMMANDS[given.command](given)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all errors are said."""

    def error(self, message: str) -> NoReturn:
        """End with the code of errors."""
        self.exit(EXIT_ERROR, f"error: {printable(message)}. `{self.prog} --help` lists what can be given.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pocketune-edge", description="Personalize and sample from an exported bundle.")
    parser.add_argument("--version", action="version", version=f"pocketune-edge {installed_version('pocketune')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("personalize", help="train a LoRA of the subject in some photos")
    train.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder or archive made by export-trainable")
    train.add_argument("photos", type=Path, nargs="+", metavar="PHOTOS", help="photos (JPEG, PNG, WebP), or folders of them")
    train.add_argument("--out", type=Path, required=True, help="the RUN folder to make")
    train.add_argument("--instance-prompt", help='what the photos show, with a rare word: "a photo of sks toy"')
    train.add_argument("--steps", type=int, help="optimizer steps")
    train.add_argument("--seed", type=int, help="equal seeds give equal results")
    train.add_argument("--learning-rate", type=float, help="of AdamW")
    train.add_argument("--scale-learning-rate", type=float, help="of AdamW for output scales")
    train.add_argument("--zo-learning-rate", type=float, help="of zeroth-order steps")
    train.add_argument("--batch-size", type=int, help="photos in each step")
    train.add_argument("--checkpoint-every", type=int, help="steps between checkpoints")
    train.add_argument("--cache-limit-mb", type=int, help="bound of the feature cache on disk")
    train.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    _add_common(train)

    sample = commands.add_parser("sample", help="make images, with a trained LoRA or without")
    sample.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder or archive made by export-trainable")
    sample.add_argument("--prompt", action="append", required=True, help="what to show; may be given several times")
    sample.add_argument("--lora", type=Path, help="a RUN folder or a result file; default: the base model")
    sample.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count up (default 0)")
    sample.add_argument("--steps", type=int, help="steps of the sampler; default: the recipe's")
    sample.add_argument("--guidance", type=float, help="guidance scale; default: the recipe's")
    sample.add_argument("--out", type=Path, default=Path("sample.png"), help="the PNG file; several images get numbers")
    _add_common(sample)

    inspect = commands.add_parser("inspect", help="check a bundle and say what is in it")
    inspect.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder or archive made by export-trainable")
    _add_output(inspect)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--streaming", action="store_true", help="run block by block: one block in memory, more time")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime; default: its own choice")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors (and what --json asks for)")


if __name__ == "__main__":
    sys.exit(main())
