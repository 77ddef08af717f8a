"""Uploads a finished output folder to the Hugging Face Hub, through huggingface_hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fastinterp._version import __version__
from fastinterp.checkpoint import hub
from fastinterp.checkpoint.hub_download import first_line
from fastinterp.checkpoint.names import listing, names_file, quote, shell_word
from fastinterp.errors import OutputError, UsageError
from fastinterp.messages import counted, size, tell
from fastinterp.urls import is_url

# Files of an older model that a new one must not be mixed with: those there that are not uploaded are removed.
_REPLACED = ("*.safetensors", "*.bin", "*.gguf", "*.index.json", "*.index.*.json")


class Upload:
    """The upload of one output folder, which is looked into before the merge and done after it.

    repo    id of the model: `org/name`
    out     the output folder
    public  a new model is public, else private
    force   a model of that name may have files: weights there are replaced

    Raises: UsageError, if there can be no such upload; OutputError, if nobody is logged in, the account may not write
    there, or the model has files already.
    """

    def __init__(self, repo: str, out: str, public: bool = False, force: bool = False):
        parsed = hub.parse(repo)
        if parsed is None or parsed[1] is not None or "/" not in repo:
            raise UsageError(f"--push-to needs the id of a model, as ORG/NAME, got {quote(repo)}")
        if is_url(out):
            raise UsageError(
                f"--push-to uploads a folder that stays here, and the output is {out}. Leave one of the two out"
            )
        if names_file(out):
            raise UsageError("--push-to uploads a folder, with configuration and card, and the output is one file")
        if why := hub.offline():
            raise UsageError(f"--push-to needs the Hub, but {why}")
        try:
            from huggingface_hub import HfApi, constants
        except ImportError:
            raise OutputError(f"{repo}: this needs the Hub's client. Install it: pip install huggingface_hub") from None
        self._repo, self._out, self._public, self._force = repo, out, public, force
        self._api = HfApi(endpoint=constants.ENDPOINT, library_name="fastinterp", library_version=__version__)
        hub.this_run().outputs[repo] = hub.place_of(repo)
        self._refuse_stranger()
        self._refuse_existing()

    def _refuse_stranger(self) -> None:
        from huggingface_hub import get_token

        login = "Run `hf auth login`, or set HF_TOKEN to a token that may write"
        if get_token() is None:
            raise OutputError(f"{self._repo}: no token is here to upload with. {login}")
        me: dict[str, Any] = self._asked(self._api.whoami, f". {login}")
        owner = self._repo.partition("/")[0]
        owners = [str(me.get("name")), *(str(org.get("name")) for org in me.get("orgs") or ())]
        if owner not in owners:
            raise OutputError(
                f"{self._repo}: {quote(me.get('name'))} may not write to {quote(owner)}, only to {listing(owners, 8)}"
            )

    def _refuse_existing(self) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self._asked(lambda: self._api.model_info(self._repo))
        except RepositoryNotFoundError:
            return
        there = [s.rfilename for s in info.siblings or () if s.rfilename != ".gitattributes"]
        if there and not self._force:
            raise OutputError(
                f"{self._repo}: the model is there already, with {listing(there)}. Add --force to replace its weights, "
                "or give another name"
            )
        if not info.private and not self._public:
            raise OutputError(f"{self._repo}: this model is public. Add --public to upload to it all the same")

    def _asked(self, ask: Callable[[], Any], remedy: str = "") -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return ask()
        except RepositoryNotFoundError:
            raise
        except Exception as error:  # the client's HTTP library differs by version, and so do its errors
            what = f"the Hub refuses, or cannot be reached: {first_line(error)}"
            raise OutputError(f"{self._repo}: {what}{remedy}") from None

    @property
    def command(self) -> str:
        """The command of huggingface_hub that uploads the folder, in backquotes."""
        private = "" if self._public else " --private"
        return f"`hf upload {shell_word(self._repo)} {shell_word(self._out)} .{private}`"

    def run(self) -> str:
        """Upload the folder. Returns the address of the commit.

        Raises: OutputError, if that fails: the output stays where it is, and the message says how to go on.
        """
        names = [os.path.join(folder, name) for folder, _, names in os.walk(self._out) for name in names]
        total = sum(os.path.getsize(name) for name in names)
        kind = "public" if self._public else "private"
        tell(f"{self._repo}: uploading {counted(len(names), 'file')}, {size(total)}, as a {kind} model")
        try:
            self._api.create_repo(self._repo, private=not self._public, exist_ok=True)
            commit = self._api.upload_folder(
                repo_id=self._repo,
                folder_path=self._out,
                commit_message=f"Merged with fastinterp {__version__}",
                delete_patterns=[*_REPLACED] if self._force else None,
            )
        except Exception as error:
            raise OutputError(
                f"{self._repo}: the upload failed ({first_line(error)}). The output is complete in {self._out}. To "
                f"upload it: {self.command}"
            ) from None
        return str(commit.commit_url)
