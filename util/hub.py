"""Files from the hub, hf://[datasets/]OWNER/REPO[@REVISION][/PATH], through huggingface_hub's own cache."""

from pathlib import Path


def is_on_hub(name):
    """Whether a name is one of the hub's, not a path."""
    return str(name).startswith("hf://")


def parse(name, kind):
    """The parts of a name: `id`, `revision`, `path_in_repo`. Raises ValueError: not of a repository of that
    kind, `model` or `dataset`."""
    from huggingface_hub import parse_hf_uri  # a fifth of a second that paths need not pay

    uri = parse_hf_uri(str(name))
    if uri.type != kind:
        raise ValueError(f"{name} is a {uri.type}, files are read from {kind} repositories here")
    return uri


def fetch(name, uri, patterns, revision=None):
    """The local folder of a repository with the files that match, fetched unless they are cached. Raises
    FileNotFoundError, which names what was asked for."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(
            uri.id, repo_type=uri.type, revision=revision or uri.revision, allow_patterns=patterns
        ))
    except Exception as error:  # of the cache, the network or the server: there is no common type
        reason = " ".join(str(error).split())[:160]
        remedy = "; scripts/fetch.py fetches weights on a machine with a network" * (uri.type == "model")
        problem = f"{name} is not in the hub's cache and cannot be fetched ({reason}){remedy}"
        raise FileNotFoundError(problem) from error
