"""`qzoom models` lists the models known by name; `qzoom convert` and `qzoom push` move branches.

qzoom push runs/branches/calibrate/final me/qwen2.5-vl-7b-branches --base qwen2.5-vl-7b --private
qzoom ask photo.jpg "What does the sign say?" --model qwen2.5-vl-7b --branches me/qwen2.5-vl-7b-branches
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qzoom_agent.cli.console import Console, print_table, printable
from qzoom_agent.cli.main import OK
from qzoom_agent.errors import ConfigError
from qzoom_agent.files import read_yaml

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from qzoom_agent.models.presets import Preset


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = "List the models that --model knows by name. A folder or a hub id works too."
    flags.add_argument("model", nargs="?", metavar="M", help="show how this preset, folder or hub id would be run")


def run(args: argparse.Namespace) -> int:
    """Print the table, or one model; nothing is loaded or looked up on the network.

    Raises:
        ConfigError: There is no such model.
    """
    from qzoom_agent.models.presets import PRESETS, guess_of, resolve_model

    if args.model:
        preset = resolve_model(args.model)
        print_table(_details(preset))
        if guess := guess_of(preset):
            print(printable(guess))
        return OK
    rows = [
        (
            preset.name,
            preset.protocol or "",
            f"{preset.memory_gb:g} GB" if preset.memory_gb else "",
            f"{preset.budget.coarse_max_tokens} + {preset.budget.crop_max_tokens} a crop" if preset.budget else "",
            _weights(preset),
            preset.note,
        )
        for preset in PRESETS.values()
    ]
    print_table(rows, header=("name", "protocol", "memory", "visual tokens", "weights", ""))
    return OK


def _details(preset: Preset) -> list[tuple[str, str]]:
    """Return what is known of a model: name of a fact, or the key of a setting, and its value."""
    from qzoom_agent.protocols.wording import FILE

    rows = [("model", preset.name), ("weights", _weights(preset)), ("protocol", preset.protocol or "plain")]
    if (budget := preset.budget) is not None:
        share = f", at most {budget.coarse_share:g} of the full sides" if budget.coarse_share else ""
        rows.append(("first view", f"{budget.coarse_min_tokens} to {budget.coarse_max_tokens} tokens{share}"))
        rows.append(("crop", f"{budget.crop_min_tokens} to {budget.crop_max_tokens} tokens"))
    rows += [(key, str(value)) for key, value in preset.settings.items()]
    own = Path(preset.source) / FILE
    if own.is_file():
        rows.append(("prompt", str(own)))
    elif preset.wording:
        rows.append(("prompt", f"ours; the authors' is in {preset.wording} (for --prompt, or {FILE} in the folder)"))
    return [(printable(key), printable(value)) for key, value in [*rows, ("", preset.note)] if value]


def _weights(preset: Preset) -> str:
    if not preset.local:
        return preset.source  # a hub id
    if not any(Path(preset.source).glob("*.safetensors")):
        return f"missing in {preset.source}"
    return "in the package" if Path(preset.source).is_relative_to(Path(__file__).parents[1]) else preset.source


def add_convert_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Write the branches (gate and SD-RPN) of a checkpoint of the published Q-Zoom code as a small "
        "folder that any copy of the base can be used with; or, with --official, write ours into such a checkpoint."
    )
    flags.add_argument("source", help="official checkpoint or branches of ours: folder or hub id")
    flags.add_argument("target", metavar="DIR", help="folder to write")
    flags.add_argument(
        "--base", metavar="M", help="the model the branches belong to: preset, folder or hub id (default: the source)"
    )
    form = flags.add_mutually_exclusive_group()
    form.add_argument("--int8", action="store_true", help="store matrices as bytes, half the size")
    form.add_argument(
        "--official", action="store_true", help="write base and branches as one checkpoint for the published code"
    )
    flags.add_argument("--force", action="store_true", help="overwrite files in the target")


def run_convert(args: argparse.Namespace) -> int:
    """Run `qzoom convert`: files and sizes go to stdout, notes on the source's config to stderr.

    Raises:
        ConfigError, BackendError: Nothing can be converted.
    """
    console = Console()

    from qzoom_agent.models.convert import to_branches, to_checkpoint

    if args.official:
        done = to_checkpoint(args.source, args.target, base=args.base, force=args.force)
    else:
        done = to_branches(args.source, args.target, base=args.base, int8=args.int8, force=args.force)
    print_table([(str(path), f"{path.stat().st_size:,} bytes") for path in done.files])
    ratio = f" ({done.after / done.before:.2f} of it)" if done.before else ""
    print(f"branches: {done.before:,} bytes in the source, {done.after:,} in the target{ratio}", flush=True)
    for note in done.notes:
        console.line(f"note: {printable(note)}", "yellow")
    return OK


def add_push_flags(flags: argparse.ArgumentParser) -> None:
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


def run_push(args: argparse.Namespace) -> int:
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
