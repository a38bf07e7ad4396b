"""Upload folders to the Hub, without pickles or tokens, and with retries while the Hub is busy."""

from __future__ import annotations

import json
import logging
import pickletools
import re
import shlex
import socket
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from pickletools import StackObject, markobject
from typing import IO, Any, TypeVar

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..documents import TOKEN
from ..errors import HubPushError
from ..files.saved_adapter import is_in_hub_cache

UPLOADED = (  # by file name: what people load or read; anything else stays, such as .env, logs and pickles
    "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "*.safetensors", "*.safetensors.index.json", "config.json",
    "generation_config.json", "adapter_config.json", "increlora_history.json", "training_args.json",
    "*_results.json", "*predictions.json", "*null_odds.json", "predict_results_*.txt", "*.png", "*.gif", "*.svg",
    # of transformers' tokenizers and processors
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "*.jinja", "vocab.txt", "vocab.json", "vocab.bpe", "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
    "entity_vocab.json", "encoder.json", "merges.txt", "bpe.codes", "dict.txt", "byte_maps.json", "word_shape.json",
    "word_pronunciation.json", "normalizer.json", "emoji.json", "prophetnet.tokenizer", "tekken.json", "*.tiktoken",
    "tokenizer.model", "tokenizer.model.v[0-9]", "tiktoken.model", "spiece.model", "spm.model", "spm_char.model",
    "sentencepiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "audio_tokenizer_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    # of sentence-transformers' modules
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "router_config.json",
    "lstm_config.json", "cnn_config.json", "wordembedding_config.json", "whitespacetokenizer_config.json",
    "phrasetokenizer_config.json",
)  # fmt: skip
FOLDERS = re.compile(r"(\w+_)?\d+_[A-Z]\w*|additional_chat_templates")  # as these libraries name theirs
FOLDERS_WITH = ("adapter_config.json", "tokenizer_config.json")  # a second adapter, a processor's second tokenizer
WEIGHTS_AND_PICTURES = (".safetensors", ".pt", ".pth", ".bin", ".png", ".gif")  # not searched for tokens
PACKED = (b"\x93NUMPY", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")  # first bytes of .npy, .gz, .bz2, .xz, .7z
TAR_MARK = slice(257, 262)
PICKLED_NAMES = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"})  # without one it is harmless
PICKLED_CALLS = frozenset({"REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"})
BUSY = frozenset({429, 500, 502, 503, 504})
ATTEMPTS = 4
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; the wait doubles, unless the Hub sends Retry-After

_LIBRARY = "increlora_hf"
_REMEDIES = {
    401: "The token is missing or no longer valid. Log in with `hf auth login`, or set HF_TOKEN.",
    403: "The token may not write there. Use one with write access, or push to a namespace of your own.",
    404: "There is no such repository or branch, or the token cannot see it. Check the name.",
    429: "The Hub asks for fewer requests. Wait as long as it says.",
}
_UNREACHABLE = "The Hub did not answer as it should. Check the connection and https://status.huggingface.co."

T = TypeVar("T")


class _TokenFound(ValueError):
    """A text to upload holds an access token."""


logger = logging.getLogger(__name__)


def is_pickle(path: Path) -> bool:
    """Whether a file is an archive, such as torch.save writes, or begins with pickles that name or call a function.

    Loading it could run code, whatever the protocol, even where it ends too early.
    """
    if path.suffix == ".safetensors" and _is_safetensors(path):  # its length may look like the start of a pickle
        return False
    with path.open("rb") as file:
        start = file.read(TAR_MARK.stop)
    if start.startswith(PACKED) or start[TAR_MARK] == b"ustar" or zipfile.is_zipfile(path):
        return True
    try:
        with path.open("rb") as file:
            while True:  # torch.save's old format is several pickles, the first of which are harmless
                if _names_a_function(file):
                    return True
    except Exception:  # of any kind: genops has no error of its own for what is no pickle
        return False


def _names_a_function(file: IO[bytes]) -> bool:
    """Read a pickle up to the first call, or to its end; raises where it breaks off before that.

    The stack tells a pickle from a text that looks like one: vocab.txt may begin with the lines "cat" and "dog".
    """
    named, stack = False, list[StackObject]()
    for opcode, _, _ in pickletools.genops(file):
        named |= opcode.name in PICKLED_NAMES
        taken = opcode.stack_before
        if markobject in taken:
            while stack.pop() is not markobject:
                pass
            taken = taken[: taken.index(markobject)]
        for _ in taken:
            stack.pop()
        stack += opcode.stack_after
        if named and opcode.name in PICKLED_CALLS:
            return True
    return named


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins with 8 bytes that hold the length of a JSON object, and the object."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size - 8:
            return False
        try:
            return isinstance(json.loads(file.read(length)), dict)
        except (ValueError, RecursionError):
            return False


def create_repository(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create a repository unless it exists, and return its name with the namespace; raises HubPushError."""
    try:
        return with_retries(lambda: _create(repo_id, token, private))
    except Exception as error:
        raise push_error(f"Creating {repo_id} on the Hub", error, None, repo_id) from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload LoRA adapter",
    path_in_repo: str | None = None,
    ignore: Sequence[str] = ("_*", "checkpoint-*"),
    whole: bool = False,
    kept_in: Path | None = None,
) -> CommitInfo:
    """Upload a folder in one commit; create the repository and branch where they are missing.

    While the Hub is busy (429, 5xx, a broken connection) the upload is tried up to `ATTEMPTS` times, each time after
    the seconds of its Retry-After, or else after twice the wait before.

    Args:
        folder: the files in it that `UPLOADED` names are uploaded, except pickles and what ``ignore`` matches.
        repo_id: NAME or NAMESPACE/NAME.
        private: make a new repository private; None follows the user's settings on the Hub.
        ignore: patterns for names of files and folders at any depth.
        whole: upload every file, pickles too. Hidden files and links are left out in any case.
        kept_in: the folder that an error names for a later push; default ``folder``.

    Returns:
        The commit; `str` of it is its URL.

    Raises:
        HubPushError: the upload failed; ``folder`` is unchanged.
    """
    folder = Path(folder)
    names: list[str] = []

    def push() -> CommitInfo:
        full = _create(repo_id, token, private)
        api = HfApi(library_name=_LIBRARY)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(full, branch=revision, token=token, exist_ok=True)
        return api.upload_folder(
            repo_id=full,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=commit_message,
            token=token,
            revision=revision,
            allow_patterns=[re.sub(r"([\[?*])", r"[\1]", name) for name in names],
        )

    try:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        names += _chosen(folder, ignore, whole)
        if not names:
            raise FileNotFoundError(f"{folder} has nothing to upload: no adapter, README.md or other known file")
        return with_retries(push)
    except Exception as error:  # huggingface_hub raises its own errors, httpx's, OSError and RuntimeError
        kept = kept_in or folder
        raise push_error(f"Pushing {kept} to {repo_id}", error, kept, repo_id) from error


def _create(repo_id: str, token: str | None, private: bool | None) -> str:
    return HfApi(library_name=_LIBRARY).create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id


def _chosen(folder: Path, ignore: Sequence[str], whole: bool) -> list[str]:
    """The files to upload, relative to ``folder``; a log line names the others, except what ``ignore`` matches."""
    chosen: list[str] = []
    left_out: list[str] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        relative = path.relative_to(folder)
        if _matches(relative.parts, ignore):
            continue
        public = whole or (_is_public(folder, relative) and not is_pickle(path))
        (chosen if public and not _is_hidden(folder, relative) else left_out).append(relative.as_posix())
    if left_out:
        logger.info(
            "IncreLoRA: these files of %s are not uploaded: %s. To upload such files too, use `hf upload`.",
            folder,
            ", ".join(left_out),
        )
    for name in chosen:
        if not name.endswith(WEIGHTS_AND_PICTURES):
            _refuse_token(folder / name)
    return chosen


def _is_public(folder: Path, relative: Path) -> bool:
    """Whether people load or read files of this name, and what writes such files has written this folder."""
    parents = relative.parents[:-1]
    return _matches([relative.name], UPLOADED) and all(
        FOLDERS.fullmatch(parent.name) or any((folder / parent / name).is_file() for name in FOLDERS_WITH)
        for parent in parents
    )


def _refuse_token(path: Path) -> None:
    """Raise _TokenFound where a text holds an access token of the Hub."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if TOKEN.search(line):
                raise _TokenFound(f"line {number} of {path} holds an access token (hf_...)")


def _matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _is_hidden(folder: Path, relative: Path) -> bool:
    """Whether a part of the path begins with a dot, or is a link: it may lead to another file of the user's.

    The Hub's own cache consists of links.
    """
    parts = [folder / part for part in [relative, *relative.parents][:-1]]
    is_link = any(part.is_symlink() for part in parts) and not is_in_hub_cache(folder, folder / relative)
    return is_link or any(part.name.startswith(".") for part in parts)


def with_retries(action: Callable[[], T]) -> T:
    """The result of ``action``, called up to `ATTEMPTS` times while the Hub is busy; raises its last error."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if attempt + 1 == ATTEMPTS or not _is_temporary(error):
                raise
            time.sleep(_wait(error, attempt))
    raise AssertionError("unreachable")


def push_error(what: str, error: Exception, folder: Path | None, repo_id: str) -> HubPushError:
    """The `HubPushError` with reason, remedy and the command that pushes later.

    Args:
        what: the action that failed.
        error: of huggingface_hub, or of the file system.
        folder: to push later; None where nothing was to be uploaded yet.
    """
    cause = _cause(error)
    remedy = _REMEDIES.get(_status(error) or 0, _UNREACHABLE)
    if isinstance(cause, NotADirectoryError | FileNotFoundError):
        remedy = "Give the folder of an adapter."
    elif isinstance(cause, HFValidationError):
        remedy = "Give NAME or NAMESPACE/NAME, of letters, digits, '-', '_' and '.'."
    elif isinstance(cause, _TokenFound):
        remedy = "Take it out, and revoke it at https://huggingface.co/settings/tokens if others have seen it."
    elif isinstance(cause, UnicodeError):
        remedy = "Rename the file whose name is not UTF-8."
    elif isinstance(cause, ValueError):
        remedy = "Correct the metadata at the top of README.md."
    elif _is_local(cause):
        remedy = "This machine refused it, not the Hub. Check the folder's permissions and the space on the disk."
    command = "" if folder is None else shlex.join(["increlora", "push", str(folder), repo_id])
    later = "" if folder is None else f" Nothing is lost: push later with `{command}`."
    reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__).rstrip(".")
    reason = re.sub(r"\?[^\s'\"]*", "", reason)  # the query of a URL: its signature would allow an upload
    return HubPushError(f"{what} failed: {reason}. {remedy}{later}")


def _cause(error: BaseException) -> BaseException:
    """The original error: huggingface_hub wraps what happened to a single file in a RuntimeError."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _status(error: BaseException) -> int | None:
    cause = _cause(error)
    response: Any = getattr(cause, "response", None)
    return getattr(response, "status_code", None)


def _is_temporary(error: Exception) -> bool:
    status, cause = _status(error), _cause(error)
    if status is not None:
        return status in BUSY
    return not isinstance(cause, ValueError | HfHubHTTPError) and not _is_local(cause)


def _is_local(cause: BaseException) -> bool:
    """Whether the operating system refused a file; the network's errors are of other classes or have no number."""
    if isinstance(cause, HfHubHTTPError | ConnectionError | TimeoutError | socket.gaierror):
        return False
    named = isinstance(cause, FileNotFoundError | NotADirectoryError | PermissionError)
    return named or (isinstance(cause, OSError) and cause.errno is not None)


def _wait(error: Exception, attempt: int) -> float:
    response: Any = getattr(_cause(error), "response", None)
    asked = "" if response is None else response.headers.get("Retry-After", "")
    seconds = float(asked) if asked.isdigit() else FIRST_WAIT * 2**attempt
    return min(seconds, LONGEST_WAIT)
