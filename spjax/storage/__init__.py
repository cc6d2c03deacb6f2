"""What is kept on disk: unit LMs, HuBERTs, k-means and prompt packs: directories of JSON and safetensors files."""

from __future__ import annotations

from spjax.storage.files import StorageError
from spjax.storage.huberts import load_hubert, save_hubert
from spjax.storage.kmeans_store import KMeans, load_kmeans, save_kmeans
from spjax.storage.packs import PackCard, PromptPack, check_pack, load_pack, make_card, save_pack
from spjax.storage.unit_lms import read_unit_lm, save_unit_lm, unit_lm_hash

__all__ = [
    "KMeans",
    "PackCard",
    "PromptPack",
    "StorageError",
    "check_pack",
    "load_hubert",
    "load_kmeans",
    "load_pack",
    "make_card",
    "read_unit_lm",
    "save_hubert",
    "save_kmeans",
    "save_pack",
    "save_unit_lm",
    "unit_lm_hash",
]
