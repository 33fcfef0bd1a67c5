"""`qzoom ask IMAGE QUESTION` answers a question, `qzoom chat IMAGE` several; `qzoom trace` shows an answer again.

The steps go to stderr as they happen and the answer to stdout. Boxes are shown in pixels of the original image,
whatever frame the model used. `chat` reads questions from the terminal or, one a line, from stdin, and keeps what it
has computed and shown; an empty line or the end of the input ends it. With `--approve`, `ask` shows each call on stderr
before it is run, and reads the decision from a line of stdin.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qzoom_agent.cli.console import Console, printable
from qzoom_agent.cli.main import BACKEND, BUDGET, OK
from qzoom_agent.cli.options import add_agent_flags, load_agent, read_config
from qzoom_agent.errors import ConfigError, ImageError
from qzoom_agent.files import is_stream, require_file, require_folder
from qzoom_agent.report.markdown import percent

if TYPE_CHECKING:
    from qzoom_agent.agent import Agent
    from qzoom_agent.answer import Answer, Event
    from qzoom_agent.approval import Decision
    from qzoom_agent.trace import CallRecord, PendingCall, PerceptionRecord, QuestionRecord, Status, Trace, Turn
    from qzoom_agent.views import View

EXIT_CODES: Final[dict[Status, int]] = {
    "answered": OK,
    "budget": BUDGET,
    "refused": BUDGET,
    "waiting": BUDGET,
    "error": BACKEND,
}


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Answer one question about one image, or several. Exit code 0: answered, 2: wrong usage, "
        "3: a budget ended the run, 4: the model failed."
    )
    flags.add_argument("image", nargs="+", help="path of an image, FILE.pdf#page=N, a data URI, or - for stdin")
    flags.add_argument("question")
    flags.add_argument(
        "--approve", action="store_true", help="ask here about each call before it is run: y, another box, or a reason"
    )
    add_output_flags(flags)
    add_agent_flags(flags)


def add_output_flags(flags: argparse.ArgumentParser) -> None:
    """Add the flags that say what is written about a run."""
    flags.add_argument("--report", metavar="FILE", help="write one HTML page that shows where the model looked")
    flags.add_argument("--save", metavar="DIR", help="save the run: trace.json, its images, config.yaml")
    flags.add_argument("--json", action="store_true", help="print the whole trace as JSON instead of the answer")
    loud = flags.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="show what the model writes")
    loud.add_argument("-q", "--quiet", action="store_true", help="show the answer only")


def run(args: argparse.Namespace) -> int:
    """Run `qzoom ask` and return the exit code that the run's status stands for."""
    console = Console(verbosity=args.verbose - args.quiet)

    from qzoom_agent.images import load_image
    from qzoom_agent.messages import require_question

    require_question(args.question)
    if args.approve and "-" in args.image:
        raise ConfigError("--approve reads decisions from stdin, and so does the image. Give the image as a file.")
    if args.image.count("-") > 1:
        raise ConfigError("Only one image can be read from stdin. Give paths for the others.")
    limit = read_config(args).max_pixels
    try:
        images = [load_image(sys.stdin.buffer if one == "-" else one, max_pixels=limit) for one in args.image]
    except ImageError as error:
        if len(args.image) > 1 or " " in args.image[0]:
            raise ImageError(f'{error} The question comes last, and in quotes: ask IMAGE "QUESTION".') from error
        raise
    agent = prepare(args, console)
    if args.approve:
        agent = agent.replace(approve=ask_at_terminal(console, *(one.size for one in images)))
    areas = [one.width * one.height for one in images]
    answer = follow(agent.stream(images, args.question), console, areas)
    try:
        show_answer(answer, console, as_json=args.json)
    finally:  # also for a reader that wants the first lines alone (`| head`)
        keep(answer, console, args)
    return EXIT_CODES[answer.status]


def prepare(args: argparse.Namespace, console: Console) -> Agent:
    """Check that what the flags name can be written, and return the agent that they describe."""
    if args.save is not None:
        require_folder(args.save)
    if args.report is not None:
        require_file(args.report)
    agent = load_agent(args)
    placement = str(getattr(agent.backend, "placement", ""))
    if placement:
        console.line(f"model   {agent.backend.name} on {placement}", "dim", level=1)
    return agent


def show_answer(answer: Answer, console: Console, *, as_json: bool = False) -> None:
    """Print an answer on stdout, and its cost and failure on the console; `as_json`: the whole trace instead."""
    record = answer.record
    if as_json:
        print(answer.trace.model_dump_json(indent=1))
    elif answer.text:
        print("\n".join(printable(line) for line in answer.text.splitlines()), flush=True)
    if record.error:
        console.error(f"The model failed: {printable(record.error)}")
    elif not answer.text:
        console.error("There is no answer.")
    console.line(summary(record), "dim" if answer.status == "answered" else "yellow")


def keep(answer: Answer, console: Console, args: argparse.Namespace) -> None:
    """Write the folder and the page that the flags --save and --report name."""
    if args.save:
        console.line(f"saved   {answer.save(args.save)}")
    if args.report:
        console.line(f"report  {answer.report(args.report)}")


def add_chat_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = (
        "Answer questions about one image, one after another, until an empty line. Exit code 0: the last "
        "question was answered, 2: wrong usage, 3: a budget ended it, 4: the model failed."
    )
    flags.add_argument("image", help="path of an image, FILE.pdf#page=N, or a data URI")
    flags.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        help="show the model the earlier questions and answers with each question (default: as its format says)",
    )
    add_output_flags(flags)
    add_agent_flags(flags)


def run_chat(args: argparse.Namespace) -> int:
    """Run `qzoom chat` and return the exit code that the status of the last question stands for."""
    console = Console(verbosity=args.verbose - args.quiet)

    from qzoom_agent.images import load_image

    if args.image == "-":
        raise ConfigError("stdin has the questions, so the image cannot be read from it. Give a path.")
    image = load_image(args.image, max_pixels=read_config(args).max_pixels)
    agent = prepare(args, console)
    with agent.chat(image, history=args.history) as chat:
        try:
            for question in _questions():
                try:
                    events = chat.stream(question)
                except ConfigError as error:
                    console.error(str(error))
                    continue
                answer = follow(events, console, [image.width * image.height])
                show_answer(answer, console, as_json=args.json)
        finally:  # also after Ctrl-C
            if chat.answer is not None:
                keep(chat.answer, console, args)
        return OK if chat.answer is None else EXIT_CODES[chat.answer.status]


def _questions() -> Iterator[str]:
    """Yield lines until an empty one, or the end of the input."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().lstrip("\ufeff").strip()  # a file of Windows begins with a byte order mark
        if not line:
            return
        yield line


def add_trace_flags(flags: argparse.ArgumentParser) -> None:
    flags.description = "Look at a saved run."
    verbs = flags.add_subparsers(dest="verb", required=True, metavar="show|report")
    show = verbs.add_parser("show", help="print the steps")
    show.add_argument("run", metavar="DIR", help="folder that --save wrote")
    show.add_argument("-v", "--verbose", action="store_true", help="show what the model wrote")
    report = verbs.add_parser("report", help="write one HTML page that shows where the model looked")
    report.add_argument("run", metavar="DIR", help="folder that --save wrote")
    report.add_argument("--out", metavar="FILE", help="file to write (default: DIR/report.html)")
    report.add_argument("--expected", metavar="TEXT", help="the right answer, shown beside the model's")


def run_trace(args: argparse.Namespace) -> int:
    """Run `qzoom trace`. Raises TraceError if the folder holds no trace."""
    from qzoom_agent.trace import Trace, saved_images

    trace = Trace.load(args.run)
    if args.verb == "report":
        from qzoom_agent.report.episode import write_report

        folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
        out = folder / "report.html" if args.out is None else require_file(args.out)
        written = write_report(trace, saved_images(folder), out, expected=args.expected)
        if not is_stream(written):
            print(written)
        return OK
    # The steps are the result here, so they go to stdout.
    console = Console(verbosity=int(args.verbose), stream=sys.stdout)
    console.line(f"{trace.model}, protocol {trace.protocol}, policy {trace.policy}, seed {trace.seed}", "dim")
    for record in trace.questions:
        console.line(printable(record.question), "bold")
        replay(trace, record, console)
        console.line(f"answer {printable(record.answer)}" if record.answer else "no answer", "bold")
        if record.error:
            console.line(f"error: {printable(record.error)}", "red")
        console.line(summary(record), "dim")
    return OK


# -- steps -----------------------------------------------------------------------------------------------------------


def follow(events: Iterable[Event], console: Console, areas: Sequence[int]) -> Answer:
    """Show each event of a run and return the answer; `areas` are the pixels of each original image."""
    from qzoom_agent.trace import CallRecord, PerceptionRecord, Turn
    from qzoom_agent.views import View

    steps = _Steps(console, areas)
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
            steps.call(CallRecord(**event.data))
        elif event.kind == "answer":
            answer = event.answer
    assert answer is not None, "a run always ends with an answer event"
    return answer


def replay(trace: Trace, record: QuestionRecord, console: Console) -> None:
    """Show the steps of one question of a trace."""
    steps = _Steps(console, [view.size.area for view in trace.all_views if view.kind == "original"] or [1])
    calls = {call.result for turn in record.turns for call in turn.calls}
    unasked = [view for view in record.views if view.tokens and view.id not in calls]
    for view in (one for one in unasked if one.kind == "coarse"):
        steps.view(view, None)
    for look in record.looks:
        steps.look(look)
    for view in (one for one in unasked if one.kind != "coarse"):
        steps.view(view, None)
    for turn in record.turns:
        steps.turn(turn)
        for call in turn.calls:
            steps.call(call)
            result = trace.view(call.result) if call.result else None
            if result:
                steps.view(result, turn.seconds + turn.act_seconds)


def summary(record: QuestionRecord) -> str:
    """Return the outcome of a question and its cost, on one line."""
    usage = record.usage
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
    return f"{record.status}: {', '.join(parts)}"


class _Steps:
    """Views, turns and calls as lines."""

    def __init__(self, console: Console, areas: Sequence[int]) -> None:
        self.console = console
        self.areas = areas
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
        share = view.region.area / self.areas[view.image]
        verb, image = "zoom" if call else "show", f"image {view.image + 1}" if len(self.areas) > 1 else "image"
        cost = f"{percent(share, 1)} of {image} +{view.tokens} visual tokens{took}"
        self.console.line(f"{verb} {_quad(view.box)} {cost}", "cyan")
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


# -- --approve ---------------------------------------------------------------------------------------------------------

_HOW: Final = "run it? y, or n, or another box (x1,y1,x2,y2 in pixels of the image), or the reason to refuse it"
_BOX: Final = re.compile(r"[\[(]?" + r"[,\s]+".join([r"\s*(-?[\d.]{1,12})"] * 4) + r"\s*[\])]?")


def ask_at_terminal(console: Console, *sizes: tuple[int, int]) -> Callable[[PendingCall], Decision]:
    """Return a function that asks a person about a call; `sizes` are those of the images in pixels."""
    from qzoom_agent.approval import read_decision
    from qzoom_agent.geometry import Size

    def decide(call: PendingCall) -> Decision:
        for line in describe(call, sizes[call.image]):
            console.line(line, "bold", level=console.verbosity)
        while True:
            console.line(_HOW, level=console.verbosity)
            written = sys.stdin.readline()
            if not written:
                raise ConfigError(
                    "Nobody decided on the call: stdin has ended. Run `qzoom ask --approve` at a terminal."
                )
            decision = read_line(written, movable=call.box is not None)
            if decision is None:
                continue
            try:
                read_decision(decision, call, Size(*sizes[call.image]))
            except ConfigError as error:
                console.error(str(error))
            else:
                return decision

    return decide


def describe(call: PendingCall, size: tuple[int, int]) -> list[str]:
    """Return the lines that show a call to a person."""
    label = f' "{printable(call.label)[:120]}"' if call.label else ""
    if call.box is None:
        return [f"call {printable(call.name)} {printable(call.arguments or '')[:400]}"]
    x1, y1, x2, y2 = call.box
    share = (x2 - x1) * (y2 - y1) / (size[0] * size[1])
    whole = f"{f'image {call.image + 1}, ' if call.image else ''}{size[0]}x{size[1]} px"
    head = f"call {printable(call.name)}{label} [{x1:.0f},{y1:.0f},{x2:.0f},{y2:.0f}] of {whole}"
    cost = f", {percent(share, 1)} of image, +{call.tokens} visual tokens"
    return [head + cost, *(f"     {printable(note)}" for note in call.notes)]


def read_line(written: str, *, movable: bool) -> Decision | None:
    """Return the decision that a person wrote; None for an empty line, and for a box where none can be moved."""
    text = written.strip()
    box = _BOX.fullmatch(text)
    if box:
        try:
            return [float(side) for side in box.groups()] if movable else None
        except ValueError:  # such as 1.2.3
            return None
    if text.lower() in ("y", "yes"):
        return True
    if text.lower() in ("n", "no"):
        return False
    return text or None
