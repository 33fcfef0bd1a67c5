"""Crops that the branches spoke against, in episodes whose calls nobody reviewed.

Under `hybrid` the review refuses them, and the model may insist. Under a policy that serves every call they can still
be told from the trace, if somebody looked: each call is put to the same review as if it was the first to be refused.
"""

from __future__ import annotations

from qzoom_agent.config import AgentConfig
from qzoom_agent.review import OPINIONS, ReviewContext, judge, refused_on_opinion
from qzoom_agent.trace import Trace
from qzoom_agent.views import View
from qzoom_agent.zoom.zoom import ZoomPlan


def unwanted(trace: Trace) -> set[str]:
    """Ids of the crops that the model was served, and gate or SD-RPN would have had it refused; none without a look."""
    look, config = trace.perception, AgentConfig().replace(**trace.config)
    if look is None:
        return set()
    asked = {call.result for turn in trace.turns for call in turn.calls}
    views = {view.id: view for view in trace.views}
    shown = [view for view in trace.views if view.kind != "original" and view.id not in asked]
    found: set[str] = set()
    for at, turn in enumerate(trace.turns):
        case = ReviewContext(
            look=look,
            refused_turns=refused_on_opinion([earlier.calls for earlier in trace.turns[:at]]),
            crops_read=sum(view.kind == "crop" for view in shown),
            image=trace.views[0].size,
            replan=lambda box: ZoomPlan("original", error="It is judged, not cut."),
            name=str,
            write=str,
        )
        for crop in (views[call.result] for call in turn.calls if call.result is not None):
            if _spoken_against(crop, shown, case, config):
                found.add(crop.id)
            shown.append(crop)
    return found


def _spoken_against(crop: View, shown: list[View], case: ReviewContext, config: AgentConfig) -> bool:
    plan = ZoomPlan("original", box=crop.region, size=crop.size, tokens=crop.tokens)
    verdict = judge(shown, plan, case, config.review, map_decides=config.perception.gate == "statistics")
    return verdict.code in OPINIONS and verdict.plan is None
