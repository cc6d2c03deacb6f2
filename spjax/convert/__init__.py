"""Other people's files into ours: fairseq checkpoints into unit LMs and prompt packs (`python -m spjax.convert`)."""

from __future__ import annotations


def why(error: Exception) -> str:
    """What an error says, without the path that the message names anyhow."""
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


class ConvertError(ValueError):
    """A file cannot be imported; the message names the file, what is wrong in it and the way out."""
