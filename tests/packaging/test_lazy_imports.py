"""`import qzoom_agent` loads little, and its public names are the real ones."""

import subprocess
import sys

import pytest

import qzoom_agent

HEAVY = ("torch", "transformers", "langgraph", "langchain_core", "trl", "datasets", "matplotlib", "rich")


def loaded_by(code: str) -> set[str]:
    """Top-level modules in sys.modules after running `code`."""
    script = f"{code}\nimport sys; print(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import qzoom_agent; qzoom_agent.__version__; dir(qzoom_agent)") & {*HEAVY, "PIL", "pydantic"}


def test_light_names_stay_light() -> None:
    assert not loaded_by("from qzoom_agent import AgentConfig, Box, Trace, load_image") & set(HEAVY)


def test_the_agent_loads_the_graph_but_no_model_library() -> None:
    modules = loaded_by("from qzoom_agent import Agent")
    assert "langgraph" in modules
    assert not modules & {"torch", "transformers", "trl"}


def test_every_public_name_is_there_and_others_are_not() -> None:
    for name in qzoom_agent.__all__:
        assert getattr(qzoom_agent, name) is not None
    assert set(qzoom_agent.__all__) <= set(dir(qzoom_agent))
    with pytest.raises(AttributeError, match="no attribute 'Agnet'"):
        _ = qzoom_agent.Agnet
