"""Bundled data is small, licensed and described."""

import pytest

from jaxllm.data.images import bundled
from jaxllm.data.provenance import describe, names, provenance, verify
from jaxllm.errors import InputError


def test_every_folder_has_a_licence_and_lists_all_of_its_files():
    assert names() == [
        "fashion_mnist_sprite",
        "gdpo_option_map",
        "pandalm",
        "quickdraw3",
        "stories260K",
        "text",
        "vader_reviews",
    ]
    for name in names():
        files = {p.name for p in bundled(name).iterdir()} - {"PROVENANCE.txt"}
        listed = provenance(bundled(name))
        assert set(listed) == files
        assert any(file.startswith("LICENSE") for file in listed)
        assert all(len(row["sha256"]) == 64 and row["source"] for row in listed.values())
        assert verify(name) == len(files)


def test_bundled_data_is_under_12_megabytes():
    sizes = [p.stat().st_size for p in bundled().rglob("*") if p.is_file()]
    assert 3_000_000 < sum(sizes) < 12_000_000


def test_describe_names_source_licences_and_bytes():
    found = describe("fashion_mnist_sprite")
    assert found == {
        "name": "fashion_mnist_sprite",
        "files": 2,
        "bytes": 790450 + 1109,
        "licences": ["LICENSE.txt"],
        "source": ["zalandoresearch/fashion-mnist@b2617bb6d3ff"],
    }
    for function in (describe, verify):
        with pytest.raises(InputError, match="data set '../text' is not one of fashion_mnist"):
            function("../text")
