"""A run folder on the Hub: weights, configuration, card, curves and record, in one commit."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

import timm_xformers
from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import find_damage
from timm_xformers.publishing.card import LICENSE, Card, write_card
from timm_xformers.publishing.finished_run import (
    WEIGHTS_FILE,
    FinishedRun,
    open_finished,
    public_settings,
)
from timm_xformers.publishing.hub import Repository
from timm_xformers.records.run_folder import RunFolder
from timm_xformers.training.build import build_model

__all__ = ["publish"]


def publish(
    root: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    dry_run: bool = False,
    api: HfApi | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Bring a run to the Hub; what is there already is left as it is.

    Args:
        root: Folder of a finished run.
        repo_id: OWNER/NAME.
        private: Whether a new repository is its owner's alone; None takes the owner's default.
        dry_run: Say what would be sent, and send nothing.
        api: The client; None makes one from the environment.
        say: Takes lines for the user.

    Raises:
        UserError: The run or the Hub does not play along.
    """
    _check_name(repo_id)
    run = open_finished(root)
    with tempfile.TemporaryDirectory() as scratch:
        files = _stage(run, repo_id, Path(scratch))
        for name, path in files.items():
            say(f"{path.stat().st_size:>12,}  {name}")
        if dry_run:
            say(f"\n{files['README.md'].read_text(encoding='utf-8')}")
            say(f"Nothing was sent; without --dry-run these files go to {repo_id}.")
            return
        api = api or HfApi(library_name="timm-xformers", library_version=timm_xformers.__version__)
        if not (api.token or get_token()):
            raise UserError(
                "There is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN."
            )
        repository = Repository(api, repo_id)
        repository.create(private)
        commit, sent = repository.push(files, _message(run))
        repository.verify(files, commit)
    done = "is there" if sent else "was there already, nothing was sent"
    say(f"{api.endpoint}/{repo_id} {done}, and comes back as it was sent (commit {commit[:12]}).")
    say(f'Load it with timm.create_model("hf-hub:{repo_id}", pretrained=True).')


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        owner, _, name = repo_id.partition("/")
        if not (owner and name):
            raise HFValidationError("it has no owner")
    except HFValidationError:
        raise UsageError(
            f"{repo_id!r} is no name on the Hub; use OWNER/NAME of letters, digits, '-', '_' and "
            "'.', up to 96 characters."
        ) from None


def _stage(run: FinishedRun, repo_id: str, folder: Path) -> dict[str, Path]:
    """Copy what is published, so that nothing changes between two tries.

    Returns:
        Files by path in the repository.
    """
    best = folder / "best"
    shutil.copytree(run.folder.best, best)
    damage = find_damage(best)  # the copy is what is sent
    if damage is not None:
        raise UserError(f"{run.folder.best} changed while it was read ({damage}); try again.")
    files = {WEIGHTS_FILE: best / WEIGHTS_FILE}

    def add(name: str, text: str) -> None:
        files[name] = folder / name
        files[name].write_text(text, encoding="utf-8", newline="")

    model, _ = build_model(f"local-dir:{best}")
    add("config.json", _config(run))
    add("README.md", write_card(_card(run, repo_id, getattr(model, "attn_layer", ""))))
    add("recipe.yaml", yaml.safe_dump(public_settings(run.recipe), sort_keys=False))
    add("results.json", json.dumps(dataclasses.asdict(run.record), indent=2) + "\n")
    source: RunFolder = run.folder
    for path in (source.history, source.curves, source.confusion, source.per_class):
        if path.is_file():
            files[path.name] = folder / path.name
            shutil.copyfile(path, files[path.name])
    return files


def _config(run: FinishedRun) -> str:
    """best/config.json, which timm reads, and the licence."""
    config: dict[str, Any] = dict(run.config)
    config["pretrained_cfg"] = {**config["pretrained_cfg"], "license": LICENSE}
    return json.dumps(config, indent=2) + "\n"


def _card(run: FinishedRun, repo_id: str, attention: Any) -> Card:
    where = "" if run.record.data == "digits" else " --data-dir DIR"
    return Card(
        title=repo_id.partition("/")[2],
        load=f"hf-hub:{repo_id}",
        attention=attention if isinstance(attention, str) else "",
        trained=run.record,
        tested=run.record,
        recipe=run.recipe,
        reproduce=f"timm-xformers train --recipe recipe.yaml{where} --seed {run.record.seed}",
        curves=run.folder.curves.name if run.folder.curves.is_file() else "",
    )


def _message(run: FinishedRun) -> str:
    record = run.record
    return f"{record.model} on {record.data}: {record.test_top1_percent:.2f} % of the test set"
