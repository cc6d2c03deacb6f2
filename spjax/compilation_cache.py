"""JAX's persistent compilation cache."""

from __future__ import annotations

import os
import warnings

import jax

from spjax import paths


def keep_programs(directory: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a directory, for this and later processes; warn if it is not writable.

    Raises:
      ValueError: it is a URL, see `paths.given`.
    """
    place = paths.given(directory)
    try:
        paths.to_write(place)
    except OSError as error:
        warnings.warn(f"compiled programs are not kept: {error}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
