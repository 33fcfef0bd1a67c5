"""`trl.push_to_hub` of a recipe: whether the hub can be written to shows first, and a failed upload loses no model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments

from qzoom_agent.errors import QzoomError
from qzoom_agent.perception.hub import explained
from qzoom_agent.training.branches.sharded_table import together


def create_repository(args: TrainingArguments) -> None:
    """Create the repository that a run pushes to, unless it is there.

    Raises:
        BackendError, ConfigError: The hub cannot be reached, or refuses; the message says what to do.
    """
    if not together().is_main_process:
        return
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    with _told(
        name, after=f"Or leave push_to_hub out of `trl`, and run `hf upload {name} {args.output_dir}/final` later."
    ):
        HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True)


def upload(trainer: Trainer, final: Path) -> None:
    """Upload a run whose model is written already, with a model card. All processes have to call this.

    Raises:
        BackendError, ConfigError: The hub cannot be reached, or refuses; the message says where the model is.
    """
    name = str(trainer.hub_model_id)
    with _told(
        name,
        before=f"The trained model is in {final}, but it was not uploaded.",
        after=f"Then run `hf upload {name} {final}`.",
    ):
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


@contextmanager
def _told(
    repository: str, *, before: str = "The recipe uploads its model (trl.push_to_hub), and that would fail.", after: str
) -> Iterator[None]:
    """Put a sentence before and after errors of the hub."""
    try:
        with explained(repository, None):
            yield
    except QzoomError as error:
        raise type(error)(f"{before} {error} {after}") from error
