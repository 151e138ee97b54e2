"""Policies (c2sp.org/tlog-policy): what is read, what is refused, and who makes a quorum."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from ledger.errors import BadSignature, MalformedProof, VerificationError
from ledger.verify.note import COSIGNATURE, ED25519, VerifierKey, format_vkey, vkey_of
from ledger.verify.policy import MAX_GROUPS, MAX_LOGS, MAX_POLICY_BYTES, MAX_WITNESSES, parse_policy


def key(n: int, type: int = COSIGNATURE, name: str | None = None) -> VerifierKey:
    return vkey_of(name or f"w{n}.example", SigningKey(n.to_bytes(32, "big")), type)


def vkey(n: int, type: int = COSIGNATURE, name: str | None = None) -> str:
    return format_vkey(key(n, type, name))


LOG = vkey(100, ED25519, "log.example")
SIX = "".join(f"witness {'XY'[n // 3]}{n % 3 + 1} {vkey(n)}\n" for n in range(6))
TWO_LEVELS = (
    f"log {LOG}\n\n{SIX}group X-witnesses 2 X1 X2 X3\n"
    "group Y-witnesses any Y1 Y2 Y3\ngroup X-and-Y all X-witnesses Y-witnesses\nquorum X-and-Y\n"
)


def test_the_example_of_the_specification() -> None:
    policy = parse_policy(TWO_LEVELS)
    assert [log.key.name for log in policy.logs] == ["log.example"]
    first = policy.witnesses[0]
    assert (first.name, first.key, first.url) == ("X1", key(0), None)
    assert [(g.name, g.threshold) for g in policy.groups] == [
        ("X-witnesses", 2), ("Y-witnesses", 1), ("X-and-Y", 2)
    ]  # fmt: skip
    assert policy.keys == tuple(key(n) for n in range(6))


def test_every_subset_of_the_example_counts_as_the_rule_says() -> None:
    policy = parse_policy(TWO_LEVELS)
    for count in range(7):
        for chosen in combinations(range(6), count):
            expected = sum(n < 3 for n in chosen) >= 2 and any(n >= 3 for n in chosen)
            assert policy.satisfied_by([key(n) for n in chosen]) is expected, chosen


@pytest.mark.parametrize(("k", "needed"), [("any", 1), ("all", 3), ("1", 1), ("2", 2), ("3", 3)])
def test_thresholds(k: str, needed: int) -> None:
    lines = "".join(f"witness w{n} {vkey(n)}\n" for n in range(3))
    policy = parse_policy(f"{lines}group g {k} w0 w1 w2\nquorum g\n")
    for count in range(4):
        assert policy.satisfied_by({key(n) for n in range(count)}) is (count >= needed)


def test_a_single_witness_none_and_strangers() -> None:
    one = parse_policy(f"witness a {vkey(1)}\nquorum a")
    assert one.satisfied_by([key(1)])
    assert not one.satisfied_by([])
    # The same public key under another name or type is not what the policy names.
    assert not one.satisfied_by([key(1, ED25519), key(1, name="other.example"), key(2)])
    nobody = parse_policy("quorum none\n")
    assert nobody.satisfied_by([])
    assert (nobody.logs, nobody.witnesses, nobody.quorum) == ((), (), None)


def test_what_is_missing_is_said() -> None:
    policy = parse_policy(TWO_LEVELS)
    policy.require([key(0), key(1), key(5)])
    with pytest.raises(BadSignature, match="1 of the 2 needed in X-and-Y; without X2, X3, Y2, Y3"):
        policy.require([key(0), key(3)])


def test_spaces_tabs_comments_and_urls() -> None:
    policy = parse_policy(
        f"# a comment\n \t # another\n\n\tlog\t{LOG}  https://log.example/ \n"
        f"  witness  a\t{vkey(1)} https://w.example/one\nquorum a\n"
    )
    assert policy.logs[0].url == "https://log.example/"
    assert policy.witnesses[0].url == "https://w.example/one"


def test_names_are_octets() -> None:
    """ASCII K and the Kelvin sign are two names, and octets that are no UTF-8 are names too."""
    lines = f"witness K {vkey(1)}\nwitness \u212a {vkey(2)}\n".encode()
    lines += b"witness \xff " + vkey(3).encode() + b"\nwitness \xfe " + vkey(4).encode()
    policy = parse_policy(lines + b"\ngroup g all K \xe2\x84\xaa \xff \xfe\nquorum \xff\n")
    assert len({w.name for w in policy.witnesses}) == 4
    assert policy.satisfied_by([key(3)])
    assert not policy.satisfied_by([key(4)])
    assert "\udcff" not in policy.shortfall([])


BAD = {
    "no quorum": f"witness a {vkey(1)}\n",
    "two quorums": f"witness a {vkey(1)}\nquorum a\nquorum none\n",
    "unknown word": "party a\nquorum none\n",
    "upper case": "Quorum none\n",
    "log without key": "log\nquorum none\n",
    "log with three": f"log {LOG} url more\nquorum none\n",
    "witness without name": f"witness {vkey(1)}\nquorum none\n",
    "log of a witness key": f"log {vkey(1)}\nquorum none\n",
    "witness of a log key": f"witness a {LOG}\nquorum a\n",
    "broken key": f"witness a {vkey(1)[:-2]}\nquorum a\n",
    "another key's id": f"witness a w1.example+00000000+{vkey(1).split('+', 2)[2]}\nquorum a\n",
    "log twice": f"log {LOG}\nlog {LOG}\nquorum none\n",
    "log twice by another name": f"log {LOG}\nlog {vkey(100, ED25519, 'x')}\nquorum none\n",
    "witness twice": f"witness a {vkey(1)}\nwitness b {vkey(1)}\nquorum a\n",
    "witness twice by key name": f"witness a {vkey(1)}\nwitness b {vkey(1, name='x')}\nquorum a\n",
    "name twice": f"witness a {vkey(1)}\nwitness a {vkey(2)}\nquorum a\n",
    "group by a witness's name": f"witness a {vkey(1)}\ngroup a any a\nquorum a\n",
    "the name none": f"witness none {vkey(1)}\nquorum none\n",
    "none in a group": f"witness a {vkey(1)}\ngroup g any none\nquorum g\n",
    "group of nobody": f"witness a {vkey(1)}\ngroup g any\nquorum a\n",
    "quorum before": f"quorum a\nwitness a {vkey(1)}\n",
    "member before": f"group g any a\nwitness a {vkey(1)}\nquorum g\n",
    "its own member": f"witness a {vkey(1)}\ngroup g any a g\nquorum g\n",
    "member twice": f"witness a {vkey(1)}\ngroup g any a a\nquorum g\n",
    "member of two": f"witness a {vkey(1)}\ngroup g any a\ngroup h any a\nquorum h\n",
    "threshold 0": f"witness a {vkey(1)}\ngroup g 0 a\nquorum g\n",
    "threshold above": f"witness a {vkey(1)}\ngroup g 2 a\nquorum g\n",
    "threshold 01": f"witness a {vkey(1)}\ngroup g 01 a\nquorum g\n",
    "threshold of other digits": f"witness a {vkey(1)}\ngroup g \u0661 a\nquorum g\n",
    "carriage return": "quorum none\r\n",
    "delete": "quorum none\x7f\n",
    "zero byte": "quorum none\n\0",
    "no-break space": f"witness a {vkey(1)}\nquorum\u00a0a\n",
    "lone surrogate": "# \ud800\nquorum none\n",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_refused(text: str) -> None:
    with pytest.raises(MalformedProof):
        parse_policy(text)


def test_limits() -> None:
    def many(line: str, count: int) -> str:
        return "".join(line.format(n=n) for n in range(count)) + "quorum none\n"

    def logs(count: int) -> str:
        return "".join(f"log {vkey(n, ED25519)}\n" for n in range(count)) + "quorum none\n"

    def witnesses(count: int) -> str:
        return "".join(f"witness w{n} {vkey(n)}\n" for n in range(count))

    assert len(parse_policy(logs(MAX_LOGS)).logs) == MAX_LOGS
    with pytest.raises(MalformedProof, match="MAX_LOGS"):
        parse_policy(logs(MAX_LOGS + 1))
    full = witnesses(MAX_WITNESSES) + "quorum none\n"
    assert len(parse_policy(full).witnesses) == MAX_WITNESSES
    with pytest.raises(MalformedProof, match="MAX_WITNESSES"):
        parse_policy(witnesses(MAX_WITNESSES + 1) + "quorum none\n")
    chain = witnesses(1) + "group g0 any w0\n" + "".join(
        f"group g{n} any g{n - 1}\n" for n in range(1, MAX_GROUPS)
    )  # fmt: skip
    assert parse_policy(f"{chain}quorum g{MAX_GROUPS - 1}\n").satisfied_by([key(0)])
    with pytest.raises(MalformedProof, match="MAX_GROUPS"):
        parse_policy(f"{chain}group more any g{MAX_GROUPS - 1}\nquorum more\n")
    with pytest.raises(MalformedProof, match="MAX_POLICY_BYTES"):
        parse_policy("#" * MAX_POLICY_BYTES + "\nquorum none\n")


def test_a_refusal_names_the_line_and_no_control_character() -> None:
    with pytest.raises(MalformedProof, match="line 2 of the policy") as caught:
        parse_policy("# first\nnonsense \u202e\u0085\nquorum none\n")
    assert str(caught.value).isprintable()


WORDS = st.sampled_from(
    ["log", "witness", "group", "quorum", "none", "any", "all", "1", "2", "a", "b", "g", "#", "\n",
     "\n", "\t", LOG, vkey(1), vkey(2), "https://x"]
)  # fmt: skip


@given(st.one_of(st.binary(max_size=300), st.text(max_size=100),
                 st.lists(WORDS, max_size=40).map(" ".join)))  # fmt: skip
def test_hostile_text_is_a_policy_or_a_verification_error(text: str | bytes) -> None:
    try:
        policy = parse_policy(text)
    except VerificationError:
        return
    assert policy.satisfied_by(policy.keys)
    assert policy.shortfall([]).isprintable()
