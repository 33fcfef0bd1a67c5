"""`qzoom push DIR REPO --base M`: upload branches to the Hugging Face hub, without the base they belong to.

qzoom push runs/branches/calibrate/final me/qwen2.5-vl-7b-branches --base qwen2.5-vl-7b --private
qzoom ask photo.jpg "What does the sign say?" --model qwen2.5-vl-7b --branches me/qwen2.5-vl-7b-branches
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import Console
from qzoom_agent.cli.main import OK
from qzoom_agent.errors import ConfigError
from qzoom_agent.files import read_yaml

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags of `qzoom push`."""
    flags.description = (
        "Upload branches (gate and SD-RPN) with their settings and a model card, without the base, to the "
        "Hugging Face hub. --branches REPO uses them anywhere."
    )
    flags.add_argument("folder", type=Path, metavar="DIR", help="branches, such as runs/branches/calibrate/final")
    flags.add_argument("repository", metavar="REPO", help="name on the hub (user/name); created if it is not there")
    flags.add_argument(
        "--base", required=True, metavar="M", help="the model they were trained with: preset or hub id, for the card"
    )
    flags.add_argument("--labels", default="", metavar="TEXT", help="where the labels came from, for the card")
    flags.add_argument(
        "--results", type=Path, metavar="FILE", help="scores for the card: a file of `qzoom eval export --to hf`"
    )
    flags.add_argument("--license", metavar="ID", help="licence for the card, such as apache-2.0")
    flags.add_argument("--private", action="store_true", help="make a new repository private")
    flags.add_argument("--revision", metavar="R", help="branch of the repository (default: main)")
    flags.add_argument("--message", default="Branches (gate and SD-RPN)", metavar="TEXT", help="title of the commit")


def run(args: argparse.Namespace) -> int:
    """Run the verb; the address of the commit goes to stdout.

    Raises:
        ConfigError, BackendError: There is nothing to upload, or the hub refuses.
    """
    results = [] if args.results is None else read_results(args.results)

    from qzoom_agent.models.presets import PRESETS, resolve_model
    from qzoom_agent.perception.hub import BranchCard, push_branches

    base = resolve_model(args.base)
    if base.local and args.base not in PRESETS:
        raise ConfigError(f"The card names the base by its hub id, and {args.base} is a folder. Push the base first.")
    if (args.folder.parent.parent / "postsft" / "final").is_dir():
        Console().line("note: postsft tuned the base of these branches; --base has to name the tuned one", "yellow")
    print(
        push_branches(
            args.folder,
            args.repository,
            BranchCard(args.base if base.local else base.source, args.labels, results, args.license),
            private=args.private or None,
            revision=args.revision,
            message=args.message,
        ),
        flush=True,
    )
    return OK


def read_results(file: Path) -> list[EvalResult]:
    """Read the scores of `qzoom eval export --to hf`. Raises ConfigError if the file holds none."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    try:
        return model_index_to_eval_results(read_yaml(file.read_text(encoding="utf-8"))["model-index"])[1]
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise ConfigError(f"{file} holds no scores. Write it with: qzoom eval export RUN --to hf") from error
