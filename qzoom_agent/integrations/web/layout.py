"""The components of the page of `qzoom web`, and the settings that a visitor may change.

What happens when a visitor uses them: `handlers.py`.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, Final, get_args

import gradio as gr
from markupsafe import Markup

from qzoom_agent.agent import Agent
from qzoom_agent.errors import ConfigError
from qzoom_agent.integrations.limits import CEILINGS, ServedPolicy, WebConfig
from qzoom_agent.models.presets import PRESETS
from qzoom_agent.policy import LOOK_FIRST
from qzoom_agent.report.page import legible

DEMO: Final = Path(str(resources.files("qzoom_agent.data") / "demo"))
"""Folder of the example pictures."""
_POLICIES: Final = {
    "direct": "no crops",
    "implicit": "crops that the branches propose",
    "explicit": "crops that the model asks for",
    "hybrid": "both, and each request is reviewed",
    "locate": "the box that the model names first",
    "always": "proposed crops, without asking the gate",
}
"""Each policy that a visitor may choose, in a few words."""
assert set(_POLICIES) == set(get_args(ServedPolicy))


class Layout:
    """The components: left what a visitor gives, right what comes out; on a phone one below the other."""

    def __init__(self, agent: Agent, config: WebConfig) -> None:
        self.examples: list[dict[str, Any]] = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))
        with gr.Blocks(title="qzoom", analytics_enabled=False, delete_cache=(600, 3600)) as self.blocks:
            gr.HTML(
                "<h1>qzoom</h1><p>A vision-language model that looks twice: at the whole picture, small, "
                "then at the regions that matter, in full resolution.</p>",
                elem_id="qz-head",
            )
            with gr.Row(elem_id="qz-columns"):
                with gr.Column(scale=5, min_width=320, elem_id="qz-ask"):
                    self._build_question(agent, config)
                with gr.Column(scale=7, min_width=320, elem_id="qz-result"):
                    self._build_result()

    def _build_question(self, agent: Agent, config: WebConfig) -> None:
        self.picture = gr.Image(label="Picture", sources=["upload", "clipboard"], height=220, buttons=[])
        _give_files(self.picture)
        self.question = gr.Textbox(label="Question", placeholder="What is the total?", max_lines=4)
        self.ask = gr.Button("Ask", variant="primary")
        gr.HTML("<p class=qz-facts>Or try an example:</p>")
        with gr.Row(elem_id="qz-examples"):
            self.pictured = [
                gr.Button(row["question"], icon=str(DEMO / row["image"]), min_width=80, elem_classes="qz-example")
                for row in self.examples
            ]
        with gr.Accordion("Policy and budget", open=False):
            budget = agent.config.budget
            self.policy = gr.Dropdown(policies(agent), value=agent.config.policy, label="Policy")
            self.asks = gr.Checkbox(label="Ask me before each zoom", info="For policies that let the model ask.")
            most = CEILINGS["budget.max_views"] - 1
            zooms = min(budget.max_views - 1, most)
            self.zooms = gr.Slider(0, most, zooms, step=1, label="Most zooms", buttons=[])
            with gr.Row():
                self.visual = gr.Number(
                    budget.max_visual_tokens or 0, label="Most visual tokens", info="0: no limit.", precision=0,
                    minimum=0, maximum=CEILINGS["budget.max_visual_tokens"], min_width=120,
                )  # fmt: skip
                self.coarse = gr.Number(
                    0, label="Of these, in the first look", info="0: the model's own.", precision=0,
                    minimum=0, maximum=CEILINGS["budget.coarse_tokens"], min_width=120,
                )  # fmt: skip
        if config.choose_model:
            with gr.Accordion("Model", open=False):
                self.model = gr.Dropdown(
                    list(PRESETS), value="nano", label="Model", allow_custom_value=True,
                    info="A preset, a hub id, or the server's name of the model.",
                )  # fmt: skip
                self.server = gr.Textbox(
                    label="Server", placeholder="http://localhost:8000/v1", info="Empty: run the model on this machine."
                )
                self.secret = gr.Textbox(label="Key of the server", type="password")
                self.use = gr.Button("Use this model")
        self.about = gr.HTML(about(agent))

    def _build_result(self) -> None:
        hint = "Click an example, or give a picture and ask about it."
        self.card = gr.HTML(f'<section class="qz-card empty"><p>{hint}</p></section>')
        self.shown = gr.Image(
            label="Where the model looked", interactive=False, visible=False, format="jpeg", elem_id="qz-shown",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
        with gr.Column(visible=False, elem_id="qz-approval") as self.panel:
            self.call = gr.HTML()
            with gr.Row():
                self.approve = gr.Button("Approve", variant="primary", min_width=90)
                self.move = gr.Button("Use my box", min_width=90)
                self.refuse = gr.Button("Refuse", min_width=90)
            with gr.Row():
                self.box = gr.Textbox(
                    label="Box", info="Tap two opposite corners in the picture, or change the numbers.", max_lines=1
                )
                self.reason = gr.Textbox(
                    label="Reason to refuse", info="The model reads it.", placeholder="optional", max_lines=1
                )
        with gr.Row(visible=False, elem_id="qz-tools") as self.tools:
            self.heat = gr.Slider(0, 100, 55, step=1, label="Heat map, %", min_width=240, scale=3, buttons=[])
            self.look = gr.Button("Show a heat map", size="sm", min_width=140, scale=2)
            self.report = gr.DownloadButton("Download the report", size="sm", min_width=140, scale=2)
        with gr.Row(visible=False, elem_id="qz-further") as self.further_row:
            self.further = gr.Textbox(
                placeholder="Ask another question about this picture", show_label=False, container=False, scale=5,
                min_width=160, max_lines=4,
            )  # fmt: skip
            self.ask_further = gr.Button("Ask", min_width=70, scale=1)
        self.crops = gr.HTML()
        with gr.Accordion("Steps", open=True, visible=False) as self.steps_fold:
            self.steps = gr.HTML()


def _give_files(picture: Any) -> None:
    """Let a component give the path of an uploaded file, which `load_image` checks and reads, and fetch nothing.

    gradio itself would decode the file before any check of ours, and download an address. (A subclass could not do
    this: gradio writes a stub beside the file of each.)
    """
    move = picture.async_move_resource_to_block_cache

    async def move_file(source: Any) -> Any:
        if str(source).startswith(("http://", "https://")):
            raise gr.Error("This page fetches no addresses. Upload the picture.")
        return await move(source)

    picture.preprocess = lambda payload: payload and payload.path
    picture.async_move_resource_to_block_cache = move_file


def about(agent: Agent) -> str:
    """Return a line on the model, as HTML."""
    line = Markup("<p class=qz-facts>Model: <b>{}</b>, policy {} unless you choose another.</p>")
    return str(line.format(legible(agent.backend.name), agent.config.policy))


def policies(agent: Agent) -> list[tuple[str, str]]:
    """Return the policies that an agent can run, each as a label and its name.

    Raises:
        ConfigError: The agent's own policy is none that a visitor may choose.
    """
    if agent.config.policy not in _POLICIES:
        raise ConfigError(
            f"The policy '{agent.config.policy}' is for measurements, and no page has known boxes. Choose another: "
            f"{', '.join(_POLICIES)}."
        )
    return [
        (f"{name}: {words}", name) for name, words in _POLICIES.items() if agent.perceives or name not in LOOK_FIRST
    ]


def changes(config: WebConfig, *, policy: str, zooms: int, visual: int, coarse: int) -> dict[str, Any]:
    """Return what a visitor changes of the configuration, by dotted key, within the limits.

    Args:
        zooms: Most crops.
        visual: Most visual tokens of all views; 0: no limit.
        coarse: Most visual tokens of the coarse view; 0: the model's own.
    """
    asked = {"budget.max_views": zooms + 1, "budget.max_visual_tokens": visual, "budget.coarse_tokens": coarse}
    within: dict[str, int | None] = {key: min(value, int(CEILINGS[key])) for key, value in asked.items() if value}
    if visual == 0:  # also where the page was started with a limit
        within["budget.max_visual_tokens"] = None
    return {"policy": policy, "budget.max_seconds": config.timeout, **within}
