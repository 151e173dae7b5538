"""Models with exits on the Hugging Face hub: what is uploaded is what ``save_pretrained`` writes, its card included."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

__all__ = ["PushesToHub"]


class _Saves(Protocol):
    """What ``PushesToHub`` is mixed into."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None: ...


class PushesToHub:
    """``push_to_hub`` for modules whose ``save_pretrained`` writes a model card.

    transformers' own saves the model and then puts a card of its own in the place of the one that was written.
    """

    def push_to_hub(
        self: _Saves,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Upload what ``save_pretrained`` writes; what a user wrote into the card that is on the hub stays.

        Args:
            repo_id: where to; made if it is not there.
            commit_message, commit_description, private, token, revision, create_pr, tags: as in transformers.
            kwargs: of ``save_pretrained``: ``accuracies`` and ``dataset`` for the card, ...
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            card = Path(folder, "README.md")
            with suppress(EntryNotFoundError):  # of the first upload
                ModelCard.load(repo_id, token=token).save(card)  # type: ignore[arg-type]  # takes what downloads take
            self.save_pretrained(folder, **kwargs)
            if tags:
                written = ModelCard.load(card)
                written.data["tags"] = sorted({*(written.data.to_dict().get("tags") or []), *tags})
                written.save(card)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
