"""Branches on the Hugging Face hub: gate and SD-RPN with their settings and a model card, without the base.

A repository holds the files of a branch folder and nothing else that is read:

    branches.json, branches.safetensors                    the branches
    further/branches.json, further/branches.safetensors    those of further looks, if there are any
    README.md                                              the card

Only these names are fetched, so nothing that could run code, such as a pickle, ever is, and sizes are checked before.
Tokens, cache and offline mode are those of huggingface_hub (`hf auth login`, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from shutil import copy2
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from qzoom_agent.errors import BackendError, ConfigError
from qzoom_agent.files import expanded
from qzoom_agent.perception.branch_config import CONFIG, FURTHER, SUBFOLDER, WEIGHTS, BranchConfig, branch_folder

_ID: Final = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_FILES: Final = tuple(f"{part}{name}" for part in ("", f"{FURTHER}/") for name in (CONFIG, WEIGHTS))
_TRANSPORT: Final = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""The base of all errors of the hub's HTTP client, which is httpx or httpx2."""
_MOST: Final = {CONFIG: 2**20, WEIGHTS: 2**33}
"""Most bytes of a file that is fetched."""


@dataclass(frozen=True)
class BranchCard:
    """Facts for the model card that are not in the branches themselves."""

    base: str
    """Hub id of the base that they were trained with, or its name if it has none."""
    labels: str = ""
    """Where the labels came from: data, heads, number of questions."""
    results: Sequence[EvalResult] = ()
    """Scores, as `qzoom eval export --to hf` writes them."""
    license: str | None = None
    """Identifier of the licence, such as apache-2.0."""


def local_branches(source: Path | str, *, token: str | None = None) -> Path:
    """Return the folder of branches: `source` itself, or that of a hub id (`user/name`, `user/name@revision`), fetched.

    Raises:
        ConfigError: It is neither.
        BackendError: There is no such repository, the hub refuses, or it holds no branches.
    """
    if (folder := expanded(source)).is_dir():
        return folder
    given = _ID.fullmatch(str(source))
    if given is None:
        raise ConfigError(
            f"There is no folder {source}. Give branches as a folder that `qzoom train` or `qzoom convert` wrote, or "
            "as a hub id (user/name)."
        )
    return fetch_branches(given["repo"], given["revision"], token=token, looked=f"There is no folder {source}. ")


def push_branches(
    folder: Path | str,
    repo_id: str,
    card: BranchCard,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Branches (gate and SD-RPN)",
    token: str | None = None,
) -> str:
    """Upload the branches in a folder with a model card, in one commit, and return its address.

    Args:
        folder: Branches, as `Branches.save` writes them.
        repo_id: Repository, `user/name` or `name`; created if it is not there.
        card: Facts for the card, which replaces the repository's README.md.
        private: Visibility of a new repository; None: the account's default.
        revision: Branch of the repository, created if it is not there; None: main.
        message: Title of the commit.
        token: Token with write access; None: the one that is logged in.

    Raises:
        BackendError: The folder holds no branches, or the hub refuses.
    """
    folder = branch_folder(folder)
    render_card(folder, repo_id, card)  # what cannot be described makes no repository
    api = HfApi(token=token)
    with TemporaryDirectory() as staging, explained(repo_id, revision):
        for name in _FILES:
            if (folder / name).is_file():
                (Path(staging) / name).parent.mkdir(exist_ok=True)
                copy2(folder / name, Path(staging) / name)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name
        (Path(staging) / "README.md").write_text(render_card(folder, repo_id, card), encoding="utf-8")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=staging,
            revision=revision,
            commit_message=message,
            delete_patterns=f"{FURTHER}/*",  # those of earlier branches
        )
    return str(done.commit_url)


def render_card(folder: Path, repo_id: str, card: BranchCard) -> str:
    """Return the model card of the branches in a folder. Raises BackendError if there are none."""
    config, parts = _checked(folder)
    further = _checked(folder / FURTHER)[0] if (folder / FURTHER / CONFIG).is_file() else None
    data = ModelCardData(
        base_model=card.base if _ID.fullmatch(card.base) else None,
        base_model_relation="adapter" if _ID.fullmatch(card.base) else None,
        eval_results=list(card.results) or None,
        library_name="qzoom-agent",
        license=card.license,
        model_name=repo_id.split("/")[-1],
        pipeline_tag="image-text-to-text",
        tags=["qzoom-agent", "gate", "region-proposal"],
    )
    template = str(files("qzoom_agent.perception") / "branch_card.md.jinja")
    about: dict[str, Any] = {"card": card, "config": config, "parts": parts, "further": further}
    return str(ModelCard.from_template(data, template_path=template, share=_share, repo_id=repo_id, **about))


def _checked(folder: Path) -> tuple[BranchConfig, list[str]]:
    """Return the settings of a branch file and the parts that its weights hold. Raises BackendError."""
    try:
        config = BranchConfig.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            parts = sorted({name.split(".")[0] for name in stored.keys()})  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise BackendError(
            f"There are no branches in {folder}: {error}. Give the folder that `qzoom train` or `qzoom convert` wrote."
        ) from error
    return config, parts


def fetch_branches(repo: str, revision: str | None = None, *, token: str | None = None, looked: str = "") -> Path:
    """Return the folder of the cache that holds the branches of a repository.

    Args:
        repo: Repository, `user/name`.
        revision: Branch, tag or commit; None: main.
        token: None: the one that is logged in.
        looked: Sentence for errors on where else they were looked for.

    Raises:
        BackendError: There is no such repository, the hub refuses, or it holds no branches.
    """
    with explained(repo, revision, looked):
        try:
            info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True)
        except HfHubHTTPError:
            raise
        except (OfflineModeIsEnabled, _TRANSPORT):  # not reached: what is in the cache will do
            wanted = [f"{inside}{name}" for inside in ("", f"{SUBFOLDER}/") for name in _FILES]
        else:
            wanted = _wanted(repo, {file.rfilename: file.size for file in info.siblings or ()})
        return branch_folder(snapshot_download(repo, revision=revision, allow_patterns=wanted, token=token))


def _wanted(repo: str, sizes: Mapping[str, int | None]) -> list[str]:
    """Return the files to fetch of a repository with files of these sizes. Raises BackendError."""
    inside = f"{SUBFOLDER}/" if f"{SUBFOLDER}/{CONFIG}" in sizes else ""
    wanted = [f"{inside}{name}" for name in _FILES if f"{inside}{name}" in sizes]
    if not {f"{inside}{CONFIG}", f"{inside}{WEIGHTS}"} <= set(wanted):
        model = " It holds a model: name it as the model." if "config.json" in sizes else ""
        raise BackendError(
            f"'{repo}' holds no branches: it lacks {CONFIG} or {WEIGHTS}.{model} Give a repository that `qzoom push` "
            "wrote."
        )
    for name in wanted:
        size, most = sizes[name], _MOST[name.rpartition("/")[2]]
        if size is None or size > most:
            raise BackendError(
                f"{name} of '{repo}' has {'an unknown number of' if size is None else f'{size:,}'} bytes; branches "
                f"have at most {most:,}. It was not fetched."
            )
    return wanted


@contextmanager
def explained(repo: str, revision: str | None, looked: str = "") -> Iterator[None]:
    """Turn errors of the hub, and of the disk its files are kept on, into one sentence each."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise BackendError(f"The repository '{repo}' has no revision '{revision}'. Check the part after @.") from error
    except GatedRepoError as error:
        raise BackendError(f"'{repo}' asks for consent first: accept its terms on the hub, and log in.") from error
    except RepositoryNotFoundError as error:
        raise BackendError(
            f"{looked}There is no repository '{repo}' on the hub that you may read or write. Check the name; for a "
            "private one run `hf auth login`, or set HF_TOKEN."
        ) from error
    except LocalEntryNotFoundError as error:
        raise BackendError(
            f"{looked}'{repo}' is not in the hub's cache, and the hub cannot be reached: check the network and "
            "HF_HUB_OFFLINE."
        ) from error
    except OfflineModeIsEnabled as error:
        raise BackendError(f"The hub cannot be asked about '{repo}': HF_HUB_OFFLINE is set. Unset it.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no")
        hint = "Log in with `hf auth login`, or set HF_TOKEN." if status in (401, 403) else "Try again later."
        raise BackendError(f"The hub answered status {status} about '{repo}'. {hint}") from error
    except _TRANSPORT as error:
        raise BackendError(f"The hub cannot be reached for '{repo}': {error}. Check the network.") from error
    except OSError as error:
        raise BackendError(
            f"The files of '{repo}' cannot be kept here: {error}. Check HF_HOME and the space."
        ) from error
    except ValueError as error:  # such as a name that the hub does not allow
        raise ConfigError(f"'{repo}' cannot be used: {str(error).splitlines()[0]}") from error


def _share(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if isinstance(value, int | float) and 0 <= value <= 1 else str(value)
