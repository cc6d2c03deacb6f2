"""Directories of JSON and safetensors: unit LMs, speech encoders, k-means, prompt packs and banks of packs."""

from __future__ import annotations

from spjax.io.banks import load_bank, load_packs, save_bank, split_bank
from spjax.io.encoders import read_encoder, save_encoder
from spjax.io.files import StorageError
from spjax.io.kmeans_store import KMeans, load_kmeans, save_kmeans
from spjax.io.pack_card import PackCard, make_card
from spjax.io.packs import PromptPack, check_pack, load_pack, save_pack
from spjax.io.unit_lms import read_unit_lm, save_unit_lm, unit_lm_hash

__all__ = [
    "KMeans",
    "PackCard",
    "PromptPack",
    "StorageError",
    "check_pack",
    "load_bank",
    "load_kmeans",
    "load_pack",
    "load_packs",
    "make_card",
    "read_encoder",
    "read_unit_lm",
    "save_bank",
    "save_encoder",
    "save_kmeans",
    "save_pack",
    "save_unit_lm",
    "split_bank",
    "unit_lm_hash",
]
