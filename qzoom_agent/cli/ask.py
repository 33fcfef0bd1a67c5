"""`qzoom ask IMAGE QUESTION` answers a question; `qzoom trace show|report DIR` shows a saved answer again.

`ask` prints the steps on stderr as they happen and the answer on stdout. Boxes are shown in pixels of the original
image, whatever frame the model used.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qzoom_agent.cli.console import Console, printable
from qzoom_agent.cli.main import BACKEND, BUDGET, OK
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.files import require_file, require_folder

if TYPE_CHECKING:
    from qzoom_agent.answer import Answer, Event
    from qzoom_agent.trace import CallRecord, PerceptionRecord, Status, Trace, Turn
    from qzoom_agent.views import View

EXIT_CODES: Final[dict[Status, int]] = {"answered": OK, "budget": BUDGET, "refused": BUDGET, "error": BACKEND}


def parser() -> argparse.ArgumentParser:
    """Return the flags of `qzoom ask`."""
    flags = argparse.ArgumentParser(
        prog="qzoom ask",
        description="Answer one question about one image. Exit code 0: answered, 2: wrong usage, "
        "3: a budget ended the run, 4: the model failed.",
    )
    flags.add_argument("image", help="path of an image, FILE.pdf#page=N, a data URI, or - for stdin")
    flags.add_argument("question")
    flags.add_argument("--report", metavar="FILE", help="write one HTML page that shows where the model looked")
    flags.add_argument("--save", metavar="DIR", help="save the run: trace.json, its images, config.yaml")
    flags.add_argument("--json", action="store_true", help="print the whole trace as JSON instead of the answer")
    loud = flags.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="show what the model writes")
    loud.add_argument("-q", "--quiet", action="store_true", help="show the answer only")
    add_agent_flags(flags)
    return flags


def main(argv: Sequence[str]) -> int:
    """Run `qzoom ask` and return the exit code that the run's status stands for."""
    args = parser().parse_args(argv)
    console = Console(verbosity=args.verbose - args.quiet)

    from qzoom_agent.images import load_image
    from qzoom_agent.messages import require_question

    require_question(args.question)
    image = load_image(sys.stdin.buffer if args.image == "-" else args.image, max_pixels=read_config(args).max_pixels)
    if args.save:
        require_folder(args.save)
    if args.report:
        require_file(args.report)
    agent = load_agent(args)
    placement = str(getattr(agent.backend, "placement", ""))
    if placement:
        console.line(f"model   {agent.backend.name} on {placement}", "dim", level=1)
    answer = follow(agent.stream(image, args.question), console, area=image.width * image.height)
    trace = answer.trace
    if args.json:
        print(trace.model_dump_json(indent=1))
    elif answer.text:
        print("\n".join(printable(line) for line in answer.text.splitlines()), flush=True)
    if trace.error:
        console.error(f"The model failed: {printable(trace.error)}")
    elif not answer.text:
        console.error("There is no answer.")
    console.line(summary(trace), "dim" if trace.status == "answered" else "yellow")
    if args.save:
        console.line(f"saved   {answer.save(args.save)}")
    if args.report:
        console.line(f"report  {answer.report(args.report)}")
    return EXIT_CODES[trace.status]


def trace_parser() -> argparse.ArgumentParser:
    """Return the flags of `qzoom trace`."""
    flags = argparse.ArgumentParser(prog="qzoom trace", description="Look at a saved run.")
    verbs = flags.add_subparsers(dest="verb", required=True, metavar="show|report")
    show = verbs.add_parser("show", help="print the steps")
    show.add_argument("run", metavar="DIR", help="folder that --save wrote")
    show.add_argument("-v", "--verbose", action="store_true", help="show what the model wrote")
    report = verbs.add_parser("report", help="write one HTML page that shows where the model looked")
    report.add_argument("run", metavar="DIR", help="folder that --save wrote")
    report.add_argument("--out", metavar="FILE", help="file to write (default: DIR/report.html)")
    report.add_argument("--expected", metavar="TEXT", help="the right answer, shown beside the model's")
    return flags


def trace_main(argv: Sequence[str]) -> int:
    """Run `qzoom trace`. Raises TraceError if the folder holds no trace."""
    args = trace_parser().parse_args(argv)

    from qzoom_agent.trace import Trace, saved_images

    trace = Trace.load(args.run)
    if args.verb == "report":
        from qzoom_agent.report.episode import write_report

        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        out = Path(args.out) if args.out else folder / "report.html"
        print(write_report(trace, saved_images(folder), out, expected=args.expected))
        return OK
    # The steps are the result here, so they go to stdout.
    console = Console(verbosity=int(args.verbose), stream=sys.stdout)
    console.line(printable(trace.question), "bold")
    console.line(f"{trace.model}, protocol {trace.protocol}, policy {trace.policy}, seed {trace.seed}", "dim")
    replay(trace, console)
    console.line(f"answer {printable(trace.answer)}" if trace.answer else "no answer", "bold")
    if trace.error:
        console.line(f"error: {printable(trace.error)}", "red")
    console.line(summary(trace), "dim")
    return OK


# -- steps -----------------------------------------------------------------------------------------------------------


def follow(events: Iterable[Event], console: Console, *, area: int) -> Answer:
    """Show each event of a run and return the answer.

    Args:
        events: What `Agent.stream` yields.
        console: Where to show them.
        area: Pixels of the original image.
    """
    from qzoom_agent.trace import CallRecord, PerceptionRecord, Turn
    from qzoom_agent.views import View

    steps = _Steps(console, area)
    answer: Answer | None = None
    began = time.perf_counter()
    for event in events:
        seconds = time.perf_counter() - began
        if event.kind == "view":
            steps.view(View(**event.data), seconds)
            began = time.perf_counter()
        elif event.kind == "look":
            steps.look(PerceptionRecord(**event.data))
        elif event.kind == "turn":
            steps.turn(Turn(**event.data))
        elif event.kind == "call":
            steps.call(CallRecord(**{key: value for key, value in event.data.items() if key != "turn"}))
        elif event.kind == "answer":
            answer = event.answer
    assert answer is not None, "a run always ends with an answer event"
    return answer


def replay(trace: Trace, console: Console) -> None:
    """Show the steps of a finished run."""
    original = trace.view("original")
    steps = _Steps(console, original.size.area if original else 1)
    calls = {call.result for turn in trace.turns for call in turn.calls}
    for view in trace.views:
        if view.kind not in ("original", "source") and view.id not in calls:
            steps.view(view, None)
            if view.kind == "coarse":
                for look in trace.looks:
                    steps.look(look)
    for turn in trace.turns:
        steps.turn(turn)
        for call in turn.calls:
            steps.call(call)
            result = trace.view(call.result) if call.result else None
            if result:
                steps.view(result, turn.seconds + turn.act_seconds)


def summary(trace: Trace) -> str:
    """Return the outcome of a run and its cost, on one line."""
    usage = trace.usage
    zooms = usage.served + usage.inserted
    turned_down = usage.refused + usage.failed
    saved = f", {usage.saved_tokens} saved by refusals" if usage.saved_tokens else ""
    made = f" + {usage.tool_tokens} tools" if usage.tool_tokens else ""
    parts = [
        f"{zooms} zoom{'' if zooms == 1 else 's'}" + (f" ({turned_down} more not served)" if turned_down else ""),
        *([f"{usage.tool_calls} tool call{'' if usage.tool_calls == 1 else 's'}"] if usage.tool_calls else []),
        f"{usage.visual_tokens} visual tokens ({usage.coarse_tokens} coarse + {usage.crop_tokens} crops{made}{saved})",
        f"{usage.seconds.total:.2f} s",
    ]
    return f"{trace.status}: {', '.join(parts)}"


class _Steps:
    """Views, turns and calls as lines."""

    def __init__(self, console: Console, area: int) -> None:
        self.console = console
        self.area = area
        self.asked: dict[str, CallRecord] = {}

    def view(self, view: View, seconds: float | None) -> None:
        if view.kind == "coarse":
            self.console.line(f"look coarse {view.tokens} tokens", "cyan")
            return
        call = self.asked.pop(view.id, None)
        took = "" if seconds is None else f" {seconds:.2f} s"
        if call and call.arguments is not None:
            self.console.line(f"tool {_called(call)} -> {view.id} +{view.tokens} visual tokens{took}", "cyan")
            return
        share = view.region.area / self.area
        verb = "zoom" if call else "show"
        self.console.line(f"{verb} {_quad(view.box)} {share:.1%} of image +{view.tokens} visual tokens{took}", "cyan")
        if call and call.decision in ("grown", "snapped") and call.reason:
            self.console.line(f"     {printable(call.reason)}", "dim")

    def look(self, found: PerceptionRecord) -> None:
        """Show gate and SD-RPN; at verbosity 0 only if the budget withheld a crop."""
        gate = "" if found.fired is None else f"gate {found.score:.2f} of {found.threshold:.2f}: "
        by = f"{printable(found.perceiver)} " if found.perceiver else ""
        text = f"     {by}{gate}{printable(found.reason)}"
        if found.withheld:
            self.console.line(text, "yellow")
        else:
            self.console.line(text, "dim", level=1)

    def turn(self, turn: Turn) -> None:
        for text in turn.text.splitlines():
            self.console.line(f"     {printable(text)}", "dim", level=1)
        for problem in turn.problems:
            self.console.line(f"unreadable call: {printable(problem)}", "yellow")
        for repair in turn.repairs:
            self.console.line(f"     mended: {printable(repair)}", "dim", level=1)

    def call(self, call: CallRecord) -> None:
        if call.result is not None:
            self.asked[call.result] = call
            return
        if call.arguments is not None and call.serves:
            self.console.line(f"tool {_called(call)}", "cyan")
            self.console.line(f"     {printable(call.text)[:200]}", "dim")
            return
        asked = f"{_quad(call.box)} of {printable(call.view)}, {call.frame} " if call.box else ""
        asked = asked if call.arguments is None else f"{_called(call)} "
        rule = f"({printable(call.code)}) " if call.code else ""
        self.console.line(f"{call.decision} {rule}{asked}- {printable(call.reason)}", "yellow")


def _called(call: CallRecord) -> str:
    return f"{printable(call.name)} {printable(call.arguments or '')[:200]}"


def _quad(box: Sequence[Any]) -> str:
    return "[" + ",".join(f"{side:.4g}" if abs(side) < 10 and side % 1 else f"{side:.0f}" for side in box) + "]"
