"""Import files of other projects: fairseq, Hugging Face, scikit-learn (`python -m spjax.convert`)."""

from __future__ import annotations


def why(error: Exception) -> str:
    """An error's text, without the path that the message names already."""
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


class ConvertError(ValueError):
    """A file cannot be imported; the message names the file, the problem and what to do."""
