"""Rules that compare an answer with the right one; see `qzoom_agent.data.answers`, where they are."""

from qzoom_agent.data.answers import exact_match as exact_match
from qzoom_agent.data.answers import matching as matching
from qzoom_agent.data.answers import normalise as normalise
from qzoom_agent.data.answers import number as number
