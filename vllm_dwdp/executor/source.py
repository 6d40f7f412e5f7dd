"""Which checkpoint a rank reads: that of its command line, one that it reloaded, or that of its group.

A group whose weights were renewed from a checkpoint tells a rank that starts where that lies. The rank
points vLLM there before it loads, as vLLM's own reload does, so that whatever it does not adopt comes
from the same weights. Runs in the worker's main thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dwdp.distributed.fingerprint import (
    DIGEST_CHARACTERS,
    UNKNOWN,
    Fingerprint,
    checkpoint_digest,
)
from vllm_dwdp.logger import init_logger

logger = init_logger(__name__)

COMMIT = "commit "
"""How the digest begins of a name on a hub."""
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
"""Files of a checkpoint folder, in the order in which vLLM prefers them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a rank's weights come from, in the words of its fingerprint."""

    model: str
    revision: str
    checkpoint_digest: str


def first_source(vllm_config: Any) -> Source:
    """Return what the command line names; vLLM has read its config, and perhaps none of its weights."""
    model = vllm_config.model_config
    return _source(vllm_config, lambda: getattr(model.hf_config, "_commit_hash", None))


def reloaded_source(vllm_config: Any) -> Source:
    """Return what vLLM has just read again, perhaps from elsewhere; its config is not read again."""
    model, folder = vllm_config.model_config, vllm_config.load_config.download_dir
    return _source(vllm_config, lambda: _downloaded_commit(model.model, model.revision, folder))


def take_over(vllm_config: Any, served: Fingerprint) -> Source | None:
    """Point vLLM to the checkpoint that the group serves; None if it is not here.

    The peers decide then whether what the command line names has the same content.
    """
    model, digest = vllm_config.model_config, served.checkpoint_digest
    if vllm_config.load_config.load_format == "dummy":
        return None
    commit = digest.removeprefix(COMMIT) if digest.startswith(COMMIT) else None
    if commit is None and (obstacle := _obstacle(served)):
        logger.warning(
            "DWDP: the group serves %s since its weights were renewed, and %s. This rank tries %s",
            served.model,
            obstacle,
            model.model,
        )
        return None
    if served.model != _place(model.model):
        logger.info(
            "DWDP: reads %s in place of %s: the weights of the group were renewed from there (%s)",
            served.model,
            model.model,
            digest[:DIGEST_CHARACTERS],
        )
    model.model, model.model_weights = served.model, ""
    model.revision = commit or _revision(served)
    return Source(model=served.model, revision=served.revision, checkpoint_digest=digest)


def follow_revision(vllm_config: Any, served: Fingerprint) -> None:
    """Once the weights are loaded, let a reload read what it reads on every other rank.

    A commit that `take_over` asked for was for this start; the revision may have a newer one.
    """
    vllm_config.model_config.revision = _revision(served)


def _revision(served: Fingerprint) -> str | None:
    return None if served.revision == str(None) else served.revision


def _obstacle(served: Fingerprint) -> str:
    """Return why the checkpoint at the place that a peer names is not the peer's; empty if it is."""
    try:
        files = weight_files(Path(served.model))
        digest = checkpoint_digest(files) if files else UNKNOWN
    except OSError as error:
        return f"it cannot be read here: {error}"
    if digest == served.checkpoint_digest:
        return ""
    if digest == UNKNOWN:
        return "there are no weights here at that place"
    here, there = digest[:DIGEST_CHARACTERS], served.checkpoint_digest[:DIGEST_CHARACTERS]
    return f"its digest is {here!r} here and {there!r} there"


def _source(vllm_config: Any, commit: Callable[[], str | None]) -> Source:
    model = vllm_config.model_config
    return Source(
        model=_place(model.model),
        revision=str(model.revision),
        checkpoint_digest=_digest(vllm_config, commit),
    )


def _place(model: str) -> str:
    """Return the name of a model as processes in other folders can use it."""
    path = Path(model)
    return str(path.resolve()) if path.exists() else model


def _digest(vllm_config: Any, commit: Callable[[], str | None]) -> str:
    """Content of a local checkpoint, or the commit that a name on a hub stands for."""
    model = vllm_config.model_config
    if vllm_config.load_config.load_format == "dummy":
        return f"dummy-{model.seed}"
    files = weight_files(Path(model.model))
    if files:
        return checkpoint_digest(files)
    found = commit()
    if found is not None:
        return f"{COMMIT}{found}"
    logger.warning(
        "DWDP: the content of %s cannot be compared between ranks (no local weight files, no commit of "
        "a hub): make sure yourself that every rank loads the same",
        model.model,
    )
    return UNKNOWN


def weight_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint folder in the format that vLLM prefers; or `path` itself."""
    if path.is_file():
        return [path]
    listed = (sorted(path.glob(pattern)) for pattern in WEIGHT_FILES)
    return next(filter(None, listed), [])


def _downloaded_commit(name: str, revision: str | None, folder: str | None) -> str | None:
    """Return the commit of a name on a hub that this host has downloaded last, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = snapshot_download(name, revision=revision, cache_dir=folder, local_files_only=True)
    except (OSError, HFValidationError):
        return None
    return Path(found).name
