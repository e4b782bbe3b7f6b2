"""Uploads a folder to the Hugging Face hub, with the token of the environment or of `hf auth login`, which nothing here
reads or keeps."""

import importlib.util
import re

from data.errors import InputError

__all__ = ["check_can_upload", "upload"]


def check_can_upload(repository: str) -> None:
    """Raises InputError where the name is none, huggingface_hub is not installed, or there is no token."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise InputError(f"--push is {repository}, expected USER/NAME or ORGANIZATION/NAME")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError("--push needs huggingface_hub, which is not installed: pip install huggingface_hub")
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError("--push needs a token of the hub: log in by `hf auth login`, or set HF_TOKEN")


def upload(folder: str, repository: str, private: bool) -> str:
    """Makes the repository if it is not there, uploads all files of `folder` in one commit, and returns its URL.

    Raises InputError where `private` is asked for and the repository is there and public; OSError where the hub, or the
    way to it, fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        is_public = private and not api.model_info(repository).private
        if not is_public:
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload the model")
    except Exception as error:  # its HTTP client's errors have no type in common with its own
        reason = " ".join(str(error).split())
        again = f"hf upload {repository} {folder}{' --private' if private else ''}"
        raise OSError(f"{folder} is made, but not uploaded: {reason}. To try again: {again}")
    if is_public:
        raise InputError(
            f"--private: {repository} is there and public, so {folder} is made, but not uploaded. Choose another name: "
            f"hf upload USER/NAME {folder} --private"
        )
    return str(url)
