"""Public names of the rules that compare an answer with the right one, which are in `qzoom_agent.data.answers`."""

from qzoom_agent.data.answers import exact_match as exact_match
from qzoom_agent.data.answers import matching as matching
from qzoom_agent.data.answers import normalise as normalise
from qzoom_agent.data.answers import number as number
