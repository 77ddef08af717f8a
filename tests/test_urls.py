"""Addresses in names and texts: what is one, and what is not shown of it."""

from __future__ import annotations

import pytest

from fastinterp.errors import UsageError
from fastinterp.recipe.references import ModelRef
from fastinterp.urls import full, is_url, mistyped, public

SIGNED = "https://h/m.safetensors?X-Amz-Algorithm=A&X-Amz-Credential=AKIA%2Fus&X-Amz-Signature=5ec4e7"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("s3://bucket/a", "s3://bucket/a"),
        ("S3://bucket/A", "s3://bucket/A"),
        ("https://me:5ec4e7@h:81/a", "https://h:81/a"),
        ("https://5ec4e7@h/a", "https://h/a"),
        (SIGNED, "https://h/m.safetensors"),
        ("https://h/m?versionId=3&sig=5ec4e7", "https://h/m?versionId=3"),
        ("s3://b/k?versionId=7", "s3://b/k?versionId=7"),
        ("sftp://me@h/a", "sftp://me@h/a"),
        ("sftp://me:5ec4e7@h/a", "sftp://h/a"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("github://org:repo@main/a", "github://org:repo@main/a"),
        ("s3://b/run/checkpoint-?", "s3://b/run/checkpoint-?"),
        ("zip://a.safetensors::https://me:5ec4e7@h/x.zip", "zip://a.safetensors::https://h/x.zip"),
        ("simplecache::s3://b/a", "simplecache::s3://b/a"),
        ("http://me:5ec4e7@[::1]:81/a?token=5ec4e7", "http://[::1]:81/a"),
        ("models/a", "models/a"),
    ],
)
def test_what_is_shown(given, shown):
    assert public(given) == shown
    assert full(shown) == given.replace("S3:", "s3:")
    assert public(shown) == shown


def test_in_texts():
    """In YAML, as a list, with adapters behind, and a scale."""
    text = (
        f"models: [{SIGNED}, 'https://me:5ec4e7@h/b', \"s3://b/a+https://x:5ec4e7@h/l:0.5\"]\n# https://h/?sig=5ec4e7\n"
    )
    shown = public(text)
    assert "5ec4e7" not in shown and "AKIA" not in shown
    assert shown.startswith(
        "models: [https://h/m.safetensors, 'https://h/b', \"s3://b/a+https://h/l:0.5\"]\n# https://h/"
    )


def test_addresses_that_only_differ_in_what_is_not_shown():
    """Of two signatures the newer counts; of other parameters nobody can tell."""
    public("https://h2/m?sig=old")
    public("https://h2/m?sig=new")
    assert full("https://h2/m") == "https://h2/m?sig=new"
    with pytest.raises(UsageError, match="https://h2/m differ only in parameters that are not kept"):
        public("https://h2/m?model=other")


def test_models():
    """An `@` belongs to the address; a `+` begins an adapter."""
    ref = ModelRef.of("s3://bucket/a@1+s3://bucket/lora:0.5+local")
    assert (ref.path, ref.revision) == ("s3://bucket/a@1", None)
    assert [(a.path, a.scale) for a in ref.adapters] == [("s3://bucket/lora", 0.5), ("local", 1.0)]
    assert str(ref) == "s3://bucket/a@1+s3://bucket/lora:0.5+local"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("s3:/b/a", "s3://b/a"), ("s3//b/a", "s3://b/a"), ("S3:/b", "s3://b"), ("gs:b/a", "gs://b/a"), ("https:/h/a", "https://h/a"),
     ("file:/data/a", "file:///data/a")],
)  # fmt: skip
def test_mistyped(name, meant):
    assert not is_url(name)
    assert mistyped(name) == f" Did you mean `{meant}`?"


@pytest.mark.parametrize("name", ["models/a", "s3", "a:b", "org/name", "/s3/x", "c:\\x", "s3://b/a"])
def test_not_mistyped(name):
    assert mistyped(name) == ""
