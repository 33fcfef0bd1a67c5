"""The recipe of `qzoom train coldstart`: where calls come from, which episodes are kept, and how they are learned."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from qzoom_agent.config import BudgetConfig, GenerationConfig, PerceptionConfig
from qzoom_agent.training.branches.branch_recipe import Optimisation
from qzoom_agent.training.branches.dataset import DatasetSpec
from qzoom_agent.training.branches.fitting import NOT_DECISIVE
from qzoom_agent.training.recipe_io import LoraSection, Section, read_recipe
from qzoom_agent.training.rewards import Rule
from qzoom_agent.training.trained_model import ModelRecipe


class TeacherServer(Section):
    """A larger model behind an OpenAI-compatible API, asked in the student's own format."""

    url: str
    """Base URL, such as http://localhost:8000/v1."""
    model: str = "default"
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; servers of your own need none."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds to wait for one turn."""


class Lora(LoraSection):
    """Low-rank adapters instead of all weights, merged into the base at the end."""

    target_modules: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Modules of every decoder layer that is trained; the vision encoder gets none."""


class ColdStartRecipe(ModelRecipe):
    """Demonstrations in the format of `protocol`, and fine-tuning on them."""

    stored = "train.json"
    dtype: str = "auto"
    seed: int = Field(default=0, ge=0)
    data: list[DatasetSpec] = Field(min_length=1)
    """Questions to demonstrate."""
    records: int | None = Field(default=None, gt=0)
    """Number of them; None: all."""
    boxes: Literal["oracle", "sdrpn", "teacher"] = "oracle"
    """Calls: at the gold boxes of the records, where gate and SD-RPN would look, or a teacher's own."""
    answer: Literal["gold", "own"] = "gold"
    """Answers after the calls: the dataset's, or the base's own, of which wrong ones are left out."""
    rule: Rule = "exact"
    """Rule that finds the answer in a reply; wrong ones are not learned. `exact` is for replies of nothing else."""
    margin: float = Field(default=0.35, ge=0, le=10)
    """Margin of a call around a gold box on every side, as a share of its longer side."""
    needed: float = Field(default=0.95, ge=0, le=1)
    """Share of every gold box that the crops of an episode have to show to support the answer."""
    redundant: bool = False
    """Keep episodes with a crop that adds nothing."""
    needless: bool = False
    """Zoom where no box is needed as well, at the place that SD-RPN finds most likely. This teaches a model to zoom too
    often, like models that were rewarded for every zoom, to measure what a review saves. Goes with `redundant`."""
    hybrid: float = Field(default=0.0, ge=0, le=1)
    """Share of the episodes that run under the policy `hybrid`, where the base has branches: crops that are inserted
    already are not asked for, and needless calls are refused. So the model knows these situations."""
    budget: BudgetConfig = BudgetConfig()
    """Views and turns of a demonstration: those of inference."""
    generation: GenerationConfig = GenerationConfig()
    """Decoding of the base or the teacher."""
    perception: PerceptionConfig = PerceptionConfig()
    """Reading of the map for `boxes: sdrpn`."""
    teacher: TeacherServer | None = None
    optimisation: Optimisation = Optimisation(learning_rate=1e-5, per_device_train_batch_size=4)
    lora: Lora | None = None
    """None: train the weights themselves."""

    def decisive(self) -> dict[str, JsonValue]:
        return self.model_dump(mode="json", exclude={"optimisation": NOT_DECISIVE})

    @property
    def sources(self) -> list[DatasetSpec]:
        return self.data

    def begun(self, output: Path) -> Path:
        return output / "train"

    @model_validator(mode="after")
    def _teacher_given(self) -> "ColdStartRecipe":
        if (self.boxes == "teacher") != (self.teacher is not None):
            raise ValueError("`boxes: teacher` needs a `teacher` with its url, and no other `boxes` has one")
        if self.needless and (self.boxes != "oracle" or not self.redundant):
            raise ValueError("`needless` adds calls to `boxes: oracle`, and they are kept only with `redundant: true`")
        if self.hybrid and self.boxes != "oracle":
            raise ValueError("`hybrid` leaves out what is shown already, which only `boxes: oracle` can tell")
        return self


def load_coldstart_recipe(path: Path, **changes: Any) -> ColdStartRecipe:
    """Read a recipe; see `read_recipe`."""
    return read_recipe(path, ColdStartRecipe, **changes)
