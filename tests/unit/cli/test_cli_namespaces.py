"""Which namespace is meant on a command line: by its name, or by the first digits of its digest."""

from __future__ import annotations

import pytest

from kvstore.cli.namespaces import listed, named_namespace
from kvstore.errors import InvalidArgument
from kvstore.protocol.statistics import NamespaceStats


def namespace(name: str, digest: str, model: str = "") -> NamespaceStats:
    return NamespaceStats(name=name, generation=0, blocks=0, slot_bytes=0, model=model, codec="raw", digest=digest)


KNOWN = [
    namespace("chat", "abcd1234"),
    namespace("batch", "abcd5678"),
    namespace("0badcafe", "11112222"),
    namespace("cafe", "0badcafe"),
    namespace("default", "33334444", model="lab/tiny"),
    namespace("twin", "55556666"),
    namespace("twin", "77778888"),
]


@pytest.mark.parametrize(
    ("given", "digest"),
    [
        ("chat", "abcd1234"),
        ("abcd1", "abcd1234"),
        ("ABCD5", "abcd5678"),
        ("1111", "11112222"),
        ("abcd1234", "abcd1234"),
        # A name wins over a digest.
        ("0badcafe", "11112222"),
        ("0badcaf", "0badcafe"),
        ("tiny raw", "33334444"),
        # What the statistics do not have is left to the daemon, which has it.
        ("abcd12345", "abcd12345"),
        ("abcd1234" + "0" * 56, "abcd1234" + "0" * 56),
    ],
)
def test_a_name_or_a_beginning_of_a_digest_is_one_namespace(given: str, digest: str) -> None:
    assert named_namespace(KNOWN, given).digest == digest


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("abcd", r"2 namespaces have a digest that begins with abcd: chat \(abcd1234\), batch \(abcd5678\)$"),
        ("twin", r"2 namespaces are called 'twin': .* twin \(55556666\), twin \(77778888\)$"),
        ("abc", "knows no namespace 'abc'; there are: chat"),
        ("abcd99", "knows no namespace 'abcd99'"),
        ("abcd1234x", "knows no namespace 'abcd1234x'"),
        ("abcd1234" + "0" * 57, "knows no namespace"),
    ],
)
def test_what_is_none_or_several_is_refused_with_those_there_are(given: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        named_namespace(KNOWN, given)


def test_no_namespaces_are_listed_as_none() -> None:
    assert listed([]) == "none"
