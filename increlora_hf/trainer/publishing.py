"""Push from a Trainer: a plain adapter without pickles. A push that fails never ends the training."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import hub

from ..documents import without_tokens, write_json
from ..errors import HubPushError
from ..files.checkpoints import MANIFEST_NAME
from ..files.run_state import STATE_JSON, STATE_TENSORS
from ..hub.card import card_text
from ..hub.upload import create_repository, push_folder
from .summary import describe

logger = logging.getLogger(__name__)

ARGUMENTS_NAME = "training_args.json"
CARD_NAME = "README.md"
NOT_PUSHED = ("_*", "checkpoint-*")  # of an output folder, as in Trainer
WHOLE_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
OF_A_CHECKPOINT_ONLY = (STATE_JSON, STATE_TENSORS, MANIFEST_NAME, TRAINER_STATE_NAME, "*.pt", "*.pth")


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def refuse_pickles(args: TrainingArguments, allowed: bool) -> None:
    """Refuse a strategy that uploads optimizer and random states, unless pickles are allowed."""
    strategy = HubStrategy(args.hub_strategy)
    if args.push_to_hub and strategy in WHOLE_CHECKPOINTS and not allowed:
        raise ValueError(
            f"hub_strategy={strategy.value!r} uploads optimizer and random states. These are pickles, which can run "
            "code when somebody loads them. Choose every_save, which uploads the adapter, or pass "
            "allow_pickles_on_hub=True (--allow_pickles_on_hub in the scripts)."
        )


class PublishingMixin(_Base):
    """Trainer's methods for the Hub, without pickles. A failed push is logged, and training goes on."""

    push_in_progress: Any = None
    hub_model_id: Any = None
    _card_options: Mapping[str, Any] = MappingProxyType({})  # arguments of `create_model_card` so far

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository before step 1, so that a refusal is seen early; every push tries it again."""
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        token, private = self._credentials(token, private)
        try:
            self.hub_model_id = create_repository(name, token=token, private=private)
        except HubPushError as error:
            self.hub_model_id = name
            logger.warning("IncreLoRA: %s Training continues, and every push tries again.", error)

    def _credentials(self, token: str | None = None, private: bool | None = None) -> tuple[str | None, bool | None]:
        return token or self.args.hub_token, self.args.hub_private_repo if private is None else private

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer's; adds a card, and training arguments as JSON, not as a pickle that would hold the token."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            self._write_arguments(folder)
            self._write_card(folder)

    def _write_arguments(self, folder: Path) -> None:
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        write_json(folder / ARGUMENTS_NAME, without_tokens(self.args.to_dict()), default=str)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; a push that fails is logged as a warning."""
        try:
            super().save_model(output_dir, _internal_call)
        except HubPushError as error:
            logger.warning("IncreLoRA: %s", error)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save, write the card, and upload output_dir without checkpoints and pickles.

        Args:
            blocking: wait for the upload; otherwise return a Future.
            kwargs: for `create_model_card`.

        Returns:
            The commit, or its Future; None on processes other than the first.

        Raises:
            HubPushError: the upload failed; the folder is complete, and the message says how to push it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        token, private = self._credentials(token, private)
        push = partial(
            push_folder,
            Path(str(self.args.output_dir)),
            self._repository,
            token=token,
            private=private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
            ignore=NOT_PUSHED,
        )
        return push() if blocking else self._in_background([push])[0]

    @property
    def _repository(self) -> str:
        assert self.hub_model_id is not None
        return self.hub_model_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: Trainer calls this before the checkpoint is complete; `_push_checkpoint` follows when it is."""

    def _push_checkpoint(self, folder: Path) -> None:
        """Upload the adapter of a complete checkpoint, or all of the checkpoint, while training goes on."""
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.args.push_to_hub or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self._is_pushing() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            self._in_background(self._pushes_of(folder, strategy))
        except Exception as error:  # of any kind, such as a full disk; the checkpoint is complete
            logger.warning("IncreLoRA: could not prepare %s for the Hub: %s", folder, error)

    def _pushes_of(self, folder: Path, strategy: HubStrategy) -> list[Callable[[], Any]]:
        """The uploads of a copy, because rotation may delete the original meanwhile, and the deletion of the copy."""
        whole = strategy in WHOLE_CHECKPOINTS
        parent = Path(tempfile.mkdtemp(prefix="increlora-push-"))
        copy, only_here = parent / folder.name, (*NOT_PUSHED, *OF_A_CHECKPOINT_ONLY)
        try:
            shutil.copytree(folder, copy, ignore=None if whole else shutil.ignore_patterns(*only_here))
        except BaseException:
            shutil.rmtree(parent, ignore_errors=True)
            raise
        token, private = self._credentials()
        options: dict[str, Any] = {"token": token, "private": private, "revision": self.args.hub_revision}
        push = partial(push_folder, copy, self._repository, kept_in=folder, **options)
        message = f"Training in progress, step {self.state.global_step}"
        pushes = [partial(push, commit_message=message, ignore=only_here)]
        if whole:
            path = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
            message += ", checkpoint"
            pushes.append(partial(push, path_in_repo=path, commit_message=message, ignore=(), whole=True))
        return [*pushes, partial(shutil.rmtree, parent)]

    def _is_pushing(self) -> bool:
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def _in_background(self, actions: Sequence[Callable[[], Any]]) -> list[Future[Any]]:
        jobs = [hub.hf_api().run_as_future(action) for action in actions]  # in one thread: one after the other
        if self._is_pushing():
            self.push_in_progress.jobs.extend(jobs)
        else:
            self._report_failures()
            self.push_in_progress = hub.PushInProgress(jobs)  # type: ignore[arg-type]
        return jobs

    def _finish_current_push(self) -> None:
        """Wait for running uploads, and log those that failed."""
        super()._finish_current_push()
        self._report_failures()

    def _report_failures(self) -> None:
        finished, self.push_in_progress = self.push_in_progress, None
        for job in finished.jobs if finished is not None else []:
            error = job.exception()
            if error is not None:
                logger.warning(
                    "IncreLoRA: %s Training continues. The checkpoints are in %s.", error, self.args.output_dir
                )

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
        dataset_args: str | Sequence[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Write the model card, README.md, into output_dir: use, scores, ranks and settings.

        Args:
            language, license, tags: for the card's metadata.
            model_name: its title; default the repository's name.
            finetuned_from: the base model, where the adapter does not name it.
            tasks: as the Hub calls them, such as text-classification; default by the model's class.
            dataset_tags, dataset, dataset_args: Hub id, name and configuration of the data.
            dataset_name: another name of the argument ``dataset``, which some trainers use.

        Arguments of earlier calls stay in use, unless this call replaces them.
        """
        if not self.is_world_process_zero():
            return
        told = {
            "language": language,
            "license": license,
            "tags": _listed(tags),
            "model_name": model_name,
            "base": finetuned_from,
            "tasks": _listed(tasks),
            "dataset_id": next(iter(_listed(dataset_tags)), None),
            "dataset_name": next(iter(_listed(dataset or dataset_name)), None),
            "dataset_config": next(iter(_listed(dataset_args)), None),
        }
        self._card_options = {**self._card_options, **{name: value for name, value in told.items() if value}}
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        try:
            (folder / CARD_NAME).write_text(self._card(folder), encoding="utf-8")
        except Exception as error:  # of any kind: it must not cost the checkpoint
            logger.warning("IncreLoRA: could not write the model card of %s: %s", folder, error)

    def _card(self, folder: Path) -> str:
        return card_text(describe(self, folder, self.hub_model_id), **self._card_options)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
