"""Trust policies: which logs and which witnesses are enough to believe a checkpoint. Pure.

A policy is a text file as c2sp.org/tlog-policy has it, the format that Sigsum's tools read too::

    log example.com/log+2f6d1b0a+Ae4...
    witness A witness.example/a+5c1f2a3b+BL3... https://witness.example
    witness B other.example/b+77aa01de+BDk...
    witness C third.example/c+0c9e3f51+BNf...
    group some 2 A B C
    quorum some

Names mean something within the file alone; keys are what counts. A group is satisfied when k of its
members are, `any` is 1 and `all` is every one; members are defined on earlier lines, so groups nest
and never circle; a name is a member of at most one group, so no witness counts twice. `quorum none`
asks for no witness at all. The file is octets: names compare byte by byte, in no Unicode sense.

Where the specification leaves room: a log key is Ed25519 (0x01), a witness key an Ed25519
cosignature key (0x04), other types are refused, not skipped; a last line without newline is read.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from ledger.errors import BadSignature, MalformedProof
from ledger.verify.encoding import decode_decimal, printable
from ledger.verify.note import COSIGNATURE, ED25519, VerifierKey, parse_vkey

MAX_POLICY_BYTES = 65_536
MAX_LOGS = 64
MAX_WITNESSES = 64
MAX_GROUPS = 64
_NONE = "none"


@dataclass(frozen=True, kw_only=True)
class PolicyLog:
    """A log whose checkpoints are accepted; its origin is the key's name."""

    key: VerifierKey
    url: str | None


@dataclass(frozen=True, kw_only=True)
class PolicyWitness:
    """A witness. `name` is the file's own word for it; `url` its submission prefix."""

    name: str
    key: VerifierKey
    url: str | None


@dataclass(frozen=True, kw_only=True)
class PolicyGroup:
    """Satisfied when `threshold` of `members` (witnesses or earlier groups) are; 1 <= it <= n."""

    name: str
    threshold: int
    members: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a policy file says. `quorum` names a witness or group; None asks for no witness."""

    logs: tuple[PolicyLog, ...]
    witnesses: tuple[PolicyWitness, ...]
    groups: tuple[PolicyGroup, ...]
    quorum: str | None

    @property
    def keys(self) -> tuple[VerifierKey, ...]:
        """The witnesses' keys, for `open_checkpoint(witnesses=...)`."""
        return tuple(witness.key for witness in self.witnesses)

    def satisfied_by(self, keys: Collection[VerifierKey]) -> bool:
        """Whether cosignatures by these keys, all verified by the caller, make the quorum."""
        return self.quorum is None or self._weights(keys)[self.quorum][0]

    def shortfall(self, keys: Collection[VerifierKey]) -> str:
        """One line for people on what the quorum has and what it lacks."""
        if self.quorum is None:
            return "no witness is asked for"
        has, wants = self._weights(keys)[self.quorum][1:]
        silent = [printable(w.name) for w in self.witnesses if w.key not in keys]
        without = f"; without {', '.join(silent)}" if silent else ""
        return f"{has} of the {wants} needed in {printable(self.quorum)}{without}"

    def require(self, keys: Collection[VerifierKey]) -> None:
        """BadSignature unless `satisfied_by(keys)`."""
        if not self.satisfied_by(keys):
            raise BadSignature(
                f"the checkpoint is not witnessed as the policy demands: {self.shortfall(keys)}"
            )

    def _weights(self, keys: Collection[VerifierKey]) -> dict[str, tuple[bool, int, int]]:
        """Per name: satisfied, members that are, members needed. Definition order, no recursion."""
        found = {w.name: (w.key in keys, int(w.key in keys), 1) for w in self.witnesses}
        for group in self.groups:
            has = sum(found[member][0] for member in group.members)
            found[group.name] = (has >= group.threshold, has, group.threshold)
        return found


@dataclass(kw_only=True)
class _Draft:
    """What the lines read so far define."""

    logs: list[PolicyLog] = field(default_factory=list)
    witnesses: list[PolicyWitness] = field(default_factory=list)
    groups: list[PolicyGroup] = field(default_factory=list)
    quorums: list[str | None] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    members: set[str] = field(default_factory=set)


def parse_policy(text: str | bytes) -> Policy:
    """The policy in a file's octets (or in their text). Raises MalformedProof, naming the line."""
    draft = _Draft()
    for number, line in enumerate(_lines(text), start=1):
        words = line.replace("\t", " ").split(" ")
        words = [word for word in words if word]
        if not words or words[0].startswith("#"):
            continue
        try:
            _read_line(draft, words)
        except MalformedProof as error:
            raise MalformedProof(f"line {number} of the policy: {error.message}") from error
    if len(draft.quorums) != 1:
        raise MalformedProof(
            f"the policy has {len(draft.quorums)} quorum lines; exactly one says which witness or "
            "group is needed ('quorum none' asks for no witness)"
        )
    return Policy(
        logs=tuple(draft.logs),
        witnesses=tuple(draft.witnesses),
        groups=tuple(draft.groups),
        quorum=draft.quorums[0],
    )


def _lines(text: str | bytes) -> list[str]:
    # surrogateescape keeps every octet: names that are no UTF-8 stay distinct and comparable.
    try:
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise MalformedProof("a policy is a text file; this has no spelling in octets") from error
    if len(data) > MAX_POLICY_BYTES:
        raise MalformedProof(f"a policy has at most MAX_POLICY_BYTES = {MAX_POLICY_BYTES} bytes")
    if any((octet < 0x20 and octet not in b"\t\n") or octet == 0x7F for octet in data):
        raise MalformedProof("a policy holds no control characters but tab and line feed")
    return data.decode("utf-8", "surrogateescape").split("\n")


def _read_line(draft: _Draft, words: list[str]) -> None:
    keyword, *rest = words
    if keyword == "log" and len(rest) in (1, 2):
        _add_log(draft, *rest)
    elif keyword == "witness" and len(rest) in (2, 3):
        _add_witness(draft, *rest)
    elif keyword == "group" and len(rest) >= 3:
        _add_group(draft, rest[0], rest[1], rest[2:])
    elif keyword == "quorum" and len(rest) == 1:
        draft.quorums.append(None if rest[0] == _NONE else _defined(draft, rest[0]))
    else:
        raise MalformedProof(
            f"{printable(' '.join(words))!r} is none of 'log <vkey> [<url>]', 'witness <name> "
            "<vkey> [<url>]', 'group <name> <k>|any|all <member>...', 'quorum <name>|none'"
        )


def _add_log(draft: _Draft, vkey: str, url: str | None = None) -> None:
    key = _key(vkey, ED25519, "a log key is of type 0x01 (Ed25519)")
    _check_new(key, [log.key for log in draft.logs], "log")
    _check_room(draft.logs, "MAX_LOGS", MAX_LOGS)
    draft.logs.append(PolicyLog(key=key, url=url))


def _add_witness(draft: _Draft, name: str, vkey: str, url: str | None = None) -> None:
    key = _key(vkey, COSIGNATURE, "a witness key is of type 0x04 (Ed25519 cosignature)")
    _check_new(key, [witness.key for witness in draft.witnesses], "witness")
    _check_room(draft.witnesses, "MAX_WITNESSES", MAX_WITNESSES)
    _define(draft, name)
    draft.witnesses.append(PolicyWitness(name=name, key=key, url=url))


def _add_group(draft: _Draft, name: str, k: str, members: list[str]) -> None:
    for member in members:
        if _defined(draft, member) in draft.members:
            raise MalformedProof(
                f"{printable(member)!r} is a member twice; each name counts in one group, once"
            )
        draft.members.add(member)
    count = len(members)
    threshold = {"any": 1, "all": count}.get(k) or decode_decimal(k, "the group's threshold")
    if not 1 <= threshold <= count:
        raise MalformedProof(
            f"a threshold of {threshold} among {count} members; 1 to n is possible"
        )
    _check_room(draft.groups, "MAX_GROUPS", MAX_GROUPS)
    _define(draft, name)
    draft.groups.append(PolicyGroup(name=name, threshold=threshold, members=tuple(members)))


def _key(vkey: str, type: int, expected: str) -> VerifierKey:
    key = parse_vkey(vkey)
    if key.type != type:
        raise MalformedProof(
            f"the key {printable(key.name)} is of type 0x{key.type:02x}; {expected}"
        )
    return key


def _check_new(key: VerifierKey, known: list[VerifierKey], kind: str) -> None:
    """Two vkeys around one public key are one party under two names: it would count twice."""
    if any(other.public_key == key.public_key for other in known):
        raise MalformedProof(f"the public key of {printable(key.name)} stands on two {kind} lines")


def _check_room(found: Collection[object], name: str, limit: int) -> None:
    if len(found) >= limit:
        raise MalformedProof(f"a policy has at most {name} = {limit} of these lines")


def _define(draft: _Draft, name: str) -> None:
    if name == _NONE or name in draft.names:
        raise MalformedProof(f"the name {printable(name)!r} is taken")
    draft.names.add(name)


def _defined(draft: _Draft, name: str) -> str:
    if name not in draft.names:
        raise MalformedProof(
            f"{printable(name)!r} is no witness or group defined on an earlier line"
        )
    return name
