"""A run folder on the Hub: weights, configuration, card, curves and record, in one commit."""

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from timm.models import get_pretrained_cfg, is_model

import timm_xformers
from timm_xformers.errors import UsageError, UserError
from timm_xformers.files.atomic import find_damage
from timm_xformers.publishing.card import (
    LICENSE,
    Card,
    changed_settings,
    reproduction,
    write_card,
)
from timm_xformers.publishing.finished_run import (
    WEIGHTS_FILE,
    FinishedRun,
    open_finished,
    public,
    public_settings,
)
from timm_xformers.publishing.hub import Repository
from timm_xformers.records.headline import TOP1
from timm_xformers.records.results_json import Record
from timm_xformers.records.run_folder import RunFolder
from timm_xformers.training.build import build_model

__all__ = ["publish"]


def publish(
    root: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    dry_run: bool = False,
    license: str = LICENSE,
    api: HfApi | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Bring a run to the Hub; what is there already is left as it is.

    Args:
        root: Folder of a finished run.
        repo_id: OWNER/NAME.
        private: Whether a new repository is its owner's alone; None takes the owner's default.
        dry_run: Say what would be sent, and send nothing.
        license: Of the weights, as the Hub calls it: ``apache-2.0``, ``cc-by-nc-4.0``, ``other``.
        api: The client; None makes one from the environment.
        say: Takes lines for the user.

    Raises:
        UserError: The run or the Hub does not play along.
    """
    _check_name(repo_id)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UsageError(
            f"--license {license!r} is no name of the Hub's; use one such as apache-2.0, mit, "
            "cc-by-nc-4.0 or other (https://huggingface.co/docs/hub/repositories-licenses)."
        )
    run = open_finished(root)
    with tempfile.TemporaryDirectory() as scratch:
        files = _stage(run, repo_id, license, Path(scratch))
        for name, path in files.items():
            say(f"{path.stat().st_size:>12,}  {name}")
        say(f"The card says licence {license}; --license chooses another.")
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


def _stage(run: FinishedRun, repo_id: str, license: str, folder: Path) -> dict[str, Path]:
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

    model: Any = build_model(f"local-dir:{best}")[0]
    config = run.config | {
        "pretrained_cfg": {**run.config.get("pretrained_cfg", {}), "license": license}
    }
    record = public(dataclasses.asdict(run.record))
    add("config.json", json.dumps(config, indent=2) + "\n")
    # A model with replaced attention has the layer's name of what it was.
    replaced = run.config.get("architecture") == "retrofit"
    attention = "" if replaced else getattr(model, "attn_layer", "")
    add("README.md", write_card(_card(run, repo_id, license, attention)))
    add("recipe.yaml", yaml.safe_dump(public_settings(run.recipe), sort_keys=False))
    add("results.json", json.dumps(record, indent=2) + "\n")
    source: RunFolder = run.folder
    for path in (source.history, source.curves, source.confusion, source.per_class):
        if path.is_file():
            files[path.name] = folder / path.name
            shutil.copyfile(path, files[path.name])
    return files


def _card(run: FinishedRun, repo_id: str, license: str, attention: Any) -> Card:
    started_from, base_model = _start(run)
    words = f", with this repository's recipe.yaml (`hf download {repo_id} recipe.yaml"
    words += " --local-dir .`)"
    if started_from and "PATH" in changed_settings(run.recipe):
        words += " and those weights in the place of PATH"
    repeat, command = reproduction(run.record, run.recipe, words)
    record = Record(**public(dataclasses.asdict(run.record)))
    return Card(
        title=repo_id.partition("/")[2],
        load=f"hf-hub:{repo_id}",
        attention=attention if isinstance(attention, str) else "",
        trained=record,
        tested=record,
        recipe=run.recipe,
        repeat=repeat,
        command=command,
        license=license,
        base_model=base_model,
        started_from=started_from,
        curves=run.folder.curves.name if run.folder.curves.is_file() else "",
    )


def _start(run: FinishedRun) -> tuple[str, str | None]:
    """The weights that the run began with: in words, and by name on the Hub if they have one."""
    if not run.recipe.starts_pretrained:
        return "", None
    model = run.recipe.model
    kind, _, name = model.rpartition(":")
    if kind == "local-dir":
        return (run.record.initial_weights or "from weights in a folder").removeprefix(
            "from "
        ), None
    if kind == "hf-hub":
        return f"`{name}`", name.partition("@")[0]
    source = get_pretrained_cfg(model) if is_model(model) else None
    return f"`{model}`", getattr(source, "hf_hub_id", None)


def _message(run: FinishedRun) -> str:
    record = run.record
    figure = f"{record.percent('test'):.2f} % of the test set"
    if record.headline is not TOP1:
        figure = f"{record.figures('test', beside=False)} on the test set"
    return f"{public(record.model)} on {record.data}: {figure}"
