"""Where compiled programs are kept for the next process."""

from __future__ import annotations

import os
import warnings

import jax

from spjax import paths


def keep_programs(directory: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a directory, for this process and those to come; one that cannot be written warns.

    Raises:
      ValueError: it is a URL, as `paths.given`.
    """
    place = paths.given(directory)
    try:
        paths.to_write(place)
    except OSError as error:
        warnings.warn(f"compiled programs are not kept: {error}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
