"""`qzoom train select-heads | label | sdrpn | postsft | gate | calibrate`: the stages of the branches, by their names.

    qzoom train branches --config rl/recipes/nano/branches.yaml --output runs/branches       (all of them, in order)
    qzoom train sdrpn --config rl/recipes/nano/branches.yaml --output runs/branches          (one)
    qzoom train sdrpn --config ... --dry-run              (what it will do and cost)
    accelerate launch -m qzoom_agent.rl.branches.run branches --config ... --output ...      (many devices)

A stage finds in the output folder what the ones before wrote (`workshop`), goes on where it was killed, and is not
repeated once it is done. With another recipe, or when a stage before it was done anew, it is refused (`inputs`).
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from datasets import Dataset
from transformers.utils.logging import disable_progress_bar
from yaml import safe_dump

from qzoom_agent.backends.hf import HFBackend
from qzoom_agent.config import PerceptionConfig
from qzoom_agent.errors import ConfigError, QzoomError
from qzoom_agent.evals.scoring.judge import Judge
from qzoom_agent.perception.branches import CONFIG, Branches
from qzoom_agent.rl.branches.calibrate import calibrate, evidence
from qzoom_agent.rl.branches.gate import answer_at_budgets, kind_of, train_gate
from qzoom_agent.rl.branches.heads import select_heads
from qzoom_agent.rl.branches.inputs import begin_stage, require_recipe
from qzoom_agent.rl.branches.labelling import label
from qzoom_agent.rl.branches.metrics import Seen, localisation, look_at
from qzoom_agent.rl.branches.plan import describe
from qzoom_agent.rl.branches.postsft import choose_cases, find_cases, train_postsft
from qzoom_agent.rl.branches.recipe import Optimisation, StageName, load_branch_recipe
from qzoom_agent.rl.branches.records import Records
from qzoom_agent.rl.branches.sdrpn import train_sdrpn
from qzoom_agent.rl.branches.workshop import Workshop
from qzoom_agent.rl.reading import keep_recipe
from qzoom_agent.usage import positive

RULES: Final[tuple[dict[str, float], ...]] = (
    *({"threshold": value} for value in (0.3, 0.2, 0.1, 0.05)),
    *({"peak_share": value} for value in (0.7, 0.5, 0.35, 0.2)),
)
"""What is foreground of the map, in the metrics that are printed."""


def run_select_heads(shop: Workshop) -> None:
    if shop.processes.is_main_process:
        recipe = shop.recipe
        found = select_heads(shop.backend(fine_tuned=False), shop.records(), recipe.heads, recipe.labelling)
        shop.result("select-heads").write_text(found.model_dump_json(indent=1), encoding="utf-8")
        print(f"Heads by {found.criterion}, {found.questions} questions; chosen ones are marked.\n{found.table()}")
        print(f"To keep this choice, write into the recipe:\nlabelling:\n  grounding: {found.heads}")
    shop.processes.wait_for_everyone()


def run_label(shop: Workshop) -> None:
    _labelled(shop, shop.backend(fine_tuned=False), shop.output / "labels")


def run_sdrpn(shop: Workshop) -> None:
    backend = shop.backend(fine_tuned=False)
    table = _labelled(shop, backend, shop.output / "labels")
    _fit(shop, backend, shop.fresh(backend, sdrpn=True, gate=False), table, "sdrpn", shop.recipe.sdrpn.optimisation)


def run_postsft(shop: Workshop) -> None:
    recipe, folder, before = shop.recipe, shop.output / "postsft", shop.latest("sdrpn")
    if shop.base is None:
        backend = shop.backend(branches=before)
        records = shop.records()
        judge = Judge(recipe.postsft.judge, model=recipe.postsft.judge_model, cache=folder / "verdicts.jsonl")
        note = _note("answered twice", recipe.postsft.records or len(records))
        source = shop.source(before)
        cases = find_cases(backend, records, recipe, folder / "cases", judge=judge, source=source, note=note)
        chosen = choose_cases(cases, recipe.postsft, seed=recipe.seed)
        _say(shop, f"{len(chosen)} of {len(cases)} cases to learn from")
        if not chosen:
            _say(shop, "No crop hurt any answer: there is nothing to mend, and the base stays as it is.")
            return
        train_postsft(backend, records, cases, chosen, recipe, folder)
        if shop.processes.is_main_process:
            writing = folder / "base.part"
            disable_progress_bar()  # type: ignore[no-untyped-call]  # of a fraction of a second
            backend.model.save_pretrained(writing)
            backend.processor.save_pretrained(writing)
            writing.rename(folder / "base")
            print(f"written {folder / 'base'}")
        shop.processes.wait_for_everyone()
    tuned = shop.backend(branches=before)
    table = _labelled(shop, tuned, folder / "labels", limit=recipe.postsft.refit_records)
    again = tuned.branches
    assert again is not None
    again.config = again.config.model_copy(update={"positions": recipe.postsft.positions})
    _fit(shop, tuned, again, table, "postsft", recipe.postsft.refit)


def run_gate(shop: Workshop) -> None:
    folder, before = shop.output / "gate", shop.latest("sdrpn", "postsft")
    backend = shop.backend(branches=before)
    records = shop.records()
    note = _note("answered at all budgets", shop.recipe.gate.records or len(records))
    table = answer_at_budgets(backend, records, shop.recipe, folder / "answers", source=shop.source(before), note=note)
    kinds = [kind_of(right) for right in table["right"]]
    _say(shop, ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("easy", "transition", "never", "luck")))
    branches, gate = backend.branches, shop.fresh(backend, sdrpn=False, gate=True).gate
    assert branches is not None and gate is not None
    train_gate(backend, gate, records, table, shop.recipe, folder)
    branches.gate = gate.eval()
    branches.config = branches.config.model_copy(update={"gate_depth": shop.recipe.gate_depth})
    if shop.processes.is_main_process:
        shop.finish("gate", branches.save)
    shop.processes.wait_for_everyone()


def run_calibrate(shop: Workshop) -> None:
    if shop.processes.is_main_process:
        backend = shop.backend(branches=shop.latest("sdrpn", "postsft", "gate"))
        branches = backend.branches
        assert branches is not None

        def write(folder: Path) -> None:
            # thresholds are chosen for the weights as they are stored
            size = branches.save(folder, int8=True)
            backend.branches = Branches.load(folder, backend.model)
            config = branches.config.model_copy(update=_thresholds(shop, backend))
            (folder / CONFIG).write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
            print(f"{size / 1e6:.2f} MB")

        shop.finish("calibrate", write)
    shop.processes.wait_for_everyone()


def _thresholds(shop: Workshop, backend: HFBackend) -> dict[str, Any]:
    """What calibration changes in the branches' config; also printed."""
    recipe, held = shop.recipe, shop.held_out()
    if held is None:
        raise ConfigError("The recipe holds nothing out (`held_out`), so there is nothing to choose thresholds on.")
    seen = look_at(backend, held, tokens=None, limit=recipe.calibration.records)
    relative = recipe.peak_share is not None
    found = calibrate(
        seen,
        _needs(shop, backend, held, seen),
        recipe.calibration,
        relative=relative,
        blurs=recipe.calibration.blurs or [recipe.blur],
        margins=recipe.calibration.margins or [recipe.margin],
        box=recipe.box,
    )
    changes: dict[str, Any] = {"evidence": evidence(found)}
    print(f"{found.questions} questions, {found.needing} of which need a zoom")
    if found.threshold is None:
        print("No held-out question has a box: the map's threshold stays as it is.")
    else:
        changes["peak_share" if relative else "threshold"] = found.threshold
        changes |= {"blur": found.blur, "margin": found.margin, "box": recipe.box}
        rule = f"{found.threshold:g}{' of its peak' if relative else ''}, blur {found.blur}, margin {found.margin:g}"
        missed = "" if found.met else f" (the target of {recipe.calibration.box_recall:g} is not reached)"
        print(f"map at {rule}: recall {found.box.recall:.3f}{missed}, area {found.box.area:.3f}")
    if found.gate is not None:
        changes["gate_threshold"] = found.gate.threshold
    for name, gate in (("learned gate", found.gate), ("training-free gate", found.training_free)):
        if gate is not None:
            print(f"{name} at {gate.threshold:.4g}: skips {gate.missed:.3f} of the needed zooms, ", end="")
            print(f"makes {gate.needless:.3f} of the needless ones")
    return changes


def _needs(shop: Workshop, backend: HFBackend, held: Records, seen: Sequence[Seen]) -> list[bool]:
    """Which held-out questions need a zoom: those with a box, or where boxes are unknown those that a budget mends."""
    if all(one.boxes is not None for one in seen):
        return [bool(one.boxes) for one in seen]
    folder, note = shop.output / "calibrate" / "answers", _note("answered at all budgets", len(seen))
    source = shop.source(shop.latest("sdrpn", "postsft", "gate"), held_out=True)
    table = answer_at_budgets(backend, held, shop.recipe, folder, count=len(seen), source=source, note=note)
    return [kind_of(right) == "transition" for right in table["right"]]


def _labelled(shop: Workshop, backend: HFBackend, folder: Path, *, limit: int | None = None) -> Dataset:
    records, recipe = shop.records(limit=limit), shop.recipe
    source = shop.source()
    if folder == shop.output / "labels":  # whatever postsft has made since
        source["model"] = recipe.model
    table = label(
        backend,
        records,
        recipe.labelling,
        folder,
        selected=shop.heads(),
        k=shop.fresh(backend, sdrpn=True, gate=False).config.k,
        source=source,
        note=_note("labelled", len(records)),
    )
    _say(shop, f"{len(table)} labels in {folder}, {sum(table['right']) / len(table):.1%} of the answers right")
    return table


def _fit(
    shop: Workshop, backend: HFBackend, branches: Branches, table: Dataset, stage: StageName, how: Optimisation
) -> None:
    """Train SD-RPN and write the branches of a stage with their metrics."""
    backend.branches = branches
    assert branches.sdrpn is not None
    recipe = shop.recipe.model_copy(update={"sdrpn": shop.recipe.sdrpn.model_copy(update={"optimisation": how})})
    folder = shop.output / stage / "fit"
    train_sdrpn(backend, branches.sdrpn, shop.records(), table, recipe, folder, made_with=recipe.labelling)
    branches.eval()

    def write(folder: Path) -> None:
        branches.save(folder)
        _report(shop, backend, folder)

    if shop.processes.is_main_process:
        shop.finish(stage, write)
    shop.processes.wait_for_everyone()


def _report(shop: Workshop, backend: HFBackend, folder: Path) -> None:
    """Localisation on held-out data at each budget, printed and written beside the branches."""
    held = shop.held_out()
    if held is None:
        return
    found: list[dict[str, Any]] = []
    for tokens in shop.recipe.sdrpn.tokens:
        seen = look_at(backend, held, tokens=tokens, limit=shop.recipe.sdrpn.report)
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


def _say(shop: Workshop, text: str) -> None:
    if shop.processes.is_main_process:
        print(text, flush=True)


STAGES: Final[dict[StageName, Callable[[Workshop], None]]] = {
    "select-heads": run_select_heads,
    "label": run_label,
    "sdrpn": run_sdrpn,
    "postsft": run_postsft,
    "gate": run_gate,
    "calibrate": run_calibrate,
}
ALL: Final = "branches"


def carry_out(shop: Workshop, stage: StageName) -> None:
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
    parser.add_argument("--config", type=Path, required=True, help="recipe (YAML)")
    parser.add_argument("--output", type=Path, default=Path("runs/branches"), help="folder of all that is written")
    parser.add_argument("--model", help="another base than the recipe's: a preset, a hub id or a folder")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and what it costs, and stop")
    parser.add_argument("--devices", type=positive, default=1, help="for --dry-run: how many devices there will be")
    options = parser.parse_args(argv)
    changes = {} if options.model is None else {"model": options.model}
    recipe = load_branch_recipe(options.config, **changes)
    stages: list[StageName] = recipe.stages if options.stage == ALL else [options.stage]
    if options.dry_run:
        print(safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        for stage in stages:
            print(describe(recipe, stage, processes=options.devices) + "\n")
        return 0
    shop = Workshop(recipe, options.output)
    require_recipe(shop)
    if shop.processes.is_main_process:
        keep_recipe(recipe, options.output)
    for stage in stages:
        carry_out(shop, stage)
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except QzoomError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
