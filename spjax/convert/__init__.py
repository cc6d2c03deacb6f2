"""Other people's files into ours: fairseq checkpoints into unit LMs and prompt packs (`python -m spjax.convert`)."""

from __future__ import annotations


class ConvertError(ValueError):
    """A file cannot be imported; the message names the file, what is wrong in it and the way out."""
