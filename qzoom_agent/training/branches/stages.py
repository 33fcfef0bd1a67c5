"""The branches' stages by name: `qzoom train select-heads`, `label`, `sdrpn`, `postsft`, `regions`, `gate`, ...

    qzoom train branches --config rl/recipes/nano/branches.yaml --output runs/branches       (all of them, in order)
    qzoom train sdrpn --config rl/recipes/nano/branches.yaml --output runs/branches          (one)
    qzoom train sdrpn --config ... --dry-run              (the resolved recipe and its cost)
    accelerate launch -m qzoom_agent.training.branches.stages branches --config ... --output ...      (many devices)

A stage reads the results of earlier ones from the output folder, resumes after an interruption, and is skipped once it
is done. It is refused with another recipe, or when an earlier stage was repeated (see `run_dir`).
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from datasets import Dataset
from transformers.utils.logging import disable_progress_bar

from qzoom_agent.config import PerceptionConfig, positive_int
from qzoom_agent.errors import ConfigError, finished
from qzoom_agent.evaluation.scorers.judge import Judge
from qzoom_agent.files import write_text
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.models.presets import keep_origin
from qzoom_agent.models.prompts import save_processor
from qzoom_agent.perception.branch_config import FURTHER
from qzoom_agent.perception.branches import Branches
from qzoom_agent.protocols.wording import write_prompt
from qzoom_agent.training.branches.base_inference import branches_of
from qzoom_agent.training.branches.branch_recipe import BranchRecipe, Optimisation, StageName, load_branch_recipe
from qzoom_agent.training.branches.calibrate import with_thresholds
from qzoom_agent.training.branches.cost_estimate import describe, require_layers
from qzoom_agent.training.branches.dataset import load_records
from qzoom_agent.training.branches.fitting import require_tracker
from qzoom_agent.training.branches.further import collect_chains, measure, train_further
from qzoom_agent.training.branches.gate import answer_at_budgets, counted, kinds, train_gate
from qzoom_agent.training.branches.labelling import label, select_heads
from qzoom_agent.training.branches.postsft import choose_cases, find_cases, train_postsft
from qzoom_agent.training.branches.proposals import localisation, look_at_records
from qzoom_agent.training.branches.regions import train_regions
from qzoom_agent.training.branches.run_dir import RULE_KEYS, RunDirectory, copy_branches
from qzoom_agent.training.branches.sdrpn import train_sdrpn
from qzoom_agent.training.branches.sharded_table import say, together
from qzoom_agent.training.recipe_io import as_yaml, keep_recipe, recipe_parser, writing


def run_select_heads(run: RunDirectory) -> None:
    """Choose the heads whose attention makes the labels."""
    if run.processes.is_main_process:
        recipe, records = run.recipe, run.records("select-heads", limit=run.recipe.heads.records)
        found = select_heads(run.backend(), records, recipe.heads, recipe.labelling)
        write_text(run.result("select-heads"), found.model_dump_json(indent=1))
        print(f"Heads by {found.criterion}, {found.questions} questions; chosen ones are marked.\n{found.table()}")
        print(f"To keep this choice, write into the recipe:\nlabelling:\n  grounding: {found.heads}")
    run.processes.wait_for_everyone()


def run_sdrpn(run: RunDirectory) -> None:
    """Train SD-RPN on the maps, which are collected first if they are not there."""
    backend = run.backend()
    table = _labelled(run, backend, run.output / "labels")
    backend.branches = run.fresh(backend, sdrpn=True, gate=False)
    _fit(run, backend, table, "sdrpn", run.recipe.sdrpn.optimisation)


def run_postsft(run: RunDirectory) -> None:
    """Fine-tune the base on questions that a crop made it answer wrongly, and fit SD-RPN to it again."""
    recipe, stage, folder, before = run.recipe, run.recipe.postsft, run.output / "postsft", run.before("postsft")
    if not run.tuned.exists():
        backend = run.backend(branches=before)
        records = run.records("postsft", limit=stage.records)
        judge = Judge(stage.judge, model=stage.judge_model, cache=folder / "verdicts.jsonl")
        cases = find_cases(backend, records, stage, folder / "cases", judge=judge)
        chosen = choose_cases(cases, stage, seed=recipe.seed)
        say(f"{len(chosen)} of {len(cases)} cases to learn from")
        if not chosen:
            say("No crop hurt any answer: there is nothing to learn, and the base stays as it is.")
            return
        train_postsft(backend, records, cases, chosen, recipe, folder)
        disable_progress_bar()  # type: ignore[no-untyped-call]  # of a fraction of a second

        def write(to: Path) -> None:
            backend.model.save_pretrained(to)
            save_processor(backend.processor, to)
            keep_origin(to, recipe.model)
            write_prompt(backend.prompt, to)

        run.finish(run.tuned, write)
    tuned = run.backend(branches=before, base=run.tuned)
    table = _labelled(run, tuned, folder / "labels", limit=stage.refit_records, positions=stage.positions)
    branches = branches_of(tuned)
    branches.config = branches.config.model_copy(update={"positions": stage.positions})
    _fit(run, tuned, table, "postsft", stage.refit, limit=stage.refit_records)


def run_regions(run: RunDirectory) -> None:
    """Let the answers of the frozen base reinforce SD-RPN."""
    if run.final("gate").exists():
        raise ConfigError(
            f"The gate in {run.final('gate')} was trained on the crops of another SD-RPN. Run `regions` before `gate`: "
            "in another output folder, or delete that one."
        )
    folder, stage = run.output / "regions", run.recipe.regions
    backend = run.backend(branches=run.before("regions"), base=run.base)
    branches = branches_of(backend)
    if branches.sdrpn is None:
        raise ConfigError("These branches have no SD-RPN to start from. Run the stage sdrpn first.")
    train_regions(backend, branches.sdrpn, run.records("regions", limit=stage.records), run.recipe, folder)
    # the figures of a calibrated base are those of another map
    branches.config = branches.config.model_copy(update={"evidence": {}})
    _finish_with_metrics(run, backend, "regions")


def run_gate(run: RunDirectory) -> None:
    """Train the gate on answers at ascending budgets."""
    folder, stage = run.output / "gate", run.recipe.gate
    backend = run.backend(branches=run.before("gate"), base=run.base)
    records = run.records("gate", limit=stage.records)
    table = answer_at_budgets(backend, records, run.recipe, folder / "answers")
    say(counted(kinds(table, stage)))
    branches, fresh = branches_of(backend), run.fresh(backend, sdrpn=False, gate=True)
    assert fresh.gate is not None
    train_gate(backend, fresh.gate, records, table, run.recipe, folder)
    branches.gate = fresh.gate.eval()
    keys = {"gate_depth", "gate_threshold"}  # those of the base's gate, if it had one, are of other scores
    branches.config = branches.config.model_copy(update=fresh.config.model_dump(include=keys))
    run.finish(run.final("gate"), branches.save)


def run_calibrate(run: RunDirectory) -> None:
    """Choose thresholds on held-out questions."""
    backend = run.backend(branches=run.before("calibrate"), base=run.base)
    branches = branches_of(backend)
    with TemporaryDirectory() as folder:  # thresholds are chosen for the weights as they are stored
        size = branches.save(folder, int8=True)
        backend.branches = Branches.load(folder, backend.model)
    say(f"{size / 1e6:.2f} MB")
    branches.config = with_thresholds(backend, run.recipe, run.output / "calibrate")
    run.finish(run.final("calibrate"), lambda folder: branches.save(folder, int8=True))


def run_further(run: RunDirectory) -> None:
    """Train gate (if there is one) and SD-RPN of further looks, which start as those of the first."""
    folder, recipe, stage, before = run.output / "further", run.recipe, run.recipe.further, run.before("further")
    backend = run.backend(branches=before, base=run.base)
    branches = branches_of(backend)
    if branches.sdrpn is None or (branches.gate is None and stage.follow == "calls"):
        raise ConfigError(
            "Further looks start from an SD-RPN, and calls are followed (further.follow) until a gate ends it. Run the "
            "stages sdrpn and gate first."
        )
    if branches.gate is None and recipe.labelling.keep != "all":
        raise ConfigError("Without a gate no answers are written that could be right: set labelling.keep to all.")
    records = run.records("further", limit=stage.records)
    table = collect_chains(backend, records, recipe, folder / "chains", selected=run.heads())
    keys = {"k", "depth", "gate_depth", "positions", "threshold", "max_regions", *RULE_KEYS}
    settings = branches.config.model_dump(include=keys)
    if stage.box is not None:
        settings["box"] = stage.box
    if stage.follow == "attention":
        settings["max_regions"] = 1  # one crop was shown at a time
    if branches.gate is None:
        settings["crops"] = stage.crops
    settings |= {"with_gate": branches.gate is not None, "inside_crops": stage.inside_crops}
    further = Branches.from_base(backend.model, **settings)
    further.load_state_dict(branches.own_weights)
    held = train_further(backend, further, records, table, recipe, folder)
    with TemporaryDirectory() as stored:  # measured as they are stored
        further.save(stored, int8=True)
        further = Branches.load(stored, backend.model)
    figures = measure(backend, further, records, table, held, recipe)
    say(figures.model_dump_json(indent=1))
    changes: dict[str, Any] = {"evidence": figures.model_dump(mode="json")}
    changes["gate_threshold"] = 0.5 if figures.gate is None else figures.gate.threshold
    further.config = further.config.model_copy(update=changes)

    def write(target: Path) -> None:
        copy_branches(before, target)
        further.save(target / FURTHER, int8=True)

    run.finish(run.final("further"), write)


def _labelled(
    run: RunDirectory, backend: HFBackend, folder: Path, *, limit: int | None = None, positions: str | None = None
) -> Dataset:
    """Return the labels of the stage's questions, at the recipe's `positions` or these of a tuned base."""
    if positions is None:
        run.begin_stage("label")
    table = label(
        backend,
        run.records("label", limit=limit),
        run.recipe.labelling,
        folder,
        selected=run.heads(),
        k=run.fresh(backend, sdrpn=True, gate=False).config.k,
        aligned=(positions or run.recipe.positions) == "aligned",
    )
    say(f"{len(table)} labels in {folder}, {sum(table['right']) / len(table):.1%} of the answers right")
    return table


def _fit(
    run: RunDirectory, backend: HFBackend, table: Dataset, stage: StageName, how: Optimisation, limit: int | None = None
) -> None:
    """Train SD-RPN on labels; write the branches of a stage with their metrics."""
    branches = branches_of(backend)
    assert branches.sdrpn is not None
    recipe = run.recipe.model_copy(update={"sdrpn": run.recipe.sdrpn.model_copy(update={"optimisation": how})})
    records = run.records("sdrpn", limit=limit)
    train_sdrpn(backend, branches.sdrpn, records, table, recipe, run.output / stage / "fit", topics=records.topics())
    branches.eval()
    _finish_with_metrics(run, backend, stage)


def _finish_with_metrics(run: RunDirectory, backend: HFBackend, stage: StageName) -> None:
    """Write the branches of a stage, and beside them how well they localise."""

    def write(folder: Path) -> None:
        branches_of(backend).save(folder)
        _report(run, backend, folder)

    run.finish(run.final(stage), write)


def _report(run: RunDirectory, backend: HFBackend, folder: Path) -> None:
    """Measure localisation on held-out data at each budget; print it, and write it beside the branches."""
    if not run.recipe.held_out:
        return
    held = load_records(run.recipe.held_out, limit=run.recipe.sdrpn.report)
    config = branches_of(backend).config  # which regions reinforces as it is, whatever rules the recipe has
    options = PerceptionConfig(blur=config.blur, margin=config.margin, box=config.box)
    rules = [("threshold", value) for value in (0.3, 0.2, 0.1, 0.05)]
    rules += [("peak_share", value) for value in (0.7, 0.5, 0.35, 0.2)]
    found: list[dict[str, Any]] = []
    for tokens in run.recipe.sdrpn.tokens:
        seen = look_at_records(backend, held, tokens=tokens)
        for key, value in rules:
            figures = localisation(seen, options.model_copy(update={key: value}))
            found.append({"tokens": tokens, key: value, **figures.model_dump()})
    (folder / "metrics.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    names = ("recall", "iou", "area", "auc", "proposed")
    print(f"held out, {found[0]['n']} questions with a box")
    print(f"{'tokens':>7} {'foreground':>13}" + "".join(f"{name:>9}" for name in names))
    for row in found:
        cells = ["-" if row[name] is None else f"{row[name]:.3f}" for name in names]
        level = f"{row['threshold']:g}" if "threshold" in row else f"{row['peak_share']:g} of peak"
        print(f"{row['tokens'] or 'preset':>7} {level:>13}" + "".join(f"{cell:>9}" for cell in cells))


STAGES: Final[dict[StageName, Callable[[RunDirectory], object]]] = {
    "select-heads": run_select_heads,
    "label": lambda run: _labelled(run, run.backend(), run.output / "labels"),
    "sdrpn": run_sdrpn,
    "postsft": run_postsft,
    "regions": run_regions,
    "gate": run_gate,
    "calibrate": run_calibrate,
    "further": run_further,
}
ALL: Final = "branches"


def run_stage(run: RunDirectory, stage: StageName) -> None:
    """Run a stage, unless its result is there; see `RunDirectory.begin_stage`."""
    run.begin_stage(stage)
    if run.result(stage).exists():
        say(f"{stage}: {run.result(stage)} is there already; delete it to run this stage again.")
        return
    say(f"== {stage}")
    STAGES[stage](run)


def _warn_of_shared_rows(recipe: BranchRecipe, stages: Sequence[StageName]) -> None:
    learned = [source for stage in stages for source in recipe.asked(stage)]
    for held in recipe.held_out:
        if any(map(held.shares_rows, learned)) and together().is_main_process:
            which = f"seed {held.seed}" if held.is_needle else f"split {held.split}"
            print(
                f"held_out reads {held.path} ({which}), as data does: thresholds and figures are of questions that "
                f"were trained on. Give it another {'seed' if held.is_needle else 'split or table'}.",
                file=sys.stderr,
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = recipe_parser(__doc__, output="runs/branches", prog="qzoom train")
    parser.add_argument("stage", choices=(ALL, *STAGES))
    parser.add_argument("--model", help="base to use instead of the recipe's: a preset, a hub id or a folder")
    parser.add_argument("--devices", type=positive_int, default=1, help="number of devices, for the costs of --dry-run")
    options = parser.parse_args(argv)
    changes = {} if options.model is None else {"model": options.model}
    recipe = load_branch_recipe(options.config, overrides=options.overrides, **changes)
    stages: list[StageName] = recipe.stages if options.stage == ALL else [options.stage]
    _warn_of_shared_rows(recipe, stages)
    if "sdrpn" in stages:
        require_layers(recipe)
    if options.dry_run:
        print(as_yaml(recipe))
        for stage in stages:
            print(describe(recipe, stage, processes=options.devices) + "\n")
        return 0
    fitted = (recipe.sdrpn, recipe.postsft, recipe.regions, recipe.gate, recipe.further)
    for how in (*(one.optimisation for one in fitted), recipe.postsft.refit):
        require_tracker(how.report_to)
    run = RunDirectory(recipe, options.output)
    with writing(options.output, run.processes):
        run.require_recipe()
        if run.processes.is_main_process:
            keep_recipe(recipe, options.output)
        for stage in stages:  # wrong rows show before a model is loaded
            load_records(recipe.asked(stage))
        if recipe.held_out:
            load_records(recipe.held_out)
        for stage in stages:
            run_stage(run, stage)
    return 0


if __name__ == "__main__":
    sys.exit(finished("qzoom train", main))
