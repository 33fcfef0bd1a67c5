"""`qzoom train select-heads | label | sdrpn | postsft | gate | calibrate`: the stages of the branches, by their names.

    qzoom train branches --config rl/recipes/nano/branches.yaml --output runs/branches       (all of them, in order)
    qzoom train sdrpn --config rl/recipes/nano/branches.yaml --output runs/branches          (one)
    qzoom train sdrpn --config ... --dry-run              (what it will do and cost)
    accelerate launch -m qzoom_agent.training.branches.stages branches --config ... --output ...      (many devices)

A stage finds in the output folder what the ones before wrote (`workshop`), goes on where it was killed, and is not
repeated once it is done. With another recipe, or when a stage before it was done anew, it is refused (`inputs`).
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from datasets import Dataset
from transformers.utils.logging import disable_progress_bar
from yaml import safe_dump

from qzoom_agent.config import PerceptionConfig, positive_int
from qzoom_agent.errors import finished
from qzoom_agent.evaluation.scorers.judge import Judge
from qzoom_agent.models.hf import HFBackend
from qzoom_agent.perception.branches import Branches
from qzoom_agent.training.branches.branch_recipe import Optimisation, StageName, load_branch_recipe
from qzoom_agent.training.branches.cost_estimate import describe
from qzoom_agent.training.branches.dataset import Records
from qzoom_agent.training.branches.gate import answer_at_budgets, counted, kinds, train_gate
from qzoom_agent.training.branches.head_selection import select_heads
from qzoom_agent.training.branches.labelling import label
from qzoom_agent.training.branches.localisation import localisation, look_at
from qzoom_agent.training.branches.postsft import choose_cases, find_cases, train_postsft
from qzoom_agent.training.branches.run_dir import RunDirectory
from qzoom_agent.training.branches.sdrpn import train_sdrpn
from qzoom_agent.training.branches.stage_dependencies import begin_stage, require_recipe
from qzoom_agent.training.branches.thresholds import with_thresholds
from qzoom_agent.training.recipe_io import add_recipe_arguments, keep_recipe
from qzoom_agent.training.trackers import require_tracker

RULES: Final[tuple[dict[str, float], ...]] = (
    *({"threshold": value} for value in (0.3, 0.2, 0.1, 0.05)),
    *({"peak_share": value} for value in (0.7, 0.5, 0.35, 0.2)),
)
"""What is foreground of the map, in the metrics that are printed."""


def run_select_heads(shop: RunDirectory) -> None:
    if shop.processes.is_main_process:
        recipe, records = shop.recipe, shop.records("select-heads", limit=shop.recipe.heads.records)
        found = select_heads(shop.backend(), records, recipe.heads, recipe.labelling)
        shop.result("select-heads").write_text(found.model_dump_json(indent=1), encoding="utf-8")
        print(f"Heads by {found.criterion}, {found.questions} questions; chosen ones are marked.\n{found.table()}")
        print(f"To keep this choice, write into the recipe:\nlabelling:\n  grounding: {found.heads}")
    shop.processes.wait_for_everyone()


def run_label(shop: RunDirectory) -> None:
    _labelled(shop, shop.backend(), shop.output / "labels")


def run_sdrpn(shop: RunDirectory) -> None:
    backend = shop.backend()
    table = _labelled(shop, backend, shop.output / "labels")
    fresh = shop.fresh(backend, sdrpn=True, gate=False)
    _fit(shop, backend, fresh, shop.records("sdrpn"), table, "sdrpn", shop.recipe.sdrpn.optimisation)


def run_postsft(shop: RunDirectory) -> None:
    recipe, folder, before = shop.recipe, shop.output / "postsft", shop.latest("sdrpn")
    if not shop.tuned.exists():
        backend = shop.backend(branches=before)
        records = shop.records("postsft", limit=recipe.postsft.records)
        judge = Judge(recipe.postsft.judge, model=recipe.postsft.judge_model, cache=folder / "verdicts.jsonl")
        note = _note("answered twice", len(records))
        source = shop.source(before, stage="postsft")
        cases = find_cases(backend, records, recipe, folder / "cases", judge=judge, source=source, note=note)
        chosen = choose_cases(cases, recipe.postsft, seed=recipe.seed)
        _say(shop, f"{len(chosen)} of {len(cases)} cases to learn from")
        if not chosen:
            _say(shop, "No crop hurt any answer: there is nothing to mend, and the base stays as it is.")
            return
        train_postsft(backend, records, cases, chosen, recipe, folder)
        if shop.processes.is_main_process:
            writing = shop.tuned.with_name("base.part")
            disable_progress_bar()  # type: ignore[no-untyped-call]  # of a fraction of a second
            backend.model.save_pretrained(writing)
            backend.processor.save_pretrained(writing)
            writing.rename(shop.tuned)
            print(f"written {shop.tuned}")
        shop.processes.wait_for_everyone()
    tuned = shop.backend(branches=before, base=shop.tuned)
    limit = recipe.postsft.refit_records
    table = _labelled(shop, tuned, folder / "labels", limit=limit, base=shop.tuned)
    again = tuned.branches
    assert again is not None
    again.config = again.config.model_copy(update={"positions": recipe.postsft.positions})
    _fit(shop, tuned, again, shop.records("label", limit=limit), table, "postsft", recipe.postsft.refit)


def run_gate(shop: RunDirectory) -> None:
    folder, before, stage = shop.output / "gate", shop.latest("sdrpn", "postsft"), shop.recipe.gate
    backend = shop.backend(branches=before, base=shop.base)
    records = shop.records("gate", limit=stage.records)
    note, source = _note("answered at all budgets", len(records)), shop.source(before, stage="gate", base=shop.base)
    table = answer_at_budgets(backend, records, shop.recipe, folder / "answers", source=source, note=note)
    _say(shop, counted(kinds(table, stage)))
    branches, gate = backend.branches, shop.fresh(backend, sdrpn=False, gate=True).gate
    assert branches is not None and gate is not None
    train_gate(backend, gate, records, table, shop.recipe, folder)
    branches.gate = gate.eval()
    branches.config = branches.config.model_copy(update={"gate_depth": shop.recipe.gate_depth})
    if shop.processes.is_main_process:
        shop.finish("gate", branches.save)
    shop.processes.wait_for_everyone()


def run_calibrate(shop: RunDirectory) -> None:
    before = shop.latest("sdrpn", "postsft", "gate")
    backend = shop.backend(branches=before, base=shop.base)
    branches = backend.branches
    assert branches is not None
    with TemporaryDirectory() as folder:  # thresholds are chosen for the weights as they are stored
        size = branches.save(folder, int8=True)
        backend.branches = Branches.load(folder, backend.model)
    _say(shop, f"{size / 1e6:.2f} MB")
    source = shop.source(before, held_out=True, base=shop.base)
    branches.config = with_thresholds(backend, shop.recipe, shop.output / "calibrate", source=source)
    if shop.processes.is_main_process:
        shop.finish("calibrate", lambda folder: branches.save(folder, int8=True))
    shop.processes.wait_for_everyone()


def _labelled(
    shop: RunDirectory, backend: HFBackend, folder: Path, *, limit: int | None = None, base: Path | None = None
) -> Dataset:
    records, recipe = shop.records("label", limit=limit), shop.recipe
    table = label(
        backend,
        records,
        recipe.labelling,
        folder,
        selected=shop.heads(),
        k=shop.fresh(backend, sdrpn=True, gate=False).config.k,
        source=shop.source(base=base),
        positions=recipe.positions if base is None else recipe.postsft.positions,
        note=_note("labelled", len(records)),
    )
    _say(shop, f"{len(table)} labels in {folder}, {sum(table['right']) / len(table):.1%} of the answers right")
    return table


def _fit(
    shop: RunDirectory,
    backend: HFBackend,
    branches: Branches,
    records: Records,
    table: Dataset,
    stage: StageName,
    how: Optimisation,
) -> None:
    """Train SD-RPN on the labels of these records, and write the branches of a stage with their metrics."""
    backend.branches = branches
    assert branches.sdrpn is not None
    recipe = shop.recipe.model_copy(update={"sdrpn": shop.recipe.sdrpn.model_copy(update={"optimisation": how})})
    folder = shop.output / stage / "fit"
    train_sdrpn(backend, branches.sdrpn, records, table, recipe, folder, made_with=recipe.labelling)
    branches.eval()

    def write(folder: Path) -> None:
        branches.save(folder)
        _report(shop, backend, folder)

    if shop.processes.is_main_process:
        shop.finish(stage, write)
    shop.processes.wait_for_everyone()


def _report(shop: RunDirectory, backend: HFBackend, folder: Path) -> None:
    """Localisation on held-out data at each budget, printed and written beside the branches."""
    held = shop.held_out(limit=shop.recipe.sdrpn.report)
    if held is None:
        return
    found: list[dict[str, Any]] = []
    for tokens in shop.recipe.sdrpn.tokens:
        seen = look_at(backend, held, tokens=tokens)
        for rule in RULES:
            options = PerceptionConfig(blur=shop.recipe.blur, margin=shop.recipe.margin, box=shop.recipe.box)
            figures = localisation(seen, options.model_copy(update=rule))
            found.append({"tokens": tokens, **rule, **figures.model_dump()})
    (folder / "metrics.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    names = ("recall", "iou", "area", "auc", "proposed")
    print(f"held out, {found[0]['n']} questions with a box")
    print(f"{'tokens':>7} {'foreground':>13}" + "".join(f"{name:>9}" for name in names))
    for row in found:
        cells = ["-" if row[name] is None else f"{row[name]:.3f}" for name in names]
        level = f"{row['threshold']:g}" if "threshold" in row else f"{row['peak_share']:g} of peak"
        print(f"{row['tokens'] or 'preset':>7} {level:>13}" + "".join(f"{cell:>9}" for cell in cells))


def _note(what: str, total: int) -> Callable[[int], None]:
    return lambda done: print(f"{what}: {done} of {total}", flush=True)


def _say(shop: RunDirectory, text: str) -> None:
    if shop.processes.is_main_process:
        print(text, flush=True)


STAGES: Final[dict[StageName, Callable[[RunDirectory], None]]] = {
    "select-heads": run_select_heads,
    "label": run_label,
    "sdrpn": run_sdrpn,
    "postsft": run_postsft,
    "gate": run_gate,
    "calibrate": run_calibrate,
}
ALL: Final = "branches"


def carry_out(shop: RunDirectory, stage: StageName) -> None:
    """Run a stage, unless its result is there.

    Raises:
        ConfigError: it was begun, or is done, with another recipe or from something else.
    """
    begin_stage(shop, stage)
    if shop.result(stage).exists():
        _say(shop, f"{stage}: {shop.result(stage)} is there already; delete it to run this stage again.")
        return
    _say(shop, f"== {stage}")
    STAGES[stage](shop)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="qzoom train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(ALL, *STAGES))
    add_recipe_arguments(parser, output="runs/branches")
    parser.add_argument("--model", help="another base than the recipe's: a preset, a hub id or a folder")
    parser.add_argument("--devices", type=positive_int, default=1, help="for --dry-run: how many devices there will be")
    options = parser.parse_args(argv)
    changes = {} if options.model is None else {"model": options.model}
    recipe = load_branch_recipe(options.config, overrides=options.overrides, **changes)
    stages: list[StageName] = recipe.stages if options.stage == ALL else [options.stage]
    if options.dry_run:
        print(safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        for stage in stages:
            print(describe(recipe, stage, processes=options.devices) + "\n")
        return 0
    for how in (recipe.sdrpn, recipe.gate, recipe.postsft):
        require_tracker(how.optimisation.report_to)
    shop = RunDirectory(recipe, options.output)
    require_recipe(shop)
    if shop.processes.is_main_process:
        keep_recipe(recipe, options.output)
    for stage in stages:
        carry_out(shop, stage)
    return 0


if __name__ == "__main__":
    sys.exit(finished("qzoom train", main))
