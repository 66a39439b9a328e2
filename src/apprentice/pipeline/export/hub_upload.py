"""Upload of an exported folder to the Hugging Face hub, or to the hub that HF_ENDPOINT names, with the login of `hf auth login`."""

from __future__ import annotations

from pathlib import Path

from apprentice.errors import StorageError


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads `folder` to the model repository `repository`, which is made if it is not there; returns its address.

    It is one commit: readers see all files or none. What an upload that failed has stored is not sent again. Raises `StorageError`
    if the hub refuses or does not answer, and for a public repository where `private` is asked for.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise StorageError(f"{repository} is public on the hub; say --public to upload there, or name another repository.")
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of apprentice")
    except StorageError:
        raise
    except Exception as error:  # its own, those of its HTTP client, and RuntimeError for an upload that failed
        reason = " ".join(str(error).split())[:200]
        raise StorageError(
            f"{folder} is whole, but is not on the hub as {repository} ({reason}); log in with `hf auth login`, and give the same"
            " command again: it uploads what is missing."
        ) from error
    return str(commit.repo_url)
