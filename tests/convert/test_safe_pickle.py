"""The pickle interpreter reads data and runs nothing, whatever the bytes."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copyreg
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spjax.convert import ConvertError
from spjax.convert.safe_pickle import Global, Inert, PickledArray, read_pickle, shown

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9) | st.binary(max_size=9)
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=15,
)


class Attack:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@given(tree=trees, protocol=st.sampled_from(PROTOCOLS))
def test_plain_data_is_read_as_pickle_reads_it(tree, protocol):
    assert read_pickle(pickle.dumps(tree, protocol)) == tree


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(ConvertError):
        read_pickle(data)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_pickle_is_read_or_refused(data):
    attack = Attack(os.system, "true")
    tree = {"a": [1, "x", (2.5, attack)], "n": argparse.Namespace(b=3), "m": np.arange(3.0), "o": [attack] * 2}
    content = bytearray(pickle.dumps(tree, data.draw(st.sampled_from(PROTOCOLS))))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ConvertError):
        read_pickle(bytes(content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_calls_are_recorded_and_never_made(protocol, tmp_path: Path):
    trace = tmp_path / "ran"
    attacks = [
        Attack(os.system, f"touch {trace}"),
        Attack(eval, f"open({str(trace)!r}, 'w')"),
        Attack(exec, f"open({str(trace)!r}, 'w')"),
        Attack(getattr, Attack(__import__, "os"), "system"),
        Attack(os.mkdir, str(trace)),
    ]
    found = read_pickle(pickle.dumps(attacks, protocol))
    assert not trace.exists()
    assert [value.name for value in found] == [
        f"{os.system.__module__}.system",
        "builtins.eval",
        "builtins.exec",
        "builtins.getattr",
        f"{os.mkdir.__module__}.mkdir",
    ]
    assert found[0].args == (f"touch {trace}",)


def test_calling_what_a_call_returned_stays_inert():
    # getattr(os, "system")("true"), in opcodes
    found = read_pickle(b"cbuiltins\ngetattr\n(cos\nos\nX\x06\x00\x00\x00systemtR(X\x04\x00\x00\x00truetR.")
    assert isinstance(found, Inert)
    assert found.name == "builtins.getattr(...)"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_instance_keeps_its_state(protocol):
    found = read_pickle(pickle.dumps(argparse.Namespace(layers=3, names=["a"]), protocol))
    assert isinstance(found, Inert)
    assert (found.name, found.state) == ("argparse.Namespace", {"layers": 3, "names": ["a"]})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_of_other_classes(protocol):
    ordered = collections.OrderedDict(b=1, a=2)
    listing = collections.defaultdict(list, x=[1])
    found = read_pickle(pickle.dumps([ordered, listing, collections.OrderedDict], protocol))
    assert list(found[0].items()) == [("b", 1), ("a", 2)]
    assert found[1].name == "collections.defaultdict"
    assert found[1].items == [("x", [1])]
    assert found[2] == Global("collections.OrderedDict")


@pytest.mark.parametrize("protocol", range(5))  # 5 keeps arrays outside the pickle if asked to
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">f4"),
        np.zeros((0, 4), np.float16),
    ],
    ids=["int64", "fortran", "big-endian", "empty"],
)
def test_numpy_arrays_are_read_from_their_bytes(array, protocol):
    found = read_pickle(pickle.dumps({"x": array, "n": np.float64(2.5)}, protocol))
    assert isinstance(found["x"], PickledArray)
    np.testing.assert_array_equal(found["x"].numpy(), array)
    assert found["x"].numpy().dtype == array.dtype
    assert found["n"] == 2.5


def test_arrays_of_objects_are_refused():
    with pytest.raises(ConvertError, match="numbers"):
        read_pickle(pickle.dumps(np.array([Attack(os.system, "true")], dtype=object), 2))


def test_extension_codes_are_refused():
    # A code registered in this process would resolve to its function without a name in the file.
    copyreg.add_extension("genericpath", "exists", 241)
    try:
        content = pickle.dumps(os.path.exists, 2)
        assert b"\x82\xf1" in content
        with pytest.raises(ConvertError, match="EXT1"):
            read_pickle(content)
    finally:
        copyreg.remove_extension("genericpath", "exists", 241)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or truncated"),
        (b"hello", "damaged or truncated"),
        (b"\x80\x02]q\x00", "truncated"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "truncated"),
        (b"0.", "takes more from the stack than it put there"),
        (b"(0.", "more from the stack than it put there"),
        (b"h\x07.", "damaged"),
        (b"\x80\x02K\x01Q.", "outside itself"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zliptR.", "latin1"),
    ],
)
def test_broken_pickles_are_refused(content, message):
    with pytest.raises(ConvertError, match=message):
        read_pickle(content)


def test_arrays_with_a_bad_shape_are_refused():
    # (2**30, [0]): multiplying would repeat the list a thousand million times.
    state = b"(K\x01(J\0\0\0\x40](K\0etcnumpy\ndtype\n(X\x02\0\0\0f4\x89\x88tR\x89X\0\0\0\0tb."
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tX\x01\0\0\0btR"
    with pytest.raises(ConvertError, match="numpy array"):
        read_pickle(head + state)
    with pytest.raises(ConvertError, match="numpy array of shape"):
        read_pickle(head + state.replace(b"X\0\0\0\0tb", b"C\0tb"))


@pytest.mark.parametrize("value", [0, "a" * 999, b"x", (1, (2,)), tuple(range(99)), [[]], 1 << 9999, Inert("a" * 999)])
def test_values_are_shown_in_short(value):
    assert 0 < len(shown(value)) < 120


def test_a_recursive_value_is_shown():
    laughs = ["ha"]
    for _ in range(100):
        laughs = [laughs, laughs]
    assert shown(laughs) == "a list"
    nested = ()
    for _ in range(100_000):
        nested = (nested,)
    assert shown((nested, 1)) == "(..., 1)"


def test_nested_keys_are_refused():
    # Hashing this tuple would overflow the C stack.
    content = b"})" + b"\x85" * 5_000 + b"K\x01s."
    with pytest.raises(ConvertError, match="key of type tuple"):
        read_pickle(content)


def test_a_call_repeated_on_one_string_does_not_fill_the_memory():
    text = "x" * 1_000_000
    opened = pickle.PROTO + b"\x02" + pickle.MARK
    first = b"c_codecs\nencode\n" + b"q\x00" + b"X" + len(text).to_bytes(4, "little") + text.encode() + b"q\x01"
    first += b"X\x06\x00\x00\x00latin1" + b"q\x02" + b"\x86R"
    again = b"h\x00h\x01h\x02\x86R"
    assert read_pickle(opened + first + b"l.") == [text.encode()]
    with pytest.raises(ConvertError, match="creates far more data than it holds"):
        read_pickle(opened + first + 50 * again + b"l.")
