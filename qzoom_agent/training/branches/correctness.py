"""Whether what a model says about a record is right, by the scorers of evaluation and by all that the record accepts.

On generated boards a reply is right if it is the answer and nothing else. On other data the final answer of the reply
has to be an accepted one, or to hold it as whole words early on: models that were asked for a short answer still say
"The date is January 5." now and then. Free-form data may have a judge, who is asked about what those rules refuse, with
one accepted answer after another until one is found to say the same.
"""

from typing import Final

from qzoom_agent.data.samples import Sample
from qzoom_agent.evaluation.scorers import ocrbench
from qzoom_agent.evaluation.scorers.judge import Judge, judged
from qzoom_agent.evaluation.tasks.needle.tasks import exact
from qzoom_agent.training.branches.dataset import Record

_NOBODY: Final = Judge()
"""A judge without a server, who goes by the rule."""


def is_right(said: str | None, record: Record, judge: Judge = _NOBODY) -> bool:
    """Whether `said` (None: nothing came) is right. Raises BackendError if a judge does not answer."""
    question = Sample(
        id=record["id"],
        task="branches",
        kind=record["mode"],
        image=record["image"],
        question=record["question"],
        answer=record["answer"],
        answers=tuple(record["answers"]),
    )
    scorers = (exact,) if record["exact"] else (ocrbench.clean, judged(judge))
    return any(score(said, question).value for score in scorers)
