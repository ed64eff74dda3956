"""One repository on the Hub: made, filled by one commit, read back and compared.

The client repeats uploads and downloads by itself, but neither the creation of a repository nor the
commit. Both are repeated here. The client sends no file that is there already, so a commit whose
answer was lost is not made twice. Downloads over plain HTTP are checked by the client for their
size alone, so everything is read back and hashed.

What failed is told by kind and status only: the client's own messages hold addresses, and those of
storage are signed.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from timm_xformers.errors import UserError
from timm_xformers.files.atomic import sha256_of

__all__ = ["Repository"]

T = TypeVar("T")

ATTEMPTS = 5
LONGEST_WAIT_S = 60.0
# The client's own list, for what it does not repeat itself.
PASSING = (408, 429, 500, 502, 503, 504)
# Somebody else's commit came between, or is being made.
MOVED = (409, 412)


@dataclass(frozen=True)
class Repository:
    """A model repository.

    Attributes:
        api: The client.
        repo_id: OWNER/NAME.
    """

    api: HfApi
    repo_id: str

    def create(self, private: bool | None = None) -> None:
        """Create it, unless it exists; ``private`` as of `publish`.

        Raises:
            UserError: The Hub refuses, or does not answer.
        """
        self._repeat(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))

    def push(self, files: Mapping[str, Path], message: str) -> tuple[str, bool]:
        """Bring files there by one commit; none if they are there.

        Args:
            files: By path in the repository. They must not change meanwhile.
            message: Of the commit.

        Returns:
            The commit that has the files, and whether this call made it.

        Raises:
            UserError: The Hub refuses, or does not answer.
        """
        heads: list[str] = []

        def attempt() -> str:
            heads.append(str(self.api.model_info(self.repo_id).sha))
            # The client leaves out files that are there, and without any makes no commit.
            operations = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
                for name, path in files.items()
            ]
            return str(
                self.api.create_commit(
                    self.repo_id, operations, commit_message=message, parent_commit=heads[-1]
                ).oid
            )

        commit = self._repeat(attempt, (*PASSING, *MOVED))
        return commit, commit != heads[0]

    def verify(self, files: Mapping[str, Path], commit: str) -> None:
        """Download files and compare them with ours.

        Args:
            files: By path in the repository.
            commit: Where they are.

        Raises:
            UserError: One comes back with other bytes, twice.
        """
        for name, path in files.items():
            wanted = sha256_of(path)
            if not any(self._download(name, commit) == wanted for _ in range(2)):
                raise UserError(
                    f"{name} came back from {self.repo_id} with other bytes than were sent; repeat "
                    "the command, and delete the file there if that does not help."
                )

    def _download(self, name: str, commit: str) -> str:
        """Hash of what the Hub gives; the user's cache neither answers nor keeps it."""

        def attempt() -> str:
            with tempfile.TemporaryDirectory() as cache:
                path = self.api.hf_hub_download(
                    self.repo_id, name, revision=commit, cache_dir=cache
                )
                return sha256_of(Path(path))

        return self._repeat(attempt)

    def _repeat(self, call: Callable[[], T], passing: tuple[int, ...] = PASSING) -> T:
        """Call until it works, while what fails is likely to pass."""
        for tries in range(1, ATTEMPTS + 1):
            try:
                return call()
            except OfflineModeIsEnabled:
                raise UserError(
                    "HF_HUB_OFFLINE is set, so nothing can be published; unset it, or use "
                    "--dry-run."
                ) from None
            except _client_errors() as error:
                # The upload of a file fails with a RuntimeError around the cause.
                cause = error.__cause__ if isinstance(error, RuntimeError) else error
                response = getattr(cause, "response", None)
                status = None if response is None else int(response.status_code)
                # The rest is about our files: storage that is full, a head that is no YAML.
                final = response is None and type(error) is ValueError
                if tries == ATTEMPTS or final or (status is not None and status not in passing):
                    detail = str(error) if final else type(cause).__name__
                    raise UserError(_words(status, self.repo_id, tries, detail)) from None
                wait = None if response is None else _seconds(response.headers.get("Retry-After"))
                time.sleep(min(wait or 2.0 ** (tries - 1), LONGEST_WAIT_S))
        raise AssertionError("unreachable")


def _words(status: int | None, repo_id: str, tries: int, detail: str) -> str:
    again = "repeat the command later, it goes on where this one stopped"
    words = {
        400: f"The Hub finds the files for {repo_id} wrong (400); this is an error of ours, please "
        "report it",
        401: "The Hub does not accept the token (401); log in with `hf auth login`, or set "
        "HF_TOKEN",
        403: f"The token may not write to {repo_id} (403); take one that may, or another owner",
        404: f"The Hub has no {repo_id} (404); check owner and name",
        409: f"Somebody else is writing to {repo_id} (409); {again}",
        412: f"{repo_id} was changed again and again while this was committed (412); {again}",
        429: f"The Hub takes no more requests for now (429); {again}",
    }
    if status in words:
        return f"{words[status]}."
    count = f"{tries} {'try' if tries == 1 else 'tries'}"
    reason = status or " ".join(detail.split())
    return f"The Hub did not do its part in {count} ({reason}); {again}."


def _client_errors() -> tuple[type[Exception], ...]:
    """What the client raises, whichever HTTP library it is built on."""
    loaded = [sys.modules.get(name) for name in ("httpx", "httpx2")]
    return (
        RuntimeError,
        ValueError,
        OSError,
        *(module.HTTPError for module in loaded if module is not None),
    )


def _seconds(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # a date, which nobody sends here
        return None
